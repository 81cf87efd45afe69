"""Load a folder of pictures of any format as one array."""

from __future__ import annotations

import collections
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ti_jax.data.augment import PLAIN, Variation, variations
from ti_jax.data.buckets import Shape, nearest_shape, shape_name
from ti_jax.data.formats import format_by_content, format_by_suffix, readable_suffixes, remedy
from ti_jax.data.masks import WHITE, MaskReader, Masks, cropped_mask, orphans, picture_of
from ti_jax.data.on_demand import IN_MEMORY, OnDemand, Pixels, digest_of
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
      pixels: float32 [N, H, W, 3] in [-1, 1]; those of a large set are read again whenever they are needed.
      names: the files' names.
      original_sizes: int32 [N, 2], height and width in pixels before scaling, upright.
      crop_offsets: int32 [N, 2], what the crop cut at the top and at the left, in pixels after scaling.
      crop_boxes: int32 [N, 4], left, top, right and bottom of the crop, in pixels before scaling.
      masks: which parts are learned from; None: all of every picture.
      buckets: the same pictures in their buckets; empty if they are learned from as squares.
      views: views of each file: the plain pictures come first, then each file's second view, and so on.

    Sizes and offsets are inputs of SDXL (``original_size`` and ``crops_coords_top_left``).
    """

    pixels: Pixels
    names: tuple[str, ...]
    original_sizes: np.ndarray
    crop_offsets: np.ndarray
    crop_boxes: np.ndarray
    masks: Masks | None = None
    buckets: tuple[Bucket, ...] = ()
    views: int = 1

    @property
    def learned_from(self) -> list[Pictures]:
        """These pictures, or those in the buckets."""
        return [bucket.pictures for bucket in self.buckets] or [self]

    @property
    def files(self) -> int:
        """Number of different pictures, of which each has one view or several."""
        return len(self.names) // self.views


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
    masks: MaskReader | None = None,
    augment: int | None = None,
    recursive: bool = False,
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
      masks: reads the pictures' masks; files named like masks are never pictures, with or without it.
      augment: seed of further views of each picture (`ti_jax.data.augment`); None: only the plain one.
      recursive: also load the pictures in sub-folders; their names have the path from ``folder`` on, with slashes.

    Raises:
      InputError: no such folder, or it cannot be read; no picture in it; a file that cannot be read, is truncated, is
        not a picture, has a side of less than `MIN_SIDE` pixels, or more pixels than twice
        ``PIL.Image.MAX_IMAGE_PIXELS`` (179 million by default), which is checked before decoding. A mask that has no
        white pixel or another size than its picture.
    """
    paths = [path for path in picture_paths(folder, recursive) if masks is None or not masks.holds(path)]
    if unread := unread_pictures(folder, recursive):
        on_skip(f"left out: {unread}")
    if lost := orphans(files_in(folder, recursive), paths):
        on_skip(lost)
    views = 1 if augment is None else len(variations(augment, ""))
    keep = len(paths) * views * resolution**2 * 12 <= IN_MEMORY
    squares: list[list[_Cropped]] = [[] for _ in range(views)]
    in_shape: list[list[_Cropped]] = [[] for _ in range(views)]
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
        name = name_in(folder, path)
        mask = None if masks is None else masks.read(path, image)
        for view, variation in enumerate([PLAIN] if augment is None else variations(augment, name)):
            crop = _Crop(path, name, center_crop, variation)
            squares[view].append(_cropped(crop, image, mask, (resolution, resolution), keep))
            if shapes:
                in_shape[view].append(_cropped(crop, image, mask, nearest_shape(*image.size, shapes), keep))
    if not squares[0]:
        raise InputError(f"{folder}: not one of its {len(paths)} pictures can be used")
    pictures = _together(list(chain(*squares)), views)
    if pictures.masks is not None:
        plain = len(squares[0])
        found = sum(each.mask is not None for each in squares[0])
        rest = "" if found == plain else "; the others are learned from as a whole"
        on_skip(f"masks: used for {found} of {plain} pictures{rest}")
    if not shapes:
        _report_sizes(pictures, resolution, on_skip)
        return pictures
    in_bucket: dict[Shape, list[int]] = {shape: [] for shape in shapes}
    all_in_shape = list(chain(*in_shape))
    for index, each in enumerate(all_in_shape):
        in_bucket[each.shape].append(index)
    buckets = tuple(
        Bucket(np.array(indices, np.int32), _together([all_in_shape[index] for index in indices], views))
        for indices in in_bucket.values()
        if indices
    )
    _report_buckets(buckets, on_skip)
    return pictures._replace(buckets=buckets)


