"""Choose the static shapes of a run from its data: canvases, and rows of the concept table.

    python scripts/choose_shapes.py --config=configs/pretrain.py:swin_t --config.data_dir=DIR
    python scripts/choose_shapes.py --data=data/mine/detection --area=800x1344

With --config it prints for each kind how the images fill the config's canvases and the best sets
of one to five canvases with the area of the first one: with the rungs and scales of the config, as
in training, and with each image as large as fits. Fill is pixels of images / pixels of canvases;
a step costs about as much as its canvases have pixels. It also prints how many concepts would find
no row in tables of several sizes, over some planned steps, and the model's arithmetic in an epoch
(models/flops.py). With --data (prepared directories,
separated by commas) it prints the canvases only, with each image as large as fits.
--count=3 proposes only sets of three.
"""

import collections
import dataclasses
import os

import numpy as np
from absl import flags
from ml_collections import config_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data import fill
from detclipv2_jax.data.config import KindConfig
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.plan import StepPlan
from detclipv2_jax.data.prepare import canvases
from detclipv2_jax.training.flags import run_with_config

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe of the run.")
_DATA = flags.DEFINE_list("data", None, "Prepared directories, instead of --config.")
_AREA = flags.DEFINE_string("area", None, "Pixels of a canvas, or HxW (default: the config's).")
_COUNT = flags.DEFINE_integer("count", None, "Number of canvases (default: 1 to 5).", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 100, "Planned steps per kind.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Print a table per kind."""
    if (_CONFIG.value is None) == (_DATA.value is None):
        raise UserError(
            "Give either --config=RECIPE, such as --config=coco_format.py, or --data=DIR with "
            "--area=HEIGHTxWIDTH."
        )
    counts = (_COUNT.value,) if _COUNT.value else range(1, 6)
    if _DATA.value is not None:
        if _AREA.value is None:
            raise UserError("--data needs --area=HEIGHTxWIDTH, the size of one suitable canvas.")
        sources = [Source.open(directory) for directory in _DATA.value]
        print(canvas_table(sources, parse_area(_AREA.value), counts, KindConfig(scales=(1.0, 1.0))))
        return
    from detclipv2_jax.training import config as config_lib
    from detclipv2_jax.training import inputs

    config = config_lib.parse(_CONFIG.value.to_dict())
    plan, sources, _ = inputs.open_data(config)
    for kind, found in plan.kinds.items():
        height, width = found.shapes[0]
        area = parse_area(_AREA.value) if _AREA.value else height * width
        print(f"\n{kind}: {', '.join(found.all_sources)}\n")
        opened = [sources[name] for name in found.all_sources]
        print(canvas_table(opened, area, counts, found, found.shapes))
        steps = first_steps(plan, kind, _STEPS.value)
        wanted = np.array([step.positives + step.dropped for step in steps])
        print("\n" + concept_table(wanted, found.table_size))
        if found.concepts_per_image:
            wants, has = (
                np.mean([getattr(step, field) for step in steps])
                for field in ("wanted_negatives", "negatives")
            )
            print(f"\nnegatives per step: {wants:,.0f} wanted, {has:,.0f} drawn")
    print("\n" + work_table(config, plan))


def canvas_table(
    sources: list[Source],
    area: int,
    counts: range | tuple[int, ...],
    config: KindConfig,
    present: tuple[tuple[int, int], ...] = (),
) -> str:
    """Return how images fill the present canvases and the best ones, as Markdown.

    Args:
        sources: whose images are placed.
        area: of the canvases to propose, pixels.
        counts: how many canvases to propose, for each set.
        config: its rungs and its augmentation are used.
        present: canvases to compare with.
    """
    heights = np.concatenate([source.height for source in sources])
    widths = np.concatenate([source.width for source in sources])
    if not heights.size:
        raise UserError(f"{sources[0].directory}: has no records. Give another source.")
    sets = [("now", present)] if present else []
    sets += [(str(n), canvases.choose(heights, widths, n, area)) for n in counts]
    lines = [
        f"Rungs {', '.join(f'{rung:g}' for rung in config.rungs)}; scales {config.scales[0]:g} to "
        f"{config.scales[1]:g}; {'cropped' if config.crop else 'not cropped'}.\n",
        f"| canvases for {len(heights):,} images | height x width | fill in training | largest "
        "images | canvas pixels per image | short sides of 90 % | split |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, shapes in sets:
        found = canvases.padding(heights, widths, shapes)
        filled = fill.expected(dataclasses.replace(config, shapes=shapes), heights, widths)
        sizes = ", ".join(f"{height}x{width}" for height, width in shapes)
        shares = ", ".join(f"{share:.1%}" for share in found.shares)
        low, high = filled.short_sides
        lines.append(
            f"| {name} | {sizes} | {filled.share:.3f} | {found.efficiency:.3f} | "
            f"{filled.canvas_pixels:,.0f} | {low:.0f}–{high:.0f} | {shares} |"
        )
    return "\n".join(lines)


def work_table(config, plan) -> str:
    """Return the programs, steps and model FLOPs of the first epoch by kind, as Markdown."""
    from detclipv2_jax.training import utilization

    steps = collections.Counter(map(plan.program, range(plan.steps_per_epoch)))
    lines = ["| kind | programs | steps per epoch | model PFLOP per epoch |", "|---|---|---|---|"]
    total = 0.0
    for kind in plan.kinds:
        mine = {canvas: count for (of, canvas), count in steps.items() if of == kind}
        work = sum(n * utilization.model_flops(config, kind, c) for c, n in mine.items()) / 1e15
        total += work
        programs = sum(of == kind for of, _ in plan.programs)
        lines.append(f"| {kind} | {programs} | {sum(mine.values()):,} | {work:,.1f} |")
    programs = len(plan.programs)
    return "\n".join([*lines, f"| all | {programs} | {steps.total():,} | {total:,.1f} |"])


def first_steps(plan, kind: str, steps: int) -> list[StepPlan]:
    """Return the first `steps` steps of a kind."""
    mine = (s for s in range(plan.steps_per_epoch) if plan.program(s)[0] == kind)
    return [plan.plan(step) for step, _ in zip(mine, range(steps))]


def concept_table(wanted: np.ndarray, rows: int) -> str:
    """Return what tables of several sizes would drop, as Markdown; `rows` is the config's size."""
    sizes = sorted({rows, *(2**k * m for k in range(5, 15) for m in (2, 3))})
    near = [n for n in sizes if n == rows or 0.5 * wanted.min() <= n <= 2 * wanted.max()]
    lines = [
        f"{len(wanted)} steps have {wanted.min():,} to {wanted.max():,} positives, median "
        f"{np.median(wanted):,.0f}\n",
        "| rows | steps that overflow | dropped per step | of all | rows filled by positives |",
        "|---|---|---|---|---|",
    ]
    for use in canvases.table_use(wanted, near):
        now = " (now)" if use.rows == rows else ""
        lines.append(
            f"| {use.rows:,}{now} | {use.overflowing:.1%} | {use.dropped:,.1f} | "
            f"{use.dropped_share:.2%} | {use.filled:.0%} |"
        )
    return "\n".join(lines)


def parse_area(text: str) -> int:
    """Return the pixels of "1075200" or "800x1344"."""
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) for side in sides):
        raise UserError(f"--area={text}: not an area. Use pixels (1075200) or sides (800x1344).")
    return int(np.prod([int(side) for side in sides]))


if __name__ == "__main__":
    run_with_config(main, needs_config=False)
