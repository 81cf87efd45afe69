"""Lines on the sizes of pictures: which are enlarged, and of which much is cropped away."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ti_jax.data.buckets import shape_name
from ti_jax.data.cropping import crop_box
from ti_jax.data.pictures import Bucket, Pictures
from ti_jax.errors import listed

# Pictures that are enlarged by more than this factor, or are longer than wide by more than it, are reported.
MAX_SCALE = 4


def report_sizes(pictures: Pictures, resolution: int, report: Callable[[str], None]) -> None:
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


def report_buckets(buckets: Sequence[Bucket], report: Callable[[str], None]) -> None:
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
