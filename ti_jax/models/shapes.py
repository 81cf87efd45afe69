"""The parameter tree of a module as shapes, by `jax.eval_shape`."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn


def param_shapes(module: nn.Module, *inputs: Any, **keywords: Any) -> Any:
    """Parameter tree of `module` as ShapeDtypeStructs; nothing is computed and no memory taken.

    `inputs` and `keywords` are those of the module's ``__call__``, as arrays or ShapeDtypeStructs.
    """
    return jax.eval_shape(lambda *args: module.init(jax.random.key(0), *args, **keywords), *inputs)["params"]
