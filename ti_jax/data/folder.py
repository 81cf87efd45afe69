"""Load a folder of pictures of any format as one array."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ti_jax.data.buckets import Shape, nearest_shape, shape_name
from ti_jax.data.formats import format_by_content, format_by_suffix, readable_suffixes, remedy
from ti_jax.data.reading import read_picture
from ti_jax.errors import InputError, listed

COMMON_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# Smallest shorter side in pixels.
MIN_SIDE = 8
# Pictures that are enlarged by more than this factor, or are longer than wide by more than it, are reported.
MAX_SCALE = 4


class Pictures(NamedTuple):
    """Pictures of one size: squares, or those of a bucket.

    Attributes:
      pixels: float32 [N, H, W, 3] in [-1, 1].
      names: the files' names.
      original_sizes: int32 [N, 2], height and width in pixels before scaling, upright.
      crop_offsets: int32 [N, 2], what the crop cut at the top and at the left, in pixels after scaling.
      buckets: the same pictures in their buckets; empty if they are learned from as squares.

    Sizes and offsets are inputs of SDXL (``original_size`` and ``crops_coords_top_left``).
    """

    pixels: np.ndarray
    names: tuple[str, ...]
    original_sizes: np.ndarray
    crop_offsets: np.ndarray
    buckets: tuple[Bucket, ...] = ()


class Bucket(NamedTuple):
    """The pictures whose shape is nearest to a bucket's: ``indices`` int32 [n] among all, and cropped to its shape."""

    indices: np.ndarray
    pictures: Pictures


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def load_images(
    folder: str | Path,
    resolution: int,
    center_crop: bool = False,
    skip_bad: bool = False,
    on_skip: Callable[[str], None] = _say,
    shapes: Sequence[Shape] = (),
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
        are enlarged a lot, and one for those that are mostly cropped away. With ``shapes`` also one for the buckets,
        and every picture that is enlarged is named.
      shapes: of the buckets; each picture is also cropped, as above, to the one with the nearest aspect ratio.

    Raises:
      InputError: no such folder, or it cannot be read; no picture in it; a file that cannot be read, is truncated, is
        not a picture, has a side of less than `MIN_SIDE` pixels, or more pixels than twice
        ``PIL.Image.MAX_IMAGE_PIXELS`` (179 million by default), which is checked before decoding.
    """
    paths = picture_paths(folder)
    if unread := unread_pictures(folder):
        on_skip(f"left out: {unread}")
    squares: list[_Cropped] = []
    in_bucket: dict[Shape, list[int]] = {shape: [] for shape in shapes}
    in_shape: list[_Cropped] = []
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
        squares.append(_cropped(path.name, image, (resolution, resolution), center_crop))
        if shapes:
            shape = nearest_shape(*image.size, shapes)
            in_bucket[shape].append(len(in_shape))
            in_shape.append(_cropped(path.name, image, shape, center_crop))
    if not squares:
        raise InputError(f"{folder}: not one of its {len(paths)} pictures can be used")
    pictures = _together(squares)
    if not shapes:
        _report_sizes(pictures, resolution, on_skip)
        return pictures
    buckets = tuple(
        Bucket(np.array(indices, np.int32), _together([in_shape[index] for index in indices]))
        for indices in in_bucket.values()
        if indices
    )
    _report_buckets(buckets, on_skip)
    return pictures._replace(buckets=buckets)


class _Cropped(NamedTuple):
    """One picture of `Pictures`."""

    pixels: np.ndarray
    name: str
    original_size: tuple[int, int]
    crop_offset: tuple[int, int]


def _cropped(name: str, image: Image.Image, shape: Shape, center_crop: bool) -> _Cropped:
    cropped, offset = cropped_to(image, shape, center_crop)
    # In float64, as in diffusers; rounded once, at the end.
    pixels = (np.asarray(cropped) / 127.5 - 1.0).astype(np.float32)
    return _Cropped(pixels, name, (image.height, image.width), offset)


def _together(pictures: list[_Cropped]) -> Pictures:
    pixels, names, sizes, offsets = zip(*pictures, strict=True)
    return Pictures(np.stack(pixels), names, np.array(sizes, np.int32), np.array(offsets, np.int32))


def _report_sizes(pictures: Pictures, resolution: int, report: Callable[[str], None]) -> None:
    """Report the pictures that are too small for ``resolution``, and those that are too narrow."""
    sides = list(zip(pictures.names, pictures.original_sizes, strict=True))
    small = [name for name, size in sides if min(size) * MAX_SCALE < resolution]
    narrow = [name for name, size in sides if min(size) * MAX_SCALE < max(size)]
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


def _report_buckets(buckets: Sequence[Bucket], report: Callable[[str], None]) -> None:
    """Report the buckets, every picture that is enlarged, and those of which less than half is used."""
    enlarged, narrow = [], []
    for bucket in buckets:
        shape = bucket.pictures.pixels.shape[1:3]
        for name, (height, width) in zip(bucket.pictures.names, bucket.pictures.original_sizes.tolist(), strict=True):
            left, top, right, bottom = crop_box((width, height), shape)
            if shape[1] > right - left:
                enlarged.append(f"{name} {shape[1] / (right - left):.1f} times")
            if 2 * (right - left) * (bottom - top) < width * height:
                narrow.append(name)
    counts = (f"{len(each.indices)} of {shape_name(each.pictures.pixels.shape[1:3])}" for each in buckets)
    report(f"pictures in buckets: {', '.join(counts)} pixels")
    if enlarged:
        report(
            f"warning: {_count(enlarged)} smaller than the bucket and enlarged, and the word learns the blur: "
            f"{listed(enlarged, 3)}; give larger pictures, or a smaller --resolution"
        )
    if narrow:
        report(
            f"warning: of {_count(narrow).removesuffix(' is').removesuffix(' are')} less than half is used: "
            f"{listed(narrow, 3)}; crop to the part that matters, or give a larger --max_aspect_ratio"
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


def crop_box(size: tuple[int, int], shape: Shape) -> tuple[int, int, int, int]:
    """The largest centred part of a picture with a shape's aspect ratio, as (left, top, right, bottom) in its pixels.

    Args:
      size: width and height of the picture.
    """
    (width, height), (rows, columns) = size, shape
    # Whole pixels, as in diffusers: a picture that already has the shape is cropped, never resampled.
    if width * rows > height * columns:
        cut_width, cut_height = max(1, (height * columns + rows // 2) // rows), height
    else:
        cut_width, cut_height = width, max(1, (width * rows + columns // 2) // columns)
    left, top = (width - cut_width) // 2, (height - cut_height) // 2
    return left, top, left + cut_width, top + cut_height


def cropped_to(image: Image.Image, shape: Shape, center_crop: bool) -> tuple[Image.Image, tuple[int, int]]:
    """Crop the centred part of a picture that has a shape's aspect ratio and resize it to the shape, see `load_images`;
    also returns its (top, left) in pixels after scaling.
    """
    rows, columns = shape
    left, top, right, bottom = box = crop_box(image.size, shape)
    if center_crop:
        cropped = image.crop(box).resize((columns, rows), Image.Resampling.BICUBIC)
    else:
        # With a box only the part is computed, but its edges use the pixels outside, as if the whole were resized.
        down = right - left > columns
        kind = Image.Resampling.LANCZOS if down else Image.Resampling.BICUBIC
        cropped = image.resize((columns, rows), kind, box=box)
    return cropped, (round(top * rows / (bottom - top)), round(left * columns / (right - left)))
