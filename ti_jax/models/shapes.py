"""The parameter tree of a module as shapes, by `jax.eval_shape`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def param_shapes(module: nn.Module, *inputs: Any) -> Any:
    """Parameter tree of `module` as ShapeDtypeStructs; nothing is computed and no memory taken.

    `inputs` are those of the module's ``__call__``, as arrays, ShapeDtypeStructs, or trees of them.
    """
    leaves, tree = jax.tree.flatten(inputs)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    if hasattr(module, "dtype"):  # of activations: the same parameters in every precision
        module = module.clone(dtype=jnp.float32)
    return jax.tree.map(lambda leaf: leaf, _param_shapes(module, tree, shapes))


# Tracing the initialisation of a Stable Diffusion takes half a second, and a session may load one many times.
@functools.lru_cache(maxsize=64)
def _param_shapes(module: nn.Module, tree: jax.tree_util.PyTreeDef, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    inputs = jax.tree.unflatten(tree, shapes)
    return jax.eval_shape(lambda *args: module.init(jax.random.key(0), *args), *inputs)["params"]
