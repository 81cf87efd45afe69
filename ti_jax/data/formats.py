"""Which picture formats can be read, and how to deal with files of other formats."""

from __future__ import annotations

import contextlib
import functools
import re
from pathlib import Path

from PIL import Image

# Formats that Pillow recognises but cannot decode.
_ONLY_RECOGNISED = {"BUFR", "GRIB", "HDF5", "MPEG"}

_RAW = (
    ".3fr .ari .arw .bay .cap .cr2 .cr3 .crw .dcr .dcs .dng .erf .fff .gpr .iiq .k25 .kdc .mdc .mef .mos .mrw .nef "
    ".nrw .orf .pef .ptx .pxn .raf .raw .rw2 .rwl .sr2 .srf .srw .x3f"
)
_EDITORS = ".afphoto .ai .cdr .clip .exr .hdr .indd .kra .ora .psb .svg .svgz .xcf"
# Suffix -> picture format that Pillow may be unable to read.
_FORMATS = {
    **dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), "HEIC"),
    **dict.fromkeys((".avif", ".avifs"), "AVIF"),
    ".jxl": "JPEG XL",
    **dict.fromkeys(_RAW.split(), "camera raw"),
    **dict.fromkeys(_EDITORS.split(), "of a drawing program"),
}
# First bytes -> format, for files with an unknown or wrong suffix.
_SIGNATURES = {
    rb"\xff\xd8\xff": "JPEG",
    rb"\x89PNG\r\n\x1a\n": "PNG",
    rb"GIF8[79]a": "GIF",
    rb"RIFF....WEBP": "WebP",
    rb"II\*\0|MM\0\*": "TIFF",
    rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)": "HEIC",
    rb"....ftyp(avif|avis)": "AVIF",
    rb"....ftypcrx ": "camera raw",
    rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
}
_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "WebP": ".webp", "TIFF": ".tif"}


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """Suffixes of the readable formats, in lower case with their dot.

    Includes HEIC and HEIF if the package pillow-heif is installed (the extra ``heif``).
    """
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    formats = Image.OPEN.keys() - _ONLY_RECOGNISED
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def format_by_suffix(path: Path) -> str | None:
    """The picture format of the suffix, if it is one that cannot be read; else None."""
    suffix = path.suffix.lower()
    return None if suffix in readable_suffixes() else _FORMATS.get(suffix)


def format_by_content(path: Path) -> str | None:
    """The picture format by a file's first bytes; None if it is not a picture or cannot be opened."""
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError:
        return None
    return next((name for bytes_, name in _SIGNATURES.items() if re.match(bytes_, start, re.DOTALL)), None)


def suffix_of(name: str | None) -> str:
    """The suffix of a format by `format_by_content`; of one that has none here, and of None, that of a PNG."""
    return _SUFFIXES.get(name or "", ".png")


def is_read(name: str) -> bool:
    """Whether pictures of a format can be read."""
    suffixes = [suffix for suffix, format_ in _FORMATS.items() if format_ == name]
    return name in _SUFFIXES or not readable_suffixes().isdisjoint(suffixes)


def remedy(name: str) -> str:
    """Advice for pictures of a format that cannot be read."""
    if name == "HEIC":
        return "pip install 'ti_jax[heif]' reads them"
    if name == "AVIF":
        return "pip install -U pillow reads them"
    if name in _SUFFIXES:
        return f"give them the suffix {_SUFFIXES[name]}"
    return "save them as JPEG or PNG"
