"""Fine-tuning a pre-trained detector on a folder of COCO-format boxes, without forgetting the rest.

    python scripts/prepare_data.py custom --from=my_photos --to=data/target
    python -m detclipv2_jax.main --config=configs/finetune_coco_format.py:swin_t \
        --config.init.model=runs/swin_t --workdir=runs/my_photos \
        --config.eval.dataset=$PWD/my_photos/val.json --config.eval.images=$PWD/my_photos/images

`init.model` is the workdir of a run, or a safetensors file that was exported. The paper (section 4)
fine-tunes on ODinW13 with 4e-5, the text tower with 4e-7, in batches of 32, and lowers the rate
where the validation AP stalls; here it falls tenfold at set shares of the run, so that a run is
still a function of its seed. A share of the pre-training data is rehearsed in between; the kinds of
it that are not prepared under `data/` are left out, and so are phrases and captions that the folder
lacks. AP on the folder's own validation set and on a second, zero-shot one (LVIS minival; '' for
none) is measured before and after: docs/finetune.md.

`:swin_t` (default) and `:swin_l` want GPUs. `:nano` runs on two CPU cores, from runs/quickstart.
"""

from ml_collections import ConfigDict

from detclipv2_jax.training import recipes

pretrain = recipes.load("pretrain")


def get_config(size: str = "swin_t") -> ConfigDict:
    """Starts from the pre-training recipe of that size: 'swin_t', 'swin_l' or 'nano'."""
    if size not in ("swin_t", "swin_l", "nano"):
        raise ValueError(
            f"configs/finetune_coco_format.py:{size} is no size: choose swin_t, swin_l or nano."
        )
    nano = size == "nano"
    config = pretrain.get_config(size)
    data = config.data
    data.skip_missing = True
    data.prepare = "python scripts/prepare_data.py custom --from=YOUR_FOLDER --to=DATA_DIR/target"
    for kind in ("detection", "grounding", "image_text"):
        data[kind].rehearsal = data[kind].sources
        data[kind].sources = ()
        data[kind].begin = 0.0
    data.detection.sources = ("target/detection",)
    data.detection.rehearsal_share = 0.5
    data.grounding.rehearsal_share = 0.5
    data.image_text.rehearsal_share = 2.0  # of pairs: an image of them is a tenth of the work
    config.init.model = f"runs/{size}"
    config.optimizer.drops = (0.6, 0.85)
    config.optimizer.warmup_steps = 50
    config.train.epochs = 12.0
    config.train.log_every = 1
    config.train.eval_every = 0
    config.train.eval_first = True
    config.eval.zero_shot = config.eval.dataset
    config.eval.zero_shot_images = config.eval.images
    config.eval.dataset = ""
    config.eval.images = ""
    if nano:
        config.init.model = "runs/quickstart"
        config.optimizer.learning_rate = 5e-4
        config.optimizer.lr_rules = ((r"text/.*", 0.1), (r".*", 1.0))
        config.optimizer.ema_decay = 0.98
        return config
    for kind in (data.detection, data.grounding):
        kind.batch_size = 32
    data.image_text.batch_size = 512
    data.image_text.table_size = 2048
    config.optimizer.learning_rate = 4e-5
    config.optimizer.lr_rules = ((r"text/.*", 0.01), (r".*", 1.0))
    config.optimizer.ema_decay = 0.998
    return config
