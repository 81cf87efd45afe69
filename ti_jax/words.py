"""Placeholder words: which are valid, and where a prompt contains them. Strings only.

Words are compared in the normal form of CLIP's tokenizer: Unicode NFC, then the lower case of each character by itself.
`str.lower` and `re.IGNORECASE` both differ from it: the first treats a final Greek sigma differently, the second takes
the Turkish dotless i for an i, and the long s for an s.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ti_jax.errors import InputError, is_utf8

Words = Mapping[str, int]
"""Placeholder words with their numbers of vectors, in the order of the rows."""


def fold(text: str) -> str:
    """The normal form for comparing words: NFC, each character in lower case."""
    return "".join(character.lower() for character in unicodedata.normalize("NFC", text))


def is_word(text: str) -> bool:
    """Whether a text is a valid placeholder word: not empty, without spaces, and encodable as UTF-8."""
    return text.split() == [text] and is_utf8(text)


def check_token(token: str, where: str = "placeholder") -> None:
    """Raise `InputError` unless ``token`` is a valid placeholder word; ``where`` names the input in the message."""
    if not is_word(token):
        raise InputError(f"{where} {token!r}: must be one word without spaces, like <cat-toy>")


def same_word(word: str, known: Iterable[str]) -> bool:
    """Whether ``word`` has the same normal form as one of the ``known`` words."""
    return fold(word) in map(fold, known)


class Found(NamedTuple):
    """An occurrence of a placeholder word: ``prompt[start:end]``, and the rows of ``word`` that it stands for."""

    start: int
    end: int
    word: str
    rows: range


def find_words(prompt: str, words: Words) -> list[Found]:
    """The placeholder words in a prompt, from left to right; where two match, the longer one.

    A word that begins or ends with a letter or digit matches whole words only ("sks" is not in "asks"). A word of
    several vectors may be already expanded, as in diffusers: ``<cat> <cat>_1 <cat>_2`` is the whole word, ``<cat>_1``
    its second row.
    """
    if not words:
        return []
    folded, starts, ends = _folded_with_places(prompt)
    by_form = {fold(word): word for word in words}
    counts = {form: words[word] for form, word in by_form.items()}
    found = []
    for match in _pattern(counts).finditer(folded):
        head = match.group().split()[0]
        if head in by_form:
            word, rows = by_form[head], range(counts[head])
        else:
            form, _, index = head.rpartition("_")
            word, rows = by_form[form], range(int(index), int(index) + 1)
        found.append(Found(starts[match.start()], ends[match.end() - 1], word, rows))
    return found


def contains_word(prompt: str, word: str) -> bool:
    """Whether a prompt contains the word as a whole word: "a rick" contains "rick", "a brick" does not."""
    return bool(find_words(prompt, {word: 1}))


def unprovided(prompts: Iterable[str], words: Words) -> list[str]:
    """Texts in the prompts that look like learned words, ``<cat>``, but are not in ``words``; each once."""
    seen: dict[str, None] = {}
    for prompt in prompts:
        rest, end = "", 0
        for found in find_words(prompt, words):
            rest, end = f"{rest}{prompt[end : found.start]} ", found.end
        seen |= dict.fromkeys(re.findall(r"<[^<>\s|][^<>\s]*>", rest + prompt[end:]))
    return list(seen)


def fill(template: str, word: str) -> str:
    """Replace each ``{}`` of a template by the word; other braces are text."""
    return template.replace("{}", word)


def without_word(prompt: str, word: str, count: int, instead: str) -> str:
    """The prompt with another text wherever a word of ``count`` vectors, or one of its vectors, stands."""
    rest, end = "", 0
    for found in find_words(prompt, {word: count}):
        rest, end = rest + prompt[end : found.start] + instead, found.end
    return rest + prompt[end:]


def _pattern(counts: Mapping[str, int]) -> re.Pattern[str]:
    """A pattern that matches each word in folded text, longest first; ``counts``: vectors of each folded word."""
    alternatives = []
    for form in sorted(counts, key=lambda form: (-len(form), form)):
        text = re.escape(form)
        before = r"(?<![\w])" if form[0].isalnum() else ""
        after = r"(?![\w])" if form[-1].isalnum() else ""
        expanded = "".join(rf"\s+{text}_{i}(?!\d)" for i in range(1, counts[form]))
        alternatives.append(f"{before}{text}{expanded}{after}" if expanded else "")
        rows = "|".join(str(i) for i in range(counts[form] - 1, 0, -1))
        alternatives.append(f"{before}{text}_(?:{rows})(?!\\d)" if rows else "")
        alternatives.append(f"{before}{text}{after}")
    return re.compile("|".join(alternative for alternative in alternatives if alternative))


def _folded_with_places(text: str) -> tuple[str, list[int], list[int]]:
    """`fold` of a text, and for each of its characters the start and end of its origin in the text."""
    folded: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    for start, end in _clusters(text):
        form = fold(text[start:end])
        folded.append(form)
        starts += [start] * len(form)
        ends += [end] * len(form)
    return "".join(folded), starts, ends


def _clusters(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each character, including the marks that NFC may combine with it."""
    start = 0
    for place, character in enumerate(text):
        if place > start and not _joins(character):
            yield start, place
            start = place
    if text:
        yield start, len(text)


def _joins(character: str) -> bool:
    """Whether NFC may combine a character with the one before: a mark, or a Hangul vowel or final consonant."""
    return unicodedata.category(character).startswith("M") or "\u1160" <= character <= "\u11ff"
