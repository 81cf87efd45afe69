"""A word of one family as the start of a word of another: between SD1.x and SDXL, which share a text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ti_jax.embeddings.embedding import Embedding
from ti_jax.embeddings.families import describe
from ti_jax.errors import InputError

FIRST, SECOND = "text_encoder", "text_encoder_2"
# What is true of the word in its own family only.
OF_ITS_MODEL = ("base_model", "base_model_hash")


@dataclass(frozen=True)
class TokenTable:
    """A text encoder's frozen tokens: ``ids`` by token, and ``rows`` float32 [V, D]."""

    ids: Mapping[str, int]
    rows: np.ndarray


@dataclass(frozen=True)
class Nearest:
    """The token nearest to a vector, as a word, and its cosine."""

    word: str
    cosine: float


def to_sdxl(
    embedding: Embedding, first: TokenTable, second: TokenTable, model: str
) -> tuple[Embedding, tuple[Nearest, ...]]:
    """A word of SD1.x as a start for SDXL.

    SDXL's first text encoder is that of SD1.x, so its vectors are taken as they are. Each vector for the second is the
    row, in the second's table, of the token that is nearest to the vector in the first's: by cosine, among the whole
    words that both have. A row of the table, not a mean of several, because its norm and its place are those of a word.

    Args:
      first, second: of SDXL's text encoders. model: SDXL's name, for the metadata.

    Returns:
      The word, and the token of each of its vectors.

    Raises:
      InputError: a word that is not of SD1.x, a model that is not SDXL's, or a vector of zeros.
    """
    check_source(embedding, first.rows.shape[1], model)
    vectors = embedding.vectors[FIRST]
    words = sorted(token for token in first.ids.keys() & second.ids.keys() if token.endswith("</w>"))
    words = [word for word in words if first.ids[word] < len(first.rows) and second.ids[word] < len(second.rows)]
    rows = first.rows[[first.ids[word] for word in words]]
    lengths = np.linalg.norm(vectors, axis=1)
    if not lengths.all():
        raise InputError(f"{embedding.token}: vector {int(np.argmin(lengths))} is zero, so that no token is near it")
    cosines = (vectors / lengths[:, None]) @ (rows / np.maximum(np.linalg.norm(rows, axis=1), 1e-12)[:, None]).T
    best = cosines.argmax(axis=1)
    nearest = [Nearest(words[i].removesuffix("</w>"), float(cosines[n, i])) for n, i in enumerate(best)]
    start = second.rows[[second.ids[words[i]] for i in best]]
    metadata = _metadata(embedding, {"base_model": model, "nearest_tokens": " ".join(each.word for each in nearest)})
    return Embedding(embedding.token, {FIRST: vectors, SECOND: start}, metadata), tuple(nearest)


def to_sd15(embedding: Embedding) -> Embedding:
    """A word of SDXL as a start for SD1.x: the vectors of the text encoder that they share.

    Raises:
      InputError: a word that is not of SDXL.
    """
    if embedding.vectors.keys() != {FIRST, SECOND}:
        raise InputError(f"{embedding.token} is for {_family(embedding)}; --to sd15 takes a word of SDXL")
    return Embedding(embedding.token, {FIRST: embedding.vectors[FIRST]}, _metadata(embedding, {}))


def check_source(embedding: Embedding, width: int | None, model: str) -> None:
    """Refuse a word that is not of SD1.x.

    Args:
      width: numbers of a vector of the first text encoder of the SDXL model; None: not known yet. model: its name.

    Raises:
      InputError: it is of another family.
    """
    if embedding.vectors.keys() != {FIRST}:
        raise InputError(f"{embedding.token} is for {_family(embedding)}; --to sdxl takes a word of SD1.x")
    if width is not None and embedding.dims[FIRST] != width:
        raise InputError(
            f"{embedding.token} is for {_family(embedding)}, and the first text encoder of {model} has {width} numbers "
            f"a vector: only SD1.x shares a text encoder with SDXL; learn the word again for SDXL"
        )


def _family(embedding: Embedding) -> str:
    return describe(embedding.dims, embedding.metadata)


def _metadata(embedding: Embedding, new: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in embedding.metadata.items() if name not in OF_ITS_MODEL}
    before = embedding.metadata.get("base_model")
    return {**kept, "transferred_from": before or _family(embedding), **new}


def report(nearest: Sequence[Nearest]) -> str:
    """Lines that tell which token each vector of the second text encoder starts from."""
    return "\n".join(
        f"  vector {number}: the second text encoder starts from {each.word!r}, the nearest token (cosine "
        f"{each.cosine:.2f})"
        for number, each in enumerate(nearest)
    )
