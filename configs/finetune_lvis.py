"""Fine-tuning a pre-trained detector on LVIS v1, 1,203 categories, as the paper's section 4 does.

    python scripts/prepare_data.py lvis --from=lvis --to=data/lvis_train
    python -m detclipv2_jax.main --config=configs/finetune_lvis.py:swin_t \
        --config.init.model=runs/swin_t --workdir=runs/lvis_swin_t

24 epochs in batches of 64, learning rate 4e-5 and 4e-6 for the text tower; the paper reports 50.7
(Swin-T) and 60.1 (Swin-L) fixed AP on minival. `init.model` is the workdir of a run, or a
safetensors file that was exported. Ours: a share of the pre-training data is rehearsed in between;
the kinds of it that are not prepared under `data/` are left out. Minival is measured before, which
is zero-shot, and after; what is left of the zero-shot ability then is measured on another set, of
names that LVIS lacks: `--config.eval.zero_shot=FILE --config.eval.zero_shot_images=DIR`.

`:swin_t` (default) and `:swin_l` want GPUs. `:nano` tries the recipe on `symbols` with two CPU
cores: from runs/quickstart, on its boxes again.
"""

from ml_collections import ConfigDict

from detclipv2_jax.training import recipes

pretrain = recipes.load("pretrain")


def get_config(size: str = "swin_t") -> ConfigDict:
    """Starts from the pre-training recipe of that size: 'swin_t', 'swin_l' or 'nano'."""
    if size not in ("swin_t", "swin_l", "nano"):
        raise ValueError(
            f"configs/finetune_lvis.py:{size} is no size: choose swin_t, swin_l or nano."
        )
    config = pretrain.get_config(size)
    data = config.data
    data.skip_missing = True
    for kind in ("detection", "grounding", "image_text"):
        data[kind].rehearsal = data[kind].sources
        data[kind].sources = ()
        data[kind].rehearsal_share = 0.25
        data[kind].begin = 0.0
    config.optimizer.lr_rules = ((r"text/.*", 0.1), (r".*", 1.0))
    config.train.epochs = 24.0
    config.train.eval_first = True
    config.train.eval_every = 0
    if size == "nano":
        data.detection.rehearsal = ()
        data.detection.sources = ("detection",)
        config.init.model = "runs/quickstart"
        config.optimizer.learning_rate = 5e-4
        config.train.epochs = 1.0
        return config
    data.prepare = "python scripts/prepare_data.py lvis --from=DIR --to=data/lvis_train"
    data.detection.sources = ("lvis_train",)
    data.detection.table_size = 1280  # its 1,203 names
    for kind in (data.detection, data.grounding):
        kind.batch_size = 64
        kind.max_boxes = 300  # LVIS has more boxes an image than other sets
    data.image_text.batch_size = 1024
    data.image_text.table_size = 4096
    config.init.model = f"runs/{size}"
    config.optimizer.learning_rate = 4e-5
    config.train.eval_every = 10_000
    return config
