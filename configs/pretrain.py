"""Pre-training on detection, grounding and image-text data: one recipe in three sizes.

nano: the built-in data, `symbols`, on two CPU cores. 673 steps, about twelve minutes. Fixed AP 0.31
on 500 unseen scenes: 0.33 for names with boxes, 0.26 for names known from captions alone (mean of
two seeds, docs/results/captions/README.md); 0.60 and 0.46 after three epochs
(docs/results/three_epochs/README.md). `./scripts/quickstart.sh` installs, then runs:

    detclip prepare symbols --to=data/symbols
    detclip train --config=configs/pretrain.py:nano --workdir=runs/quickstart

swin_t (the default) and swin_l: the paper's recipe on Objects365, GoldG and CC15M, 12 epochs, about
159,000 steps. The paper reports 40.4 and 44.7 fixed AP on LVIS minival; this code has not been
trained at these sizes yet. The sources are prepared under `data/` first (docs/data.md), and the
pretrained towers, three files, are downloaded into `weights/` (docs/weights.md):

    detclip train --config=configs/pretrain.py:swin_t --workdir=runs/swin_t
    detclip train --config=configs/pretrain.py:swin_l --workdir=runs/swin_l

ImageNet-1k as a fourth kind of data [paper, appendix C: AP 28.6 to 30.4, rare names 24.2 to 32.2
with Objects365 alone; 40.4 to 40.6, rare 36.0 to 38.2 with all data; nothing for Swin-L] is off.
`detclip prepare imagenet` prepares it; its sizes are set here, so it is turned on by its source:

    detclip train --config=configs/pretrain.py:swin_t --workdir=runs/swin_t_imagenet \\
        --config.data.classification.sources="('imagenet',)"

swin_t,scratch and swin_l,scratch [ours] train without pretrained towers, with what random towers
need instead (docs/paper_vs_ours.md). The paper does not do this; expect a lower AP. nano is always
trained from scratch.

A comment [paper] marks a value of the paper (Yao et al. 2023, §4.1), [ours] a choice where it is
silent. Values that are not set here are defaults; docs/paper_vs_ours.md lists all of them.
"""

from ml_collections import ConfigDict

from detclipv2_jax.common import config_dict
from detclipv2_jax.models import sizes
from detclipv2_jax.training import config as config_lib
from detclipv2_jax.training import recipes

SIZES = ("swin_t", "swin_l", "nano")


def get_config(size: str = "swin_t") -> ConfigDict:
    """Return the recipe at a size: 'swin_t', 'swin_l' or 'nano'; ',scratch' may follow."""
    size, from_scratch = recipes.size_and_start("pretrain", size, SIZES)
    config = {"swin_t": swin_t, "swin_l": swin_l, "nano": nano}[size]()
    if from_scratch:
        recipes.start_from_scratch(config)
    return config


def swin_t() -> ConfigDict:
    """Swin-T: images with boxes at 1333×800 in batches of 128, pairs at 320×320 in batches of 6144.

    These sizes, epochs, learning rate and concepts per image are the paper's; most are defaults.
    """
    config = ConfigDict(config_dict.to_dict(config_lib.RunConfig(model=sizes.SWIN_T)))
    config.init.backbone = "weights/swin_tiny_patch4_window7_224.pth"  # ImageNet's [paper]
    config.init.text = "weights/ViT-B-32.pt"  # OpenAI's CLIP; FILIP's is not published [ours]
    data = config.data
    data.prepare = (
        "detclip prepare objects365|goldg|conceptual_captions --from=DIR "
        "--to=data/NAME for the names objects365, goldg and cc15m, then "
        "detclip prepare concepts --from=data --to=data/concepts (docs/data.md)"
    )
    data.dictionary = "concepts"
    for kind in (data.detection, data.grounding):
        # Short sides 480 to 800 [paper: multi-scale; ours: the range]. All images of a step are
        # near one of three sizes, so that little of a canvas is padding. Photos of 4:3 and 3:2 have
        # the paper's resolution, 1333×800; wider ones are up to 9 % smaller [ours].
        kind.shapes = ((800, 1216), (1216, 800))
        kind.rungs = (0.72, 0.84, 1.0)
        kind.scales = (0.834, 1.0)
    data.detection.sources = ("objects365",)
    # Names are asked bare, and with definitions: a quarter of a step's names is bare [ours].
    data.detection.definitions_drop = 0.25
    data.detection.table_size = 384  # Objects365 has 365 names [ours: static shape]
    data.grounding.sources = ("goldg",)
    data.grounding.concepts_per_image = 100  # [paper]
    # Together 128 images want about 8,600 of the dictionary's 14,000 [paper: all are pooled]. With
    # 2,048 rows the run would cost 9 % less (docs/performance_data.md).
    data.grounding.table_size = 8704
    data.grounding.labels_per_box = 3  # phrases of a caption that name the same box [ours]
    data.image_text.sources = ("cc15m",)
    data.image_text.batch_size = 6144  # [paper]
    data.image_text.shapes = ((320, 320),)  # [paper]
    data.image_text.table_size = 6144 * 4  # a caption and three phrases of its own each [ours]
    data.image_text.max_boxes = 0
    data.image_text.concepts_per_image = 0  # scored against the captions' concepts only
    data.image_text.texts_per_image = 8  # the caption and up to seven phrases [ours]
    data.image_text.scales = (0.8, 1.4)  # [ours]
    data.image_text.crop = True  # [ours]
    # ImageNet-1k, without sources: off. Batch and resolution are those of image-text data [paper].
    data.classification.batch_size = 6144  # [paper]
    data.classification.repeat = 3  # [paper]
    data.classification.shapes = ((320, 320),)  # [paper]
    data.classification.table_size = 1024  # 1,000 names [ours: static shape]
    data.classification.scales = (0.8, 1.4)  # [ours]
    data.classification.crop = True  # [ours]
    config.eval.dataset = "lvis/lvis_v1_minival.json"
    config.eval.images = "lvis"
    config.train.eval_every = 13_288  # steps; one epoch
    return config


