"""Encode the pictures to VAE moments once, so that the training loop never runs the VAE."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from ti_jax.data.moments_cache import MomentsCache
from ti_jax.data.on_demand import Pixels, digests_of
from ti_jax.pipeline import StableDiffusion

# Pictures per batch. The VAE's activations at full resolution set the peak memory: 8.9 GB for four pictures and 1.3 GB
# for one, in bfloat16 at 1024 pixels, compiled for a TPU v5e. It runs once, so that its speed hardly matters.
ENCODE_BATCH = 4
LARGE = 512  # pixels; pictures with a larger side are encoded one at a time


def encode_moments(
    sd: StableDiffusion, sets: Sequence[Pixels], with_mirrored: bool, cache: MomentsCache | None = None
) -> np.ndarray:
    """VAE mean and log-variance of each picture and of its mirror image.

    A few pictures at a time are in memory, or on the device.

    Args:
      sets: float32 [n, H, W, 3] in [-1, 1], all of one size.
      with_mirrored: also encode the pictures flipped left to right; flipping the latents would not be the same.
      cache: of moments that were computed before; None: there is none.

    Returns:
      float32 [N, 2, h, w, 2c] (without mirror images [N, 1, h, w, 2c]) of the pictures of all sets, unscaled.
    """
    views = 2 if with_mirrored else 1
    total = sum(map(len, sets))
    size = encode_batch(max(sets[0].shape[1:3]), views * total)
    names = None
    if cache is not None:
        names = [
            cache.name(digest, pixels.shape[1:], sd, views, size) for pixels in sets for digest in digests_of(pixels)
        ]
    moments: np.ndarray | None = None
    missing = []
    for index in range(total):
        known = None if cache is None or names is None else cache.read(names[index])
        if known is None:
            missing.append(index)
            continue
        if moments is None:
            moments = aligned((total, *known.shape))
        moments[index] = known
    places = [(index, mirrored) for index in missing for mirrored in range(views)]
    shown = _views(sets, missing, views)
    for start in range(0, len(places), size):
        part = places[start : start + size]
        rows = [next(shown) for _ in part]
        # One program serves all: the last batch is filled up.
        encoded = np.asarray(sd.encode_image(np.stack(rows + rows[-1:] * (size - len(rows)))))
        if moments is None:
            moments = aligned((total, views, *encoded.shape[1:]))
        for place, each in zip(part, encoded, strict=False):
            moments[place] = each
            if cache is not None and names is not None and place[1] == views - 1:
                cache.write(names[place[0]], moments[place[0]])
    assert moments is not None, "there are pictures"
    return moments


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An array of float32 whose memory all devices of a CPU can use as it is, which XLA does from 64 bytes on."""
    size = 4 * math.prod(shape)
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(np.float32).reshape(shape)


def _views(sets: Sequence[Pixels], wanted: Sequence[int], views: int) -> Iterator[np.ndarray]:
    """The wanted pictures, by their number over all sets, and after each its mirror image if there are two views."""
    starts = np.cumsum([0, *map(len, sets)])
    for index in wanted:
        number = int(np.searchsorted(starts, index, side="right")) - 1
        picture = sets[number][int(index - starts[number])]
        yield from [picture, picture[:, ::-1]][:views]


def encode_batch(resolution: int, count: int) -> int:
    """Batch size to encode ``count`` pictures with a longer side of ``resolution`` pixels."""
    return 1 if resolution > LARGE else min(ENCODE_BATCH, count)
