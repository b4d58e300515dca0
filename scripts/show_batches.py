"""Draws what the model will see: the pictures of some steps with boxes and names, or captions.

    python scripts/show_batches.py --config=configs/pretrain.py:nano --output=DIR
    python scripts/show_batches.py --config=configs/pretrain.py:nano --output=DIR \\
        --kind=image_text --step=500 --config.data.image_text.crop=True

Writes a PNG a step, the very batch that training takes at that step, and prints what is in it. Any
field of the config can be set behind it, as for training.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import app, flags
from ml_collections import config_flags
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from detclipv2_jax.errors import UserError
from detclipv2_jax.structures import KINDS, Batch

_CONFIG = config_flags.DEFINE_config_file("config", None, "File with the run's config.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory for the pictures.")
_KIND = flags.DEFINE_enum("kind", None, KINDS, "Only steps of this kind; by default of any.")
_STEP = flags.DEFINE_integer("step", 0, "First step to look at.", lower_bound=0)
_STEPS = flags.DEFINE_integer("steps", 3, "How many steps to draw.", lower_bound=1)
_PICTURES = flags.DEFINE_integer(
    "pictures", 12, "At most this many pictures a step.", lower_bound=1
)
flags.mark_flags_as_required(["config", "output"])


def main(argv: list[str]) -> None:
    """Draws the steps that the flags name."""
    from detclipv2_jax import config as config_lib
    from detclipv2_jax import drawing, train
    from detclipv2_jax.data import pipeline
    from detclipv2_jax.data.transforms import TransformConfig

    if len(argv) > 1:
        raise UserError(f"Unexpected argument {argv[1]!r}: every option starts with --.")
    config = config_lib.parse(_CONFIG.value.to_dict())
    plan, sources, _ = train.open_data(config)
    kinds = config.data.kinds()
    transforms = {
        k: TransformConfig(flip=c.flip, scales=c.scales, crop=c.crop) for k, c in kinds.items()
    }
    if _KIND.value is not None and _KIND.value not in kinds:
        raise UserError(
            f"--kind={_KIND.value}: the config has no such data, only {', '.join(kinds)}."
        )
    wanted = (s for s in itertools.count(_STEP.value) if _KIND.value in (None, plan.program(s)[0]))
    for step in itertools.islice(wanted, _STEPS.value):
        steps = dict(start=step, stop=step + 1, max_broken_share=1.0)  # what is broken is logged
        planned, batch = next(pipeline.batches(plan, sources, transforms, **steps))
        names = plan.dictionary.names(planned.concepts)
        shown = list(itertools.islice(drawn(batch, names), _PICTURES.value))
        path = Path(_OUTPUT.value) / f"step-{step:06d}-{planned.kind}.png"
        if shown:
            drawing.save(drawing.grid(*zip(*shown), columns=min(4, len(shown))), path)
        height, width = planned.shape
        print(
            f"step {step}, epoch {planned.epoch}: {planned.kind}, "
            f"{int((batch.sizes[:, 0] > 0).sum())} of {len(batch.sizes)} slots filled, "
            f"{height}x{width} pixels, {int((batch.labels >= 0).sum())} boxes, "
            f"{planned.positives} concepts of its own, "
            f"{int(batch.token_mask.sum()) - planned.positives} negatives, "
            f"{planned.dropped} without room -> {path}"
        )


def drawn(batch: Batch, names: list[str]) -> Iterator[tuple[Image.Image, str]]:
    """The canvas of each filled slot with its boxes, and its texts (or its number) as a title."""
    from detclipv2_jax import drawing

    for slot in np.flatnonzero(batch.sizes[:, 0] > 0):
        boxed = batch.labels[slot] >= 0
        labels = [names[row] for row in batch.labels[slot][boxed]]
        texts = [names[row] for row in batch.texts[slot] if row >= 0]
        picture = drawing.draw_boxes(batch.images[slot], batch.boxes[slot][boxed], labels, side=480)
        yield picture, " | ".join(texts) or f"slot {slot}"


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, its errors in one sentence."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(str(error).splitlines()[0]) from None


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=parse_flags)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
