"""The optimizer of each trained row by itself, its learning-rate schedules, and the rows that are shown of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from ti_jax.config import TrainConfig
from ti_jax.config.rates import Rates
from ti_jax.models.networks import Rows

# Weight of the prior of `directional`: the authors' kappa.
DIRECTION_PRIOR = 1e-4


def learning_rate_schedule(config: TrainConfig, peak: float, total_steps: int) -> optax.Schedule:
    """Learning rate of each update, counted from 0.

    Held to ``diffusers.optimization.get_scheduler``: warm-up is linear from 0 over ``lr_warmup_steps`` for every
    schedule but ``constant``, which has none.

    Args:
      peak: the rate; of several, the factor that multiplies each.
    """
    if isinstance(config.learning_rate, str):
        return _stepped(Rates(config.learning_rate), peak)
    kind, warmup, cycles = config.lr_scheduler, config.lr_warmup_steps, config.lr_num_cycles
    if kind == "constant":
        return lambda count: jnp.full_like(count, peak, dtype=jnp.float32)

    def factor(count: jax.Array) -> jax.Array:
        progress = (count - warmup) / max(1, total_steps - warmup)
        if kind == "constant_with_warmup":
            after = jnp.ones_like(progress)
        elif kind == "linear":
            after = jnp.maximum(0.0, 1.0 - progress)
        elif kind == "cosine":
            after = jnp.maximum(0.0, 0.5 * (1.0 + jnp.cos(math.pi * progress)))
        elif kind == "cosine_with_restarts":
            after = jnp.where(
                progress >= 1.0, 0.0, jnp.maximum(0.0, 0.5 * (1.0 + jnp.cos(math.pi * ((cycles * progress) % 1.0))))
            )
        else:  # polynomial, of degree 1 down to 1e-7 as in diffusers
            end = 1e-7 / peak
            after = jnp.where(progress > 1.0, end, (1.0 - end) * (1.0 - progress) + end)
        return jnp.where(count < warmup, count / max(1, warmup), after)

    return lambda count: peak * factor(jnp.asarray(count, jnp.float32))


def _stepped(rates: Rates, factor: float) -> optax.Schedule:
    """Each rate until the update at which it ends, as in AUTOMATIC1111."""
    schedules = [optax.constant_schedule(rate * factor) for rate, _ in rates.steps]
    joined = optax.join_schedules(schedules, [end for _, end in rates.steps if end is not None])
    return lambda count: jnp.asarray(joined(count), jnp.float32)


def warmup_note(config: TrainConfig, total_steps: int) -> str | None:
    """A warning if the run ends before its learning rate has risen to --learning_rate; None if it has.

    Not an error: diffusers runs such a command, and its default of 500 is more than many a run has.
    """
    if config.lr_scheduler == "constant" or config.lr_warmup_steps < total_steps:
        return None
    share = (total_steps - 1) / config.lr_warmup_steps
    return (
        f"warning: --lr_warmup_steps {config.lr_warmup_steps}: the run ends after {total_steps} updates, so the "
        f"learning rate rises to {share:.0%} of --learning_rate only; give fewer"
    )


def per_row(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Apply ``inner`` to each row by itself, and only where its mask is true.

    A leaf of the parameters is a table of rows [n, D]. Moments, and what `optax` keeps one number of for all
    parameters (counts, and with them the learning rate, warm-up and bias correction), are those of the row: leaves of
    the state are [n, ...]. ``update`` takes ``row_mask``, the same tree of bool [n]: a masked row keeps its state bit
    for bit, and its update is exactly zero, whatever momentum and weight decay would make of it.
    """

    def init(rows: optax.Params) -> optax.OptState:
        # A copy, because a transformation may keep the rows that it starts from, and the step donates both.
        return jax.tree.map(lambda table: jax.vmap(inner.init)(jnp.copy(table)), rows)

    def update(grads, state, rows=None, *, row_mask, **extra):
        del extra

        def update_row(grad, state, row, trained):
            update, updated = inner.update(grad, state, row)
            kept = jax.tree.map(lambda new, old: jnp.where(trained, new, old), updated, state)
            return jnp.where(trained, update, 0), kept

        pairs = jax.tree.map(jax.vmap(update_row), grads, state, rows, row_mask)
        return tuple({name: pair[part] for name, pair in pairs.items()} for part in (0, 1))

    return optax.GradientTransformationExtraArgs(init, update)


