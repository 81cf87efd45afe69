"""2-D convolution, with the fastest implementation for each platform.

GPU and TPU use XLA's convolution. XLA:CPU has four slow cases (seen with jax 0.10 on 2 cores). The implementations here
avoid them and compute the same function:

- im2col, where the kernel is large and the picture small. XLA's convolution runs there at a few percent of a matmul's
  speed (16 ms against 0.6 ms for 512 -> 256 channels at 2 x 2). im2col concatenates the 3 x 3 neighbourhoods and
  multiplies them by the kernel as one matrix.
- The gradient with respect to the input is a convolution whose kernel is flipped and transposed by its layout only.
  Inside a ``while`` loop XLA has no fast routine for that layout (10 times slower). So the kernel is really flipped and
  transposed first.
- The gradient of a strided convolution is a dilated convolution, for which there is no fast routine: im2col again.
- XLA computes bfloat16 convolutions in float32. As one matmul for each kernel tap, with float32 results, they use the
  bfloat16 instructions of newer CPUs (see `ti_jax.ops.matmul`).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ti_jax.ops.matmul import float32_product, matmul
from ti_jax.ops.platform import current

Padding = tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right)

DIMENSIONS = ("NHWC", "HWIO", "NHWC")

# im2col is faster where in_channels * out_channels > this * output height * output width.
IM2COL_KERNEL_PER_PIXEL = 2048
# With fewer channels in or out, the matmul of a kernel tap is too thin to be fast.
TAPS_LEAST_CHANNELS = 32


def conv2d(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: Padding = ((0, 0), (0, 0))) -> jax.Array:
    """Cross-correlation with zero padding, as ``torch.nn.functional.conv2d``.

    Args:
      x: [B, H, W, C].
      kernel: [kh, kw, C, O], in the dtype of `x`.
      stride: pixels from one output to the next, along both axes.
      padding: zeros around the picture.

    Returns:
      [B, H', W', O], in the dtype of `x`.
    """
    if kernel.shape[:2] == (1, 1) and stride == 1 and padding == ((0, 0), (0, 0)):
        return matmul(x, kernel[0, 0])
    if current().name == "cpu":
        return _conv2d_on_cpu(stride, padding, x, kernel)
    return _convolution(stride, padding, x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv2d_on_cpu(stride: int, padding: Padding, x: jax.Array, kernel: jax.Array) -> jax.Array:
    if _suits_taps(kernel):
        return _by_taps(stride, padding, x, kernel)
    if _kernel_outweighs_picture(x, kernel, stride):
        return _im2col(stride, padding, x, kernel)
    return _convolution(stride, padding, x, kernel)


def _conv2d_forward(
    stride: int, padding: Padding, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _conv2d_on_cpu(stride, padding, x, kernel), (x, kernel)


def _conv2d_backward(
    stride: int, padding: Padding, residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    if _suits_taps(kernel):
        to_x = _gradient_by_taps(stride, padding, x.shape, gradient, kernel)
    elif stride != 1 or _kernel_outweighs_picture(x, kernel, stride):
        (to_x,) = jax.linear_transpose(lambda x: _im2col(stride, padding, x, kernel), x)(gradient)
    else:
        to_x = _convolution_with_flipped_kernel(padding, gradient, kernel)
    # Frozen weights need no gradient; the compiler then removes this as dead code.
    (to_kernel,) = jax.linear_transpose(lambda kernel: _convolution(stride, padding, x, kernel), kernel)(gradient)
    return to_x, to_kernel


_conv2d_on_cpu.defvjp(_conv2d_forward, _conv2d_backward)


def _suits_taps(kernel: jax.Array) -> bool:
    return kernel.dtype == jnp.bfloat16 and min(kernel.shape[2:]) >= TAPS_LEAST_CHANNELS


def _kernel_outweighs_picture(x: jax.Array, kernel: jax.Array, stride: int) -> bool:
    pixels = x.shape[1] * x.shape[2] // stride**2
    return kernel.shape[2] * kernel.shape[3] > IM2COL_KERNEL_PER_PIXEL * pixels


def _convolution(stride: int, padding: Padding, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=DIMENSIONS)


def _convolution_with_flipped_kernel(padding: Padding, gradient: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transpose of the stride-1 convolution: correlate the gradient with the flipped, transposed kernel."""
    flipped = jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2)
    return _convolution(1, _transposed_padding(padding, kernel), gradient, flipped)


