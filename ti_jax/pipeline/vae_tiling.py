"""Choose whether the VAE decodes whole pictures or tiles, from the compiled program's memory and what is free."""

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
    """The `tile` argument of `Networks.decode_latents` for a batch.

    Args:
      latent_shape: (h, w, c) of one picture.
      vae_tiling: "never": the whole batch at once; "always": tiles, if a picture is larger than one; "auto": try in
        order the whole batch, one picture at a time, and tiles, and take the first that fits in memory. The first two
        are exact, tiles are approximate.
      lower: lowers the program that uses the tile. It is compiled here if there is a choice; calling it later with the
        same shapes does not compile it again.
      free: free bytes of the device; None: unknown, and everything is taken to fit.

    Raises:
      InputError: `vae_tiling` is not one of its values.
    """
    if vae_tiling not in typing.get_args(VaeTiling):
        raise InputError(f"vae_tiling {vae_tiling!r}: must be one of {', '.join(typing.get_args(VaeTiling))}")
    tile, side = networks.vae.config.tile_latent_size, max(latent_shape[:2])
    candidates: list[int | None] = [None]
    if batch_size > 1:
        candidates.append(side)  # one tile holds a whole picture
    if side > tile:
        candidates.append(tile)
    if vae_tiling == "never":
        return candidates[0]
    if vae_tiling == "always":
        return candidates[-1]
    for candidate in candidates[:-1]:
        available = free()
        if available is None or _fits(lower(candidate), available):
            return candidate
    if side > tile:
        factor = networks.latent_factor
        width, height = factor * latent_shape[1], factor * latent_shape[0]
        _print_once(
            f"note: too little memory is free for decoding {width} x {height} pixels at once: pictures are decoded in "
            f"tiles of {factor * tile} pixels (--vae_tiling never decodes them whole)"
        )
    return candidates[-1]


def _fits(lowered: jax.stages.Lowered, available: float) -> bool:
    """Whether the temporaries and results fit; most arguments, such as weights, are on the device already."""
    try:
        memory: Any = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        # The TPU compiler allocates all memory ahead of time, and raises if it cannot.
        if is_out_of_memory(error):
            return False
        raise
    return memory.temp_size_in_bytes + memory.output_size_in_bytes <= available


@functools.cache
def _print_once(note: str) -> None:
    """Print a note once, even if many pictures follow."""
    print(note, file=sys.stderr)
