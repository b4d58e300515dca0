"""The data section of a run's config: what each kind of data takes from the prepared sources."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import KINDS, TEXT_KINDS, Kind
from detclipv2_jax.text.tokenizer import TEMPLATE, check_template

AUTO = "auto"  # as "auto:FILE" in some fields: that file or directory, if it exists


@dataclasses.dataclass(frozen=True)
class KindConfig:
    """One kind of data: its sources, its batches, and how its images are augmented."""

    RENAMED = {"accumulate": "micro_batches", "negatives": "concepts_per_image"}

    sources: tuple[str, ...] = ()  # directories of prepared sources, relative to data_dir; () = off
    # Prepared sources of the pre-training, repeated in part so that fine-tuning does not forget
    # them [ours].
    rehearsal: tuple[str, ...] = ()
    rehearsal_share: float = 0.25  # their records per epoch, per record of all kinds' `sources`
    repeat: int = 1  # passes over `sources` per epoch, each in an order of its own
    batch_size: int = 128  # images per global step
    micro_batches: int = 1  # pieces of each device's images in a step: less memory, the same step
    # Canvases (height, width) in pixels; each record goes to the one of nearest aspect.
    shapes: tuple[tuple[int, int], ...] = ((800, 1344), (1344, 800), (1088, 1088))
    table_size: int = 512  # rows of the step's concept table
    # Concepts an image is scored on, its own included, the rest drawn at random (paper §4.1:
    # detection 150, grounding 100); 0 draws none.
    concepts_per_image: int = 150
    # Detection: an image that draws fewer negatives from the names of its source, because there are
    # few, draws names of WordNet for the rest [ours] (general_names.py); 0 draws none.
    general_negatives: int = 0
    # Concepts that an image is scored on as negatives, of those in the step's table: all of them
    # (paper §3.1), the names of its own source, or only its own concepts and the negatives that
    # were drawn for it.
    scored_on: Literal["table", "source", "own"] = "table"
    # Concepts of other images that are not negatives of an image [ours]: "synonyms" of its own
    # concepts (by the dictionary), and those of the same head noun ("heads").
    ignore_alike: tuple[Literal["synonyms", "heads"], ...] = ()
    # Score images of federated sources (LVIS) only on their own names and those listed as absent.
    federated: bool = False
    max_boxes: int = 100  # boxes per canvas, the largest first; the others are dropped and counted
    labels_per_box: int = 1  # concepts that may name one box; the others are dropped and counted
    # image_text: concepts per image, the caption first (ours: 8). classification: 1, the class name
    texts_per_image: int = 0
    # Probability of a horizontal flip. An image with a concept that says left or right is never
    # flipped [ours].
    flip: float = 0.5
    # Each step draws one of these factors of its canvas's sides [ours]: all images of the step are
    # smaller, and little of the canvas is padding. Ascending; the last is 1, the canvas itself.
    rungs: tuple[float, ...] = (1.0,)
    # A schedule of resolutions over the run: (first epoch, weight of each rung) of each phase, like
    # ((0, (1, 1, 0)), (9, (0, 0, 1))). (): throughout, each rung in proportion to its factor.
    rung_phases: tuple[tuple[float, tuple[float, ...]], ...] = ()
    # Range of random image sizes, relative to the size that just fits the step's canvas. On an
    # 800 x 1344 canvas (0.6, 1.0) is multi-scale training with short sides 480 to 800. With the
    # rungs (0.72, 0.84, 1.0), (0.834, 1.0) is the same range.
    scales: tuple[float, float] = (0.6, 1.0)
    crop: bool = False  # True: an image larger than its canvas is cropped at random; False: shrunk
    mosaic: float = 0.0  # share of canvases with four images (kinds with boxes); raise max_boxes
    begin: float = 0.0  # share of the first epoch's other batches before this kind's (paper: 0)
    definitions: bool = False  # join names with their definitions; needs a dictionary
    # Probability that a step encodes a name without its definition, so that the model also learns
    # the bare names that people type [ours].
    definitions_drop: float = 0.0

    @property
    def all_sources(self) -> tuple[str, ...]:
        """Every source of the kind: `sources`, then `rehearsal`."""
        return self.sources + self.rehearsal


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What each kind of data takes from the prepared sources."""

    RENAMED = {"concepts": "dictionary"}

    prepare: str = ""  # the command that prepares the data, shown where the data is missing
    skip_missing: bool = False  # train without the kinds whose sources are missing
    # Directory of the prepared dictionary, relative to data_dir; "" = none; "auto:DIR": that one if
    # it exists, else names are trained without definitions.
    dictionary: str = ""
    # Table of your own definitions, relative to data_dir, used before the dictionary's: name,
    # synset, definition, separated by tabs, with this header; "" = none.
    definitions_file: str = ""
    # The names of the detection data are a closed label space: no text tower, plain ATSS
    # (models/closed_set.py).
    closed_set: bool = False
    template: str = TEMPLATE  # of a name with its definition; cut to 16 tokens at a word's end
    detection: KindConfig = KindConfig(definitions=True, scored_on="source")
    grounding: KindConfig = KindConfig()
    image_text: KindConfig = KindConfig()
    classification: KindConfig = KindConfig(texts_per_image=1, max_boxes=0, concepts_per_image=0)
    max_broken_share: float = 0.05  # share of a source's records that may be unreadable

    def __post_init__(self):
        check_template(self.template, "config.data.template")
        if self.definitions_file and not self.dictionary:
            raise UserError(
                "config.data.definitions_file is set, but names are encoded without definitions. "
                "Set config.data.dictionary too."
            )
        for kind, config in self.kinds().items():
            check_kind(kind, config)
            if "synonyms" in config.ignore_alike and not self.dictionary:
                raise UserError(
                    f"config.data.{kind}.ignore_alike names synonyms, which only a dictionary "
                    "knows. Set config.data.dictionary, or remove 'synonyms'."
                )

    def kinds(self) -> dict[Kind, KindConfig]:
        """The kinds that have a source, by name."""
        every = {kind: getattr(self, kind) for kind in KINDS}
        return {kind: config for kind, config in every.items() if config.all_sources}


