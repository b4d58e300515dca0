"""Feature pyramid network: three backbone maps in, five maps of equal channels out."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from detclipv2_jax.models.initializers import Draws, xavier
from detclipv2_jax.models.padding import zero_padding
from detclipv2_jax.ops import conv


def conv3x3(
    width: int, out: int, dtype, rngs: Draws, *, stride=1, use_bias=True, kernel_init
) -> nnx.Conv:
    """Return a 3×3 convolution layer that pads one pixel of zeros on every side.

    The padding is explicit because 'SAME' pads a strided convolution only at the bottom and the
    right, unlike the reference implementations.
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
    """Call `ops.conv.conv3x3`, whose stride and padding equal those that Flax passes."""
    return conv.conv3x3(x, kernel)


def upsample_to(
    coarse: Float[Array, "B H W C"], fine: Float[Array, "B H2 W2 C"]
) -> Float[Array, "B H2 W2 C"]:
    """Upsample to exactly the size of `fine` by nearest-neighbor interpolation.

    A stride-2 stage turns n pixels into m = ⌈n/2⌉, so `fine` has 2m or 2m - 1 pixels per side.
    Nearest interpolation to that size repeats every pixel twice and crops.
    """
    batch, height, width, channels = coarse.shape
    shape = (batch, height, 2, width, 2, channels)
    x = jnp.broadcast_to(coarse[:, :, None, :, None], shape)
    x = x.reshape(batch, 2 * height, 2 * width, channels)
    return x[:, : fine.shape[1], : fine.shape[2]]


class FPN(nnx.Module):
    """FPN (Lin et al. 2017) with two extra levels by stride-2 convolutions, as in ATSS.

    P6 is computed from P5's output and P7 from P6, with no activation in between.

    Args:
        in_channels: channels of the incoming maps, fine to coarse.
        channels: channels of every outgoing map.
        coarse_gain: factor on the initial laterals of all maps but the finest.
        dtype: of the activations.
        rngs: initializes the parameters (Xavier, like the reference implementation).
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

    @jax.named_scope("neck")
    def __call__(
        self,
        maps: tuple[Float[Array, "B H W C"], ...],
        extents: Int[Array, "B 5 2"] | None = None,
    ) -> tuple[Float[Array, "B H2 W2 D"], ...]:
        """Return P3 to P7 (strides 8 to 128) from the backbone's maps of strides 8, 16 and 32.

        Args:
            maps: the backbone's maps.
            extents: of each image on each level (`level_extents`). Beyond them every convolution
                reads zeros, as beyond the canvas, and the returned levels are zero. None: what
                the backbone computed there counts like the image.
        """
        masked = lambda x, level: zero_padding(x, None if extents is None else extents[:, level])
        merged = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        merged[-1] = masked(merged[-1], len(merged) - 1)
        for level in reversed(range(len(merged) - 1)):
            up = upsample_to(merged[level + 1], merged[level])
            merged[level] = masked(merged[level] + up, level)
        levels = []
        for level, (output, x) in enumerate(zip(self.output, merged, strict=True)):
            levels.append(masked(output(x), level))
        for level, extra in enumerate(self.extra, len(levels)):
            levels.append(masked(extra(levels[-1]), level))
        return tuple(levels)
