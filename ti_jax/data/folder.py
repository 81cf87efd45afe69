"""Load a folder of pictures of any format as one array."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ti_jax.data.formats import format_by_content, format_by_suffix, readable_suffixes, remedy
from ti_jax.data.reading import read_picture
from ti_jax.errors import InputError, listed

COMMON_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# Smallest shorter side in pixels.
MIN_SIDE = 8
# Pictures that are enlarged by more than this factor, or are longer than wide by more than it, are reported.
MAX_SCALE = 4


class Pictures(NamedTuple):
    """Square pictures of one size.

    Attributes:
      pixels: float32 [N, H, W, 3] in [-1, 1], H = W.
      names: the files' names.
      original_sizes: int32 [N, 2], height and width in pixels before scaling, upright.
      crop_offsets: int32 [N, 2], what the crop cut at the top and at the left, in pixels after scaling.

    Sizes and offsets are inputs of SDXL (``original_size`` and ``crops_coords_top_left``).
    """

    pixels: np.ndarray
    names: tuple[str, ...]
    original_sizes: np.ndarray
    crop_offsets: np.ndarray


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def load_images(
    folder: str | Path,
    resolution: int,
    center_crop: bool = False,
    skip_bad: bool = False,
    on_skip: Callable[[str], None] = _say,
) -> Pictures:
    """Load every picture directly in ``folder``, sorted by name, as squares of ``resolution`` pixels.

    Pictures are the files that are not hidden and have the suffix of a format that Pillow reads; HEIC needs pillow-heif
    (the extra ``heif``). Pictures of other formats are reported; other files (README.md, captions) and sub-folders are
    ignored. See `read_picture` for how a file is read.

    Args:
      resolution: side in pixels, a positive multiple of 8 (the VAE's scale factor).
      center_crop: as diffusers' ``textual_inversion.py`` with ``--center_crop``: crop the largest centred square, then
        resize it with Pillow's bicubic filter. Otherwise scale the picture to cover the square, keeping its aspect
        ratio, and crop the overhang equally on both sides; Lanczos to shrink, bicubic to enlarge.
      skip_bad: skip files that cannot be read or are too small.
      on_skip: called with a line for each skipped file, one for all pictures of unreadable formats, one for those that
        are enlarged a lot, and one for those that are mostly cropped away.

    Raises:
      InputError: no such folder, or it cannot be read; no picture in it; a file that cannot be read, is truncated, is
        not a picture, has a side of less than `MIN_SIDE` pixels, or more pixels than twice
        ``PIL.Image.MAX_IMAGE_PIXELS`` (179 million by default), which is checked before decoding.
    """
    paths = picture_paths(folder)
    if unread := unread_pictures(folder):
        on_skip(f"left out: {unread}")
    pixels, names, sizes, offsets = [], [], [], []
    for path in paths:
        try:
            image = read_picture(path)
            if min(image.size) < MIN_SIDE:
                raise InputError(
                    f"{path}: {image.width} x {image.height} pixels: nothing can be learned from a picture with a side "
                    f"of less than {MIN_SIDE} pixels"
                )
        except InputError as error:
            if not skip_bad:
                raise InputError(f"{error}; mend or remove it, or go on without it with --skip_bad_images") from error
            on_skip(f"left out: {error}")
            continue
        square, offset = square_of(image, resolution, center_crop)
        # In float64, as in diffusers; rounded once, at the end.
        pixels.append((np.asarray(square) / 127.5 - 1.0).astype(np.float32))
        names.append(path.name)
        sizes.append((image.height, image.width))
        offsets.append(offset)
    if not pixels:
        raise InputError(f"{folder}: not one of its {len(paths)} pictures can be used")
    _report_sizes(names, sizes, resolution, on_skip)
    return Pictures(np.stack(pixels), tuple(names), np.array(sizes, np.int32), np.array(offsets, np.int32))


def _report_sizes(
    names: list[str], sizes: list[tuple[int, int]], resolution: int, report: Callable[[str], None]
) -> None:
    """Report the pictures that are too small for ``resolution``, and those that are too narrow."""
    small = [name for name, size in zip(names, sizes, strict=True) if min(size) * MAX_SCALE < resolution]
    narrow = [name for name, size in zip(names, sizes, strict=True) if min(size) * MAX_SCALE < max(size)]
    if small:
        report(
            f"warning: {_count(small)} enlarged more than {MAX_SCALE} times to {resolution} pixels, and the word "
            f"learns the blur: {listed(small, 3)}; give larger pictures, or a smaller --resolution"
        )
    if narrow:
        report(
            f"warning: {_count(narrow)} more than {MAX_SCALE} times as long as wide, and only the square in the middle "
            f"is used: {listed(narrow, 3)}; crop to the part that matters"
        )


def _count(names: list[str]) -> str:
    return f"{len(names)} picture is" if len(names) == 1 else f"{len(names)} pictures are"


def as_uint8(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [-1, 1] -> uint8, the inverse of `load_images`."""
    return np.round((pixels + 1.0) * 127.5).astype(np.uint8)


def picture_paths(folder: str | Path) -> list[Path]:
    """Files of ``folder`` that `load_images` reads, sorted by name.

    Raises:
      InputError: no such folder, a file instead of a folder, no permission, or no picture in it.
    """
    suffixes = readable_suffixes()
    # A broken link is kept, so that reading it is an error: it once pointed to a picture.
    paths = [path for path in _files(folder) if path.suffix.lower() in suffixes]
    if not paths:
        unread = unread_pictures(folder)
        raise InputError(
            f"{folder}: no pictures in this folder; looked for {', '.join(COMMON_SUFFIXES)} and "
            f"{len(suffixes.difference(COMMON_SUFFIXES))} rarer suffixes, not in sub-folders"
            + (f". Not read: {unread}" if unread else "")
        )
    return paths


def unread_pictures(folder: str | Path) -> str | None:
    """A message on the pictures in ``folder`` that cannot be read: how many, which, and what to do; None if none.

    They are recognised by their suffix or, if that is unknown, by their first bytes.

    Raises:
      InputError: as `picture_paths`, but for a folder without pictures.
    """
    suffixes = readable_suffixes()
    found: dict[str, list[str]] = {}
    for path in _files(folder):
        if path.suffix.lower() in suffixes:
            continue
        name = format_by_suffix(path) or format_by_content(path)
        if name is not None:
            found.setdefault(name, []).append(path.name)
    if not found:
        return None
    parts = [f"{len(names)} {name} ({listed(names, 3)}): {remedy(name)}" for name, names in sorted(found.items())]
    total = sum(map(len, found.values()))
    return f"{total} of the pictures in {folder}: {'; '.join(parts)}"


def _files(folder: str | Path) -> list[Path]:
    """Files of a folder that are not hidden, and broken links, sorted by name."""
    folder = Path(folder)
    try:
        return sorted(
            Path(entry.path)
            for entry in os.scandir(folder)
            if not entry.name.startswith(".")
            and (entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)))
        )
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no such folder; give the folder with the pictures") from error
    except NotADirectoryError as error:
        raise InputError(f"{folder}: not a folder; give the folder with the pictures, not one of them") from error
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be read ({error.strerror}); change its permissions") from error


def square_of(image: Image.Image, resolution: int, center_crop: bool) -> tuple[Image.Image, tuple[int, int]]:
    """Crop the centred square of a picture and resize it, see `load_images`; also returns its (top, left) in pixels
    after scaling.
    """
    side = min(image.size)
    # Whole pixels, as in diffusers: a picture that already has the resolution is cropped, never resampled.
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    size = (resolution, resolution)
    if center_crop:
        square = image.crop(box).resize(size, Image.Resampling.BICUBIC)
    else:
        # With a box only the square is computed, but its edges use the pixels outside, as if the whole were resized.
        down = side > resolution
        square = image.resize(size, Image.Resampling.LANCZOS if down else Image.Resampling.BICUBIC, box=box)
    return square, (round(top * resolution / side), round(left * resolution / side))
