"""AUTOMATIC1111's image cards: a picture that stores a word in a PNG text chunk and in its pixels.

Held to the layout of AUTOMATIC1111's ``image_embedding.py``. Both places have the dict of its ``.pt`` files as JSON,
with tensors as ``{"TORCHTENSOR": [[...], ...]}``; float32 numbers are exact in JSON. The text chunk
``sd-ti-embedding`` is base64 of it. In the pixels it is compressed with zlib: the picture is between two blocks, with a
black column on each side. In the low four bits of each channel, row by row, the left block has the low nibbles of the
bytes and the right block the high nibbles, both xored with the low nibbles of a pseudo-random sequence. The high four
bits of the blocks are decoration. So the pixels keep the word if text chunks are removed, but not in lossy formats.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import struct
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ti_jax.errors import InputError, one_line

TEXT_CHUNK = "sd-ti-embedding"
TENSOR = "TORCHTENSOR"

# Far more than any card has. They limit a hostile one to about 200 MB and seconds.
MAX_PIXELS = 32_000_000
MAX_JSON_BYTES = 8_000_000

# What Pillow raises for truncated or damaged files.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error, zlib.error)

_BLACK = 1  # columns between a block and the picture


def is_picture(start: bytes) -> bool:
    """Whether a file with these first 12 bytes is a PNG or a WebP."""
    return start.startswith(b"\x89PNG\r\n\x1a\n") or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


# -- reading


def read_card(path: Path) -> tuple[dict[str, Any], str]:
    """The dict of a card, with tensors as float64 arrays, and where it was read from: "text chunk" or "pixels".

    The pixels are read if the text chunk is missing or broken.

    Raises:
      InputError: a picture that cannot be read, is too large for a card, or has no word.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=("PNG", "WEBP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"{path}: a picture of {image.width} x {image.height} pixels, far too large for a card"
                )
            text = image.info.get(TEXT_CHUNK)
            from_text = _from_text(text) if isinstance(text, str) else None
            if from_text is not None:
                return from_text, "text chunk"
            pixels = np.asarray(image.convert("RGB"))
    except (*_BROKEN, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a complete picture ({one_line(error)}); download it again") from error
    from_pixels = _from_pixels(pixels)
    if from_pixels is None:
        raise InputError(
            f"{path}: a picture without a word in it, be it in the chunk {TEXT_CHUNK!r} or in its edges (which JPEG "
            "and other lossy compression destroy); get the original file"
        )
    return from_pixels, "pixels"


def _from_text(text: str) -> dict[str, Any] | None:
    try:
        return _parse(base64.b64decode(text[: 2 * MAX_JSON_BYTES], validate=True))
    except (binascii.Error, ValueError):
        return None


def _from_pixels(pixels: np.ndarray) -> dict[str, Any] | None:
    """The dict in the side blocks of a picture uint8 [H, W, 3]; None if there is none."""
    # Crop the black frame that some programs add: it has no pixel that is nonzero in all channels.
    light = np.all(pixels > 0, axis=2)
    rows, columns = np.flatnonzero(light.any(axis=1)), np.flatnonzero(light.any(axis=0))
    if not len(rows):
        return None
    nibbles = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 0x0F
    black = np.flatnonzero(~nibbles.any(axis=(0, 2)))
    if len(black) < 2:
        return None
    low, high = nibbles[:, : black[0]], nibbles[:, black[-1] + 1 :]
    if low.shape != high.shape or not low.size:
        return None
    mask = _mask(low.size)
    data = (low.reshape(-1) ^ mask) | ((high.reshape(-1) ^ mask) << 4)
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(data.tobytes(), MAX_JSON_BYTES + 1)
    except zlib.error:
        return None
    return _parse(content) if stream.eof else None


def _parse(content: bytes) -> dict[str, Any] | None:
    """JSON to a dict with arrays; None if it is too long or anything else."""
    if len(content) > MAX_JSON_BYTES:
        return None
    try:
        data = json.loads(content, object_hook=_with_array)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _with_array(item: dict[str, Any]) -> Any:
    if TENSOR not in item:
        return item
    value = item[TENSOR]
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    # Check each number: NumPy would also accept text, and make object arrays of ragged lists.
    for row in rows:
        if not isinstance(row, list) or len(row) != len(rows[0]) or not all(type(x) in (float, int) for x in row):
            raise ValueError("a tensor that is not rows of numbers")
    try:
        return np.array(value, np.float64)
    except OverflowError as error:
        raise ValueError("a number too large for a tensor") from error


def _mask(count: int) -> np.ndarray:
    """The low nibbles of the first ``count`` numbers of the pseudo-random sequence, uint8 [count].

    A linear congruential generator from 0, ``s <- 1664525 s + 1013904223 mod 2**32``; each number is ``s mod 255``.
    In closed form, s is the increment times a partial sum of the multiplier's powers; uint32 computes mod 2**32.
    """
    powers = np.full(count, 1664525, np.uint32)
    powers[:1] = 1
    np.cumprod(powers, dtype=np.uint32, out=powers)
    sums = np.cumsum(powers, dtype=np.uint32)
    return ((sums * np.uint32(1013904223)) % np.uint32(255)).astype(np.uint8) & 0x0F


# -- writing


def card_png(picture: Image.Image, data: Mapping[str, Any]) -> bytes:
    """A PNG of ``picture`` that stores ``data`` (a dict as in an AUTOMATIC1111 ``.pt``, tensors as float32 arrays)."""
    content = json.dumps(data, default=_as_json).encode()
    info = PngInfo()
    info.add_text(TEXT_CHUNK, base64.b64encode(content).decode())
    encoded = io.BytesIO()
    Image.fromarray(_with_edges(np.asarray(picture.convert("RGB")), zlib.compress(content, 9))).save(
        encoded, format="PNG", pnginfo=info
    )
    return encoded.getvalue()


def _as_json(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value).__name__} in a card")
    return {TENSOR: value.tolist()}


def _with_edges(pixels: np.ndarray, content: bytes) -> np.ndarray:
    """A picture uint8 [H, W, 3] between two blocks that store ``content``."""
    height = len(pixels)
    width = -(-len(content) // (3 * height))
    numbers = np.frombuffer(content, np.uint8)
    # AUTOMATIC1111 pads in the same way; readers stop at the end of the zlib stream.
    numbers = np.resize(numbers, 3 * height * width)
    mask = _mask(numbers.size)
    # The decoration has no dark spot: a dark row or column at the edge would be cropped as a frame.
    shade = np.linspace(1, 15, height).astype(np.uint8)[:, None, None] << 4
    low, high = ((half ^ mask).reshape(height, width, 3) | shade for half in (numbers & 0x0F, numbers >> 4))
    black = np.zeros((height, _BLACK, 3), np.uint8)
    return np.concatenate([low, black, pixels, black, high], axis=1)
