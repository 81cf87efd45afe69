"""Read one picture file of any format as an upright picture in 8-bit sRGB."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from ti_jax.data.colours import to_rgb
from ti_jax.data.formats import format_by_content, is_read, readable_suffixes, remedy
from ti_jax.errors import InputError, one_line

# Exceptions that Pillow's decoders raise on broken files: they have no common class.
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

# The EXIF tag and, for each of its values but 1, the transposition that makes the picture upright.
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_NONE = Image.new("1", (1, 1))


def read_picture(path: Path) -> Image.Image:
    """Read a picture in 8-bit sRGB, upright, with transparent parts on white; of an animation, the first frame.

    Only the pixel data must be intact. Broken EXIF tags, colour profiles and text are ignored; the orientation is
    applied if it can be read.

    Raises:
      InputError: it cannot be read. The message has no remedy, because that depends on the caller.
    """
    return _read(path, to_rgb)


def read_alpha(path: Path) -> Image.Image | None:
    """The alpha channel of a picture, upright, in 8-bit grey; None if it has none.

    Raises:
      InputError: as `read_picture`.
    """
    # An image of mode "1" says that there is none: a mask of mode "L" is read in the same pass.
    found = _read(path, lambda image: image.convert("RGBA").getchannel("A") if image.has_transparency_data else _NONE)
    return None if found.mode == "1" else found


def _read(path: Path, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    readable_suffixes()  # registers the formats
    try:
        try:
            return _decoded(path, convert)
        except (Image.DecompressionBombError, PermissionError, FileNotFoundError):
            raise
        except _BROKEN:
            for content in _without_metadata(path.read_bytes()):
                with contextlib.suppress(*_BROKEN):
                    return _decoded(io.BytesIO(content), convert)
            raise
    except Image.DecompressionBombError as error:
        # Pillow warns above its limit and refuses above twice the limit. Pictures of phones with 108 megapixels are
        # between the two.
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InputError(f"{path}: more than {limit:,} pixels, the most that one picture may have") from error
    except UnidentifiedImageError as error:
        found = format_by_content(path)
        if found and not is_read(found):
            raise InputError(f"{path}: {found}, despite its suffix; {remedy(found)}") from error
        what = f"broken, though it begins as {found}" if found else "not a picture, despite its suffix"
        raise InputError(f"{path}: {what}") from error
    except PermissionError as error:
        raise InputError(f"{path}: no permission to read it") from error
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file (a link to nothing?)") from error
    except MemoryError as error:
        raise InputError(f"{path}: too large for this machine's memory") from error
    except _BROKEN as error:
        raise InputError(f"{path}: broken, cut short or of a kind that is not read ({one_line(error)})") from error


def _decoded(file: Path | IO[bytes], convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    # Pillow warns about large pictures (see `read_picture`) and about metadata that does not affect the pixels.
    with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        converted = convert(image)
        if turn is not None:
            converted = converted.transpose(turn)
        converted.info = {}  # or the picture, saved again, would carry a colour profile that no longer applies
        return converted


def _orientation(image: Image.Image) -> int:
    """The EXIF (or XMP) orientation, 1 to 8; 1 if it is missing or cannot be read.

    `PIL.ImageOps.exif_transpose` is not used: it rewrites all other tags too, and fails if one of them is broken.
    """
    # Pillow before 13 is led astray by a second tag of that number that is broken.
    if (value := _orientation_tag(image.info.get("exif") or b"")) is not None:
        return value
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except _BROKEN:
        return 1
    return found if isinstance(found, int) else 1


def _orientation_tag(exif: bytes) -> int | None:
    """The orientation in EXIF data; None if it cannot be found."""
    content = exif.removeprefix(b"Exif\0\0")
    order = _byte_order(content)
    for place, tag in _first_directory(content):
        kind, count, value = struct.unpack_from(order + "HIH", content, place + 2)
        if (tag, kind, count) == (_ORIENTATION, 3, 1):  # one 16-bit number
            return value
    return None


# -- the same file without metadata


def _without_metadata(content: bytes) -> Iterator[bytes]:
    """Copies of a file with less and less metadata, in case that is what is broken; none for most formats."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        yield _png_with(content, (b"eXIf", b"iCCP"))
        yield _png_with(content, ())
    elif content.startswith((b"II*\0", b"MM\0*")):
        yield _tiff_with_image_tags(content)


def _png_with(content: bytes, kept: tuple[bytes, ...]) -> bytes:
    """A PNG with its critical chunks and, of the ancillary ones (PNG specification, section 5), tRNS and ``kept``."""
    parts, start = [content[:8]], 8
    while start + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, start)
        end = start + 12 + length
        critical = not kind[0] & 0x20
        whole = content[end - 4 : end] == struct.pack(">I", zlib.crc32(content[start + 4 : end - 4]))
        # Chunks that the pixels depend on stay even if their checksum is wrong, so that the decoder refuses them.
        if critical or kind == b"tRNS" or (kind in kept and whole):
            parts.append(content[start:end])
        start = end
    return b"".join(parts)


# TIFF tags that the pixels depend on: size, layout and compression (254 to 284), the orientation among them, predictor,
# palette, tiles, extra samples, JPEG tables and YCbCr.
_IMAGE_TAGS = {
    *(254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339, 347),
    *(529, 530, 531, 532),
}


def _tiff_with_image_tags(content: bytes) -> bytes:
    """A TIFF in whose first directory each tag that does not affect the pixels is made an unknown one with value 0."""
    order = _byte_order(content)
    changed = bytearray(content)
    for place, tag in _first_directory(content):
        if tag not in _IMAGE_TAGS:
            struct.pack_into(order + "HHII", changed, place, 65000, 4, 1, 0)
    return bytes(changed)


def _byte_order(content: bytes) -> str:
    """Of the numbers in a TIFF or in EXIF data, as `struct` writes it."""
    return "<" if content[:2] == b"II" else ">"


def _first_directory(content: bytes) -> Iterator[tuple[int, int]]:
    """Place and tag of each entry of 12 bytes in a TIFF's first directory, as far as it is there."""
    order = _byte_order(content)
    with contextlib.suppress(struct.error):  # it ends within its directory
        (start,) = struct.unpack_from(order + "I", content, 4)
        (count,) = struct.unpack_from(order + "H", content, start)
        for place in range(start + 2, min(start + 2 + 12 * count, len(content) - 11), 12):
            yield place, *struct.unpack_from(order + "H", content, place)
