"""Rows of a table by index, with a gradient that is the same to the bit each time that it is computed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def lookup(table: jax.Array, indices: jax.Array) -> jax.Array:
    """``jnp.take(table, indices, axis=0)`` whose gradient is a product with one-hot vectors instead of a scatter-add.

    A GPU scatters with atomic additions, in whatever order they come. A product is summed in a fixed order; its price
    is the matrix ``[number of indices, N]``.

    Args:
      table: [N, ...]. indices: int32 of any shape; one that is out of range gives NaN and no gradient.

    Returns:
      [*indices.shape, ...]
    """
    return _lookup(len(table), table, indices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(rows: int, table: jax.Array, indices: jax.Array) -> jax.Array:
    return jnp.take(table, indices, axis=0)


def _forward(rows: int, table: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _lookup(rows, table, indices), indices


def _backward(rows: int, indices: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    chosen = jax.nn.one_hot(indices.reshape(-1), rows, dtype=gradient.dtype)
    # HIGHEST: on a TPU and in TF32 a float32 gradient would lose bits that a scatter-add keeps.
    product = jnp.matmul(
        chosen.T,
        gradient.reshape(indices.size, -1),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return product.astype(gradient.dtype).reshape(rows, *gradient.shape[indices.ndim :]), None


_lookup.defvjp(_forward, _backward)
