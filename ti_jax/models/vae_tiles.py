"""The VAE's decoder on one tile of one picture after another, so that its memory is that of a tile."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

OVERLAP = 4  # a tile shares a quarter of its side with the next


def decode_in_tiles(decode: Callable[[jax.Array], jax.Array], latents: jax.Array, tile: int, factor: int) -> jax.Array:
    """Decode overlapping tiles and blend them, linearly over the overlap. Pure, to be used inside ``jax.jit``.

    A tile's group norms and attention see the tile alone, so the picture is near that of the whole decoder and is not
    it. Held to ``AutoencoderKL.tiled_decode`` of diffusers' ``autoencoder_kl.py``; where pictures are no larger than a
    tile, to its ``use_slicing``: they are decoded whole, one after the other.

    Args:
      decode: unscaled latents [1, h, w, c] of any h and w -> pixels [1, factor * h, factor * w, C].
      latents: unscaled, [B, h, w, c].
      tile: side of a tile in latents, 4 or more. diffusers' pictures come out in another size, were it not divisible by
        4; ours do not.
      factor: pixels to a latent, along one side.

    Returns:
      Pixels [B, factor * h, factor * w, C].
    """
    _, height, width, channels = latents.shape
    if max(height, width) <= tile:
        return _decode_equal(decode, latents, [(0, 0)], (height, width, channels))[0]
    # As diffusers has it: a tile begins at every step, along the side that is not longer than a tile, too.
    step = tile - tile // OVERLAP
    tops, lefts = _spans(height, tile, step), _spans(width, tile, step)

    # One compiled decoder, and one loop, for all tiles of a size. The last of a row or column are smaller: if they were
    # filled up, or moved inwards, their norms would see something else.
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
            # A neighbour is blended before it is blended into, as diffusers does.
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
    """Pixels [B, H, W, C] of the tiles of one shape [h, w, c] with these upper left corners, one tile at a time."""
    starts = np.array([(index, *corner, 0) for corner in corners for index in range(len(latents))], np.int32)
    pixels = lax.map(lambda start: decode(lax.dynamic_slice(latents, start, (1, *shape)))[0], jnp.asarray(starts))
    return list(pixels.reshape(len(corners), len(latents), *pixels.shape[1:]))


def _blend(before: jax.Array, pixels: jax.Array, overlap: int, axis: int) -> jax.Array:
    """`pixels`, going over from the end of the tile `before` into its own within `overlap` rows (axis 1) or columns."""
    extent = min(overlap, before.shape[axis], pixels.shape[axis])
    weights = jnp.expand_dims(jnp.arange(extent) / extent, [each for each in range(4) if each != axis])
    end = lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    start = lax.slice_in_dim(pixels, 0, extent, axis=axis)
    rest = lax.slice_in_dim(pixels, extent, None, axis=axis)
    return jnp.concatenate([end * (1 - weights) + start * weights, rest], axis=axis)
