"""What a placeholder word may be, and where a prompt has it; strings only.

Words are compared in the normal form that CLIP's tokenizer gives all text: Unicode NFC, then the lower case of each
character by itself. `str.lower` and `re.IGNORECASE` both differ from it: the first gives a Greek sigma at the end of a
word a form of its own, the second takes the Turkish dotless i for an i, and the long s for an s.
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
    """The normal form in which words are compared: NFC, each character in lower case."""
    return "".join(character.lower() for character in unicodedata.normalize("NFC", text))


def is_word(text: str) -> bool:
    """Whether a text can be a placeholder word: not empty, in UTF-8, and without spaces."""
    return text.split() == [text] and is_utf8(text)


def check_token(token: str, where: str = "placeholder") -> None:
    """Raise `InputError` unless ``token`` can be a placeholder word; ``where`` says what it was given as."""
    if not is_word(token):
        raise InputError(f"{where} {token!r}: must be one word without spaces, like <cat-toy>")


def same_word(word: str, known: Iterable[str]) -> bool:
    """Whether a prompt could not tell ``word`` from one of the ``known`` words."""
    return fold(word) in map(fold, known)


class Found(NamedTuple):
    """A placeholder word in a prompt: ``prompt[start:end]``, and the rows of ``word`` that stand there."""

    start: int
    end: int
    word: str
    rows: range


def find_words(prompt: str, words: Words) -> list[Found]:
    """The placeholder words in a prompt, from left to right; where two could begin, the longer one.

    A word that begins or ends with a letter or digit must stand alone ("sks" is not in "asks"). A word of several
    vectors may come already expanded, as diffusers writes it: ``<cat> <cat>_1 <cat>_2`` is the whole word, ``<cat>_1``
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
    """Whether a prompt has the word, as a whole word: "a rick" has "rick", "a brick" has not."""
    return bool(find_words(prompt, {word: 1}))


def unprovided(prompts: Iterable[str], words: Words) -> list[str]:
    """What looks like a learned word in the prompts, ``<cat>``, and is none of ``words``; each once."""
    seen: dict[str, None] = {}
    for prompt in prompts:
        rest, end = "", 0
        for found in find_words(prompt, words):
            rest, end = f"{rest}{prompt[end : found.start]} ", found.end
        seen |= dict.fromkeys(re.findall(r"<[^<>\s|][^<>\s]*>", rest + prompt[end:]))
    return list(seen)


def fill(template: str, word: str) -> str:
    """A template with the word in the place of each ``{}``; other braces are text."""
    return template.replace("{}", word)


def _pattern(counts: Mapping[str, int]) -> re.Pattern[str]:
    """Matches each word, longest first, in folded text; ``counts`` are the vectors of folded words."""
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
    """`fold` of a text, and for each character of it where in the text its origin starts and ends."""
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
    """Start and end of each character with the marks that NFC may join to it."""
    start = 0
    for place, character in enumerate(text):
        if place > start and not _joins(character):
            yield start, place
            start = place
    if text:
        yield start, len(text)


def _joins(character: str) -> bool:
    """Whether NFC may join a character to the one before: a mark, or a vowel or final consonant of Hangul."""
    return unicodedata.category(character).startswith("M") or "\u1160" <= character <= "\u11ff"
