"""Training a new model on your own images with COCO-format boxes, phrases or captions.

    detclip prepare custom --from=my_photos --to=data/my_photos
    detclip train --config=configs/coco_format.py:nano \
        --config.data_dir=data/my_photos --workdir=runs/my_photos

nano (the default) trains on two CPU cores, about 0.33 s per step. From 244 COCO photos it reaches
AP50 0.63 on the photos it was trained on, and near zero on others: so few photos show that data and
training fit together, and no more (docs/results/photos/README.md; measured with captions from the
first step on). swin_t needs a GPU and the pretrained towers in `weights/` (docs/weights.md); not
measured yet. To start from a trained model, use finetune_coco_format.py.

Kinds of data that the folder lacks are skipped. Each epoch is measured on the validation set that
`prepare` found in the folder, or held out with --val_share=0.1; docs/own_data.md says more. All
values are ours.
"""

from ml_collections import ConfigDict

from detclipv2_jax.common import config_dict
from detclipv2_jax.models import sizes
from detclipv2_jax.training import config as config_lib
from detclipv2_jax.training import recipes

SIZES = ("nano", "swin_t")


def get_config(size: str = "nano") -> ConfigDict:
    """Return the recipe for a few hundred to a few thousand photos: 'nano' or 'swin_t'.

    nano is always trained from scratch; swin_t from pretrained towers unless ',scratch' follows.
    """
    size, from_scratch = recipes.size_and_start("coco_format", size, SIZES)
    nano = size == "nano"
    model = sizes.NANO if nano else sizes.SWIN_T
    config = ConfigDict(config_dict.to_dict(config_lib.RunConfig(model=model)))
    if nano or from_scratch:
        recipes.start_from_scratch(config)
    else:
        config.init.backbone = "weights/swin_tiny_patch4_window7_224.pth"
        config.init.text = "weights/ViT-B-32.pt"
    data = config.data
    data.skip_missing = True
    data.detection.definitions = False  # bare names: there is no dictionary
    data.prepare = "detclip prepare custom --from=YOUR_FOLDER --to=DATA_DIR"
    for kind in ("detection", "grounding", "image_text"):
        data[kind].sources = (kind,)
    for kind in (data.detection, data.grounding):
        kind.batch_size = 4 if nano else 8
        kind.table_size = 512
        kind.shapes = ((192, 256), (256, 192)) if nano else ((800, 1216), (1216, 800))
        if not nano:  # short sides 480 to 800, as in pretrain.py
            kind.rungs = (0.72, 0.84, 1.0)
            kind.scales = (0.834, 1.0)
    # Of few names, a model learns what they mean only next to other names.
    data.detection.general_negatives = 50
    data.grounding.labels_per_box = 3
    data.image_text.batch_size = 32
    data.image_text.shapes = ((128, 128),) if nano else ((320, 320),)
    data.image_text.table_size = 256
    data.image_text.texts_per_image = 8
    data.image_text.max_boxes = 0
    data.image_text.concepts_per_image = 0
    data.image_text.scales = (1.0, 1.3)
    data.image_text.crop = True
    config.loss.proposals.group = 32
    config.loss.proposals.k = 32 if nano else 100
    config.optimizer.learning_rate = 1e-3 if nano else 1e-4
    config.optimizer.warmup_steps = 100
    config.optimizer.ema_decay = 0.998
    if nano:
        # Anchors of 16 to 256 pixels; ATSS's scale of 8 suits images of 800 pixels.
        config.model.anchors.scale = 2.0
    config.train.epochs = 12.0
    config.train.log_every = 1
    config.train.eval_every = -1  # each epoch
    config.eval.dataset = "auto"
    config.eval.canvas = (192, 256) if nano else (800, 1344)
    return config
