"""Whole pictures or tiles? By what a compiled program needs and what memory the device has left."""

from __future__ import annotations

import functools
import sys
import typing
from collections.abc import Callable
from typing import Any

import jax

from ti_jax.config import VaeTiling
from ti_jax.errors import InputError
from ti_jax.machine import free_memory, is_out_of_memory
from ti_jax.models.networks import Networks


def choose_tile(
    networks: Networks,
    latent_shape: tuple[int, ...],
    batch_size: int,
    vae_tiling: VaeTiling,
    lower: Callable[[int | None], jax.stages.Lowered],
    free: Callable[[], float | None] = lambda: free_memory(jax.local_devices()[:1]),
) -> int | None:
    """How `Networks.decode_latents` is to decode a batch: its `tile`.

    Args:
      latent_shape: (h, w, c) of one picture.
      vae_tiling: "never": whole pictures and all at once; "always": tiles, where a picture is larger than one; "auto":
        the first that the memory is enough for of all pictures at once, one whole picture after the other, and tiles.
        The first two draw the same, the last something near it.
      lower: the program that the tile goes into. It is compiled here where there is a choice; calling it with the same
        shapes does not compile it again.
      free: bytes that the device has left; None: not known, and then memory is taken to be enough.

    Raises:
      InputError: `vae_tiling` is none of its values.
    """
    if vae_tiling not in typing.get_args(VaeTiling):
        raise InputError(f"vae_tiling {vae_tiling!r}: must be one of {', '.join(typing.get_args(VaeTiling))}")
    tile, side = networks.vae.config.tile_latent_size, max(latent_shape[:2])
    ways: list[int | None] = [None]
    if batch_size > 1:
        ways.append(side)  # a tile that a whole picture is in
    if side > tile:
        ways.append(tile)
    if vae_tiling == "never":
        return ways[0]
    if vae_tiling == "always":
        return ways[-1]
    for way in ways[:-1]:
        available = free()
        if available is None or _fits(lower(way), available):
            return way
    if side > tile:
        factor = networks.latent_factor
        width, height = factor * latent_shape[1], factor * latent_shape[0]
        _tell(
            f"note: too little memory is free for decoding {width} x {height} pixels at once: pictures are decoded in "
            f"tiles of {factor * tile} pixels (--vae_tiling never decodes them whole)"
        )
    return ways[-1]


def _fits(lowered: jax.stages.Lowered, available: float) -> bool:
    """Does the compiled program find room beside its arguments, most of which are weights and on the device already?"""
    try:
        memory: Any = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        # A TPU's compiler has to find a place for everything and says so if it does not.
        if is_out_of_memory(error):
            return False
        raise
    return memory.temp_size_in_bytes + memory.output_size_in_bytes <= available


@functools.cache
def _tell(note: str) -> None:
    """Once, though many pictures may follow."""
    print(note, file=sys.stderr)
