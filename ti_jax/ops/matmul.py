"""Matmul, with the fastest implementation for each platform and the intended precision.

XLA:CPU has two slow cases:

- Layers over [B, L, C] are slower than over [B * L, C]: gradients of a chain of them by a fifth. So `matmul` flattens.
- A bfloat16 matmul with a bfloat16 result is computed entirely in float32. With a float32 result
  (``preferred_element_type``) XLA uses the bfloat16 instructions of newer CPUs: twice as fast as float32, up to eight
  times with AMX. The same holds for the gradient, if it is written as such a matmul.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ti_jax.ops.platform import current


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x @ kernel``: [..., C], [C, O] -> [..., O], in the dtype of `x`; accumulated in float32."""
    if current().name != "cpu":
        return x @ kernel
    product = _bfloat16_matmul if x.dtype == kernel.dtype == jnp.bfloat16 else jnp.matmul
    return product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[1])


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None) -> jax.Array:
    """`matmul` with the signature of `jax.lax.dot_general`, for `flax.linen.Dense`, which needs no other case."""
    if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())) or precision is not None:
        raise ValueError(f"dot_general: {dimension_numbers} with precision {precision} is not x @ kernel")
    return matmul(x, kernel)


def exact_products(dtype: Any) -> contextlib.AbstractContextManager[None]:
    """Context to trace a computation of `dtype` in: float32 matmuls get full float32 precision.

    By default a TPU multiplies float32 inputs as bfloat16, and an NVIDIA GPU since Ampere as TF32.
    """
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else contextlib.nullcontext()


def float32_product(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Matmul of two matrices that contracts axis ``contract[0]`` of `x` with ``contract[1]`` of `y`; float32 result."""
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
    # Frozen weights need no gradient; the compiler then removes this as dead code. (XLA has no bfloat16 instructions
    # for a contraction over the first axis of both matrices.)
    return to_x, x.T @ gradient


_bfloat16_matmul.defvjp(_forward, _backward)
