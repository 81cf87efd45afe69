"""Tokenizers of a diffusers folder, or the one of CLIP itself, as transformers' CLIPTokenizer (needs no PyTorch)."""

from __future__ import annotations

import gzip
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ti_jax.config import ASSETS
from ti_jax.errors import InputError, one_line
from ti_jax.weights.files import refuse_git_lfs_pointer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

SLOW_FILES = ("vocab.json", "merges.txt")  # transformers 4
FAST_FILE = "tokenizer.json"  # transformers 5; where both are there, transformers reads this one
TOKENIZER_FILES = (*SLOW_FILES, FAST_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(folder: Path, name: str) -> CLIPTokenizer:
    """Tokenizer in ``<folder>/<name>/``, from ``vocab.json`` and ``merges.txt`` or from ``tokenizer.json``.

    Raises:
      InputError: files that are missing or broken, or a tokenizer without start and end tokens, so not CLIP's.
    """
    where = Path(folder) / name
    there = [file for file in TOKENIZER_FILES if (where / file).is_file()]
    if FAST_FILE not in there and not all(file in there for file in SLOW_FILES):
        raise InputError(f"{where}: no tokenizer; expected {' and '.join(SLOW_FILES)}, or {FAST_FILE}")
    for file in there:
        refuse_git_lfs_pointer(where / file)

    try:
        tokenizer = _tokenizer_class().from_pretrained(where, local_files_only=True)
    except Exception as error:  # the library below transformers raises nothing more specific
        raise InputError(f"{where}: not a CLIP tokenizer ({one_line(error)}); download it again") from error
    # transformers would give the missing tokens ids of its own, behind the text encoder's table.
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    missing = [token for token in (tokenizer.bos_token, tokenizer.eos_token) if token not in vocabulary]
    if missing:
        raise InputError(f"{where}: not CLIP's tokenizer, {' and '.join(missing)} are not in its vocabulary")
    return tokenizer


def _tokenizer_class() -> type[CLIPTokenizer]:
    # transformers advises to install PyTorch as it is imported; its tokenizers do without.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import CLIPTokenizer

    return CLIPTokenizer


# -- CLIP's own, for checkpoints that come without

MERGES = ASSETS / "clip_tokenizer" / "bpe_simple_vocab_16e6.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY_SIZE = 49408
MAX_LENGTH = 77


def clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """The tokenizer that OpenAI trained CLIP with, and OpenCLIP's models too; it comes with the package.

    Its 49408 tokens are 256 bytes, the same at the end of a word, the results of the first 48894 merges, start and end:
    the order of OpenAI's ``simple_tokenizer.py``.

    Args:
      pad_token: what a prompt is filled up with: ``<|endoftext|>`` beside ViT-L, ``!`` beside OpenCLIP's encoders. An
        exclamation mark in a prompt is the padding's id then: that of a diffusers folder, and not OpenCLIP's own.
    """
    # Behind a line of title; the file has more merges than CLIP has tokens for.
    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").split("\n")[1:]
    merges = [tuple(line.split()) for line in lines[: VOCABULARY_SIZE - 2 * 256 - 2]]
    return tokenizer_of_merges(merges, pad_token, MAX_LENGTH)


def tokenizer_of_merges(merges: Sequence[tuple[str, ...]], pad_token: str, max_length: int) -> CLIPTokenizer:
    """A CLIPTokenizer whose tokens are the bytes, the bytes at the end of a word, what the merges make, start and end.

    Args:
      merges: pairs of tokens, in the order in which they are tried.
    """
    # The bytes that print as themselves come first. The others get letters from 256 on, because no space or control
    # character may stand in a token.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    # transformers' annotation knows only merges as text, which the library below takes no more.
    return _tokenizer_class()(vocabulary, cast("list[str]", merges), pad_token=pad_token, model_max_length=max_length)
