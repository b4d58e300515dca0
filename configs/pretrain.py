"""Hybrid pre-training on detection, grounding and image-text data: one recipe in three sizes.

    python -m detclipv2_jax.main --config=configs/pretrain.py:swin_t --workdir=runs/swin_t
    python -m detclipv2_jax.main --config=configs/pretrain.py:swin_l --workdir=runs/swin_l
    python -m detclipv2_jax.main --config=configs/pretrain.py:nano   --workdir=runs/nano

`swin_t` (the default) and `swin_l` are the paper's: Objects365, GoldG and CC15M, 12 epochs, about
159,000 steps; the paper reports 40.4 and 44.7 fixed AP on LVIS minival. They need the sources
prepared under `--config.data_dir` (default `data/`).

`nano` is the same on the built-in data, `symbols`, on two CPU cores; `./scripts/quickstart.sh`
prepares the data and runs it. docs/paper_vs_ours.md says which value is the paper's.
"""

from ml_collections import ConfigDict

from detclipv2_jax.common import config_dict
from detclipv2_jax.models import sizes
from detclipv2_jax.training import config as config_lib


def get_config(size: str = "swin_t") -> ConfigDict:
    """The recipe at one size: 'swin_t', 'swin_l' or 'nano'."""
    recipes = {"swin_t": swin_t, "swin_l": swin_l, "nano": nano}
    if size not in recipes:
        raise ValueError(
            f"configs/pretrain.py:{size} is no size: choose one of {', '.join(recipes)}."
        )
    return recipes[size]()


def swin_t() -> ConfigDict:
    """Paper §4.1, Swin-T: boxes at 1333×800 in batches of 128, pairs at 320² in batches of 6144."""
    config = ConfigDict(config_dict.to_dict(config_lib.RunConfig(model=sizes.SWIN_T)))
    data = config.data
    data.prepare = (
        "python scripts/prepare_data.py objects365|goldg|conceptual_captions --from=DIR "
        "--to=data/NAME for the names objects365, goldg and cc15m, then "
        "scripts/prepare_concepts.py --from=data --to=data/concepts (docs/data.md)"
    )
    data.dictionary = "concepts"
    data.detection.sources = ("objects365",)
    data.detection.table_size = 384  # its 365 names
    data.grounding.sources = ("goldg",)
    data.grounding.concepts_per_image = 100
    data.grounding.table_size = 2048
    data.image_text.sources = ("cc15m",)
    data.image_text.batch_size = 6144
    data.image_text.shapes = ((320, 320),)
    data.image_text.table_size = 6144 * 4  # captions, and three phrases each that nobody shares
    data.image_text.max_boxes = 0
    data.image_text.concepts_per_image = 0
    data.image_text.texts_per_image = 8
    data.image_text.scales = (0.8, 1.4)
    data.image_text.crop = True
    config.eval.dataset = "lvis/lvis_v1_minival.json"
    config.eval.images = "lvis"
    config.train.eval_every = 13_288  # an epoch
    return config


def swin_l() -> ConfigDict:
    """Paper §4.1, Swin-L: 64 GPUs, detection and grounding in batches of 256."""
    config = swin_t()
    config.model = ConfigDict(sizes.SWIN_L.to_dict())
    config.data.detection.batch_size = 256
    config.data.grounding.batch_size = 256
    config.optimizer.learning_rate = 4e-4
    config.train.eval_every = 10_000
    return config


def nano() -> ConfigDict:
    """The built-in data on two CPU cores in about twelve minutes; every part at its true shape."""
    config = swin_t()
    config.model = ConfigDict(sizes.NANO.to_dict())
    data = config.data
    config.data_dir = "data/symbols"
    data.prepare = "python scripts/prepare_data.py symbols --to=data/symbols"
    data.dictionary = ""  # bare names: its towers start from noise and its names are all there are
    for kind in (data.detection, data.grounding):
        kind.batch_size = 16
        kind.shapes = ((128, 128),)
        kind.max_boxes = 8
        kind.table_size = 256
        kind.scales = (0.9, 1.0)
        kind.flip = 0.0  # phrases say left and right, and a mirrored glyph is another glyph
    data.detection.sources = ("detection",)
    data.grounding.sources = ("grounding",)
    data.image_text.sources = ("image_text",)
    data.image_text.batch_size = 96
    data.image_text.shapes = ((64, 64),)
    data.image_text.table_size = 768
    data.image_text.scales = (1.0, 1.0)
    data.image_text.flip = 0.0
    data.image_text.begin = 0.5  # from noise: what no region tells apart, no caption can name
    config.loss.candidates = 1  # the cell at its center: nine would reach 12 px off it
    config.loss.contrastive = 0.5  # λ; a seventh of its steps have to teach all that is novel
    config.loss.proposals.group = 96
    config.loss.proposals.k = 16
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 30
    config.optimizer.ema_decay = 0.99
    config.optimizer.beta2 = 0.99  # some six hundred steps in all
    config.optimizer.lr_rules = ((r".*", 1.0),)  # its text tower starts from noise too
    config.train.epochs = 1.0
    config.train.log_every = 1
    config.train.checkpoint_every = 200
    config.train.eval_every = 0
    config.eval.dataset = "archives/annotations/lvis_val.json"
    config.eval.images = "archives/images/val"
    config.eval.canvas = (128, 128)
    config.eval.batch_size = 50
    config.eval.pre_nms_top_k = 20
    config.eval.max_detections = 4720  # all: 20 of each of 236 names
    return config