class _Crop(NamedTuple):
    """How a view of a picture is made."""

    path: Path
    name: str
    center_crop: bool
    variation: Variation

    def pixels(self, image: Image.Image, shape: Shape) -> np.ndarray:
        """Of the picture that was read, float32 [H, W, 3]."""
        cropped, _ = cropped_to(image, shape, self.center_crop, self.variation.box(crop_box(image.size, shape)))
        # In float64, as in diffusers; rounded once, at the end.
        return (np.asarray(self.variation.jittered(cropped)) / 127.5 - 1.0).astype(np.float32)

    def read(self, shape: Shape) -> np.ndarray:
        """Read the picture again."""
        return self.pixels(read_picture(self.path), shape)


class _Cropped(NamedTuple):
    """One view of `Pictures`; its pixels if they are kept in memory, else their hash."""

    crop: _Crop
    shape: Shape
    pixels: np.ndarray | None
    digest: str
    original_size: tuple[int, int]
    box: tuple[int, int, int, int]
    mask: bytes | None


def _cropped(crop: _Crop, image: Image.Image, mask: Image.Image | None, shape: Shape, keep: bool) -> _Cropped:
    box = crop.variation.box(crop_box(image.size, shape))
    packed = None
    if mask is not None:
        part = cropped_mask(mask, box, shape)
        if part.max() < WHITE and crop.variation != PLAIN:  # the little that is white is at the edge
            return _cropped(crop._replace(variation=PLAIN), image, mask, shape, keep)
        if part.max() < WHITE:
            raise InputError(
                f"{crop.path}: nothing is white in the part of its mask that is left after cropping to "
                f"{shape_name(shape)} pixels; crop the picture and its mask to the part that matters"
            )
        packed = Masks.pack(part)
    pixels = crop.pixels(image, shape)
    kept, digest = (pixels, "") if keep else (None, digest_of(pixels))
    return _Cropped(crop, shape, kept, digest, (image.height, image.width), box, packed)


def _together(crops: list[_Cropped], views: int) -> Pictures:
    shape = crops[0].shape
    kept = [each.pixels for each in crops if each.pixels is not None]
    make = [partial(each.crop.read, shape) for each in crops]
    return Pictures(
        pixels=np.stack(kept) if kept else OnDemand(make, (*shape, 3), [each.digest for each in crops]),
        names=tuple(each.crop.name for each in crops),
        original_sizes=np.array([each.original_size for each in crops], np.int32),
        crop_offsets=np.array([offset_of(each.box, shape) for each in crops], np.int32),
        crop_boxes=np.array([each.box for each in crops], np.int32),
        masks=Masks(shape, [each.mask for each in crops]) if any(each.mask for each in crops) else None,
        views=views,
    )


def _report_sizes(pictures: Pictures, resolution: int, report: Callable[[str], None]) -> None:
    """Report the pictures that are too small for ``resolution``, and those that are too narrow."""
    sides = list(zip(pictures.names, pictures.original_sizes, strict=True))[: pictures.files]
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
        plain = bucket.pictures.files
        sizes = bucket.pictures.original_sizes[:plain].tolist()
        for name, (height, width) in zip(bucket.pictures.names[:plain], sizes, strict=True):
            left, top, right, bottom = crop_box((width, height), shape)
            if shape[1] > right - left:
                enlarged.append(f"{name} {shape[1] / (right - left):.1f} times")
            if 2 * (right - left) * (bottom - top) < width * height:
                narrow.append(name)
    counts = (f"{each.pictures.files} of {shape_name(each.pictures.pixels.shape[1:3])}" for each in buckets)
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


