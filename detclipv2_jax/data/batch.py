"""The type that carries one step's data to the devices."""

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int, UInt8

from detclipv2_jax.data.index import Kind


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The data of one global step, all of one kind and one static shape.

    Boxes are (x_min, y_min, x_max, y_max) in absolute pixels of the canvas, continuous coordinates.
    A slot without an image (at the end of an epoch, or for an unreadable record) has size (0, 0),
    no box and no text; every loss ignores it.
    """

    images: UInt8[Array, "B H W 3"]  # each image in the top-left corner of its canvas, then zeros
    sizes: Int[Array, "B 2"]  # (height, width) of each image on its canvas, in pixels
    boxes: Float[Array, "B N 4"]  # zeros pad
    # Rows of `tokens` that name each box, first ones first; -1 pads. A box without any is neither
    # object nor background: none of its concepts has a row.
    labels: Int[Array, "B N L"]
    # Concepts that each image may be scored on as a negative. What names a box is a positive of its
    # anchors whatever stands here. (B, 0) for kinds with texts: each is compared with every image.
    scored: Bool[Array, "B M"]
    # Rows of `tokens` of the image; -1 pads. image_text: the caption first; classification: C = 1,
    # the class name.
    texts: Int[Array, "B C"]
    tokens: Int[Array, "M L"]  # the step's concepts, each once for the whole global batch
    token_mask: Bool[Array, " M"]  # False: an unused row of the table
    kind: Kind = dataclasses.field(metadata={"static": True})

    @property
    def canvas(self) -> tuple[int, int]:
        """(height, width) of the canvas in pixels."""
        return self.images.shape[1], self.images.shape[2]
