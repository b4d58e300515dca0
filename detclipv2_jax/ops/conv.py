"""3×3 convolution whose kernel gradient is computed by matrix products on CPUs.

XLA computes the gradient of the kernel as a convolution whose window is the whole map. On a CPU
that runs at a quarter of the speed of the forward pass (docs/performance_cpu.md). Everything else,
and every other platform, uses XLA's own operations.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Pixels of an image per matrix product: its operands then mostly stay in the cache.
_BLOCK = 2048
# Multiplications per tap from which the products are worth the 0.1 s that they take to compile.
_WORTH = 1 << 25


@jax.custom_vjp
def conv3x3(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C O"]) -> Float[Array, "B H W O"]:
    """Return the 3×3 convolution with stride 1 and one pixel of zeros on every side."""
    return _convolve(x, kernel)


def _convolve(x, kernel, dtype=None):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=dtype,
    )


def _forward(x, kernel):
    return _convolve(x, kernel), (x, kernel)


def _backward(saved, grad_out):
    x, kernel = saved
    (grad_x,) = jax.linear_transpose(lambda x: _convolve(x, kernel), x)(grad_out)
    if x.size * kernel.shape[-1] < _WORTH:
        return grad_x, kernel_gradient_by_convolution(x, grad_out)
    grad_kernel = jax.lax.platform_dependent(
        x, grad_out, cpu=kernel_gradient_by_products, default=kernel_gradient_by_convolution
    )
    return grad_x, grad_kernel


conv3x3.defvjp(_forward, _backward)


@jax.custom_vjp
def conv3x3_float32(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C O"]
) -> Float[Array, "B H W O"]:
    """Return `conv3x3` of a bfloat16 map and a float32 kernel, with the precision of float32.

    Neither the kernel nor the result is rounded to bfloat16. The gradient is that of `conv3x3`,
    computed in x's dtype. For a float32 map the function is `conv3x3`.
    """
    if x.dtype == jnp.float32:
        return _convolve(x, kernel)
    parts = jnp.concatenate(high_and_low(kernel), axis=-1).astype(x.dtype)
    high, low = jnp.split(_convolve(x, parts, jnp.float32), 2, axis=-1)
    return high + low


def high_and_low(kernel: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Split float32 values into two that survive rounding to bfloat16; their sum has 16 bits.

    Both are float32, and the sum has the gradient of `kernel`.
    """
    # Not a cast to bfloat16 and back: XLA may remove it.
    high = jax.lax.stop_gradient(jax.lax.reduce_precision(kernel, exponent_bits=8, mantissa_bits=7))
    return high, kernel - high


def _float32_backward(saved, grad_out):
    x, kernel = saved
    grad_x, grad_kernel = _backward((x, kernel.astype(x.dtype)), grad_out.astype(x.dtype))
    return grad_x, grad_kernel.astype(kernel.dtype)


conv3x3_float32.defvjp(
    lambda x, kernel: (conv3x3_float32(x, kernel), (x, kernel)), _float32_backward
)


def kernel_gradient_by_convolution(
    x: Float[Array, "B H W C"], grad_out: Float[Array, "B H W O"]
) -> Float[Array, "3 3 C O"]:
    """Return the gradient of the kernel as automatic differentiation computes it.

    Args:
      x: the input of the convolution.
      grad_out: the gradient of its output.
    """
    kernel = jax.ShapeDtypeStruct((3, 3, x.shape[-1], grad_out.shape[-1]), x.dtype)
    return jax.linear_transpose(lambda kernel: _convolve(x, kernel), kernel)(grad_out)[0]


def kernel_gradient_by_products(
    x: Float[Array, "B H W C"], grad_out: Float[Array, "B H W O"]
) -> Float[Array, "3 3 C O"]:
    """Return the gradient of the kernel, computed by one matrix product per block of rows.

    The gradient of tap (i, j) is the sum of x[h + i - 1, w + j - 1] · grad_out[h, w] over the map.
    Indexed by the row of x instead, it is the sum of x[h, w + j - 1] · grad_out[h - i + 1, w]. With
    three shifts of x by columns and three shifts of the gradient by rows, all nine taps are a
    single product. Sums are float32; the result has x's dtype.

    Args:
      x: the input of the convolution.
      grad_out: the gradient of its output.
    """
    _, height, width, channels = x.shape
    blocks = max(1, min(height, round(height * width / _BLOCK)))
    rows = -(-height // blocks)
    blocks = -(-height // rows)
    below = blocks * rows - height
    x = jnp.pad(x, ((0, 0), (0, below), (1, 1), (0, 0)))
    grad_out = jnp.pad(grad_out, ((0, 0), (1, 1 + below), (0, 0), (0, 0)))
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def product(top, equation):
        here = jax.lax.dynamic_slice_in_dim(x, top, rows, axis=1)
        near = jax.lax.dynamic_slice_in_dim(grad_out, top, rows + 2, axis=1)
        here = jnp.concatenate([here[:, :, j : j + width] for j in range(3)], axis=-1)
        near = jnp.concatenate([near[:, 2 - i : 2 - i + rows] for i in range(3)], axis=-1)
        return jnp.einsum(equation, here, near, preferred_element_type=wide)

    if blocks == 1:
        total = product(0, "bhwc,bhwo->co")
    else:
        # Keep the images apart within the loop: where they are on several devices, only one sum
        # is communicated, at the end.
        add = lambda total, top: (total + product(top, "bhwc,bhwo->bco"), None)
        start = jnp.zeros((len(x), 3 * channels, 3 * grad_out.shape[-1]), wide)
        total = jax.lax.scan(add, start, rows * jnp.arange(blocks))[0].sum(axis=0)
    total = total.reshape(3, channels, 3, -1).transpose(2, 0, 1, 3)  # from (j, C, i, O)
    return total.astype(x.dtype)