def picture_paths(folder: str | Path, recursive: bool = False) -> list[Path]:
    """Files of ``folder``, or also of its sub-folders, that `load_images` reads, sorted by name.

    Raises:
      InputError: no such folder, a file instead of a folder, no permission, or no picture in it.
    """
    suffixes = readable_suffixes()
    # A broken link is kept, so that reading it is an error: it once pointed to a picture.
    paths = [
        path
        for path in files_in(folder, recursive)
        if path.suffix.lower() in suffixes and picture_of(path.name) is None
    ]
    if not paths:
        unread = unread_pictures(folder, recursive)
        if not recursive and (deeper := [path for path in files_in(folder, True) if path.suffix.lower() in suffixes]):
            raise InputError(f"{folder}: no pictures in this folder, but {len(deeper)} in sub-folders; add --recursive")
        raise InputError(
            f"{folder}: no pictures in this folder; looked for {', '.join(COMMON_SUFFIXES)} and "
            f"{len(suffixes.difference(COMMON_SUFFIXES))} rarer suffixes{', in sub-folders, too' if recursive else ''}"
            + (f". Not read: {unread}" if unread else "")
        )
    return paths


def unread_pictures(folder: str | Path, recursive: bool = False) -> str | None:
    """A message on the pictures in ``folder`` that cannot be read: how many, which, and what to do; None if none.

    They are recognised by their suffix or, if that is unknown, by their first bytes.

    Raises:
      InputError: as `picture_paths`, but for a folder without pictures.
    """
    suffixes = readable_suffixes()
    found: dict[str, list[str]] = {}
    for path in files_in(folder, recursive):
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


def name_in(folder: str | Path, path: Path) -> str:
    """A file's name from ``folder`` on, with slashes, as `Pictures` has it."""
    return path.relative_to(folder).as_posix()


def repeats_of(name: str) -> int:
    """How often an epoch shows a picture: ten times in a sub-folder ``10_name``, as in kohya's scripts, else once.

    Raises:
      InputError: it is in a folder such as ``0_name``.
    """
    for folder in reversed(name.split("/")[:-1]):
        if (found := re.match(r"(\d+)_", folder)) is not None:
            if int(found[1]) == 0:
                raise InputError(f"{name}: its folder {folder} says to show it 0 times; move it away, or rename it")
            return int(found[1])
    return 1


def report_repeats(names: Sequence[str], report: Callable[[str], None]) -> None:
    """Report how often an epoch shows the pictures, unless each is shown once."""
    counts = collections.Counter(map(repeats_of, names))
    if set(counts) != {1}:
        parts = (f"{number} of the pictures {repeats} times" for repeats, number in sorted(counts.items()))
        report(f"folders: by their names an epoch shows {', '.join(parts)}")


def files_in(folder: str | Path, recursive: bool = False, above: frozenset[str] = frozenset()) -> list[Path]:
    """Files of a folder, or also of its sub-folders, that are not hidden, and broken links; sorted by name.

    Args:
      above: where the folders that it is in really are; a link that leads back to one of them is not followed.

    Raises:
      InputError: no such folder, or it cannot be read.
    """
    folder = Path(folder)
    above |= {os.path.realpath(folder)}
    found: list[Path] = []
    try:
        for entry in os.scandir(folder):
            if entry.name.startswith("."):
                continue
            if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
                found.append(Path(entry.path))
            elif recursive and entry.is_dir() and os.path.realpath(entry.path) not in above:
                found += files_in(entry.path, recursive, above)
        return sorted(found)
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


def offset_of(box: tuple[int, int, int, int], shape: Shape) -> tuple[int, int]:
    """What a crop to ``box`` cuts at the top and at the left, in pixels after it is scaled to ``shape``."""
    left, top, right, bottom = box
    return round(top * shape[0] / (bottom - top)), round(left * shape[1] / (right - left))


def cropped_to(
    image: Image.Image, shape: Shape, center_crop: bool, box: tuple[int, int, int, int] | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """Crop the centred part of a picture that has a shape's aspect ratio and resize it to the shape, see `load_images`;
    also returns its (top, left) in pixels after scaling.

    Args:
      box: another part: left, top, right and bottom.
    """
    rows, columns = shape
    left, _, right, _ = box = box or crop_box(image.size, shape)
    if center_crop:
        cropped = image.crop(box).resize((columns, rows), Image.Resampling.BICUBIC)
    else:
        # With a box only the part is computed, but its edges use the pixels outside, as if the whole were resized.
        down = right - left > columns
        kind = Image.Resampling.LANCZOS if down else Image.Resampling.BICUBIC
        cropped = image.resize((columns, rows), kind, box=box)
    return cropped, offset_of(box, shape)
