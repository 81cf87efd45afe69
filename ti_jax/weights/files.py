"""The weight files of one component: find them in any published layout, and read their tensors one by one."""

from __future__ import annotations

import contextlib
import io
import json
import math
import mmap
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ti_jax.errors import InputError, listed, one_line

# Format -> base file names: diffusers' for unet and vae, transformers' for text encoders.
BASE_NAMES = {"safetensors": ("diffusion_pytorch_model", "model"), "bin": ("diffusion_pytorch_model", "pytorch_model")}

GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

SAFETENSORS, PICKLE = "safetensors", "PyTorch pickle"
_PICKLES = (b"PK\x03\x04", b"\x80")  # a zip archive since PyTorch 1.6
# First bytes of other files that are found under the name of a model or a word.
_OTHER_FILES = {
    b"GGUF": "a GGUF file, whose quantised weights ti_jax does not read; get the model as .safetensors",
    b"<": "a web page and not a model or a word; download it again",
    b"7z\xbc\xaf": "an archive; unpack it",
}

VARIANT = r"(?:\.((?!index\.)[^.]+?(?<!-of-\d{5})))?"  # shards are not variants

LARGE = 1 << 16  # bytes

# The dtypes that are read, by their safetensors names.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def file_names(base: str, extension: str, variant: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names under which weights are published: (single files, indices of shards)."""
    if variant is None:
        return (f"{base}.{extension}",), (f"{base}.{extension}.index.json",)
    return (
        (f"{base}.{variant}.{extension}",),
        # The names of transformers, of diffusers and of earlier diffusers.
        (
            f"{base}.{extension}.index.{variant}.json",
            f"{base}.{variant}.{extension}.index.json",
            f"{base}.{extension}.{variant}.index.json",
        ),
    )


def variants_in(names: list[str]) -> list[str | None]:
    """Variants for which a list of file names has weights; None is the plain one."""
    found: set[str | None] = set()
    for extension, bases in BASE_NAMES.items():
        for base in bases:
            single = rf"{base}{VARIANT}\.{extension}"
            index = rf"{base}{VARIANT}\.{extension}{VARIANT}\.index{VARIANT}\.json"
            for name in names:
                if match := re.fullmatch(f"{single}|{index}", name):
                    found.add(next((word for word in match.groups() if word), None))
    return sorted(found, key=str)


def select_files(names: list[str], variant: str | None) -> tuple[str, bool] | None:
    """The file among `names` to read weights of `variant` from, and whether it is an index of shards.

    safetensors is preferred to pickles, a single file to shards. None if there is no such file.
    """
    for extension, bases in BASE_NAMES.items():
        for base in bases:
            singles, indices = file_names(base, extension, variant)
            for candidates, is_index in ((singles, False), (indices, True)):
                for name in candidates:
                    if name in names:
                        return name, is_index
    return None


def choose_file(names: list[str], variant: str | None, where: object) -> tuple[str, bool]:
    """As `select_files`, but raises InputError, which lists the available variants, if there is no such file."""
    selected = select_files(names, variant)
    if selected is not None:
        return selected
    variants = variants_in(names)
    if not variants:
        raise InputError(
            f"{where}: no weight file (diffusion_pytorch_model, model or pytorch_model, .safetensors or .bin); "
            "download the model again, or give another"
        )
    wanted = "weights without a variant" if variant is None else f"weights of variant {variant}"
    there = ", ".join("the plain weights" if name is None else name for name in variants)
    remedy = "leave out --variant" if variants == [None] else "choose one with --variant"
    raise InputError(f"{where}: no {wanted}; there are: {there}; {remedy}")


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Files with the weights of the component in `folder`: one file, or the shards listed in an index.

    Raises:
      InputError: no such folder, no weights, no weights of this variant, or an index that is broken or lists shards
        that are missing.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a diffusers model has its weights there")
    name, is_index = choose_file(sorted(path.name for path in folder.iterdir()), variant, folder)
    return shards(folder / name) if is_index else [folder / name]


def shards(index: Path) -> list[Path]:
    """Files listed in an ``.index.json``; each is checked to exist."""
    refuse_git_lfs_pointer(index)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("its shards are not names of files beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not an index of weight shards ({one_line(error)}); download it again") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InputError(
            f"{index}: {len(missing)} of its {len(names)} shards are missing: {listed(missing)}; download them"
        )
    return [index.parent / name for name in names]


class Tensors:
    """Tensors of one weight file: `shapes` and `dtypes` of all, values one tensor at a time."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype | str]
    """A supported dtype, or the name of one that is not supported."""
    metadata: Mapping[str, str] = {}
    """Metadata of the file's header."""

    def label(self, name: str) -> str:
        """The tensor's name in messages."""
        return name

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own."""
        raise NotImplementedError


class SafetensorsFile(Tensors):
    """A safetensors file that `safe_open` has validated.

    Values are read without that library: pages of its memory map stay resident until the file is closed, and its other
    reader keeps the last tensor.
    """

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        self._path, self._file = path, file
        length = int.from_bytes(file.read(8), "little")
        self._entries = json.loads(file.read(length))
        self.metadata = self._entries.pop("__metadata__", None) or {}
        self._start = 8 + length
        self.shapes = {name: tuple(entry["shape"]) for name, entry in self._entries.items()}
        self.dtypes = {name: DTYPES.get(entry["dtype"], entry["dtype"]) for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own."""
        tensor = page_aligned(self.shapes[name], self.dtypes[name])
        self._file.seek(self._start + self._entries[name]["data_offsets"][0])
        if self._file.readinto(tensor.reshape(-1).view(np.uint8).data) != tensor.nbytes:
            raise InputError(f"{self._path}: became shorter while it was read; download it again")
        return tensor