def swin_l() -> ConfigDict:
    """Swin-L: detection and grounding in batches of 256; the paper uses 64 GPUs."""
    config = swin_t()
    config.model = ConfigDict(sizes.SWIN_L.to_dict())
    # Window 12, as the model's; ImageNet-22k at 384 pixels [inferred: what detectors start from].
    config.init.backbone = "weights/swin_large_patch4_window12_384_22k.pth"
    config.loss.proposals.group = 96  # pairs per device [paper]
    config.data.detection.batch_size = 256  # [paper]
    config.data.grounding.batch_size = 256  # [paper]
    config.data.grounding.table_size = 12_288  # 256 images want about 12,200
    config.optimizer.learning_rate = 4e-4  # [paper]
    config.train.eval_every = 10_000  # steps
    return config


def nano() -> ConfigDict:
    """Nano: the built-in data on two CPU cores, with every part of the model at a small size.

    Its towers start without pretrained weights; docs/paper_vs_ours.md explains what that changes.
    All values are ours.
    """
    config = swin_t()
    config.model = ConfigDict(sizes.NANO.to_dict())
    recipes.start_from_scratch(config)
    data = config.data
    config.data_dir = "data/symbols"
    data.prepare = "detclip prepare symbols --to=data/symbols"
    data.dictionary = ""  # no definitions: the text tower starts from scratch and learns names
    data.detection.definitions = False
    for kind in (data.detection, data.grounding):
        kind.batch_size = 16
        kind.shapes = ((128, 128),)
        kind.rungs = (1.0,)
        kind.max_boxes = 8
        kind.table_size = 256
        kind.scales = (0.9, 1.0)
        kind.flip = 0.0  # phrases say left and right, and a mirrored glyph is another symbol
    data.detection.sources = ("detection",)
    data.grounding.sources = ("grounding",)
    data.image_text.sources = ("image_text",)
    data.image_text.batch_size = 96
    data.image_text.shapes = ((64, 64),)
    data.image_text.table_size = 768
    data.image_text.scales = (1.0, 1.0)
    data.image_text.flip = 0.0
    config.loss.candidates = 1  # the anchor at a glyph's center; nine lie up to 12 pixels off it
    config.loss.contrastive = 0.5  # λ; a seventh of the steps must teach all novel names
    config.loss.proposals.group = 96
    config.loss.proposals.k = 16
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 30
    config.optimizer.ema_decay = 0.99
    config.optimizer.beta2 = 0.99  # the run has less than 700 steps
    config.train.epochs = 1.0
    config.train.log_every = 1
    config.train.checkpoint_every = 200
    config.train.eval_every = 0
    config.eval.dataset = "archives/annotations/lvis_val.json"
    config.eval.images = "archives/images/val"
    config.eval.canvas = (128, 128)
    config.eval.batch_size = 50
    config.eval.pre_nms_top_k = 20
    config.eval.max_detections = 4720  # all of them: 20 for each of 236 names
    return config
