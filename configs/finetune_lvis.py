"""Fine-tuning of a trained detector on LVIS v1, 1,203 categories (paper §4).

    detclip prepare lvis --from=lvis --to=data/lvis_train
    detclip train --config=configs/finetune_lvis.py:swin_t \
        --config.init.model=runs/swin_t --workdir=runs/lvis_swin_t

The paper reports 50.7 (Swin-T) and 60.1 (Swin-L) fixed AP on minival. This code has not been
trained at these sizes yet; swin_t (the default) and swin_l need GPUs. nano tries the recipe on two
CPU cores: it trains runs/quickstart for another epoch on the boxes of `symbols`. `init.model` is
the workdir of a run or an exported safetensors file.

A share of the pre-training data is rehearsed [ours]; kinds that are not prepared under `data/` are
skipped. Minival is evaluated before training (zero-shot) and after it. To measure how much of the
zero-shot ability remains, name a set whose names LVIS lacks:
`--config.eval.zero_shot=FILE --config.eval.zero_shot_images=DIR`.
"""

from ml_collections import ConfigDict

from detclipv2_jax.training import recipes

pretrain = recipes.load("pretrain")

SIZES = ("swin_t", "swin_l", "nano")


def get_config(size: str = "swin_t") -> ConfigDict:
    """Return the pre-training recipe at a size, changed for fine-tuning."""
    recipes.check_size("finetune_lvis", size, SIZES)
    config = pretrain.get_config(size)
    config.init.backbone = config.init.text = ""  # both are in init.model
    data = config.data
    data.skip_missing = True
    for kind in ("detection", "grounding", "image_text"):
        data[kind].rehearsal = data[kind].sources
        data[kind].sources = ()
        data[kind].rehearsal_share = 0.25
        data[kind].begin = 0.0
    config.optimizer.lr_rules = ((r"text/.*", 0.1), (r".*", 1.0))  # text tower: 4e-6 [paper]
    config.train.epochs = 24.0  # [paper]
    config.train.eval_first = True
    config.train.eval_every = 0
    if size == "nano":
        data.detection.rehearsal = ()
        data.detection.sources = ("detection",)
        config.init.model = "runs/quickstart"
        config.optimizer.learning_rate = 5e-4
        config.train.epochs = 1.0
        return config
    data.prepare = "detclip prepare lvis --from=DIR --to=data/lvis_train"
    data.detection.sources = ("lvis_train",)
    data.detection.table_size = 1280  # LVIS has 1,203 names
    # LVIS says of each image only which names are absent; the paper does not mention it [ours].
    data.detection.federated = True
    data.detection.labels_per_box = 2  # LVIS's categories overlap [ours]
    for kind in (data.detection, data.grounding):
        kind.batch_size = 64  # [paper]
        kind.max_boxes = 300  # LVIS has more boxes per image than other sets
    data.grounding.table_size = 5376  # 64 images want about 5,200 concepts
    data.image_text.batch_size = 1152  # whole groups of the paper's 192 (T) or 96 (L) pairs [ours]
    data.image_text.table_size = 1152 * 4
    config.init.model = f"runs/{size}"
    config.optimizer.learning_rate = 4e-5  # [paper]
    config.train.eval_every = 10_000
    return config
