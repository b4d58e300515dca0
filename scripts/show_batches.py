"""Write a web page with the batches of some training steps: images, boxes, names and negatives.

    python scripts/show_batches.py --config=configs/pretrain.py:nano --output=DIR
    python scripts/show_batches.py --config=configs/pretrain.py:nano --output=DIR \\
        --kind=image_text --step=500 --config.data.image_text.crop=True

Writes DIR/index.html with a section for each step. It shows exactly the batch that training uses at
that step: every image on its canvas, the names of its boxes ("man = player" where a box has two) or
its texts, how many concepts it is scored on, and the negatives of the batch. Any field of the
config can be set, as for training.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import jinja2
import numpy as np
from absl import flags
from ml_collections import config_flags

from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.outputs import OutputFolder, guarded
from detclipv2_jax.data.batch import Batch
from detclipv2_jax.data.index import KINDS
from detclipv2_jax.training.flags import run_with_config

_CONFIG = config_flags.DEFINE_config_file("config", None, "File with the run's config.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory for the page and its images.")
_KIND = flags.DEFINE_enum("kind", None, KINDS, "Show only steps of this kind (default: all kinds).")
_SOURCE = flags.DEFINE_string(
    "source", None, "Show only images of this source (default: all sources)."
)
_STEP = flags.DEFINE_integer("step", 0, "First step.", lower_bound=0)
_STEPS = flags.DEFINE_integer("steps", 3, "Number of steps.", lower_bound=1)
_PICTURES = flags.DEFINE_integer("pictures", 12, "Most images to show per step.", lower_bound=1)
flags.mark_flags_as_required(["config", "output"])

_MAX_SEARCHED = 10_000  # steps that are searched for those of --kind and --source


@dataclasses.dataclass(frozen=True)
class Shown:
    """One slot of a batch as the page shows it."""

    file: str  # of the drawn image, relative to the page
    source: str
    record: int
    size: tuple[int, int]  # (height, width) of the image on its canvas, in pixels
    names: list[str]  # of its boxes, or its texts with the caption first
    scored: int  # concepts of the table that it is scored on; image_text: 0


def main(argv: list[str]) -> None:
    """Write the page for the steps that the flags select."""
    from detclipv2_jax.training import config as config_lib
    from detclipv2_jax.training import inputs

    config = config_lib.parse(_CONFIG.value.to_dict())
    output = OutputFolder(_OUTPUT.value)
    output.check(["index.html"])
    plan, sources, _ = inputs.open_data(config)
    if _KIND.value is not None and _KIND.value not in plan.kinds:
        names = ", ".join(plan.kinds)
        raise UserError(f"--kind={_KIND.value}: the config has no such data. Use one of {names}.")
    if _SOURCE.value is not None and _SOURCE.value not in sources:
        raise UserError(
            f"--source={_SOURCE.value}: not a source of the config. Use one of "
            f"{', '.join(sources)}."
        )
    with guarded(output):
        _write(plan, sources)


def _write(plan, sources) -> None:
    """Draw the steps and write the page."""
    from detclipv2_jax.data import pipeline

    sections = []
    for step in itertools.islice(_select_steps(plan), _STEPS.value):
        once = dict(
            start=step, stop=step + 1, max_broken_share=1.0
        )  # unreadable records are logged
        planned, batch = next(pipeline.batches(plan, sources, **once))
        names = plan.vocabulary.names(planned.concepts)
        folder = f"step-{step:06d}-{planned.kind}"
        drawn = draw(batch, planned, plan.kinds[planned.kind].all_sources, names, folder)
        sections.append(
            {
                "title": f"Step {step}: {planned.kind}",
                "summary": _summary(planned, batch),
                "pictures": list(itertools.islice(drawn, _PICTURES.value)),
                "concepts": planned.positives + planned.negatives,
                "negatives": [n for n in names[planned.positives :] if n],
            }
        )
        print(f"step {step}: {sections[-1]['summary']}")
    page = Path(_OUTPUT.value) / "index.html"
    with replacing(page) as temporary:
        temporary.write_text(render(sections), encoding="utf-8")
    print(f"{page}: {sum(len(s['pictures']) for s in sections)} images")


def _select_steps(plan) -> Iterator[int]:
    """Yield the steps of --kind that have an image of --source."""
    for step in range(_STEP.value, _STEP.value + _MAX_SEARCHED):
        if _KIND.value not in (None, plan.program(step)[0]):
            continue
        if _SOURCE.value is not None:
            planned = plan.plan(step)
            names = plan.kinds[planned.kind].all_sources
            here = planned.sources[planned.records >= 0]
            if _SOURCE.value not in {names[number] for number in here}:
                continue
        yield step


def _summary(planned, batch: Batch) -> str:
    height, width = planned.shape
    phrases = [
        f"epoch {planned.epoch}",
        f"{int((batch.sizes[:, 0] > 0).sum())} of {len(batch.sizes)} slots filled",
        f"canvas {height}x{width}",
        f"{int((batch.labels >= 0).any(axis=-1).sum())} boxes",
        f"{planned.positives} positives",
        f"{planned.negatives} negatives",
    ]
    if planned.wanted_negatives > planned.negatives:
        phrases.append(f"{planned.wanted_negatives} negatives wanted")
    if planned.dropped:
        phrases.append(f"{planned.dropped} positives without a row")
    return ", ".join(phrases)


def draw(
    batch: Batch, planned, sources: tuple[str, ...], names: list[str], folder: str
) -> Iterator[Shown]:
    """Draw the filled slots of a batch to one file each, and yield what they show."""
    from detclipv2_jax.inference import drawing

    for slot in np.flatnonzero(batch.sizes[:, 0] > 0):
        source = sources[planned.sources[slot]]
        if _SOURCE.value not in (None, source):
            continue
        boxed = (batch.boxes[slot, :, 2:] > batch.boxes[slot, :, :2]).all(axis=1)
        rows = batch.labels[slot][boxed]
        labels = [" = ".join(names[row] for row in own[own >= 0]) or "(no row)" for own in rows]
        texts = [names[row] for row in batch.texts[slot] if row >= 0]
        picture = drawing.draw_boxes(batch.images[slot], batch.boxes[slot][boxed], labels, side=480)
        file = f"{folder}/slot-{slot:04d}.png"
        drawing.save_png(picture, Path(_OUTPUT.value) / file)
        size = tuple(int(n) for n in batch.sizes[slot])
        shown = texts or list(dict.fromkeys(labels))
        scored = int(batch.scored[slot].sum())
        yield Shown(file, source, int(planned.records[slot]), size, shown, scored)


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Batches</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; width: 320px; } img { width: 100%; background: #eee; }
figcaption { font-size: 13px; overflow-wrap: anywhere; } .from { color: #666; }
.name { background: #eef; border-radius: 3px; padding: 0 .3em; margin-right: .3em; }
details { margin: .6rem 0 2rem; max-width: 70rem; } .negative { color: #844; }
</style>
<h1>Training batches</h1>
{% for s in sections %}
<h2>{{ s.title }}</h2>
<p>{{ s.summary }}</p>
<div class="pictures">
{% for p in s.pictures %}
<figure><a href="{{ p.file }}"><img src="{{ p.file }}" alt="slot" loading="lazy"></a>
<figcaption><span class="from">{{ p.source }}, record {{ p.record }},
{{ p.size[0] }}×{{ p.size[1] }}
{%- if p.scored %}, scored on {{ p.scored }} of {{ s.concepts }} concepts{% endif %}</span><br>
{% for n in p.names %}<span class="name">{{ n }}</span> {% endfor %}</figcaption></figure>
{% endfor %}
</div>
<details{{ ' open' if s.negatives|length <= 60 }}><summary>{{ s.negatives|length }} negatives:
concepts that no image of the batch has</summary>
{% for n in s.negatives %}<span class="negative">{{ n }}</span>{{ ", " if not loop.last }}
{% endfor %}</details>
{% endfor %}
</html>
"""


def render(sections: list[dict]) -> str:
    """Return the HTML of the page, with everything from the data escaped."""
    return jinja2.Environment(autoescape=True).from_string(_PAGE).render(sections=sections)


if __name__ == "__main__":
    run_with_config(main)
