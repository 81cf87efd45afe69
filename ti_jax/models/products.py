"""Matrix products of bfloat16 numbers, in the form that each platform runs fastest.

GPU and TPU sum bfloat16 products in float32 on their own. XLA on CPU computes a bfloat16 product whose result is
bfloat16 in float32 from beginning to end; asked for a float32 result, it uses the bfloat16 instructions that newer CPUs
have, which are twice as fast as float32's. So do its gradients, if they are written as such products.
"""

from __future__ import annotations

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


def float32_product(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product over axis ``contract[0]`` of `x` and ``contract[1]`` of `y`, two matrices, as float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


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
    to_kernel = float32_product(rows, gradients, (0, 0)).astype(kernel.dtype)
    return to_x, to_kernel


_bfloat16_matmul.defvjp(_forward, _backward)
