"""AdamW for each trained row by itself, and its learning-rate schedules."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
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


def make_optimizer(
    config: TrainConfig, total_steps: int, global_factor: int
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """AdamW for each row and its schedule for a resolved config.

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
    return per_row(adamw), schedule
