"""Warnings about words that other programs do not handle well."""

from __future__ import annotations

import functools

from ti_jax.embeddings.embedding import Embedding
from ti_jax.weights.tokenizers import clip_tokenizer
from ti_jax.words import fold


def capital_fault(token: str, num_vectors: int) -> str | None:
    """The problem of diffusers with transformers 5 with a capital letter in a word of several vectors, and its remedy.

    It lower-cases the prompt before it expands words, so that only the first vector is used.
    """
    if num_vectors == 1 or fold(token) == token:
        return None
    expanded = " ".join([token, *(f"{token}_{row}" for row in range(1, min(num_vectors, 3)))])
    return (
        f"diffusers with transformers 5 finds {token} only in lower case and would use the first of its {num_vectors} "
        f"vectors alone: save it as {fold(token)}, or write {expanded}{' ...' if num_vectors > 3 else ''} there"
    )


@functools.cache  # put together from the merges each time that the tokenizer is made
def _clip_vocabulary() -> frozenset[str]:
    """CLIP's tokens."""
    return frozenset(clip_tokenizer("<|endoftext|>").get_vocab())


def word_warnings(embedding: Embedding) -> list[str]:
    """Warnings to show before this word is shared."""
    warnings = []
    fault = capital_fault(embedding.token, embedding.num_vectors)
    if fault is not None:
        warnings.append(fault)
    vocabulary = _clip_vocabulary()
    if embedding.token in vocabulary or f"{fold(embedding.token)}</w>" in vocabulary:
        warnings.append(
            f"{embedding.token} is a token of CLIP's already, and diffusers may refuse it or take the one for the "
            f"other: give another with --token, like <{embedding.token}>"
        )
    return warnings
