"""Matrix products in the form that each platform runs fastest, and of the precision that is meant.

XLA on CPU has two weak spots:

- A chain of layers over [B, L, C] is slower than over [B * L, C]: its gradients by a fifth.
- A bfloat16 product whose result is bfloat16 is computed in float32 from beginning to end. Asked for a float32 result,
  XLA uses the bfloat16 instructions that newer CPUs have, twice as fast as float32's, and up to eight times where the
  CPU multiplies whole tiles (AMX). So does the gradient, if it is written as such a product.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ti_jax.ops.platform import current


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x @ kernel``: [..., C], [C, O] -> [..., O], of the dtype of `x`; sums are float32."""
    if current().name != "cpu":
        return x @ kernel
    product = _bfloat16_matmul if x.dtype == kernel.dtype == jnp.bfloat16 else jnp.matmul
    return product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[1])


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


@jax.custom_vjp
def _bfloat16_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return float32_product(x, kernel, (1, 0)).astype(x.dtype)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _bfloat16_matmul(x, kernel), (x, kernel)


def _backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    to_x = float32_product(gradient, kernel, (1, 1)).astype(x.dtype)
    # Of no use to frozen weights, and then dropped by the compiler. (Over the first axis of both matrices XLA has no
    # bfloat16 instructions.)
    return to_x, x.T @ gradient


_bfloat16_matmul.defvjp(_forward, _backward)
