"""Prune the vectors of a word: which to drop, and how much the text encoder's output changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ti_jax.embeddings.embedding import Embedding
from ti_jax.errors import InputError

# B selections of the vectors to keep -> by text encoder, its output at the end-of-text token of a prompt with only
# these vectors, float32 [B, D].
EndStates = Callable[[Sequence[Sequence[int]]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Loss:
    """How far the text encoder's output moves when vectors are dropped.

    Measured at the end-of-text token, which attends to the whole prompt and which the padding after it repeats.
    ``moved`` is the Euclidean distance from the output with the whole word; for SDXL over both text encoders (root of
    the sum of squares).

    Attributes:
      relative: ``moved`` divided by the norm of the output with the whole word.
      of_the_word: ``moved`` divided by its value if the whole word is dropped.
    """

    relative: float
    of_the_word: float

    def __str__(self) -> str:
        return (
            f"the text encoder's output moves by {100 * self.relative:.1f}% of its length, "
            f"{100 * self.of_the_word:.1f}% of what the word does to it"
        )


def losses(num_vectors: int, selections: Sequence[Sequence[int]], states: EndStates) -> list[Loss]:
    """The loss for each selection of vectors to keep."""
    found = states([list(range(num_vectors)), [], *selections])
    outputs = np.concatenate([np.asarray(value, np.float64) for value in found.values()], axis=1)
    whole, without = outputs[0], outputs[1]
    effect = max(float(np.linalg.norm(without - whole)), 1e-12)
    length = max(float(np.linalg.norm(whole)), 1e-12)
    moved = [float(np.linalg.norm(output - whole)) for output in outputs[2:]]
    return [Loss(distance / length, distance / effect) for distance in moved]


def choose(num_vectors: int, keep: int, states: EndStates) -> list[int]:
    """Indices of the ``keep`` vectors to keep: greedily drops the one that moves the output least.

    Raises:
      InputError: ``keep`` would drop all vectors, or none.
    """
    check_keep(num_vectors, keep)
    staying = list(range(num_vectors))
    while len(staying) > keep:
        selections = [[other for other in staying if other != number] for number in staying]
        found = losses(num_vectors, selections, states)
        staying = selections[int(np.argmin([loss.relative for loss in found]))]
    return staying


def check_keep(num_vectors: int, keep: int) -> None:
    """Raise `InputError` unless some of ``num_vectors`` are kept and some dropped."""
    if num_vectors == 1:
        raise InputError("the word has one vector; there is nothing to prune")
    if not 1 <= keep < num_vectors:
        raise InputError(f"--keep {keep}: the word has {num_vectors} vectors; keep from 1 to {num_vectors - 1} of them")


def staying_without(num_vectors: int, drop: Sequence[int]) -> list[int]:
    """Indices of the vectors that are not in ``drop``, counted from 0.

    Raises:
      InputError: there is no such vector, or none would be left.
    """
    for number in drop:
        if not 0 <= number < num_vectors:
            raise InputError(f"--drop {number}: the word has the vectors 0 to {num_vectors - 1}")
    staying = [number for number in range(num_vectors) if number not in drop]
    if not staying:
        raise InputError(f"--drop {' '.join(map(str, drop))}: no vector would stay of the word")
    return staying


def select(embedding: Embedding, numbers: Sequence[int]) -> Embedding:
    """The word with only the vectors of these indices, counted from 0."""
    vectors = {name: value[list(numbers)] for name, value in embedding.vectors.items()}
    metadata = {**embedding.metadata, "pruned_to": f"{' '.join(map(str, numbers))} of {embedding.num_vectors} vectors"}
    if "num_vectors" in metadata:
        metadata["num_vectors"] = str(len(numbers))
    return Embedding(embedding.token, vectors, metadata)
