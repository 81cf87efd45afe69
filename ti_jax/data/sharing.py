"""Several concepts share the batches: whose turn it is, so that each has as many samples as any other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Most turns of a concept in a round. Only with buckets, and concepts of several hundred pictures, are they rounded.
MOST_TURNS = 256


class Sharing(NamedTuple):
    """The turns of the concepts of a dataset, whose entries there follow each other.

    Turns go through rounds of ``turns``. A batch takes the next ``in_batch`` of them, with as many samples for each.
    """

    start: jax.Array  # int32 [C]: the first of each concept's entries
    size: jax.Array  # int32 [C]: their number
    turns: jax.Array  # int32 [S]: the concept of each turn of a round
    earlier: jax.Array  # int32 [S]: how many turns before it in the round are the same concept's
    in_round: jax.Array  # int32 [C]: turns of each concept in a round
    in_batch: jax.Array  # int32 scalar: turns that a batch takes


def share(sizes: Sequence[int], in_batch: int, of: Sequence[int] | None = None) -> Sharing:
    """The sharing by concepts with ``sizes`` entries.

    Args:
      of: each concept's entries in all of the run's datasets; None: those in this one. A concept has turns in
        proportion to the part of its entries that is here: with `weight` for how often the dataset is used, every
        concept has as many samples as any other in the whole run.
    """
    in_round = _whole_numbers(sizes, sizes if of is None else of)
    # Turns of one concept are spread over the round.
    times = [((turn + 0.5) / count, concept) for concept, count in enumerate(in_round) for turn in range(count)]
    turns = np.array([concept for _, concept in sorted(times)], np.int32)
    earlier = np.array([(turns[:place] == concept).sum() for place, concept in enumerate(turns)], np.int32)
    return Sharing(
        start=jnp.asarray(np.cumsum([0, *sizes[:-1]]), jnp.int32),
        size=jnp.asarray(sizes, jnp.int32),
        turns=jnp.asarray(turns),
        earlier=jnp.asarray(earlier),
        in_round=jnp.asarray(in_round, jnp.int32),
        in_batch=jnp.int32(in_batch),
    )


def weight(sizes: Sequence[int], of: Sequence[int]) -> float:
    """How often a dataset with ``sizes`` of the concepts' entries is used, among the run's: the sum of their parts."""
    return sum(size / whole for size, whole in zip(sizes, of, strict=True))


def _whole_numbers(sizes: Sequence[int], of: Sequence[int]) -> list[int]:
    """The smallest whole numbers in proportion to ``sizes`` / ``of``, at most `MOST_TURNS`: then they are rounded."""
    common = math.lcm(*of)
    counts = [size * (common // whole) for size, whole in zip(sizes, of, strict=True)]
    divisor = max(1, math.gcd(*counts))
    counts = [count // divisor for count in counts]
    most = max(counts)
    if most > MOST_TURNS:
        counts = [max(1, round(count * MOST_TURNS / most)) if count else 0 for count in counts]
    return counts


def next_entry(
    sharing: Sharing,
    num_entries: int,
    order_key: jax.Array,
    turn: jax.Array,
    position: jax.Array,
    global_batch: int,
) -> jax.Array:
    """The entry of a sample, int32 scalar.

    The samples of a batch are dealt out to its turns one by one, so that the timesteps of each, which are spread over
    the positions, cover the schedule. Each concept has epochs of its own, each in another order.

    Args:
      num_entries: of the dataset. order_key: the run's, for the orders of epochs.
      turn: int32 scalar, the number of updates before that had this dataset. position: int32 scalar, the sample's in
        the global batch.
    """
    concept, own = turn_of_sample(sharing, turn, position, global_batch)
    shuffled = order_of_epoch(sharing, num_entries, order_key, concept, own // sharing.size[concept])
    return sharing.start[concept] + shuffled[own % sharing.size[concept]]


def turn_of_sample(
    sharing: Sharing, turn: jax.Array, position: jax.Array, global_batch: int
) -> tuple[jax.Array, jax.Array]:
    """The concept of a sample, and how many samples of it came before: int32 scalars; arguments as in `next_entry`."""
    place = turn * sharing.in_batch + position % sharing.in_batch
    in_round, rounds = place % len(sharing.turns), place // len(sharing.turns)
    concept = sharing.turns[in_round]
    own_turn = rounds * sharing.in_round[concept] + sharing.earlier[in_round]
    return concept, own_turn * (global_batch // sharing.in_batch) + position // sharing.in_batch


def order_of_epoch(
    sharing: Sharing, num_entries: int, order_key: jax.Array, concept: jax.Array, epoch: jax.Array
) -> jax.Array:
    """The order in which an epoch of a concept shows its entries, int32 [num_entries], counted from its first one.

    Of the numbers only the first ``sharing.size[concept]`` are its entries'.
    """
    epoch_key = jax.random.fold_in(jax.random.fold_in(order_key, concept), epoch)
    # A permutation of the concept's entries, whose number is not known to the compiler: the others are sorted behind.
    at_random = jax.random.uniform(epoch_key, (num_entries,))
    return jnp.argsort(jnp.where(jnp.arange(num_entries) < sharing.size[concept], at_random, 2.0))
