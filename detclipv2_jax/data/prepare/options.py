"""The options of preparation that do not depend on the source."""

import dataclasses
import os

from detclipv2_jax.text import phrases as phrases_lib


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """How examples become records, and with how many processes."""

    phrase_model: str | None = None  # spaCy pipeline; None: the first installed of phrases.MODELS
    phrase_limit: int = phrases_lib.LIMIT  # noun phrases per caption, the caption not counted
    store_side: int | None = None  # pixels; longest side of a stored image with texts
    jobs: int = max(1, os.cpu_count() or 1)  # processes that decode images and parse captions
