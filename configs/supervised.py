"""Supervised baselines with a closed label space: plain ATSS on COCO or LVIS, without text.

They check backbone, neck, head, losses, moving average and evaluation against published figures
before anything is spent on pre-training (docs/reproduce.md):

    detclip prepare coco --from=coco --to=data/coco_train
    detclip train --config=configs/supervised.py:coco_swin_t --workdir=runs/coco_swin_t

    detclip prepare lvis --from=lvis --to=data/lvis_train
    detclip train --config=configs/supervised.py:lvis_swin_t --workdir=runs/lvis_supervised

coco_swin_t: 47.2 COCO AP is published for ATSS with Swin-T (Liu et al. 2021, table 2a, 36 epochs).
lvis_swin_t, lvis_swin_l: 33.6 and 43.9 fixed AP on LVIS minival (Yao et al. 2023, table 6), whose
schedule the paper does not give. This code has not been trained at these sizes yet. nano trains on
the boxes of `symbols` on two CPU cores, where novel names have none.

The classes are the names of the detection data. The text tower is gone: each class has its own
channel of the head's last convolution, so a logit is what it is in ATSS. The deformable convolution
is left out, as it is in ATSS.
"""

from ml_collections import ConfigDict

from detclipv2_jax.training import recipes

pretrain = recipes.load("pretrain")

SIZES = ("coco_swin_t", "coco_swin_l", "lvis_swin_t", "lvis_swin_l", "nano")


def get_config(size: str = "coco_swin_t") -> ConfigDict:
    """Return the recipe of a data set and a size, such as 'lvis_swin_t'."""
    recipes.check_size("supervised", size, SIZES)
    name, _, model = size.rpartition("swin")
    config = pretrain.get_config("nano" if size == "nano" else f"swin{model}")
    data, detection = config.data, config.data.detection
    data.grounding.sources = data.image_text.sources = ()
    data.closed_set = True
    data.dictionary = ""
    detection.definitions = False
    detection.definitions_drop = 0.0
    config.model.similarity = "dot"
    config.model.head.deformable = False
    # The scale of the similarity stays 1, as ATSS has none.
    config.optimizer.lr_rules = ((r"logit_scale", 0.0), (r".*", 1.0))
    if size == "nano":
        return config
    config.init.text = ""  # there is no text tower
    detection.concepts_per_image = 0  # no draw: every class is in the table at every step
    if name == "coco_":
        data.prepare = "detclip prepare coco --from=DIR --to=data/coco_train"
        detection.sources = ("coco_train",)
        detection.batch_size = 16  # Liu et al. 2021
        detection.table_size = 80
        detection.concepts_per_image = 80
        config.optimizer.learning_rate = 1e-4  # Liu et al. 2021
        config.optimizer.drops = (0.75, 0.92)  # epochs 27 and 33 of 36, Liu et al. 2021
        config.train.epochs = 36.0  # Liu et al. 2021
        config.train.eval_every = 7_393 * 3  # steps; three epochs
        config.eval.dataset = "coco/annotations/instances_val2017.json"
        config.eval.images = "coco/val2017"
        return config
    data.prepare = "detclip prepare lvis --from=DIR --to=data/lvis_train"
    detection.sources = ("lvis_train",)
    detection.batch_size = 64  # as in the paper's fine-tuning [ours]
    detection.table_size = 1203
    detection.concepts_per_image = 1203
    detection.max_boxes = 300  # LVIS has more boxes per image than other sets
    detection.labels_per_box = 2  # LVIS's categories overlap [ours]
    config.optimizer.learning_rate = 2e-4  # [ours]
    config.train.epochs = 24.0  # as in the paper's fine-tuning [ours]
    config.train.eval_every = 1_552 * 3  # steps; three epochs
    return config
