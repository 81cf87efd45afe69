"""The word that a file is read as, and ``FILE=word`` arguments of the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ti_jax.embeddings.containers import Content, word_metadata
from ti_jax.embeddings.embedding import Embedding
from ti_jax.errors import InputError
from ti_jax.words import check_token, find_words, fold


def named(
    content: Content,
    token: str | None,
    name: str,
    vectors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    stored_name: str | None = None,
) -> Embedding:
    """A word named by the caller, or by its file.

    Args:
      token: the caller's name; None: ``name``, with hyphens for spaces and a note about it.
      metadata: None: that of the file's header.
      stored_name: another name in the file, for `Embedding.stored_name`.
    """
    word = token or "-".join(name.split()) or "-".join(content.path.stem.split()) or "word"
    notes = []
    if token is None and word != name:
        notes.append(f"its name {name!r} has spaces: write {word} in prompts, or give FILE=word")
    if stored_name is not None and fold(stored_name) == fold(word):
        stored_name = None
    metadata = word_metadata(content, word) if metadata is None else metadata
    return Embedding(word, vectors, metadata, stored_name=stored_name, notes=tuple(notes))


def chosen(words: Mapping[str, object], token: str | None) -> str:
    """The only key of ``words``, or of several the one that is ``token``.

    Raises:
      InputError: there are several, and ``token`` is none of them.
    """
    if len(words) == 1:
        return next(iter(words))
    if token is None or token not in words:
        raise InputError(f"it holds {len(words)} words, {', '.join(map(repr, words))}; say which with token=")
    return token


def split_word(text: str) -> tuple[str, str | None]:
    """``FILE`` or ``FILE=word`` -> the file, and the word or None. If a path itself has ``=``, an existing file wins.

    Raises:
      InputError: the word is empty or has spaces.
    """
    places = [place for place, character in enumerate(text) if character == "="]
    if not places or os.path.exists(text):
        return text, None
    # From the right: "a=b.pt=<x>" is the file a=b.pt if that exists. Else the word may contain "=" itself.
    place = next((place for place in reversed(places) if os.path.exists(text[:place])), places[0])
    path, word = text[:place], text[place + 1 :]
    check_token(word, f"{text}: the word")
    return path, word


def load_given(texts: Sequence[str]) -> list[Embedding]:
    """The words of ``FILE`` or ``FILE=word`` arguments, as ``--embedding`` takes them.

    Raises:
      InputError: as `Embedding.load`.
    """
    return [Embedding.load(Path(path), token) for path, token in map(split_word, texts)]


def with_stored_name(embedding: Embedding, prompts: Sequence[str]) -> tuple[list[str], str | None]:
    """Prompts with the name stored in a word's file replaced by the word, and a note if any was replaced.

    Replaced only if no prompt has the word itself.
    """
    name = embedding.stored_name
    counts = {embedding.token: embedding.num_vectors}
    if name is None or name.split() != [name] or any(find_words(prompt, counts) for prompt in prompts):
        return list(prompts), None
    renamed = [_renamed(prompt, name, embedding) for prompt in prompts]
    if renamed == list(prompts):
        return renamed, None
    return renamed, f"{name} is the name stored in the file, and is taken for its word {embedding.token}"


def _renamed(prompt: str, name: str, embedding: Embedding) -> str:
    parts, end = [], 0
    for found in find_words(prompt, {name: embedding.num_vectors}):
        row = found.rows.start
        parts += [prompt[end : found.start], embedding.token if row == 0 else f"{embedding.token}_{row}"]
        end = found.end
    return "".join([*parts, prompt[end:]])
