"""Placeholder words: prompts to token ids, and the embedding rows of the new ids.

New words get ids beyond the frozen token table: id ``vocab_size + r`` is row ``r`` of the trained rows. The tokenizer
itself is never changed. A prompt is split at its placeholder words *before* it is tokenized, and each word is replaced
by its ids. So placeholder words never pass through byte-pair encoding, and words that contain each other cannot be
confused.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ti_jax.errors import InputError
from ti_jax.words import Words, check_token, find_words, fold, same_word
from ti_jax.words import contains_word as contains_word

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from ti_jax.embeddings import Embedding


def check_new_word(tokenizer: CLIPTokenizer, word: str) -> None:
    """Raise `InputError` unless ``word`` can be a placeholder: not empty, no spaces, not in the vocabulary."""
    check_token(word)
    if is_known(tokenizer, word):
        raise InputError(
            f"placeholder {word!r} is a word that this tokenizer knows already; choose one that it does not, "
            f"like <{word.strip('<>|')}-1>"
        )


def is_known(tokenizer: CLIPTokenizer, word: str) -> bool:
    """Whether ``word`` is a single token of the tokenizer's own vocabulary."""
    vocabulary = tokenizer.get_vocab()
    return word in vocabulary or fold(word) + "</w>" in vocabulary


def initializer_ids(tokenizer: CLIPTokenizer, initializer: str) -> list[int]:
    """Token ids of the words in ``initializer``, each of which must be one token of the vocabulary.

    Raises:
      InputError: no word, or a word that the tokenizer splits into several tokens (a piece of a word is a meaningless
        start); the message has the nearest known words.
    """
    ids: list[int] = []
    for word in initializer.split():
        pieces = tokenizer(word, add_special_tokens=False, verbose=False).input_ids
        if len(pieces) != 1 or pieces[0] in (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
            known = [token.removesuffix("</w>") for token in tokenizer.get_vocab() if token.endswith("</w>")]
            near = difflib.get_close_matches(fold(word), [w for w in known if len(w) > 1], n=3, cutoff=0.4)
            split = "|".join(tokenizer.convert_ids_to_tokens(pieces)).replace("</w>", "") or "nothing"
            raise InputError(
                f"initializer word {word!r} is not one token of this model (it splits into {split}); "
                + (f"known words spelt like it: {', '.join(near)}" if near else "choose a common word that it knows")
            )
        ids += pieces
    if not ids:
        raise InputError("the initializer is empty; give a known word close to the concept")
    return ids


def initial_rows(table: np.ndarray, ids: Sequence[int], num_vectors: int) -> np.ndarray:
    """Initial values of ``num_vectors`` rows from the initializer's tokens: float32 [num_vectors, D].

    With as many tokens as vectors, each row gets one. More vectors than tokens: the tokens are repeated in turn. Fewer:
    each row is the mean of a contiguous group of tokens, so that no word of the initializer is lost.
    """
    rows = np.asarray(table[np.asarray(ids)], np.float32)
    if num_vectors >= len(ids):
        return rows[np.arange(num_vectors) % len(ids)]
    return np.stack([group.mean(axis=0) for group in np.array_split(rows, num_vectors)])


def combine(embeddings: Sequence[Embedding]) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Several learned embeddings -> words with their numbers of vectors, and the rows stacked in that order.

    Returns:
      ``({"<cat>": 2, "<dog>": 1}, {"text_encoder": float32 [3, D], ...})``: inputs of `tokenize` and the text encoders.

    Raises:
      InputError: two embeddings have the same word.
    """
    words: dict[str, int] = {}
    for embedding in embeddings:
        if same_word(embedding.token, words):
            raise InputError(f"two embeddings have the word {embedding.token!r}; load one of them under another token")
        words[embedding.token] = embedding.num_vectors
    names = embeddings[0].vectors if embeddings else {}
    rows = {name: np.concatenate([e.vectors[name] for e in embeddings]).astype(np.float32) for name in names}
    return words, rows


def prompt_ids(tokenizer: CLIPTokenizer, prompt: str, words: Words, vocab_size: int) -> list[int]:
    """Token ids of ``prompt`` without start, end and padding; words become ``vocab_size + row``.

    Held to transformers' tokenizer with the words added to it (``add_tokens``), as diffusers does.
    """
    return [number for group in token_groups(tokenizer, prompt, words, vocab_size) for number in group]


def token_groups(tokenizer: CLIPTokenizer, prompt: str, words: Words, vocab_size: int) -> list[list[int]]:
    """`prompt_ids` in groups: all ids of a placeholder word are one group, any other token is a group by itself."""
    first_row, offset = {}, 0
    for word, count in words.items():
        first_row[word] = vocab_size + offset
        offset += count

    def plain(text: str) -> list[list[int]]:
        return [[number] for number in tokenizer(text, add_special_tokens=False, verbose=False).input_ids]

    groups: list[list[int]] = []
    end = 0
    for found in find_words(prompt, words):
        groups += plain(prompt[end : found.start])
        groups.append([first_row[found.word] + row for row in found.rows])
        end = found.end
    return groups + plain(prompt[end:])


def tokenize(
    tokenizer: CLIPTokenizer, prompts: Sequence[str], words: Words, vocab_size: int, max_length: int
) -> np.ndarray:
    """Prompts as padded token ids, int32 [B, max_length]: start, prompt, end, padding.

    Args:
      words: placeholder word -> its number of vectors, in the order of the rows.
      vocab_size: number of rows of the frozen token table; row r of the new rows has id ``vocab_size + r``.

    Raises:
      InputError: a prompt is too long. Truncating it silently could remove the new word.
    """
    batch = np.full((len(prompts), max_length), tokenizer.pad_token_id, np.int32)
    for row, prompt in enumerate(prompts):
        ids = [tokenizer.bos_token_id, *prompt_ids(tokenizer, prompt, words, vocab_size), tokenizer.eos_token_id]
        if len(ids) > max_length:
            shown = prompt if len(prompt) <= 60 else prompt[:57] + "..."
            lost = ids[max_length - 1 : -1]
            word = ", and with it the new word," if any(i >= vocab_size for i in lost) else ""
            raise InputError(
                f"prompt {shown!r} takes {len(ids) - 2} tokens where the text encoder reads {max_length - 2}; its end"
                f"{word} would be cut: shorten it"
            )
        batch[row, : len(ids)] = ids
    return batch
