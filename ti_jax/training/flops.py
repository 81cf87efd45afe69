"""The least number of FLOPs of a function or a training step, counted on the jaxpr."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from ti_jax.models.networks import Networks, Rows
from ti_jax.ops.platform import PLAIN
from ti_jax.training.step import StepInputs


def least_flops(jaxpr: ClosedJaxpr, trained: Sequence[bool]) -> float:
    """Floating-point operations of a function and of its gradient with respect to some of its arguments.

    Only matmuls and convolutions are counted: the rest is small. Each costs one forward pass, and in the backward pass
    as much again for each of its two operands that depends on a `trained` argument.

    Args:
      jaxpr: of the function, from `jax.make_jaxpr`.
      trained: for each flat argument, whether the gradient is taken with respect to it.

    Returns:
      FLOPs; infinite if there is a Pallas kernel. (Trace for `ti_jax.ops.platform.PLAIN`, which uses none.)
    """
    return _count(jaxpr.jaxpr, list(trained))[0]


def batch_flops(networks: Networks, frozen: StepInputs, rows: Rows, batch: int) -> float:
    """The least FLOPs of the loss of a batch and of its gradient with respect to the rows.

    Attention within a kernel is counted as the two products that it is, as in the plain implementation. Each prompt is
    encoded once if there are fewer of them than samples. Rematerialisation is not counted: it is no necessary work.

    Args:
      frozen, rows: arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes are used.
      batch: number of samples.
    """
    networks = networks.compiled_for(PLAIN)
    height, width, moments = frozen.dataset.latents
    prompts = min(batch, *(ids.shape[0] for ids in frozen.dataset.ids.values()))

    negative = frozen.dataset.negative

    def predict(rows: Any, params: Any, ids: Any, noisy: jax.Array, timesteps: jax.Array) -> Any:
        def of(ids: Any, rows: Any) -> jax.Array:
            condition = networks.encode_text(params, ids, rows)
            condition = jax.tree.map(lambda each: each[jnp.arange(batch) % each.shape[0]], condition)
            return networks.predict_noise(params, noisy, timesteps, condition)

        if negative is None:
            return of(ids, rows)
        # No gradient goes through the prompts.
        return of(ids, None), of({name: jnp.zeros(each.shape, each.dtype) for name, each in negative.ids.items()}, rows)

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (rows, frozen.params))
    ids = {name: jax.ShapeDtypeStruct((prompts, ids.shape[1]), jnp.int32) for name, ids in frozen.dataset.ids.items()}
    noisy = jax.ShapeDtypeStruct((batch, height, width, moments // 2), jnp.float32)
    arguments = (*shapes, ids, noisy, jax.ShapeDtypeStruct((batch,), jnp.int32))
    trained = [[index == 0] * len(jax.tree.leaves(tree)) for index, tree in enumerate(arguments)]
    return least_flops(jax.make_jaxpr(predict)(*arguments), [each for part in trained for each in part])


def _count(jaxpr: Jaxpr, trained: list[bool]) -> tuple[float, list[bool]]:
    """FLOPs, and which results depend on a trained argument."""
    touched = {variable for variable, is_touched in zip(jaxpr.invars, trained, strict=True) if is_touched}
    total = 0.0
    for equation in jaxpr.eqns:
        inputs = [not isinstance(value, Literal) and value in touched for value in equation.invars]
        name = equation.primitive.name
        outputs = [any(inputs)] * len(equation.outvars)
        if name in ("dot_general", "conv_general_dilated"):
            total += _forward(equation) * (1 + sum(inputs))
        elif name == "cond":  # alternative implementations of the same function
            branches = [_count(branch.jaxpr, inputs[1:]) for branch in equation.params["branches"]]
            total += min(flops for flops, _ in branches)
            outputs = [any(each) for each in zip(*(results for _, results in branches), strict=True)]
        elif name == "pallas_call":  # a kernel's FLOPs are unknown
            total = math.inf
        elif name == "scan":
            flops, outputs = _scan(equation, inputs)
            total += flops
        else:
            for inner in _inner(equation.params):
                flops, outputs = _count(inner, inputs)
                total += flops
        touched |= {variable for variable, out in zip(equation.outvars, outputs, strict=True) if out}
    return total, [not isinstance(value, Literal) and value in touched for value in jaxpr.outvars]


def _scan(equation: Any, inputs: list[bool]) -> tuple[float, list[bool]]:
    """As `_count`; a carry depends on a trained argument if it does after any iteration."""
    (body,) = _inner(equation.params)
    # The parameters' names differ between versions of JAX, so that parts are recognised by shape: only the scanned
    # inputs and the stacked outputs have another shape inside the loop.
    carried = sum(_same_shapes(body.outvars, equation.outvars))
    constants = sum(_same_shapes(body.invars, equation.invars)) - carried
    while True:
        flops, outputs = _count(body, inputs)
        now = [one or other for one, other in zip(inputs[constants:], outputs[:carried], strict=False)]
        if inputs[constants : constants + carried] == now:
            return flops * equation.params["length"], outputs
        inputs = [*inputs[:constants], *now, *inputs[constants + carried :]]


def _same_shapes(within: Any, without: Any) -> list[bool]:
    return [one.aval.shape == other.aval.shape for one, other in zip(within, without, strict=True)]


def _inner(params: dict[str, Any]) -> list[Jaxpr]:
    """Jaxprs that an equation calls with its own arguments."""
    found = [params.get(name) for name in ("jaxpr", "call_jaxpr", "fun_jaxpr")]
    return [each.jaxpr if isinstance(each, ClosedJaxpr) else each for each in found if each is not None]


def _forward(equation: Any) -> float:
    """Multiply-adds, counted as 2 FLOPs, of a matmul or convolution, without those on zero padding."""
    left, right = (variable.aval.shape for variable in equation.invars)
    results = equation.outvars[0].aval.shape
    numbers = equation.params["dimension_numbers"]
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = numbers
        return 2.0 * math.prod(results) * math.prod(left[axis] for axis in contracted)
    total = 2.0 * math.prod(results[axis] for axis in numbers.out_spec[:2]) * right[numbers.rhs_spec[1]]
    for axis, (low, _) in enumerate(equation.params["padding"]):
        size, taps, places = (
            shape[spec[2 + axis]]
            for shape, spec in ((left, numbers.lhs_spec), (right, numbers.rhs_spec), (results, numbers.out_spec))
        )
        stride, dilation = (equation.params[name][axis] for name in ("window_strides", "rhs_dilation"))
        starts = (place * stride - low for place in range(places))
        total *= sum(0 <= start + tap * dilation < size for start in starts for tap in range(taps))
    return total
