"""The part of a picture that is learned from: the centred one with a shape's aspect ratio, scaled to the shape."""

from __future__ import annotations

from PIL import Image

from ti_jax.data.buckets import Shape


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
