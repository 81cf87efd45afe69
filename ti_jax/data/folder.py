"""Load a folder of pictures of any format as one array."""

from __future__ import annotations

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
from ti_jax.data.cropping import crop_box, cropped_to, offset_of
from ti_jax.data.masks import WHITE, MaskReader, Masks, cropped_mask, orphans
from ti_jax.data.on_demand import IN_MEMORY, OnDemand, digest_of
from ti_jax.data.picture_files import files_in, name_in, picture_paths, unread_pictures
from ti_jax.data.pictures import Bucket, Pictures
from ti_jax.data.reading import read_picture
from ti_jax.data.size_report import report_buckets, report_sizes
from ti_jax.errors import InputError

# Smallest shorter side in pixels.
MIN_SIDE = 8


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
      shapes: of the buckets; each picture is cropped, as above, to the one with the nearest aspect ratio. The squares
        are then read again if they are asked for.
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
            square = (resolution, resolution)
            if shapes:
                in_shape[view].append(_cropped(crop, image, mask, nearest_shape(*image.size, shapes), keep))
                squares[view].append(_later(crop, image, square))
            else:
                squares[view].append(_cropped(crop, image, mask, square, keep))
    if not squares[0]:
        raise InputError(f"{folder}: not one of its {len(paths)} pictures can be used")
    pictures = _together(list(chain(*squares)), views)
    learned_from = in_shape[0] if shapes else squares[0]
    if found := sum(each.mask is not None for each in learned_from):
        rest = "" if found == len(learned_from) else "; the others are learned from as a whole"
        on_skip(f"masks: used for {found} of {len(learned_from)} pictures{rest}")
    if not shapes:
        report_sizes(pictures, resolution, on_skip)
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
    report_buckets(buckets, on_skip)
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
    """One view of `Pictures`; its pixels if they are kept in memory, else their hash; neither, if it is for later."""

    crop: _Crop
    shape: Shape
    pixels: np.ndarray | None
    digest: str | None
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
    kept, digest = (pixels, None) if keep else (None, digest_of(pixels))
    return _Cropped(crop, shape, kept, digest, (image.height, image.width), box, packed)


def _later(crop: _Crop, image: Image.Image, shape: Shape) -> _Cropped:
    """A view that is only made when it is asked for, without a mask."""
    box = crop.variation.box(crop_box(image.size, shape))
    return _Cropped(crop, shape, None, None, (image.height, image.width), box, None)


def _together(crops: list[_Cropped], views: int) -> Pictures:
    shape = crops[0].shape
    kept = [each.pixels for each in crops if each.pixels is not None]
    make = [partial(each.crop.read, shape) for each in crops]
    digests = [each.digest for each in crops if each.digest is not None]
    return Pictures(
        pixels=np.stack(kept) if kept else OnDemand(make, (*shape, 3), digests or None),
        names=tuple(each.crop.name for each in crops),
        original_sizes=np.array([each.original_size for each in crops], np.int32),
        crop_offsets=np.array([offset_of(each.box, shape) for each in crops], np.int32),
        crop_boxes=np.array([each.box for each in crops], np.int32),
        masks=Masks(shape, [each.mask for each in crops]) if any(each.mask for each in crops) else None,
        views=views,
    )


def as_uint8(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [-1, 1] -> uint8, the inverse of `load_images`."""
    return np.round((pixels + 1.0) * 127.5).astype(np.uint8)
