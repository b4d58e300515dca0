"""The schema of a run's data: what each kind takes from the prepared sources."""

import dataclasses

from detclipv2_jax.data.index import KINDS
from detclipv2_jax.text.tokenizer import TEMPLATE, check_template


@dataclasses.dataclass(frozen=True)
class KindConfig:
    """One kind of data: its prepared sources, its batch, how its pictures are brought to size."""

    RENAMED = {"accumulate": "micro_batches", "negatives": "concepts_per_image"}

    sources: tuple[str, ...] = ()  # directories of prepared sources, relative to data_dir; () = off
    # Prepared sources of the pre-training that fine-tuning rehearses, so as not to forget [ours].
    rehearsal: tuple[str, ...] = ()
    rehearsal_share: float = 0.25  # their records an epoch, for each record of all kinds' `sources`
    batch_size: int = 128  # images a global step
    micro_batches: int = (
        1  # parts that each device's images are cut into: less memory, the same step
    )
    shapes: tuple[tuple[int, int], ...] = (
        (800, 1344),
        (1344, 800),
        (1088, 1088),
    )  # (height, width)
    table_size: int = 512  # rows of the step's concept table
    concepts_per_image: int = (
        150  # concepts an image asks for, its own included (paper §4.1: 150, 100)
    )
    max_boxes: int = 100  # boxes an image; more are dropped, counted
    texts_per_image: int = 0  # image_text: concepts an image, caption first (ours: 8)
    flip: float = 0.5  # chance of a horizontal flip
    scales: tuple[float, float] = (0.6, 1.0)  # size of the picture relative to fitting its canvas
    crop: bool = False  # may a picture exceed its canvas and be cropped at random?
    mosaic: float = 0.0  # share of canvases with four pictures (not image_text); raise max_boxes
    begin: float = 0.0  # share of the first epoch's other batches before this kind's (paper: 0)
    definitions: bool = False  # with a dictionary: are names joined with their definitions?


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What each kind of data takes from the prepared sources."""

    RENAMED = {"concepts": "dictionary"}

    prepare: str = ""  # the command that would make the data, shown where it is missing
    skip_missing: bool = False  # train without the kinds whose sources are not there
    dictionary: str = ""  # directory of the prepared dictionary, relative to data_dir; "" = none
    template: str = TEMPLATE  # of a name with its definition; cut to 16 tokens at a word's end
    detection: KindConfig = KindConfig(definitions=True)
    grounding: KindConfig = KindConfig()
    image_text: KindConfig = KindConfig()
    max_broken_share: float = 0.05  # a run stops once more of its records than this are unreadable

    def __post_init__(self):
        check_template(self.template, "config.data.template")

    def kinds(self) -> dict[str, KindConfig]:
        """The kinds that have a source, by name."""
        every = {kind: getattr(self, kind) for kind in KINDS}
        return {kind: c for kind, c in every.items() if c.sources or c.rehearsal}
