"""A folder of pictures as one array, whatever form the files have."""

from __future__ import annotations

import os
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError, one_line

COMMON_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# Pillow knows these when it sees them, but has no decoder for them.
_ONLY_RECOGNISED = {"BUFR", "GRIB", "HDF5", "MPEG"}

# What Pillow's decoders raise on broken files, besides OSError: they are many hands' work, and agree on nothing.
_BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
)


class Pictures(NamedTuple):
    """Square pictures of one size.

    Attributes:
      pixels: float32 [N, H, W, 3] in [-1, 1], H = W.
      names: the files' names.
      original_sizes: int32 [N, 2], height and width in pixels before scaling, upright.
      crop_offsets: int32 [N, 2], what the crop cut at the top and at the left, in pixels after scaling.

    SDXL is told sizes and offsets (``original_size`` and ``crops_coords_top_left``).
    """

    pixels: np.ndarray
    names: tuple[str, ...]
    original_sizes: np.ndarray
    crop_offsets: np.ndarray


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def check_resolution(resolution: int) -> None:
    """Raise `InputError` unless ``resolution`` is a positive multiple of 8, the VAE's pixels to a latent."""
    if isinstance(resolution, bool) or not isinstance(resolution, int) or resolution < 8 or resolution % 8:
        near = ""
        if isinstance(resolution, int) and resolution > 8:
            near = f", like {resolution // 8 * 8} or {resolution // 8 * 8 + 8}"
        raise InputError(f"resolution {resolution}: the side in pixels must be a positive multiple of 8{near}")


def load_images(
    folder: str | Path,
    resolution: int,
    center_crop: bool = False,
    skip_bad: bool = False,
    on_skip: Callable[[str], None] = _say,
) -> Pictures:
    """Every picture directly in ``folder``, sorted by name, as squares of ``resolution`` pixels.

    Which files: those that are not hidden and whose suffix is one of a form that Pillow reads. Any other file
    (README.md, captions) and sub-folders are left alone. Of an animation, the first frame is taken; a picture is turned
    as its EXIF tag says; transparent parts are laid on white; 16-bit grey is scaled to 8 bits.

    Args:
      center_crop: the pixel path of diffusers' ``textual_inversion.py`` with ``--center_crop``: the largest centred
        square is cut out, then resized with Pillow's bicubic filter. Otherwise the picture is scaled to cover the
        square, aspect ratio kept, and the overhang cut on both sides alike; down with Lanczos, up with bicubic.
      skip_bad: go on without files that cannot be read; ``on_skip`` is called with a line on each.

    Raises:
      InputError: no such folder, or it cannot be read; no picture in it; a file that cannot be read, is cut short, is
        no picture, or has more pixels than twice ``PIL.Image.MAX_IMAGE_PIXELS`` (179 million unless changed), which is
        found before it is decoded; a resolution that is no positive multiple of 8.
    """
    check_resolution(resolution)
    paths = picture_paths(folder)
    pixels, names, sizes, offsets = [], [], [], []
    for path in paths:
        try:
            image = read_picture(path)
        except InputError as error:
            if not skip_bad:
                raise InputError(f"{error}; mend or remove it, or go on without it with --skip_bad_images") from error
            on_skip(f"left out: {error}")
            continue
        square, offset = square_of(image, resolution, center_crop)
        # In float64, as diffusers has it; rounded once, at the end.
        pixels.append((np.asarray(square) / 127.5 - 1.0).astype(np.float32))
        names.append(path.name)
        sizes.append((image.height, image.width))
        offsets.append(offset)
    if not pixels:
        raise InputError(f"{folder}: not one of its {len(paths)} pictures can be read")
    return Pictures(np.stack(pixels), tuple(names), np.array(sizes, np.int32), np.array(offsets, np.int32))


