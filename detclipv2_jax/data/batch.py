"""The types that travel between rooms on the device: a batch in, detections out."""

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int, UInt8

from detclipv2_jax.data.index import Kind


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One global step's data, all of one kind and one static shape.

    Boxes are (x_min, y_min, x_max, y_max) in absolute pixels of the canvas, continuous coordinates.
    A slot without an image (the padded tail of an epoch, an unreadable record) has size (0, 0), no
    box and no text; every loss ignores it.
    """

    images: UInt8[Array, "B H W 3"]  # the picture in the top-left corner, zeros around it
    sizes: Int[Array, "B 2"]  # valid (height, width) of each picture on its canvas, in pixels
    boxes: Float[Array, "B N 4"]
    labels: Int[Array, "B N"]  # row of `tokens` that names the box; -1: no box, or none of them
    texts: Int[
        Array, "B C"
    ]  # image_text: rows of `tokens` that belong to the image, caption first; -1 pads
    tokens: Int[Array, "M L"]  # the step's concepts, each once for the whole global batch
    token_mask: Bool[Array, " M"]  # False: an unused row of the table
    kind: Kind = dataclasses.field(metadata={"static": True})
