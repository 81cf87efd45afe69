"""diffusers' format: one tensor under the word; an SDXL word is two such files.

Held to diffusers' ``load_textual_inversion`` and to what its ``textual_inversion.py`` and ``textual_inversion_sdxl.py``
write: ``learned_embeds.safetensors``, ``learned_embeds-steps-N.safetensors``, and for the second text encoder
``learned_embeds_2.safetensors``, ``learned_embeds_2-steps-N.safetensors``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from ti_jax.embeddings.containers import OURS, PICKLE_SUFFIXES, Content, pickle_bytes, read_content, safetensors_bytes
from ti_jax.embeddings.embedding import Embedding
from ti_jax.embeddings.families import FAMILIES
from ti_jax.embeddings.naming import named
from ti_jax.embeddings.vectors import encoder_of, vectors_of
from ti_jax.errors import InputError
from ti_jax.models.components import TEXT_ENCODERS

FILE_NAMES = ("learned_embeds.safetensors", "learned_embeds.bin")
_BASE = "learned_embeds"

# Entries in the header of our files. The pair is a hash of both halves: it distinguishes the matching half from a file
# left by an earlier run.
_PAIR, _ENCODER = f"{OURS}pair", f"{OURS}encoder"


def second_path(path: Path) -> Path:
    """Path of the half for the second text encoder, as diffusers' SDXL script names it."""
    if path.name.startswith(_BASE):
        return path.with_name(f"{_BASE}_2{path.name.removeprefix(_BASE)}")
    return path.with_name(f"{path.stem}_2{path.suffix}")


def first_path(path: Path) -> Path | None:
    """The inverse of `second_path`; None if ``path`` is not named like a second half."""
    if path.name.startswith(f"{_BASE}_2"):
        return path.with_name(_BASE + path.name.removeprefix(f"{_BASE}_2"))
    return path.with_name(path.stem.removesuffix("_2") + path.suffix) if path.stem.endswith("_2") else None


def read(content: Content, token: str | None) -> Embedding | None:
    """A word from its file, or an SDXL word from either of its two files; None if it is not this format."""
    own = _single(content)
    if own is None:
        return None
    halves = halves_of(content) or {content.metadata.get(_ENCODER, encoder_of(own[1])): (content.path, own[1])}
    return named(content, token, own[0], {name: vectors for name, (_, vectors) in halves.items()})


def _single(content: Content) -> tuple[str, np.ndarray] | None:
    """The file's only entry, if it has one entry and that is an array."""
    if not isinstance(content.data, dict) or len(content.data) != 1:
        return None
    ((word, array),) = content.data.items()
    return (str(word), vectors_of(array, str(word))) if isinstance(array, np.ndarray) else None


def halves_of(content: Content) -> dict[str, tuple[Path, np.ndarray]] | None:
    """Files and vectors of an SDXL word by text encoder, if the file at hand is one of its two.

    Raises:
      InputError: the file says that it is one of two, and its other half is missing or belongs to another word.
    """
    for encoder, path in ((TEXT_ENCODERS[0], second_path(content.path)), (TEXT_ENCODERS[1], first_path(content.path))):
        if path is None or not _is_half(content, encoder):
            continue
        if path.is_file():
            other = read_content(path)
            halves = _join(content, other) if encoder == TEXT_ENCODERS[0] else _join(other, content)
            if halves is not None:
                return halves
        if _PAIR in content.metadata:
            what = "is not its other half; save the word again" if path.is_file() else "with the other half is missing"
            raise InputError(f"this is one half of an SDXL word, and {path} {what}")
    return None


def _is_half(content: Content, encoder: str) -> bool:
    """Whether a file may be the half of an SDXL word for this text encoder."""
    if _ENCODER in content.metadata:
        return _PAIR in content.metadata and content.metadata[_ENCODER] == encoder
    own = _single(content)
    return own is not None and own[1].shape[1] == FAMILIES["SDXL"][encoder]


def _join(first: Content, second: Content) -> dict[str, tuple[Path, np.ndarray]] | None:
    """Files and vectors by text encoder, if the two files are halves of one word."""
    mine, other = _single(first), _single(second)
    if mine is None or other is None or mine[0] != other[0] or len(mine[1]) != len(other[1]):
        return None
    if not (_is_half(first, TEXT_ENCODERS[0]) and _is_half(second, TEXT_ENCODERS[1])):
        return None
    pairs = {half.metadata[_PAIR] for half in (first, second) if _PAIR in half.metadata}
    if not pairs <= {_pair_hash(mine[1], other[1])}:
        return None
    return {TEXT_ENCODERS[0]: (first.path, mine[1]), TEXT_ENCODERS[1]: (second.path, other[1])}


def _pair_hash(first: np.ndarray, second: np.ndarray) -> str:
    return hashlib.sha256(first.tobytes() + second.tobytes()).hexdigest()[:16]


def write(embedding: Embedding, path: Path) -> dict[Path, bytes]:
    """The file of a word, by suffix ``.safetensors``, or ``.bin`` or ``.pt`` (a pickle without metadata)."""
    if path.suffix not in (".safetensors", *PICKLE_SUFFIXES):
        raise InputError(f"{path}: a word in diffusers' format is a .safetensors or a .bin file")
    paths = [path] if len(embedding.vectors) == 1 else [path, second_path(path)]
    extra = {} if len(paths) == 1 else {_PAIR: _pair_hash(*embedding.vectors.values())}
    files: dict[Path, bytes] = {}
    for target, (encoder, vectors) in zip(paths, embedding.vectors.items(), strict=True):
        if path.suffix == ".safetensors":
            header = {**embedding.metadata, _ENCODER: encoder, **extra}
            files[target] = safetensors_bytes({embedding.token: vectors}, embedding.token, header)
        else:
            files[target] = pickle_bytes(path, {embedding.token: vectors})
    return files