def _transposed_padding(padding: Padding, kernel: jax.Array) -> Padding:
    """Padding of the transposed convolution (stride 1)."""
    height, width = kernel.shape[:2]
    (top, bottom), (left, right) = padding
    return (height - 1 - top, height - 1 - bottom), (width - 1 - left, width - 1 - right)


def _seen_by_taps(stride: int, padding: Padding, x: jax.Array, kernel: jax.Array) -> list[jax.Array]:
    """Slices of the padded picture that the kernel taps multiply, in row-major order: [B, H', W', C] each."""
    height, width = kernel.shape[:2]
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = (
        (size - window) // stride + 1 for size, window in zip(padded.shape[1:3], (height, width), strict=True)
    )
    return [
        padded[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride]
        for i, j in np.ndindex(height, width)
    ]


def _im2col(stride: int, padding: Padding, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """im2col: neighbourhoods [B * H' * W', kh * kw * C] times kernel [kh * kw * C, O].

    In float32, so that its transpose also sums overlapping neighbourhoods in float32, as a convolution does.
    """
    seen = jnp.concatenate(_seen_by_taps(stride, padding, x.astype(jnp.float32), kernel), axis=-1)
    product = seen.reshape(-1, seen.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1]).astype(jnp.float32)
    return product.astype(x.dtype).reshape(*seen.shape[:-1], -1)


def _by_taps(stride: int, padding: Padding, x: jax.Array, kernel: jax.Array, transposed: bool = False) -> jax.Array:
    """Sum over the kernel taps [C, O] of the shifted picture times the tap; in float32, then rounded.

    With `transposed` the taps are read in reverse order and as [O, C], without a transposed copy of the kernel.
    """
    seen = _seen_by_taps(stride, padding, x, kernel)
    total = jnp.float32(0)
    for (i, j), part in zip(np.ndindex(*kernel.shape[:2]), seen, strict=True):
        tap = kernel[-1 - i, -1 - j] if transposed else kernel[i, j]
        total += float32_product(part.reshape(-1, x.shape[-1]), tap, (1, 1 if transposed else 0))
    return total.astype(x.dtype).reshape(*seen[0].shape[:-1], -1)


def _gradient_by_taps(
    stride: int, padding: Padding, shape: tuple[int, ...], gradient: jax.Array, kernel: jax.Array
) -> jax.Array:
    """Gradient of `_by_taps` with respect to pictures of `shape`."""
    if stride == 1:
        return _by_taps(1, _transposed_padding(padding, kernel), gradient, kernel, transposed=True)
    (top, bottom), (left, right) = padding
    sizes = (shape[1] + top + bottom, shape[2] + left + right)
    rows = gradient.reshape(-1, gradient.shape[-1])
    total = jnp.float32(0)
    for tap in np.ndindex(*kernel.shape[:2]):
        part = float32_product(rows, kernel[tap], (1, 1)).reshape(*gradient.shape[:3], -1)
        places = (
            (first, size - first - (stride * (count - 1) + 1), stride - 1)
            for first, size, count in zip(tap, sizes, gradient.shape[1:3], strict=True)
        )
        total += lax.pad(part, jnp.float32(0), ((0, 0, 0), *places, (0, 0, 0)))
    return total[:, top : sizes[0] - bottom, left : sizes[1] - right].astype(gradient.dtype)