def state_with_one_count(state: optax.OptState) -> optax.OptState:
    """`per_row`'s state of AdamW as it was in checkpoints when all rows of all text encoders shared one count."""
    names = sorted(state)
    return {
        "inner": jax.tree.map(
            lambda *leaves: leaves[0][0, ...] if leaves[0].ndim == 1 else dict(zip(names, leaves, strict=True)),
            *(state[name] for name in names),
        )
    }


def state_with_counts(old: optax.OptState, like: optax.OptState) -> optax.OptState:
    """The reverse of `state_with_one_count`: each row has made as many updates as all had; ``like`` has the shapes."""
    return {
        name: jax.tree.map(
            lambda leaf, shared, name=name: np.full_like(leaf, shared) if leaf.ndim == 1 else shared[name],
            table,
            old["inner"],
        )
        for name, table in like.items()
    }


class AveragedState(NamedTuple):
    """State of `averaged`."""

    inner: optax.OptState
    made: jax.Array  # int32: number of updates made
    average: jax.Array  # the row's


def averaged(inner: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """``inner``, with a moving average of the parameters in its state.

    Held to diffusers' ``EMAModel``: at update n, from 0, ``min(decay, (1 + n) / (10 + n))`` of the average stays; at
    the first one nothing.
    """

    def init(row: jax.Array) -> AveragedState:
        return AveragedState(inner.init(row), jnp.zeros((), jnp.int32), jnp.copy(row))

    def update(grad, state, row=None):
        update, updated = inner.update(grad, state.inner, row)
        stays = jnp.where(state.made == 0, 0.0, jnp.minimum(decay, (1.0 + state.made) / (10.0 + state.made)))
        average = state.average - (1.0 - stays) * (state.average - (row + update))
        return update, AveragedState(updated, state.made + 1, average)

    return optax.GradientTransformation(init, update)


class NormState(NamedTuple):
    """State of `with_norm`."""

    inner: optax.OptState
    norm: jax.Array  # the row's at the start


def of_norm(row: jax.Array, norm: jax.Array) -> jax.Array:
    """Rows [..., D] with this norm [...]."""
    return row * (norm / jnp.linalg.norm(row, axis=-1))[..., None]


def with_norm(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``inner``, after whose updates the row is set to the norm that it started with.

    Of schedule-free the average is set to it, and the sequence that is averaged; the row is between the two, where
    the next gradient is taken.
    """

    def init(row: jax.Array) -> NormState:
        return NormState(inner.init(row), jnp.linalg.norm(row))

    def update(grad, state, row=None):
        update, updated = inner.update(grad, state.inner, row)
        if isinstance(updated, optax.contrib.ScheduleFreeState):
            average = of_norm(optax.contrib.schedule_free_eval_params(updated, row + update), state.norm)
            updated = updated._replace(z=of_norm(updated.z, state.norm))
            now = updated.b1 * average + (1.0 - updated.b1) * updated.z
        else:
            now = of_norm(row + update, state.norm)
        return now - row, NormState(updated, state.norm)

    return optax.GradientTransformation(init, update)


class DirectionState(NamedTuple):
    """State of `directional`."""

    start: jax.Array  # the row's direction at the start: of length 1
    made: jax.Array  # int32: number of updates made


def directional(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Directional Textual Inversion (Kim et al. 2025, arXiv 2512.13672), to be wrapped in `with_norm`.

    A row is ``m v`` with ``|v| = 1`` and a fixed m. The gradient with respect to v, of the loss and of the prior
    ``-kappa v . start`` (von Mises-Fisher), is projected to the tangent space at v and divided by its length; v goes
    against it by the learning rate, and `with_norm` brings it back to length 1. No momentum; held to the authors'
    ``SphericalSGD`` with ``beta`` 0.
    """

    def init(row: jax.Array) -> DirectionState:
        return DirectionState(row / jnp.linalg.norm(row), jnp.zeros((), jnp.int32))

    def update(grad, state, row=None):
        norm = jnp.linalg.norm(row)
        direction = row / norm
        grad = norm * grad - DIRECTION_PRIOR * state.start
        grad = grad - jnp.vdot(grad, direction) * direction
        step = schedule(state.made) * grad / (jnp.linalg.norm(grad) + 1e-8)
        return -norm * step, state._replace(made=state.made + 1)

    return optax.GradientTransformation(init, update)


def only_with_a_gradient(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``inner``, to which an update whose gradient is all zeros is none.

    Prodigy would divide by zero at the first, and `directional` follow its prior alone.
    """

    def update(grad, state, row=None):
        update, updated = inner.update(grad, state, row)
        there = jnp.any(grad != 0)
        return jnp.where(there, update, 0), jax.tree.map(lambda new, old: jnp.where(there, new, old), updated, state)

    return optax.GradientTransformation(inner.init, update)


def shown_rows(rows: Rows, opt_state: optax.OptState) -> Rows:
    """The rows that are saved, drawn and measured, where training is at ``rows``: their average if there is one.

    Args:
      rows, opt_state: of a training state; arrays on any devices.
    """
    return {name: _shown(jax.device_get(table), jax.device_get(opt_state[name])) for name, table in rows.items()}


def _shown(table: np.ndarray, state: optax.OptState) -> np.ndarray:
    if isinstance(state, AveragedState):
        has_norm = isinstance(state.inner, NormState)
        return np.asarray(of_norm(state.average, state.inner.norm) if has_norm else state.average)
    if isinstance(state, NormState):
        state = state.inner
    if isinstance(state, optax.contrib.ScheduleFreeState):
        return np.asarray(jax.vmap(optax.contrib.schedule_free_eval_params)(state, table))
    return table


def make_optimizer(
    config: TrainConfig, total_steps: int, global_factor: int
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """The optimizer of each row and its schedule for a resolved config.

    Args:
      total_steps: updates in the whole run; the schedules end there.
      global_factor: accumulation steps x batch per device x devices; ``scale_lr`` multiplies the learning rate by it.
    """
    rate = config.learning_rate
    assert rate is not None, "the config is resolved"
    peak = (1.0 if isinstance(rate, str) else rate) * (global_factor if config.scale_lr else 1)
    schedule = learning_rate_schedule(config, peak, total_steps)
    optimizer = _one_row(config, schedule)
    if config.kept_norm != "free":
        optimizer = with_norm(optimizer)
    if config.optimizer in ("prodigy", "dti"):
        optimizer = only_with_a_gradient(optimizer)
    if config.ema_decay is not None:
        optimizer = averaged(optimizer, config.ema_decay)
    return per_row(optimizer), schedule


def _one_row(config: TrainConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer of one row [D]."""
    if config.optimizer == "dti":
        return directional(schedule)
    b1, b2, eps, decay = config.adam_beta1, config.adam_beta2, config.adam_epsilon, config.adam_weight_decay
    assert b1 is not None and b2 is not None, "the config is resolved"
    clip = [] if config.max_grad_norm is None else [optax.clip_by_global_norm(config.max_grad_norm)]
    if config.optimizer == "schedule_free":
        # AdamW without momentum, as `optax.contrib.schedule_free_adamw`, which takes no schedule. The average's weights
        # follow the rate of the same update: its count begins at 1.
        base = optax.chain(
            *clip,
            optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True),
            optax.add_decayed_weights(decay),
            optax.scale_by_learning_rate(schedule),
        )
        return optax.contrib.schedule_free(base, lambda count: schedule(count - 1), b1=b1)
    if config.optimizer == "prodigy":
        warms_up = config.lr_scheduler != "constant" and config.lr_warmup_steps > 0
        optimizer = optax.contrib.prodigy(
            schedule, betas=(b1, b2), eps=eps, weight_decay=decay, safeguard_warmup=warms_up
        )
    else:
        optimizer = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=decay)
    return optax.chain(*clip, optimizer) if clip else optimizer
