"""How the concepts of a run share its batches."""

from __future__ import annotations

from dataclasses import dataclass

from ti_jax.config import TrainConfig
from ti_jax.errors import InputError

# Chosen by measurement (benchmarks/NOTES.md). With as many samples of each word in all, more concepts in a batch mean
# more and noisier updates of each: with four, words were learned worse than in runs of their own.
CONCEPTS_IN_A_BATCH = 2


@dataclass(frozen=True)
class Mixing:
    """Batches with samples of several concepts, as many of each: the next batch has the concepts that come next.

    Attributes:
      concepts: of the run. in_batch: concepts in a batch; it divides the global batch, and is at most ``concepts``.
    """

    concepts: int = 1
    in_batch: int = 1

    def updates(self, step: int) -> int:
        """Updates that each word has had after ``step`` updates of the run."""
        return step * self.in_batch // self.concepts


def mixing_of(config: TrainConfig, concepts: int, global_batch: int) -> Mixing:
    """How the concepts share a global batch.

    Raises:
      InputError: ``--concepts_per_batch`` is more than there are, or does not divide the batch.
    """
    wanted = config.concepts_per_batch
    if wanted is None:
        few = range(1, min(concepts, CONCEPTS_IN_A_BATCH) + 1)
        return Mixing(concepts, max(number for number in few if global_batch % number == 0))
    if wanted > concepts:
        raise InputError(
            f"--concepts_per_batch {wanted}: there are {concepts} concepts; give at most that, or leave it out"
        )
    if global_batch % wanted:
        raise InputError(
            f"--concepts_per_batch {wanted}: does not divide the {global_batch} samples of a batch (of all devices and "
            f"accumulation steps), and each concept has as many of them; give a number that does, or leave it out"
        )
    return Mixing(concepts, wanted)
