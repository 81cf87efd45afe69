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
      InputError: files that are missing or broken, or a tokenizer without start and end tokens, so not CLIP's.
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
    # transformers would give the missing tokens ids of its own, behind the text encoder's table.
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    missing = [token for token in (tokenizer.bos_token, tokenizer.eos_token) if token not in vocabulary]
    if missing:
        raise InputError(f"{where}: not CLIP's tokenizer, {' and '.join(missing)} are not in its vocabulary")
    return tokenizer
