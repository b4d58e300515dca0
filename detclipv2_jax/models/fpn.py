"""Feature pyramid network: three backbone maps in, five maps of equal width out."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from detclipv2_jax.models.initializers import Draws, xavier
from detclipv2_jax.ops import conv


def conv3x3(
    width: int, out: int, dtype, rngs: Draws, *, stride=1, use_bias=True, kernel_init
) -> nnx.Conv:
    """3×3 convolution with one pixel of zeros on every side.

    The padding is explicit because 'SAME' pads a strided convolution at the bottom and right only,
    which is another layer than the references'.
    """
    return nnx.Conv(
        width,
        out,
        (3, 3),
        strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        use_bias=use_bias,
        kernel_init=kernel_init,
        conv_general_dilated=_convolve if stride == 1 else jax.lax.conv_general_dilated,
        dtype=dtype,
        rngs=rngs,
    )


def _convolve(x, kernel, *_, **__):
    """What flax passes besides is the stride and the padding that `conv.conv3x3` has."""
    return conv.conv3x3(x, kernel)


def upsample_to(
    coarse: Float[Array, "B H W C"], fine: Float[Array, "B H2 W2 C"]
) -> Float[Array, "B H2 W2 C"]:
    """Nearest-neighbor upsampling to exactly the size of `fine`.

    A stride-2 stage makes ⌈n/2⌉ of n, so `fine` is 2m or 2m - 1 wide; then repeating every pixel
    twice and cropping is what nearest interpolation to that size gives.
    """
    batch, height, width, channels = coarse.shape
    shape = (batch, height, 2, width, 2, channels)
    x = jnp.broadcast_to(coarse[:, :, None, :, None], shape)
    x = x.reshape(batch, 2 * height, 2 * width, channels)
    return x[:, : fine.shape[1], : fine.shape[2]]


class FPN(nnx.Module):
    """Lin et al. 2017 with two extra levels by stride-2 convolutions on the last output.

    These follow ATSS's defaults: P6 from P5's *output*, P7 from P6, no activation between.

    Args:
        in_channels: widths of the incoming maps, fine to coarse.
        channels: width of every outgoing map.
        coarse_gain: on the initial laterals of all but the finest map.
        dtype: of the activations.
        rngs: initializes the parameters (Xavier, as the reference's).
    """

    def __init__(
        self,
        in_channels: tuple[int, ...],
        channels: int,
        coarse_gain: float = 1.0,
        *,
        dtype=jnp.float32,
        rngs: Draws,
    ):
        gains = [1.0] + [coarse_gain] * (len(in_channels) - 1)
        self.lateral = nnx.List(
            nnx.Linear(width, channels, kernel_init=xavier(gain), dtype=dtype, rngs=rngs)
            for width, gain in zip(in_channels, gains)
        )
        self.output = nnx.List(
            conv3x3(channels, channels, dtype, rngs, kernel_init=xavier()) for _ in in_channels
        )
        self.extra = nnx.List(
            conv3x3(channels, channels, dtype, rngs, stride=2, kernel_init=xavier())
            for _ in range(2)
        )

    def __call__(
        self, maps: tuple[Float[Array, "B H W C"], ...]
    ) -> tuple[Float[Array, "B H2 W2 D"], ...]:
        """P3..P7 of the maps at strides 8, 16 and 32: strides 8, 16, 32, 64 and 128."""
        merged = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for level in reversed(range(len(merged) - 1)):
            merged[level] += upsample_to(merged[level + 1], merged[level])
        levels = [output(x) for output, x in zip(self.output, merged, strict=True)]
        for extra in self.extra:
            levels.append(extra(levels[-1]))
        return tuple(levels)
