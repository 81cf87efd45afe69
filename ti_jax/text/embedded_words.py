"""The few words that the embedded model knows; whatever else a prompt or a caption says is noise to it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable

from ti_jax.config import ASSETS
from ti_jax.words import fold

_VOCABULARY = ASSETS / "mini-sd" / "tokenizer" / "vocab.json"
_END = "</w>"  # of a word, in a CLIP tokenizer's files
_NOT_ITS_OWN = re.compile(r"<[^<>\s]+>|\{\}|\{caption\}|\[\w+\]")  # placeholders

_SAID = re.compile(r"[^\W\d_][\w'-]*|,")  # no other signs, nor numbers: they may be weights


@functools.cache
def _known() -> frozenset[str]:
    entries = json.loads(_VOCABULARY.read_text(encoding="utf-8"))
    letters = {"a"}  # of single characters, which all are in the file, captions have this one
    words = {entry.removesuffix(_END) for entry in entries if entry.endswith(_END)}
    return frozenset({word for word in words if len(word) > 1} | letters)


def unknown_words(texts: Iterable[str]) -> list[str]:
    """Words and commas that no caption of the embedded model's training has, each once, in their order.

    Placeholders, as ``<cleo>`` and ``{}``, are not looked at. The tokenizer's pieces of words pass for words.
    """
    said = (piece for text in texts for piece in _SAID.findall(fold(_NOT_ITS_OWN.sub(" ", text))))
    return [piece for piece in dict.fromkeys(said) if piece not in _known()]


def note_unknown(texts: Iterable[str], what: str) -> str | None:
    """One line if the texts have something that the embedded model does not know; ``what`` they are, as "captions"."""
    found = unknown_words(texts)
    if not found:
        return None
    shown = ", ".join(repr(each) for each in found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
    return (
        f"warning: {what} with what the embedded model does not know, and takes for noise: {shown}; leave that out; "
        f"it knows 96 words, as in 'a portrait of a person with glasses wearing a red jacket on a grey background'"
    )
