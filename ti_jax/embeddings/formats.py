"""The file formats of words. A new one is a module beside this one and a line in `FORMATS`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ti_jax.embeddings import a1111_format, bundle_formats, comfyui_format, diffusers_format, xti_format
from ti_jax.embeddings.containers import Content, read_content
from ti_jax.embeddings.embedding import Embedding
from ti_jax.errors import InputError
from ti_jax.files import as_url
from ti_jax.remote import Storage, local_copy


@dataclass(frozen=True)
class Format:
    """A program's file format for words.

    Attributes:
      name: the name that `Embedding.save` takes.
      looks_like: short description of its files.
      read: content and the wanted token (or None) -> the word, or None if the file has another format.
      write: word and path -> bytes of the files to write, by path; `InputError` if the format cannot represent the
        word. None: the format is read-only.
      suffixes: file suffixes for which it is the default format.
    """

    name: str
    looks_like: str
    read: Callable[[Content, str | None], Embedding | None]
    write: Callable[[Embedding, Path], dict[Path, bytes]] | None
    suffixes: tuple[str, ...] = ()


# In the order in which they are tried. diffusers' format is any single tensor, so more specific ones come first.
FORMATS = (
    Format("card", "a picture with string_to_param in it", a1111_format.read_card, a1111_format.write_card, (".png",)),
    Format("a1111", "string_to_param", a1111_format.read, a1111_format.write, (".pt",)),
    Format("comfyui", "emb_params, or clip_l and clip_g", comfyui_format.read, comfyui_format.write),
    Format("cog-sdxl", "text_encoders_0 and text_encoders_1", bundle_formats.read_cog, None),
    Format("bundle", "bundle_emb in a LoRA", bundle_formats.read_bundle, None),
    Format("list", "a list of dicts of tensors", bundle_formats.read_list, None),
    Format("tensor", "a tensor without a word", bundle_formats.read_tensor, None),
    Format("xti", "IN01 to OUT11", xti_format.read, None),
    Format(
        "diffusers",
        "one tensor [n, D] under the word",
        diffusers_format.read,
        diffusers_format.write,
        (".safetensors", ".bin"),
    ),
)
WRITTEN = tuple(form.name for form in FORMATS if form.write is not None)


def format_for(path: Path) -> str:
    """Name of the default format for a file with this suffix.

    Raises:
      InputError: no format has the suffix.
    """
    for form in FORMATS:
        if path.suffix.lower() in form.suffixes:
            return form.name
    raise InputError(f"{path}: no format has this suffix; use .safetensors, .bin, .pt or .png")


def render(embedding: Embedding, path: Path, format_name: str) -> dict[Path, bytes]:
    """The files of a word in the format of that name: bytes by path; nothing is written.

    Raises:
      InputError: no such format, or a read-only one; a suffix that it does not have; a word that it cannot represent.
    """
    for form in FORMATS:
        if form.name == format_name and form.write is not None:
            return form.write(embedding, path)
    raise InputError(f"unknown format {format_name!r} for a learned word; known are {', '.join(WRITTEN)}")


def word_file(path: str | Path) -> Path:
    """``path``; for a folder, the file in it that diffusers' scripts and our runs save the word in; for a URL, a copy.

    Raises:
      InputError: a folder without such a file.
    """
    path = _copied(path)
    # Not Path's methods: they raise if the parent folder is not accessible.
    if not os.path.isdir(path):
        return path
    for name in diffusers_format.FILE_NAMES:
        if os.path.isfile(path / name):
            return path / name
    raise InputError(f"{path}: a folder without {' or '.join(diffusers_format.FILE_NAMES)}; give the file itself")


def _copied(path: str | Path) -> Path:
    """The path itself; for a URL that of a copy, with the other half of an SDXL word beside it if there is one."""
    url = as_url(path)
    if url is None:
        return Path(path)
    storage = Storage(url)
    if "" not in storage.listing():
        halves = {each.name for name in diffusers_format.FILE_NAMES for each in _halves(Path(name))}
        return local_copy(url, lambda names: [name for name in names if name in halves])
    copy = local_copy(url)
    for half in _halves(copy)[1:]:
        beside = f"{url.rpartition('/')[0]}/{half.name}"
        if Storage(beside).listing():
            local_copy(beside)
        else:
            half.unlink(missing_ok=True)
    return copy


def _halves(path: Path) -> list[Path]:
    """A word's file, and where its other half would be, whichever of the two it is."""
    first = diffusers_format.first_path(path)
    return [path, diffusers_format.second_path(path), *([] if first is None else [first])]


def read(path: str | Path, token: str | None = None) -> Embedding:
    """Read a word from a file of any known format; see `Embedding.load`."""
    return read_as_found(path, token)[0]


def read_as_found(path: str | Path, token: str | None = None) -> tuple[Embedding, Format, Content]:
    """As `read`, with the detected format and the file's contents."""
    path = word_file(path)
    content = read_content(path)
    for form in FORMATS:
        try:
            embedding = form.read(content, token)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        if embedding is not None:
            return embedding, form, content
    known = "; ".join(f"{form.name} ({form.looks_like})" for form in FORMATS)
    raise InputError(
        f"{path}: not a learned word in a known format: it holds {_found(content.data)}; known are {known}"
    )


def _found(data: Any, limit: int = 4) -> str:
    """Short description of a file's contents, for a message."""
    if not isinstance(data, dict):
        return f"an array {list(data.shape)}" if isinstance(data, np.ndarray) else f"a {type(data).__name__}"
    if not data:
        return "nothing"
    parts = []
    for key, value in list(data.items())[:limit]:
        what = f"{list(value.shape)} {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        parts.append(f"{key!r} {what}")
    return ", ".join(parts) + (f" and {len(data) - limit} more" if len(data) > limit else "")