def as_uint8(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [-1, 1] -> uint8: the inverse of what `load_images` does to them."""
    return np.round((pixels + 1.0) * 127.5).astype(np.uint8)


def picture_paths(folder: str | Path) -> list[Path]:
    """Files of ``folder`` that `load_images` reads, sorted by name.

    Raises:
      InputError: no such folder, a file instead of a folder, no permission, or no picture in it.
    """
    folder = Path(folder)
    Image.init()
    forms = Image.OPEN.keys() - _ONLY_RECOGNISED
    known = {suffix for suffix, form in Image.registered_extensions().items() if form in forms}
    try:
        # A link to nothing counts: it stood for a picture once, and that is to be told, not passed over.
        paths = sorted(
            Path(entry.path)
            for entry in os.scandir(folder)
            if Path(entry.name).suffix.lower() in known
            and not entry.name.startswith(".")
            and (entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)))
        )
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no such folder; give the folder with the pictures") from error
    except NotADirectoryError as error:
        raise InputError(f"{folder}: not a folder; give the folder with the pictures, not one of them") from error
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be read ({error.strerror}); change its permissions") from error
    if not paths:
        raise InputError(
            f"{folder}: no pictures in this folder; looked for {', '.join(COMMON_SUFFIXES)} and "
            f"{len(known.difference(COMMON_SUFFIXES))} rarer suffixes, not in sub-folders"
        )
    return paths


def read_picture(path: Path) -> Image.Image:
    """One picture in 8-bit RGB, upright, transparent parts on white.

    Raises:
      InputError: it cannot be read; without a remedy, which depends on who asks.
    """
    try:
        # What Pillow warns of is large pictures (see below) and parts of the file that the pixels do not depend on.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            return _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        # Twice the number is where Pillow refuses; at once the number it only warns, and a phone's 108 megapixels are
        # above that.
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InputError(f"{path}: more than {limit:,} pixels, the most that one picture may have") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not a picture, whatever its suffix says") from error
    except PermissionError as error:
        raise InputError(f"{path}: no permission to read it") from error
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file (a link to nothing?)") from error
    except MemoryError as error:
        raise InputError(f"{path}: too large for this machine's memory") from error
    except _BROKEN as error:
        raise InputError(f"{path}: broken, cut short or of a kind that is not read ({one_line(error)})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow to RGB."""
    if image.mode.startswith("I;16"):
        # Pillow's own conversion cuts everything above 255 to white. The high byte is what it takes of 16-bit RGB.
        values = np.asarray(image)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            values = np.where(values == transparent, np.uint16(65535), values)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return _grey_to_rgb(np.asarray(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _grey_to_rgb(values: np.ndarray) -> Image.Image:
    """Grey of 32 bits, integers or floats [H, W], which the file does not say the white of, to RGB.

    Integers go to 65535 (Pillow reads 16-bit PGM as these). Floats go to 1, 255 or 65535, whichever is enough first.
    """
    lowest, highest = values.min(), values.max()
    whites = (65535,) if values.dtype.kind == "i" else (1.0, 255.0, 65535.0)
    white = next((white for white in whites if highest <= white), None)
    if white is None or not lowest >= 0:  # not ">": NaN is neither
        raise ValueError(f"grey values from {lowest} to {highest}: cannot tell black and white; save it in 8 bits")
    return Image.fromarray(np.round(values * (255.0 / white)).astype(np.uint8)).convert("RGB")


def square_of(image: Image.Image, resolution: int, center_crop: bool) -> tuple[Image.Image, tuple[int, int]]:
    """The centred square of a picture, resized: see `load_images`; and its (top, left) in pixels after scaling."""
    side = min(image.size)
    # Whole pixels, by diffusers' arithmetic: so a picture that has the resolution already is cut, never blurred.
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    size = (resolution, resolution)
    if center_crop:
        square = image.crop(box).resize(size, Image.Resampling.BICUBIC)
    else:
        # With a box, only the square is computed, but its edges see their neighbours outside: as if all were scaled.
        down = side > resolution
        square = image.resize(size, Image.Resampling.LANCZOS if down else Image.Resampling.BICUBIC, box=box)
    return square, (round(top * resolution / side), round(left * resolution / side))
