"""Weighted prompts in AUTOMATIC1111's notation: ``(word:1.2)``, ``(word)``, ``[word]``, ``BREAK``, and any length.

A prompt is parsed into pieces of text with one weight each, their tokens are split into chunks of the text encoder's
length, and the encoder's output is multiplied by the weights (`ti_jax.models.networks`). The semantics are those of
AUTOMATIC1111's default ("original") emphasis; the code is our own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ti_jax.errors import InputError
from ti_jax.models.networks import Condition, Networks, Params
from ti_jax.text.tokens import token_groups
from ti_jax.words import Words, find_words

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BRACKET = 1.1  # ( ) multiply by it, [ ] divide by it
# A full chunk ends at its last comma, if that is at most this many tokens back.
COMMA_REACH = 20


_NOTATION = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|(?P<open>[(\[])"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<close>[)\]])"
    r"|(?P<cut>\s*\bBREAK\b\s*)"
    r"|(?P<text>.)",
    re.DOTALL,
)


class Piece(NamedTuple):
    """Text with one weight; text None is BREAK."""

    text: str | None
    weight: float


def parse(prompt: str, words: Words) -> list[Piece]:
    """Parse the notation.

    Brackets nest and multiply. An unclosed bracket reaches to the end; an unopened one is text, and so is a bracket
    after a backslash. Brackets inside a placeholder word are part of the word.

    Args:
      words: placeholder words with their numbers of vectors.
    """
    texts: list[str | None] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(bracket: str, factor: float) -> None:
        first = opened[bracket].pop()
        weights[first:] = [weight * factor for weight in weights[first:]]

    for match in _symbols(prompt, words):
        if isinstance(match, str):
            texts.append(match)
            weights.append(1.0)
            continue
        found = match.lastgroup
        if found == "open":
            opened[match.group()].append(len(texts))
        elif found == "weight" and opened["("]:
            multiply("(", float(match["weight"]))
        elif found == "close" and opened["(" if match.group() == ")" else "["]:
            if match.group() == ")":
                multiply("(", BRACKET)
            else:
                multiply("[", 1 / BRACKET)
        else:
            texts.append(None if found == "cut" else match["escaped"] or match.group())
            weights.append(1.0)
    for bracket, factor in (("(", BRACKET), ("[", 1 / BRACKET)):
        while opened[bracket]:
            multiply(bracket, factor)

    pieces: list[Piece] = []
    for text, weight in zip(texts, weights, strict=True):
        last = pieces[-1] if pieces else None
        if text is not None and last is not None and last.text is not None and last.weight == weight:
            pieces[-1] = Piece(last.text + text, weight)
        else:
            pieces.append(Piece(text, weight))
    return pieces


def _symbols(prompt: str, words: Words) -> Iterator[re.Match[str] | str]:
    """Split into the notation's symbols and placeholder words; the words are not parsed."""
    end = 0
    for found in find_words(prompt, words):
        # With `endpos` a match treats the start of the next word as the end of the text.
        yield from _NOTATION.finditer(prompt, end, found.start)
        yield prompt[found.start : found.end]
        end = found.end
    yield from _NOTATION.finditer(prompt, end)


class Chunk(NamedTuple):
    """Token ids for one pass of a text encoder, int32 [L], and the weights of its output, float32 [L]."""

    ids: np.ndarray
    weights: np.ndarray


@dataclass
class _Chunker:
    """Fills chunks with tokens."""

    room: int
    comma: int | None
    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    after_comma: int | None = None
    chunks: list[tuple[list[int], list[float]]] = field(default_factory=list)

    def add(self, group: Sequence[int], weight: float) -> None:
        """Add a token, or all ids of a word, which stay in one chunk."""
        if len(self.ids) + len(group) > self.room:
            self.end(self._cut() if len(group) == 1 else None)
        self.ids += group
        self.weights += [weight] * len(group)
        if list(group) == [self.comma]:
            self.after_comma = len(self.ids)

    def _cut(self) -> int | None:
        near = self.after_comma is not None and self.room - self.after_comma < COMMA_REACH
        return self.after_comma if near else None

    def end(self, cut: int | None = None) -> None:
        """Close the chunk; tokens after `cut` go into the next one."""
        cut = len(self.ids) if cut is None else cut
        self.chunks.append((self.ids[:cut], self.weights[:cut]))
        self.ids, self.weights, self.after_comma = self.ids[cut:], self.weights[cut:], None


def chunks(tokenizer: CLIPTokenizer, prompt: str, words: Words, vocab_size: int, max_length: int) -> list[Chunk]:
    """Split a weighted prompt into at least one chunk of `max_length` tokens: start, text, end, padding.

    Args:
      words, vocab_size, max_length: as for `tokens.tokenize`.

    Raises:
      InputError: a word with more vectors than a chunk has room for.
    """
    comma = tokenizer(",", add_special_tokens=False, verbose=False).input_ids
    chunker = _Chunker(max_length - 2, comma[0] if len(comma) == 1 else None)
    for text, weight in parse(prompt, words):
        if text is None:
            chunker.end()
            continue
        for group in token_groups(tokenizer, text, words, vocab_size):
            if len(group) > chunker.room:
                raise InputError(
                    f"a word of {len(group)} vectors does not fit into the {chunker.room} tokens that the text encoder "
                    "reads at once; make it shorter (ti-jax embedding prune)"
                )
            chunker.add(group, weight)
    chunker.end()
    return [_padded(tokenizer, ids, weights, max_length) for ids, weights in chunker.chunks]


