"""Tiled VAE decoding: one tile of one picture at a time, so that it needs the memory of one tile."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

OVERLAP = 4  # a tile shares a quarter of its side with the next


def decode_in_tiles(decode: Callable[[jax.Array], jax.Array], latents: jax.Array, tile: int, factor: int) -> jax.Array:
    """Decode overlapping tiles and blend them linearly over the overlap. Pure, for use inside ``jax.jit``.

    Group norms and attention see one tile only, so the picture is close to that of the whole decoder but not equal to
    it. Held to ``AutoencoderKL.tiled_decode`` of diffusers' ``autoencoder_kl.py``; for pictures no larger than a tile,
    to its ``use_slicing``: they are decoded whole, one after the other.

    Args:
      decode: unscaled latents [1, h, w, c] of any h and w -> pixels [1, factor * h, factor * w, C].
      latents: unscaled, [B, h, w, c].
      tile: side of a tile in latents, 4 or more. (If it is not a multiple of 4, diffusers returns pictures of another
        size; this function does not.)
      factor: pixels for each latent, along one side.

    Returns:
      Pixels [B, factor * h, factor * w, C].
    """
    _, height, width, channels = latents.shape
    if max(height, width) <= tile:
        return _decode_equal(decode, latents, [(0, 0)], (height, width, channels))[0]
    # As in diffusers, a tile begins at every step, even along a side that is no longer than a tile.
    step = tile - tile // OVERLAP
    tops, lefts = _spans(height, tile, step), _spans(width, tile, step)

    # One compiled decoder and one loop for all tiles of the same size. The last tile of a row or column is smaller:
    # padding it or moving it inwards would change what its norms see.
    decoded: dict[tuple[int, int], jax.Array] = {}
    for rows in sorted({length for _, length in tops}):
        for columns in sorted({length for _, length in lefts}):
            corners = [
                (top, left) for top, length in tops if length == rows for left, other in lefts if other == columns
            ]
            equal = _decode_equal(decode, latents, corners, (rows, columns, channels))
            decoded |= dict(zip(corners, equal, strict=True))

    picture: list[jax.Array] = []
    for i, (top, _) in enumerate(tops):
        line: list[jax.Array] = []
        for j, (left, _) in enumerate(lefts):
            pixels = decoded[top, left]
            # As in diffusers, each neighbour has been blended itself before it is used here.
            if i > 0:
                pixels = _blend(decoded[tops[i - 1][0], left], pixels, factor * (tile - step), axis=1)
            if j > 0:
                pixels = _blend(decoded[top, lefts[j - 1][0]], pixels, factor * (tile - step), axis=2)
            decoded[top, left] = pixels
            line.append(pixels[:, : factor * step, : factor * step])
        picture.append(jnp.concatenate(line, axis=2))
    return jnp.concatenate(picture, axis=1)


def _spans(size: int, tile: int, step: int) -> list[tuple[int, int]]:
    """Start and length of each tile along a side."""
    return [(start, min(tile, size - start)) for start in range(0, size, step)]


def _decode_equal(
    decode: Callable[[jax.Array], jax.Array],
    latents: jax.Array,
    corners: list[tuple[int, int]],
    shape: tuple[int, int, int],
) -> list[jax.Array]:
    """Pixels [B, H, W, C] of the tiles of shape [h, w, c] at these upper left corners, one tile at a time."""
    starts = np.array([(index, *corner, 0) for corner in corners for index in range(len(latents))], np.int32)
    pixels = lax.map(lambda start: decode(lax.dynamic_slice(latents, start, (1, *shape)))[0], jnp.asarray(starts))
    return list(pixels.reshape(len(corners), len(latents), *pixels.shape[1:]))


def _blend(before: jax.Array, pixels: jax.Array, overlap: int, axis: int) -> jax.Array:
    """Cross-fade from the end of tile `before` to the start of `pixels` over `overlap` rows (axis 1) or columns."""
    extent = min(overlap, before.shape[axis], pixels.shape[axis])
    weights = jnp.expand_dims(jnp.arange(extent) / extent, [each for each in range(4) if each != axis])
    end = lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    start = lax.slice_in_dim(pixels, 0, extent, axis=axis)
    rest = lax.slice_in_dim(pixels, extent, None, axis=axis)
    return jnp.concatenate([end * (1 - weights) + start * weights, rest], axis=axis)
