"""File containers of words (safetensors, PyTorch pickles, pictures): bytes to named arrays and back."""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from ti_jax.embeddings.image_card import is_picture, read_card
from ti_jax.errors import InputError, listed, one_line, utf8
from ti_jax.weights.files import DTYPES, PICKLE, SAFETENSORS, container, safe_classes

OURS = "ti_jax."  # prefix of header entries about one of our files rather than its word

BUNDLE = "bundle_emb."  # prefix of words in a LoRA file

PICKLE_SUFFIXES = (".bin", ".pt")

PICTURES = {"text chunk": "text chunk of a picture", "pixels": "pixels of a picture"}

# A word has one or two tensors (XTI: 16); a file with more is a model or a LoRA, and is refused without reading it.
MAX_TENSORS = 64
MAX_NUMBERS = 10_000_000
MAX_PICKLE_BYTES = 100_000_000

# What `torch.load` raises for a truncated or damaged file.
_BROKEN = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
)


@dataclass(frozen=True)
class Content:
    """The contents of a file.

    Attributes:
      container: the kind of file: `SAFETENSORS`, `PICKLE`, or a key of `PICTURES`.
      data: usually a dict; its tensors are NumPy arrays in the file's own precision (bfloat16 of ``ml_dtypes``).
      metadata: of a safetensors header, str to str.
    """

    path: Path
    container: str
    data: Any
    metadata: dict[str, str] = field(default_factory=dict)


def read_content(path: Path) -> Content:
    """Read a file. Its first bytes decide its kind; the suffix does not matter.

    Raises:
      InputError: no such file, or it cannot be read; broken; of another kind; a pickle with anything but tensors, text
        and numbers; a picture without a word; many tensors, as in a model.
    """
    try:
        kind, start = container(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give the file of a learned word") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the file of a learned word") from error
    if kind == SAFETENSORS:
        return _read_safetensors(path)
    if kind == PICKLE:
        return Content(path, PICKLE, _read_pickle(path))
    if is_picture(start):
        data, channel = read_card(path)
        return Content(path, channel, data)
    if start.startswith(b"\xff\xd8\xff"):
        raise InputError(
            f"{path}: a JPEG picture, and image cards are PNG or lossless WebP: a word in it would not survive JPEG's "
            "compression; get the original file"
        )
    what = "an empty file" if not start else "no safetensors, PyTorch, PNG or WebP file, or broken at its start"
    raise InputError(f"{path}: {what}; give the file of a learned word, or download it again")


def _refuse_many(path: Path, names: list[str]) -> None:
    if len(names) > MAX_TENSORS:
        raise InputError(
            f"{path}: {len(names)} entries ({listed(names, 4)}): a model or a LoRA, not a learned word; give the "
            "file of a word"
        )


def _refuse_large(path: Path, shape: Sequence[int]) -> None:
    if math.prod(shape) > MAX_NUMBERS:
        raise InputError(f"{path}: a tensor {list(shape)}, far too large for a learned word; give the file of a word")


def _read_safetensors(path: Path) -> Content:
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            # From a LoRA with bundled words, only the words are read.
            names = [name for name in names if name.startswith(BUNDLE)] or names
            _refuse_many(path, names)
            for name in names:
                part = file.get_slice(name)
                _refuse_large(path, part.get_shape())
                dtype = part.get_dtype()
                if dtype not in DTYPES:
                    raise InputError(f"{path}: {name!r} holds {dtype}; a word has numbers of {', '.join(DTYPES)}")
            return Content(path, SAFETENSORS, {name: file.get_tensor(name) for name in names}, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({one_line(error)}); download it again") from error


def _import_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path}: {path.suffix} files need PyTorch (pip install 'ti_jax[torch]'); or use .safetensors, which "
            f"AUTOMATIC1111 loads, too"
        ) from error
    return torch


