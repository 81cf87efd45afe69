"""Matrix products of bfloat16 numbers, in the form that each platform runs fastest.

GPU and TPU sum bfloat16 products in float32 on their own. XLA on CPU computes a bfloat16 product whose result is
bfloat16 in float32 from beginning to end; asked for a float32 result, it uses the bfloat16 instructions that newer CPUs
have, which are twice as fast as float32's, and up to eight times where the CPU multiplies whole tiles (AMX). So do its
gradients, if they are written as such products, and if none of them is over the first axis of both matrices: those
XLA computes in float32, so that one of the two is turned first.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x @ kernel``: [..., C], [C, O] -> [..., O], of the dtype of `x`; sums are float32."""
    if x.dtype == kernel.dtype == jnp.bfloat16:
        return _bfloat16_matmul(x, kernel)
    return x @ kernel


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None) -> jax.Array:
    """`matmul` with the arguments of `jax.lax.dot_general`, for `flax.linen.Dense`, which asks for nothing else."""
    if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())) or precision is not None:
        raise ValueError(f"dot_general: {dimension_numbers} with precision {precision} is not x @ kernel")
    return matmul(x, kernel)


def exact_products(dtype: Any) -> contextlib.AbstractContextManager[None]:
    """While tracing what computes in `dtype`: products of float32 numbers have float32's precision.

    Left alone, a TPU multiplies float32 numbers as bfloat16, and an NVIDIA GPU since Ampere as TF32.
    """
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else contextlib.nullcontext()


def float32_product(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product over axis ``contract[0]`` of `x` and ``contract[1]`` of `y`, two matrices, as float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def product_over_rows(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x^T y`` of two matrices of bfloat16, [N, C] and [N, O]: [C, O] of bfloat16; sums are float32."""

    def on_cpu(x: jax.Array, y: jax.Array) -> jax.Array:
        if x.shape[1] <= y.shape[1]:
            return float32_product(turned(x), y, (1, 0)).astype(x.dtype)
        return turned(float32_product(turned(y), x, (1, 0)).astype(x.dtype))

    return lax.platform_dependent(x, y, cpu=on_cpu, default=lambda x, y: jnp.matmul(x.T, y))


def turned(x: jax.Array) -> jax.Array:
    """The transpose of a matrix, laid out in memory, whatever it is used for.

    XLA would take the transpose into a product before or behind it, through a barrier, too, and then find no bfloat16
    instructions for that. It does not look through a loop whose count it cannot know; this one runs once.
    """
    once = jnp.where(jnp.isnan(x[0, 0]), 2, 1)
    return lax.fori_loop(0, once, lambda _, __: x.T, jnp.zeros(x.shape[::-1], x.dtype))


@jax.custom_vjp
def _bfloat16_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    def on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
        product = float32_product(x.reshape(-1, x.shape[-1]), kernel, (1, 0))
        return product.astype(x.dtype).reshape(*x.shape[:-1], kernel.shape[1])

    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=jnp.matmul)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _bfloat16_matmul(x, kernel), (x, kernel)


def _backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    rows, gradients = (array.reshape(-1, array.shape[-1]) for array in (x, gradient))
    to_x = float32_product(gradients, kernel, (1, 1)).astype(x.dtype).reshape(x.shape)
    # Of no use to frozen weights, and then dropped by the compiler.
    to_kernel = product_over_rows(rows, gradients)
    return to_x, to_kernel


_bfloat16_matmul.defvjp(_forward, _backward)