class PickleFile(Tensors):
    """A state dict that PyTorch pickled."""

    def __init__(self, path: Path, state_dict: dict[str, Any]) -> None:
        self._path, self._state_dict = path, state_dict
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        names = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
        self.dtypes = {}
        for name, tensor in state_dict.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            self.dtypes[name] = DTYPES[names[dtype]] if dtype in names else dtype

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own."""
        import torch

        # Popped, to free its memory: if the file could not be memory-mapped, the state dict holds all tensors.
        stored = self._state_dict.pop(name).detach()
        # With stride 0, a few stored numbers can pretend to be a tensor of any size and fill the memory.
        if stored.numel() * stored.itemsize > stored.untyped_storage().nbytes():
            raise InputError(f"{self._path}: {name} has more numbers than the file; get it as .safetensors")
        if stored.dtype == torch.bfloat16:  # which PyTorch cannot hand to NumPy
            stored = stored.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            stored = stored.numpy()
        tensor = page_aligned(self.shapes[name], self.dtypes[name])
        tensor[...] = stored
        return tensor


def page_aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """As `np.empty`, but a large array gets its own memory pages (mmap).

    Freed pages go back to the system at once; malloc would keep tens of megabytes of freed tensors. They are also
    aligned, so that JAX on CPU aliases the array instead of copying it.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < LARGE:
        return np.empty(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Tensors]:
    """Open one weight file, a ``.safetensors`` or a PyTorch pickle (``.bin``; unpickled with ``weights_only=True``).

    Raises:
      InputError: the file is a git-lfs pointer, broken, cut short, or a pickle that holds anything but tensors; or
        PyTorch, which only pickles need, is not installed.
    """
    refuse_git_lfs_pointer(path)
    if path.suffix == ".safetensors":
        with open_safetensors(path) as file:
            yield file
    else:
        yield PickleFile(path, state_dict(path, load_pickle(path)))


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[SafetensorsFile]:
    """Open a safetensors file; InputError if it is not a whole one."""
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({one_line(error)}); download it again") from error
    with path.open("rb") as file:
        yield SafetensorsFile(path, file)


def safe_classes(torch: Any, classes: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """``torch.serialization.safe_globals`` that keeps the caller's own globals; PyTorch's removes them on exit."""
    allowed = torch.serialization.get_safe_globals()
    return torch.serialization.safe_globals([each for each in classes if each not in allowed])


def load_pickle(path: Path, stand_ins: Sequence[Any] = ()) -> Any:
    """Contents of a PyTorch pickle; its tensors are memory-mapped if the format allows.

    `stand_ins` are further classes that it may contain, in the form that `torch.serialization.safe_globals` takes.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path}: reading a {path.suffix} file needs PyTorch (pip install 'ti_jax[torch]'); or get the model as "
            ".safetensors"
        ) from error
    try:
        with warnings.catch_warnings(), safe_classes(torch, stand_ins):
            # Warnings about pickles that PyTorch did not write; if it cannot read one, an error follows.
            warnings.simplefilter("ignore", UserWarning)
            # Files from before PyTorch 1.6 are no zip archives and cannot be memory-mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: refused, it is broken or holds more than tensors ({one_line(error)}); get it as .safetensors"
        ) from error
    except Exception as error:  # a truncated file can raise anything, IndexError too
        raise InputError(f"{path}: not a complete PyTorch file ({one_line(error)}); download it again") from error


def state_dict(path: Path, content: Any) -> dict[str, Any]:
    """`content` of the pickle at `path`, if it is a dict of tensors; else InputError."""
    import torch

    def is_plain(tensor: Any) -> bool:
        return (
            isinstance(tensor, torch.Tensor)
            and not tensor.is_nested
            and not tensor.is_neg()
            and tensor.layout == torch.strided
            and tensor.device.type == "cpu"
        )

    if not isinstance(content, dict) or not all(
        isinstance(name, str) and is_plain(tensor) for name, tensor in content.items()
    ):
        raise InputError(f"{path}: not a dict of tensors, as a model's state dict is; get the model as .safetensors")
    return content


def is_zip(path: Path) -> bool:
    """Whether a PyTorch file is a zip archive."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def container(path: Path) -> tuple[str | None, bytes]:
    """What a file is by its first bytes, because files are shared under any suffix, and its first 12 bytes.

    Returns:
      `SAFETENSORS`, `PICKLE`, or None if it is neither.

    Raises:
      InputError: a git-lfs pointer, or a file that cannot be a model or a word. OSError: it cannot be read.
    """
    refuse_git_lfs_pointer(path)
    with path.open("rb") as file:
        start = file.read(12)
    # Before the others: the 8 bytes before the header are its length, and may begin like a pickle or a web page.
    if start[8:9] == b"{":
        return SAFETENSORS, start
    if start.startswith(_PICKLES):
        return PICKLE, start
    for beginning, kind in _OTHER_FILES.items():
        if start.startswith(beginning):
            raise InputError(f"{path}: {kind}")
    return None, start


def refuse_git_lfs_pointer(path: Path) -> None:
    """Raise InputError if `path` is the note that git leaves in place of a large file."""
    with path.open("rb") as file:
        if file.read(len(GIT_LFS_POINTER)) == GIT_LFS_POINTER:
            raise InputError(f"{path}: a git-lfs pointer, not the file itself; fetch it with  git lfs pull")
