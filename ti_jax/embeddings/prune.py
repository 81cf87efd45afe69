"""Fewer vectors for a word: which can go, and what the text encoder's output loses with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ti_jax.embeddings.embedding import Embedding
from ti_jax.errors import InputError

# Numbers of the vectors that stay, several selections of them -> what each text encoder makes of a prompt with them:
# its output at the end-of-text token, float32 [B, D] by text encoder.
EndStates = Callable[[Sequence[Sequence[int]]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Loss:
    """How far the text encoder's output moves when vectors are dropped.

    The output is the one at the end-of-text token, which all of the prompt has gone into, and which the padding behind
    it repeats. ``moved`` is the Euclidean distance from the output with the whole word; for SDXL that of both text
    encoders together (root of the sum of squares).

    Attributes:
      relative: ``moved`` over the norm of the output with the whole word.
      of_the_word: ``moved`` over what dropping the word altogether would move it.
    """

    relative: float
    of_the_word: float

    def __str__(self) -> str:
        return (
            f"the text encoder's output moves by {100 * self.relative:.1f}% of its length, "
            f"{100 * self.of_the_word:.1f}% of what the word does to it"
        )


def losses(num_vectors: int, selections: Sequence[Sequence[int]], states: EndStates) -> list[Loss]:
    """What is lost with each selection of the vectors that stay."""
    found = states([list(range(num_vectors)), [], *selections])
    outputs = np.concatenate([np.asarray(value, np.float64) for value in found.values()], axis=1)
    whole, without = outputs[0], outputs[1]
    effect = max(float(np.linalg.norm(without - whole)), 1e-12)
    length = max(float(np.linalg.norm(whole)), 1e-12)
    moved = [float(np.linalg.norm(output - whole)) for output in outputs[2:]]
    return [Loss(distance / length, distance / effect) for distance in moved]


def choose(num_vectors: int, keep: int, states: EndStates) -> list[int]:
    """Numbers of the ``keep`` vectors that stay when, one by one, the one goes whose loss moves the output least.

    Raises:
      InputError: none would stay, or none go.
    """
    check_keep(num_vectors, keep)
    staying = list(range(num_vectors))
    while len(staying) > keep:
        selections = [[other for other in staying if other != number] for number in staying]
        found = losses(num_vectors, selections, states)
        staying = selections[int(np.argmin([loss.relative for loss in found]))]
    return staying


def check_keep(num_vectors: int, keep: int) -> None:
    """Raise `InputError` unless of ``num_vectors`` some stay and some go."""
    if num_vectors == 1:
        raise InputError("the word has one vector; there is nothing to prune")
    if not 1 <= keep < num_vectors:
        raise InputError(f"--keep {keep}: the word has {num_vectors} vectors; keep from 1 to {num_vectors - 1} of them")


def staying_without(num_vectors: int, drop: Sequence[int]) -> list[int]:
    """Numbers of the vectors that stay without those in ``drop``, which are counted from 0.

    Raises:
      InputError: there is no such vector, or none would stay.
    """
    for number in drop:
        if not 0 <= number < num_vectors:
            raise InputError(f"--drop {number}: the word has the vectors 0 to {num_vectors - 1}")
    staying = [number for number in range(num_vectors) if number not in drop]
    if not staying:
        raise InputError(f"--drop {' '.join(map(str, drop))}: no vector would stay of the word")
    return staying


def select(embedding: Embedding, numbers: Sequence[int]) -> Embedding:
    """The word with only the vectors of these numbers, counted from 0."""
    vectors = {name: value[list(numbers)] for name, value in embedding.vectors.items()}
    metadata = {**embedding.metadata, "pruned_to": f"{' '.join(map(str, numbers))} of {embedding.num_vectors} vectors"}
    if "num_vectors" in metadata:
        metadata["num_vectors"] = str(len(numbers))
    return Embedding(embedding.token, vectors, metadata)
