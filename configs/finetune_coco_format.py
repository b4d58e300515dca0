"""Fine-tuning of a trained detector on your own COCO-format boxes, while rehearsing the old data.

    detclip prepare custom --from=my_photos --to=data/target
    detclip train --config=configs/finetune_coco_format.py:swin_t \
        --config.init.model=runs/swin_t --workdir=runs/tuned

`init.model` is the workdir of a run or an exported safetensors file. swin_t (the default) and
swin_l need GPUs and have not been measured yet. nano runs on two CPU cores from runs/quickstart: on
20 symbols that had no boxes before, 5 epochs (305 steps) raise COCO AP from 0.05 to 0.17, and fixed
AP on all 236 names from 0.28 to 0.30 (docs/results/finetune/README.md).

Between steps on the target, a share of the pre-training data is rehearsed [ours]. Kinds that are
not prepared under `data/` are skipped, and so are phrases and captions that the folder lacks. AP on
the validation set and on a zero-shot set (LVIS minival, if it exists) is measured before and after
(docs/finetune.md).

[paper] marks values that the paper uses on ODinW13, whose own recipe is finetune_odinw.py. The
paper lowers the learning rate when the validation AP stalls; here it falls tenfold at fixed shares
of the run, so that the run depends on its seed alone.
"""

from ml_collections import ConfigDict

from detclipv2_jax.training import recipes

pretrain = recipes.load("pretrain")

SIZES = ("swin_t", "swin_l", "nano")


def get_config(size: str = "swin_t") -> ConfigDict:
    """Return the pre-training recipe at a size, changed for fine-tuning."""
    recipes.check_size("finetune_coco_format", size, SIZES)
    nano = size == "nano"
    config = pretrain.get_config(size)
    config.init.backbone = config.init.text = ""  # both are in init.model
    data = config.data
    data.skip_missing = True
    if data.dictionary:
        data.dictionary = f"auto:{data.dictionary}"
    data.prepare = "detclip prepare custom --from=YOUR_FOLDER --to=DATA_DIR/target"
    for kind in ("detection", "grounding", "image_text"):
        data[kind].rehearsal = data[kind].sources
        data[kind].sources = ()
        data[kind].begin = 0.0
    data.detection.sources = ("target/detection",)
    data.detection.rehearsal_share = 0.5
    data.grounding.rehearsal_share = 0.5
    data.image_text.rehearsal_share = 2.0  # a pair takes a tenth of the time of a boxed image
    config.init.model = f"runs/{size}"
    config.optimizer.drops = (0.6, 0.85)
    config.optimizer.warmup_steps = 50
    config.train.epochs = 12.0
    config.train.log_every = 1
    config.train.eval_every = -1  # each epoch
    config.train.eval_first = True
    config.eval.zero_shot = f"auto:{config.eval.dataset}"
    config.eval.zero_shot_images = config.eval.images
    config.eval.dataset = "auto"
    config.eval.images = ""
    if nano:
        config.init.model = "runs/quickstart"
        config.optimizer.learning_rate = 5e-4
        config.optimizer.lr_rules = ((r"text/.*", 0.1), (r".*", 1.0))
        config.optimizer.ema_decay = 0.98
        return config
    for kind in (data.detection, data.grounding):
        kind.batch_size = 32  # [paper]
    data.grounding.table_size = 3072  # 32 images want about 2,900 concepts
    data.image_text.batch_size = 576  # whole groups of the paper's 192 (T) or 96 (L) pairs [ours]
    data.image_text.table_size = 576 * 4
    config.optimizer.learning_rate = 4e-5  # [paper]
    config.optimizer.lr_rules = ((r"text/.*", 0.01), (r".*", 1.0))  # text tower: 4e-7 [paper]
    config.optimizer.ema_decay = 0.998
    return config