_LEAST = {
    "rehearsal_share": 0,
    "repeat": 1,
    "batch_size": 1,
    "table_size": 1,
    "concepts_per_image": 0,
    "general_negatives": 0,
    "max_boxes": 0,
    "labels_per_box": 1,
    "texts_per_image": 0,
}


def check_kind(kind: Kind, config: KindConfig) -> None:
    """Check the values of `config.data.KIND`.

    Raises:
        UserError: a value is out of its range; names the field.
    """

    def check(field: str, is_valid: bool, rule: str) -> None:
        if not is_valid:
            value = getattr(config, field)
            raise UserError(f"config.data.{kind}.{field} is {value!r}. It must be {rule}.")

    for field, least in _LEAST.items():
        check(field, getattr(config, field) >= least, f"at least {least}")
    is_canvas = bool(config.shapes) and min(map(min, config.shapes)) >= 1
    check("shapes", is_canvas, "a list of (height, width) of at least 1 pixel")
    check("definitions_drop", 0 <= config.definitions_drop <= 1, "a probability, from 0 to 1")
    check("flip", 0 <= config.flip <= 1, "a probability, from 0 to 1")
    is_range = len(config.scales) == 2 and 0 < config.scales[0] <= config.scales[1]
    check("scales", is_range, "(low, high) with 0 < low <= high")
    rungs = config.rungs
    is_ladder = bool(rungs) and rungs[0] > 0 and rungs[-1] == 1 and list(rungs) == sorted({*rungs})
    check("rungs", is_ladder, "factors above 0, ascending, the last of them 1")
    begins = [begin for begin, _ in config.rung_phases]
    is_schedule = not begins or (begins[0] == 0 and begins == sorted({*begins}))
    is_schedule &= all(_are_weights(weights, len(rungs)) for _, weights in config.rung_phases)
    rule = "(first epoch, weight of each rung) of each phase, ascending, the first from epoch 0"
    check("rung_phases", is_schedule, rule)
    check("begin", 0 <= config.begin < 1, "at least 0 and below 1")
    if kind in TEXT_KINDS:
        check("mosaic", config.mosaic == 0, f"0: {kind} data has no mosaics")
    check("mosaic", 0 <= config.mosaic <= 1, "from 0 to 1")
    _check_scoring(kind, config, check)
    is_disjoint = not set(config.rehearsal) & set(config.sources)
    check("rehearsal", is_disjoint, "without the names that are in `sources`")


def _are_weights(weights: tuple[float, ...], count: int) -> bool:
    """Return whether these are weights for `count` rungs: none negative, and one above 0."""
    return len(weights) == count and min(weights) >= 0 and max(weights) > 0


def _check_scoring(kind: Kind, config: KindConfig, check: Callable[[str, bool, str], None]) -> None:
    """Check which concepts an image is scored on; `check` raises with the field's name."""
    if kind != "detection":
        # Only a list of names that somebody looked for says what is absent.
        none = config.general_negatives == 0
        check("general_negatives", none, "0: only detection data has lists of names")
        check("federated", not config.federated, "False: only detection data has lists of names")
        is_open = config.scored_on != "source"
        check("scored_on", is_open, '"table" or "own": only detection data has lists of names')
    if kind in TEXT_KINDS:
        rule = "the default: texts are compared with all images of the batch"
        check("scored_on", config.scored_on == "table", rule)
        check("ignore_alike", not config.ignore_alike, rule)
    if config.general_negatives:
        rule = 'above 0 with scored_on "source" or "own" only'
        check("general_negatives", config.scored_on != "table", rule)
        check("concepts_per_image", config.concepts_per_image > 0, "above 0 to draw negatives")
    if config.federated:
        check(
            "scored_on", config.scored_on != "table", '"source" or "own" where `federated` is set'
        )
