"""3×3 convolution whose kernel gradient is matrix products on CPUs, where XLA's is slow.

XLA takes the gradient by the kernel as a convolution whose window is the whole map, and on a CPU
that runs at a quarter of the speed of the forward pass (docs/performance_cpu.md). Everything else,
and every other platform, is XLA's own.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Pixels of an image that one product takes: its operands then stay in a cache, more or less.
_BLOCK = 2048
# Multiplications a tap from which the products repay the tenth of a second that they compile.
_WORTH = 1 << 25


@jax.custom_vjp
def conv3x3(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C O"]) -> Float[Array, "B H W O"]:
    """Convolution with stride 1 and one pixel of zeros on every side."""
    return _convolve(x, kernel)


def _convolve(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _forward(x, kernel):
    return _convolve(x, kernel), (x, kernel)


def _backward(saved, gradient):
    x, kernel = saved
    (by_x,) = jax.linear_transpose(lambda x: _convolve(x, kernel), x)(gradient)
    if x.size * kernel.shape[-1] < _WORTH:
        return by_x, kernel_gradient_by_convolution(x, gradient)
    by_kernel = jax.lax.platform_dependent(
        x, gradient, cpu=kernel_gradient_by_products, default=kernel_gradient_by_convolution
    )
    return by_x, by_kernel


conv3x3.defvjp(_forward, _backward)


def kernel_gradient_by_convolution(
    x: Float[Array, "B H W C"], gradient: Float[Array, "B H W O"]
) -> Float[Array, "3 3 C O"]:
    """The kernel's gradient as automatic differentiation has it."""
    kernel = jax.ShapeDtypeStruct((3, 3, x.shape[-1], gradient.shape[-1]), x.dtype)
    return jax.linear_transpose(lambda kernel: _convolve(x, kernel), kernel)(gradient)[0]


def kernel_gradient_by_products(
    x: Float[Array, "B H W C"], gradient: Float[Array, "B H W O"]
) -> Float[Array, "3 3 C O"]:
    """The kernel's gradient as one matrix product for every block of rows.

    The tap (i, j) sums x[h + i - 1, w + j - 1] · gradient[h, w] over the map. Counted from the row
    of x instead, that is x[h, w + j - 1] · gradient[h - i + 1, w]: three shifts of x by columns and
    three of the gradient by rows, and all nine taps are a single product of the two.
    """
    _, height, width, channels = x.shape
    blocks = max(1, min(height, round(height * width / _BLOCK)))
    rows = -(-height // blocks)
    blocks = -(-height // rows)
    below = blocks * rows - height
    x = jnp.pad(x, ((0, 0), (0, below), (1, 1), (0, 0)))
    gradient = jnp.pad(gradient, ((0, 0), (1, 1 + below), (0, 0), (0, 0)))
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def product(top, equation):
        here = jax.lax.dynamic_slice_in_dim(x, top, rows, axis=1)
        near = jax.lax.dynamic_slice_in_dim(gradient, top, rows + 2, axis=1)
        here = jnp.concatenate([here[:, :, j : j + width] for j in range(3)], axis=-1)
        near = jnp.concatenate([near[:, 2 - i : 2 - i + rows] for i in range(3)], axis=-1)
        return jnp.einsum(equation, here, near, preferred_element_type=wide)

    if blocks == 1:
        total = product(0, "bhwc,bhwo->co")
    else:
        # Image by image inside the loop: of images on several devices, one sum travels at the end.
        add = lambda total, top: (total + product(top, "bhwc,bhwo->bco"), None)
        start = jnp.zeros((len(x), 3 * channels, 3 * gradient.shape[-1]), wide)
        total = jax.lax.scan(add, start, rows * jnp.arange(blocks))[0].sum(axis=0)
    total = total.reshape(3, channels, 3, -1).transpose(2, 0, 1, 3)  # it came as (j, C, i, O)
    return total.astype(x.dtype)
