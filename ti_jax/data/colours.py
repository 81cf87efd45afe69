"""Convert any of Pillow's modes to 8-bit sRGB: bit depths, colour profiles and transparency."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms

# Colour space of an ICC profile -> modes of Pillow that have it.
_SPACES = {"RGB": ("RGB",), "GRAY": ("L",), "CMYK": ("CMYK",)}


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to 8-bit sRGB, with transparent parts composited on white.

    16-bit grey is scaled to 8 bits. An embedded ICC profile is converted to sRGB (perceptual intent). A profile that is
    broken, or of another colour space than the pixels, is ignored, as browsers do.

    Raises:
      ValueError: 32-bit grey whose values for black and white are unknown.
    """
    profile = image.info.get("icc_profile")
    image = _to_8_bits(image)
    alpha = None
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
    if image.mode in ("1", "L", "LA"):
        image = image.convert("L")
    elif image.mode == "LAB":
        image, profile = image.convert("RGB"), None  # the colours of LAB are absolute
    elif image.mode != "CMYK":
        image = (image if alpha is None else image.convert("RGBA")).convert("RGB")
    image = _to_srgb(image, profile)
    if alpha is None:
        return image
    image.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit and 32-bit grey to 8 bits; every other picture as it is."""
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips everything above 255 to white. For 16-bit RGB it takes the high byte, as here.
        values = np.asarray(image)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            values = np.where(values == transparent, np.uint16(65535), values)
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        return _grey_to_8_bits(np.asarray(image))
    return image


def _grey_to_8_bits(values: np.ndarray) -> Image.Image:
    """32-bit grey, integers or floats [H, W], to 8 bits. The file does not specify the white level.

    For integers it is 65535 (Pillow reads 16-bit PGM this way). For floats it is 1, 255 or 65535, the smallest that no
    value exceeds.
    """
    lowest, highest = values.min(), values.max()
    whites = (65535,) if values.dtype.kind == "i" else (1.0, 255.0, 65535.0)
    white = next((white for white in whites if highest <= white), None)
    if white is None or not lowest >= 0:  # not "lowest < 0": NaN is neither
        raise ValueError(f"grey values from {lowest} to {highest}: cannot tell black and white; save it in 8 bits")
    return Image.fromarray(np.round(values * (255.0 / white)).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert a picture of mode L, RGB or CMYK to sRGB, with its ICC profile if that is usable."""
    if not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if image.mode not in _SPACES.get(space, ()):
            return image.convert("RGB")
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, "RGB")
        if image.mode == "RGB" and _is_identity(transform):
            return image
        converted = ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError, ImportError):
        # Broken, or (ImportError) a Pillow that was built without LittleCMS.
        return image.convert("RGB")
    assert converted is not None, "not in place"
    return converted


def _is_identity(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform from RGB to RGB changes colours by no more than its own rounding.

    True for the sRGB profiles of cameras and editors: their pictures are then left unchanged.
    """
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(len(levels), -1, 3)
    converted = ImageCms.applyTransform(Image.fromarray(colours), transform)
    return bool(np.abs(np.asarray(converted).astype(int) - colours).max() <= 1)
