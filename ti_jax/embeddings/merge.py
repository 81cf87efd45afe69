"""Merge several words into one: weighted sum, concatenation of the vectors, or spherical interpolation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ti_jax.embeddings.embedding import CAVEAT, Embedding
from ti_jax.embeddings.families import describe
from ti_jax.errors import InputError

METHODS = ("sum", "concat", "slerp")


def merge(
    embeddings: Sequence[Embedding],
    token: str,
    method: str = "sum",
    weights: Sequence[float] | None = None,
    names: Sequence[object] | None = None,
) -> Embedding:
    """A new word from several words of the same model family; computed in float64.

    Args:
      token: the new word.
      method: "sum": ``w_1 v_1 + ... + w_k v_k``, vector by vector; all words have the same number of vectors.
        "concat": all vectors after each other, unchanged; their numbers add up.
        "slerp": vector by vector on the great circle (Shoemake 1985): the direction is interpolated at constant angular
        speed, the length linearly; with more than two words, each is interpolated with the result so far.
      weights: for "sum" as they are, None: 1/k each; for "slerp" shares of their sum, not negative, None: equal; none
        for "concat".
      names: sources of the words, for messages and the metadata; None: the words themselves.

    Raises:
      InputError: fewer than two words, different families, different numbers of vectors; invalid weights; for "slerp"
        zero vectors, or vectors in opposite directions.
    """
    labels = [str(name) for name in names] if names is not None else [embedding.token for embedding in embeddings]
    if len(embeddings) < 2:
        raise InputError(f"{len(embeddings)} word to merge; give two or more")
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    first = embeddings[0]
    for label, embedding in zip(labels[1:], embeddings[1:], strict=True):
        if embedding.dims != first.dims:
            raise InputError(
                f"{labels[0]} is for {describe(first.dims, first.metadata)}, and {label} for "
                f"{describe(embedding.dims, embedding.metadata)}; merge words of one family"
            )
        if method != "concat" and embedding.num_vectors != first.num_vectors:
            raise InputError(
                f"{labels[0]} has {first.num_vectors} vectors, and {label} {embedding.num_vectors}; prune the longer "
                "one first, or merge them with concat"
            )
    shares = _checked_weights(method, weights, len(embeddings))
    combine: Callable[[list[np.ndarray]], np.ndarray]
    if method == "concat":
        combine = np.concatenate
    elif method == "sum":

        def combine(parts: list[np.ndarray]) -> np.ndarray:
            return np.tensordot(np.array(shares), np.stack(parts), axes=1)
    else:

        def combine(parts: list[np.ndarray]) -> np.ndarray:
            return _arc(parts, shares, labels)

    vectors = {
        name: combine([embedding.vectors[name].astype(np.float64) for embedding in embeddings])
        for name in first.vectors
    }
    metadata = {"token": token, "merged_from": ", ".join(labels), "merge_method": method}
    if method != "concat":
        metadata["merge_weights"] = " ".join(f"{share:g}" for share in shares)
    caveats = [f"{label}: {e.caveat}" for label, e in zip(labels, embeddings, strict=True) if e.caveat]
    if caveats:
        metadata[CAVEAT] = "; ".join(caveats)
    # Metadata that all words share is valid for the new one, too.
    for entry in ("base_model", "base_model_hash"):
        if entry in first.metadata and all(e.metadata.get(entry) == first.metadata[entry] for e in embeddings):
            metadata[entry] = first.metadata[entry]
    return Embedding(token, vectors, metadata)


def _checked_weights(method: str, weights: Sequence[float] | None, count: int) -> list[float]:
    if method == "concat":
        if weights is not None:
            raise InputError("concat leaves the vectors as they are and has no weights; leave --weights out")
        return [1.0] * count
    if weights is None:
        return [1.0 / count] * count
    if len(weights) != count:
        raise InputError(f"{len(weights)} weights for {count} words; give one for each, in their order")
    if not np.isfinite(weights).all() or not any(weights):
        raise InputError(f"weights {' '.join(f'{w:g}' for w in weights)}: must be finite, and not all 0")
    if method == "slerp" and min(weights) < 0:
        raise InputError(f"weights {' '.join(f'{w:g}' for w in weights)}: an arc has none below 0; use sum")
    return [float(weight) for weight in weights]


def _arc(parts: list[np.ndarray], shares: Sequence[float], labels: Sequence[str]) -> np.ndarray:
    """Interpolate words float64 [n, D] one after the other, each by its share of the sum of weights so far."""
    # A word with weight 0 is skipped, even if it has no valid direction.
    kept = [(part, share, label) for part, share, label in zip(parts, shares, labels, strict=True) if share]
    result, total, _ = kept[0]
    for part, share, label in kept[1:]:
        total += share
        result = slerp(result, part, share / total, label)
    return result


def slerp(start: np.ndarray, end: np.ndarray, t: float, label: object) -> np.ndarray:
    """From ``start`` (t = 0) to ``end`` (t = 1), float64 [n, D], row by row.

    Args:
      label: name of ``end`` for a message.

    Raises:
      InputError: a zero row, or two rows in opposite directions, between which no arc is the shortest.
    """
    rows = []
    for number, (a, b) in enumerate(zip(start, end, strict=True)):
        length_a, length_b = np.linalg.norm(a), np.linalg.norm(b)
        if length_a == 0 or length_b == 0:
            raise InputError(f"{label}: vector {number} has no direction to turn to or from; use sum")
        unit_a, unit_b = a / length_a, b / length_b
        # From the half chords, which are exact for small angles, where the cosine is not.
        angle = 2 * np.arctan2(np.linalg.norm(unit_a - unit_b), np.linalg.norm(unit_a + unit_b))
        if angle > np.pi - 1e-6:
            raise InputError(f"{label}: vector {number} points the opposite way; there is no arc between them, use sum")
        if angle < 1e-12:
            direction = unit_a
        else:
            direction = (np.sin((1 - t) * angle) * unit_a + np.sin(t * angle) * unit_b) / np.sin(angle)
        rows.append(direction * ((1 - t) * length_a + t * length_b))
    return np.stack(rows)
