"""Training steps that the runs of a test process share: tracing one takes longer than what most tests do with it."""

import collections
import dataclasses
import functools
import inspect
import os

import jax
import numpy as np

from ti_jax.training.compile import StepBuilder

_lower = StepBuilder.lower
_compiled = {}
_uses = collections.Counter()
_sharing = False


class _Step:
    """A step that is lowered and compiled when it is asked for, unless one like it was before."""

    def __init__(self, key, lower):
        self.key, self.lower = key, lower

    def compile(self):
        _uses[self.key] += 1
        if self.key not in _compiled:
            _compiled[self.key] = self.lower().compile()
        return _compiled[self.key]


def share(wanted):
    """Whether steps are shared from here on: not where a test replaces what they may be made of."""
    global _sharing
    _sharing = wanted
    StepBuilder.lower = _shared_lower


def forget(but=0):
    """Free all programs but so many, those that were asked for most often."""
    most = sorted(_compiled, key=lambda key: -_uses[key])
    for key in most[but:]:
        del _compiled[key]


def _shared_lower(builder, frozen, state, *arguments, **settings):
    lower = functools.partial(_lower, builder, frozen, state, *arguments, **settings)
    if not _sharing:
        return lower()
    leaves, tree = jax.tree.flatten((frozen, state))
    key = _described(
        (builder, tree, [(leaf.shape, leaf.dtype) for leaf in leaves], arguments, settings,
         os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"])
    )  # fmt: skip
    return _Step(key, lower)


def _described(value):
    """A key that is equal for what is computed alike: of a function its code and all that it has enclosed."""
    if inspect.isfunction(value):
        enclosed = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__code__, _described((enclosed, value.__defaults__, value.__kwdefaults__))
    if isinstance(value, functools.partial):
        return _described((value.func, value.args, value.keywords))
    if isinstance(value, (np.ndarray, jax.Array)):
        return value.shape, str(value.dtype), np.asarray(value).tobytes()
    if isinstance(value, StepBuilder):
        return _described([getattr(value, field.name) for field in dataclasses.fields(value)])
    if isinstance(value, dict):
        return tuple((name, _described(each)) for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_described, value))
    return type(value), value  # 1, 1.0 and True are equal
