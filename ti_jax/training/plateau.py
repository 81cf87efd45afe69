"""When a loss has stopped falling: the rule of ``--early_stop``, on numbers alone."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Losses in a window. They are of the same samples every time, so that few show whether they still fall.
IN_WINDOW = 4


class Watch(NamedTuple):
    """What is known of the losses of C concepts, which have n rows together; a part of the training state."""

    recent: jax.Array  # float32 [C, IN_WINDOW]: the last losses, the next one in place of the oldest
    seen: jax.Array  # int32 [C]: number of losses so far
    mean: jax.Array  # float32 [C]: of all of them
    squares: jax.Array  # float32 [C]: the sum of their squared differences from it
    stopped: jax.Array  # int32 [C]: the step at which the concept ended; -1: it is still learned
    halted: jax.Array  # bool [n]: rows of concepts that have ended

    @property
    def ended(self) -> jax.Array:
        """Whether all concepts have ended, bool scalar."""
        return jnp.all(self.stopped >= 0)


class Seen(NamedTuple):
    """What one call of `observe` saw, for the log."""

    losses: jax.Array  # float32 [C]; of concepts that had ended before, nothing that means anything
    variances: jax.Array  # float32 [C]: variance in the window, as a share of that of all losses; inf: not known yet
    stops: jax.Array  # bool [C]: the concept ends here


def no_watch(rows: int, concepts: int) -> Watch:
    """Before the first loss."""
    zeros = jnp.zeros(concepts, jnp.float32)
    return Watch(
        recent=jnp.zeros((concepts, IN_WINDOW), jnp.float32),
        seen=jnp.zeros(concepts, jnp.int32),
        mean=zeros,
        squares=jnp.copy(zeros),
        stopped=jnp.full(concepts, -1, jnp.int32),
        halted=jnp.zeros(rows, bool),
    )


def observe(
    watch: Watch, losses: jax.Array, step: jax.Array, threshold: float, concept_of_row: jax.Array
) -> tuple[Watch, Seen]:
    """Take one more loss of each concept; a concept ends where its last `IN_WINDOW` losses hardly differ any more.

    This is DVAR (Voronov et al. 2023, arXiv 2302.04841): the variance of the last losses, divided by the variance of
    all of them, is below ``threshold``. At least one loss must be older than the window. Where the losses never
    differed, nothing was learned yet, as at a rate of 0, and the concept goes on.

    Args:
      losses: float32 [C], always of the same samples. step: int32 scalar.
      concept_of_row: int32 [n]: the concept of each row; -1: of none, because it is not trained.
    """
    live = watch.stopped < 0
    seen = watch.seen + live
    # Welford's update, which loses no digits where all losses are alike.
    before = losses - watch.mean
    mean = watch.mean + jnp.where(live, before / jnp.maximum(seen, 1), 0.0)
    squares = watch.squares + jnp.where(live, before * (losses - mean), 0.0)
    place = jnp.arange(IN_WINDOW) == (watch.seen % IN_WINDOW)[:, None]
    recent = jnp.where(place & live[:, None], losses[:, None], watch.recent)

    known = (seen > IN_WINDOW) & (squares > 0)
    of_all = jnp.where(known, squares, 1.0) / jnp.maximum(seen, 1)
    variances = jnp.where(known, jnp.var(recent, axis=-1) / of_all, jnp.inf)
    stops = live & (variances < threshold)
    stopped = jnp.where(stops, step, watch.stopped)
    halted = (concept_of_row >= 0) & (stopped >= 0)[concept_of_row]
    return Watch(recent, seen, mean, squares, stopped, halted), Seen(losses, variances, stops)
