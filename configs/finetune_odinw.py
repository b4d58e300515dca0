"""Fine-tuning of a trained detector on one set of ODinW13, as in the paper (appendix).

    detclip prepare odinw --from=odinw --to=data/pothole \
        --annotations=odinw/pothole/train/annotations_without_background.json
    detclip train --config=configs/finetune_odinw.py:swin_t --workdir=runs/pothole \
        --config.init.model=runs/swin_t --config.data.detection.sources="('pothole',)" \
        --config.eval.dataset=$PWD/odinw/pothole/valid/annotations_without_background.json \
        --config.eval.images=$PWD/odinw/pothole/valid

The paper reports 68.5 (Swin-T) and 70.4 (Swin-L) mean AP over the 13 sets; this code has not been
trained at these sizes yet. The learning rate falls tenfold when AP on the validation set has not
risen for 5 epochs, and the run ends when it has not risen for 8 epochs at the least rate
(training/auto_step.py), so the 250 epochs are a limit. Nothing is rehearsed, as in the paper: the
detector forgets other names. finetune_coco_format.py rehearses.

nano tries the recipe on two CPU cores, from runs/quickstart on the boxes of `symbols`.
"""

from ml_collections import ConfigDict

from detclipv2_jax.training import recipes

pretrain = recipes.load("pretrain")

SIZES = ("swin_t", "swin_l", "nano")


def get_config(size: str = "swin_t") -> ConfigDict:
    """Return the pre-training recipe at a size, changed for fine-tuning."""
    recipes.check_size("finetune_odinw", size, SIZES)
    config = pretrain.get_config(size)
    config.init.backbone = config.init.text = ""  # both are in init.model
    data, optimizer = config.data, config.optimizer
    data.grounding.sources = data.image_text.sources = ()
    optimizer.auto_step.on = True  # [paper]
    optimizer.lr_rules = ((r"text/.*", 0.01), (r".*", 1.0))  # text tower: 4e-7 [paper]
    config.train.epochs = 250.0  # at most [paper]
    config.train.eval_every = 0  # auto-step evaluates after every epoch
    config.train.eval_first = True
    config.train.log_every = 1
    if size == "nano":
        config.init.model = "runs/quickstart"
        optimizer.learning_rate = 5e-4
        config.train.epochs = 2.0
        return config
    data.prepare = "detclip prepare odinw --from=DIR --to=data/NAME (docs/data.md)"
    data.detection.sources = ("odinw",)
    data.detection.batch_size = 32  # [paper]
    config.init.model = f"runs/{size}"
    optimizer.learning_rate = 4e-5  # [paper]
    optimizer.warmup_steps = 500  # [paper]
    optimizer.ema_decay = 0.998  # the sets are small [ours]
    return config
