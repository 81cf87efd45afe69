"""AdamW on the trained rows only, its learning-rate schedules, and the mask that freezes rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ti_jax.config import TrainConfig


def learning_rate_schedule(config: TrainConfig, peak: float, total_steps: int) -> optax.Schedule:
    """Learning rate of each update, counted from 0.

    Held to ``diffusers.optimization.get_scheduler``: warm-up is linear from 0 over ``lr_warmup_steps`` for every
    schedule but ``constant``, which has none.
    """
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


class MaskRowsState(NamedTuple):
    """State of `mask_rows`: the wrapped transformation's."""

    inner: optax.OptState


def mask_rows(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Apply ``inner`` to the rows whose mask is true; the others keep their values and moments, bit for bit.

    ``optax.masked`` masks whole leaves; here a leaf is a table of rows [n, D], and ``update`` takes ``row_mask``, the
    same tree of bool [n]. Momentum and weight decay do not affect a masked row: its update is exactly zero.
    """

    def init(rows: optax.Params) -> MaskRowsState:
        return MaskRowsState(inner.init(rows))

    def update(grads, state, rows=None, *, row_mask, **extra):
        del extra
        masked_grads = _select(row_mask, grads, jax.tree.map(jnp.zeros_like, grads))
        updates, new_inner = inner.update(masked_grads, state.inner, rows)
        # Moments get the mask of their rows; counters, which belong to no row, always advance.
        masks = optax.tree.map_params(
            inner, lambda _, mask: mask, new_inner, row_mask, transform_non_params=lambda _: jnp.array([True])
        )
        kept = _select(masks, new_inner, state.inner)
        return _select(row_mask, updates, jax.tree.map(jnp.zeros_like, updates)), MaskRowsState(kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _select(masks, chosen, other):
    """Rows of ``chosen`` where the mask is true, of ``other`` elsewhere; for a scalar leaf the mask's first entry."""
    return jax.tree.map(
        lambda mask, a, b: jnp.where(
            mask.reshape(mask.shape + (1,) * (jnp.ndim(a) - 1)) if jnp.ndim(a) else mask[0], a, b
        ),
        masks,
        chosen,
        other,
    )


def make_optimizer(
    config: TrainConfig, total_steps: int, global_factor: int
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """Masked AdamW and its schedule for a resolved config.

    Args:
      total_steps: updates in the whole run; the schedules end there.
      global_factor: accumulation steps x batch per device x devices; ``scale_lr`` multiplies the learning rate by it.
    """
    assert config.learning_rate is not None, "the config is resolved"
    peak = config.learning_rate * (global_factor if config.scale_lr else 1)
    schedule = learning_rate_schedule(config, peak, total_steps)
    adamw = optax.adamw(
        schedule,
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )
    return mask_rows(adamw), schedule