def _padded(tokenizer: CLIPTokenizer, ids: list[int], weights: list[float], max_length: int) -> Chunk:
    whole = np.full(max_length, tokenizer.pad_token_id, np.int32)
    whole[: len(ids) + 2] = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    factors = np.ones(max_length, np.float32)
    factors[1 : len(ids) + 1] = weights
    return Chunk(whole, factors)


def stack(prompts: Sequence[Sequence[Chunk]], count: int, empty: Chunk) -> Chunk:
    """Prompts of at most `count` chunks -> ids and weights [B, count, L]; shorter ones are padded with `empty`."""
    filled = [[*prompt, *[empty] * (count - len(prompt))] for prompt in prompts]
    return Chunk(
        np.stack([[chunk.ids for chunk in prompt] for prompt in filled]),
        np.stack([[chunk.weights for chunk in prompt] for prompt in filled]),
    )


def plain(prompts: Mapping[str, Sequence[Sequence[Chunk]]]) -> bool:
    """Whether all prompts (by text encoder) have one chunk and no weights."""
    return all(len(prompt) == 1 and (prompt[0].weights == 1.0).all() for each in prompts.values() for prompt in each)


class Reader(NamedTuple):
    """A text encoder's tokenizer, number of rows of its token table, and maximum length in tokens."""

    tokenizer: CLIPTokenizer
    vocab_size: int
    max_length: int


class Group(NamedTuple):
    """Prompts that can be drawn together.

    Attributes:
      numbers: indices of the prompts. ids: by text encoder, int32 [N, L] or `Chunk` of [N, K, L].
      negative_ids: the same for their negative prompts; None if they have none.
    """

    numbers: list[int]
    ids: Mapping[str, Any]
    negative_ids: Mapping[str, Any] | None


def groups(
    readers: Mapping[str, Reader], prompts: Sequence[str], negatives: Sequence[str] | None, words: Words
) -> Iterator[Group]:
    """Weighted prompts as ids by text encoder, grouped by their number of chunks.

    So the padding of a short prompt never depends on the length of another. Prompts of one chunk without weights are a
    separate group with plain ids. So a picture does not depend on which others are drawn in the same call.

    Raises:
      InputError: a word with more vectors than a chunk has room for.
    """
    both = [*prompts, *(negatives or [])]
    cut = {
        name: [chunks(reader.tokenizer, prompt, words, *reader[1:]) for prompt in both]
        for name, reader in readers.items()
    }
    pairs = [(number,) if negatives is None else (number, len(prompts) + number) for number in range(len(prompts))]
    # 0 chunks mean plain ids.
    lengths = []
    for pair in pairs:
        of_pair = {name: [each[number] for number in pair] for name, each in cut.items()}
        lengths.append(0 if plain(of_pair) else max(len(prompt) for each in of_pair.values() for prompt in each))
    empty = {name: chunks(reader.tokenizer, "", words, *reader[1:])[0] for name, reader in readers.items()}

    def stacked(chosen: list[int], length: int) -> dict[str, Any]:
        if length == 0:
            return {name: np.stack([each[number][0].ids for number in chosen]) for name, each in cut.items()}
        return {name: stack([each[number] for number in chosen], length, empty[name]) for name, each in cut.items()}

    for length in sorted(set(lengths)):
        chosen = [number for number, other in enumerate(lengths) if other == length]
        after = None if negatives is None else stacked([len(prompts) + number for number in chosen], length)
        yield Group(chosen, stacked(chosen, length), after)


def encode_weighted(
    networks: Networks, params: Params, chunks: Mapping[str, Chunk], rows: Mapping[str, jax.Array] | None
) -> Condition:
    """The condition of B weighted prompts; pure, to be used inside ``jax.jit``.

    Args:
      chunks: by text encoder, ids int32 and weights float32 [B, K, L]: each prompt is K chunks, which are encoded one
        by one, multiplied by their weights (`weighted`), and joined to a context [B, K * L, D]. The pooled text is that
        of the first chunk.
      rows: trained rows float32 [n, D] by text encoder.
    """
    batch, count, length = next(iter(chunks.values())).ids.shape
    flat = {name: jnp.reshape(chunk.ids, (batch * count, length)) for name, chunk in chunks.items()}
    states, pooled = networks.text_states(params, flat, rows)
    context = jnp.concatenate(
        [weighted(state, jnp.reshape(chunks[name].weights, (batch * count, length))) for name, state in states.items()],
        axis=-1,
    )
    pooled = None if pooled is None else pooled.reshape(batch, count, -1)[:, 0]
    return Condition(context.reshape(batch, count * length, -1), pooled)


def weighted(states: jax.Array, weights: jax.Array) -> jax.Array:
    """Text states [B, L, D] times weights [B, L], brought back to the mean that they had, as AUTOMATIC1111 does."""
    exact = states.astype(jnp.float32)
    emphasized = exact * weights[..., None]
    mean, new_mean = (x.mean(axis=(1, 2), keepdims=True) for x in (exact, emphasized))
    # Without weights nothing changes, to the bit.
    return jnp.where(new_mean == mean, emphasized, emphasized * (mean / new_mean)).astype(states.dtype)
