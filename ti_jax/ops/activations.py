"""Activation functions: computed in float32 and rounded once to the dtype of the argument, as in PyTorch.

In bfloat16 the intermediate results would lose their digits: ``1 + erf(x)`` of a negative x cancels.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


@jax.custom_jvp
def erf(x: jax.Array) -> jax.Array:
    """The error function, with its derivative ``2 / sqrt(pi) exp(-x^2)`` written out.

    JAX 0.12 cannot differentiate its own ``erf`` or ``erfc`` inside ``jax.shard_map``: their series mix constants with
    values that vary over devices. Disabling that check (``check_vma``) would change what a gradient means.
    """
    return jax.lax.erf(x)


@erf.defjvp
def _erf_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    return erf(x), tangent * (2.0 / math.sqrt(math.pi)) * jnp.exp(-jnp.square(x))


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU with `erf`, as in PyTorch. On CPU it takes half the time of `jax.nn.gelu`, which uses ``erfc``."""
    exact = x.astype(jnp.float32)
    return (0.5 * exact * (1.0 + erf(exact * 0.5**0.5))).astype(x.dtype)


def quick_gelu(x: jax.Array) -> jax.Array:
    """``x sigmoid(1.702 x)``, OpenAI's approximation of GELU. SD1's text encoder was trained with it."""
    exact = x.astype(jnp.float32)
    return (exact * jax.nn.sigmoid(1.702 * exact)).astype(x.dtype)


def silu(x: jax.Array) -> jax.Array:
    """``x sigmoid(x)``."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)