def _unpacked_size(path: Path) -> int:
    """Bytes that a PyTorch file takes in memory: PyTorch never compresses it, but also reads compressed archives."""
    size = path.stat().st_size
    if size > MAX_PICKLE_BYTES:
        return size
    try:
        with zipfile.ZipFile(path) as archive:
            return max(size, sum(entry.file_size for entry in archive.infolist()))
    except (*_BROKEN, zipfile.BadZipFile):  # an old file, not an archive; or a broken one, which PyTorch refuses
        return size


def _read_pickle(path: Path) -> Any:
    if _unpacked_size(path) > MAX_PICKLE_BYTES:
        raise InputError(f"{path}: more than {MAX_PICKLE_BYTES:,} bytes, far too large for a learned word")
    torch = _import_torch(path)
    try:
        # The paper's code saves a ParameterDict. One more class is harmless: only its dict of tensors is used.
        # Pass an open file, because torch.load also looks at a path's suffix. Before refusing a pickle, it may warn.
        with (
            safe_classes(torch, [torch.nn.ParameterDict]),
            warnings.catch_warnings(action="ignore"),
            path.open("rb") as file,
        ):
            data = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds {found.group(1)}" if found else "it is broken, or holds more than tensors"
        raise InputError(
            f"{path}: refused: {what}, which could run code when loaded; get the word as .safetensors"
        ) from error
    except _BROKEN as error:
        raise InputError(f"{path}: not a complete PyTorch file ({one_line(error)}); download it again") from error
    if isinstance(data, dict):
        _refuse_many(path, [str(key) for key in data])
    if isinstance(data, list):
        _refuse_many(
            path, [f"{n}: {key}" for n, each in enumerate(data) for key in (each if isinstance(each, dict) else [n])]
        )
    return _with_arrays(path, data, torch, depth=2)


def _with_arrays(path: Path, value: Any, torch: Any, depth: int) -> Any:
    """``value`` with each tensor, in dicts up to ``depth`` levels deep, replaced by a NumPy copy."""
    if isinstance(value, torch.nn.ParameterDict):
        # Not by its methods: they need attributes that PyTorch releases of the paper's time did not write.
        value = vars(value).get("_parameters", {})
    if isinstance(value, list) and depth > 0:
        return [_with_arrays(path, item, torch, depth - 1) for item in value[: MAX_TENSORS + 1]]
    if isinstance(value, dict) and depth > 0:
        return {key: _with_arrays(path, item, torch, depth - 1) for key, item in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    _refuse_large(path, value.shape)
    tensor = value.detach()
    try:
        if tensor.dtype == torch.bfloat16:  # which PyTorch cannot hand to NumPy
            return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
        return tensor.numpy().copy()
    except (TypeError, RuntimeError) as error:
        raise InputError(f"{path}: holds a tensor that is not plain numbers ({one_line(error)})") from error


def word_metadata(content: Content, word: str) -> dict[str, str]:
    """Metadata of a file about its word, without entries about the file; ``token`` is the word that it is read as."""
    metadata = {key: value for key, value in content.metadata.items() if key != "format" and not key.startswith(OURS)}
    return {**metadata, "token": word} if "token" in metadata else metadata


def safetensors_bytes(tensors: Mapping[str, np.ndarray], word: str, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with ``format: pt``, as transformers and diffusers write it."""
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    texts = {utf8(name): utf8(text) for name, text in metadata.items()}
    return safetensors.numpy.save(arrays, {**texts, "token": word, "format": "pt"})


def pickle_bytes(path: Path, data: dict[str, Any]) -> bytes:
    """A PyTorch file; each array in ``data`` becomes a tensor.

    Raises:
      InputError: PyTorch is not installed (``path`` is for this message).
    """
    torch = _import_torch(path)

    def with_tensors(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: with_tensors(item) for key, item in value.items()}
        return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value

    buffer = io.BytesIO()
    torch.save(with_tensors(data), buffer)
    return buffer.getvalue()
