"""Tokenizers of a diffusers folder, as transformers' CLIPTokenizer (which needs no PyTorch)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ti_jax.errors import InputError
from ti_jax.weights.files import one_line, refuse_git_lfs_pointer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

SLOW_FILES = ("vocab.json", "merges.txt")  # transformers 4
FAST_FILE = "tokenizer.json"  # transformers 5; where both are there, transformers reads this one
TOKENIZER_FILES = (*SLOW_FILES, FAST_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(folder: Path, name: str) -> CLIPTokenizer:
    """Tokenizer in ``<folder>/<name>/``, from ``vocab.json`` and ``merges.txt`` or from ``tokenizer.json``.

    Raises:
      InputError: files that are missing or broken, or a tokenizer that does not wrap a prompt in start and end tokens.
    """
    where = Path(folder) / name
    there = [file for file in TOKENIZER_FILES if (where / file).is_file()]
    if FAST_FILE not in there and not all(file in there for file in SLOW_FILES):
        raise InputError(f"{where}: no tokenizer; expected {' and '.join(SLOW_FILES)}, or {FAST_FILE}")
    for file in there:
        refuse_git_lfs_pointer(where / file)

    # transformers advises to install PyTorch as it is imported; its tokenizers do without.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(where, local_files_only=True)
    except Exception as error:  # the library below transformers raises nothing more specific
        raise InputError(f"{where}: not a CLIP tokenizer ({one_line(error)}); download it again") from error
    if tokenizer("").input_ids != [tokenizer.bos_token_id, tokenizer.eos_token_id]:
        raise InputError(f"{where}: not a CLIP tokenizer, it does not put a start and an end token around a prompt")
    return tokenizer
