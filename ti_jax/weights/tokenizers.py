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
FAST_FILE = "tokenizer.json"  # transformers 5; transformers prefers it if both exist
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
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise InputError(f"{where}: not a CLIP tokenizer ({one_line(error)}); download it again") from error
    # transformers would give missing tokens new ids, beyond the text encoder's table.
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    missing = [token for token in (tokenizer.bos_token, tokenizer.eos_token) if token not in vocabulary]
    if missing:
        raise InputError(f"{where}: not CLIP's tokenizer, {' and '.join(missing)} are not in its vocabulary")
    return tokenizer


def _tokenizer_class() -> type[CLIPTokenizer]:
    # On import transformers advises to install PyTorch; its tokenizers do not need it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import CLIPTokenizer

    return CLIPTokenizer


# -- CLIP's own tokenizer, for checkpoints without one

MERGES = ASSETS / "clip_tokenizer" / "bpe_simple_vocab_16e6.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY_SIZE = 49408
MAX_LENGTH = 77


def clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """CLIP's tokenizer, which OpenAI's and OpenCLIP's models were trained with; it comes with the package.

    Its 49408 tokens are 256 bytes, the same bytes at the end of a word, the results of the first 48894 merges, start
    and end, in the order of OpenAI's ``simple_tokenizer.py``.

    Args:
      pad_token: the padding: ``<|endoftext|>`` for ViT-L, ``!`` for OpenCLIP's encoders. With ``!``, an exclamation
        mark in a prompt gets the padding's id, as in a diffusers folder but not in OpenCLIP itself.
    """
    # The first line is a title; the file has more merges than CLIP has tokens.
    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").split("\n")[1:]
    merges = [tuple(line.split()) for line in lines[: VOCABULARY_SIZE - 2 * 256 - 2]]
    return tokenizer_of_merges(merges, pad_token, MAX_LENGTH)


def tokenizer_of_merges(merges: Sequence[tuple[str, ...]], pad_token: str, max_length: int) -> CLIPTokenizer:
    """A CLIPTokenizer with the tokens: bytes, bytes at the end of a word, results of the merges, start and end.

    Args:
      merges: pairs of tokens, by priority.
    """
    # Printable bytes come first. The others are mapped to characters from 256 on, because a token must not contain
    # spaces or control characters.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    # transformers annotates merges as strings, which the tokenizers library accepts no more.
    return _tokenizer_class()(vocabulary, cast("list[str]", merges), pad_token=pad_token, model_max_length=max_length)
