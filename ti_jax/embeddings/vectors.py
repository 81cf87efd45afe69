"""From an array in a file to the vectors of a word."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ti_jax.embeddings.families import FAMILIES
from ti_jax.errors import InputError
from ti_jax.models.components import TEXT_ENCODERS

T5_WIDTH = 4096  # of T5-XXL
T5_WORD = "a word for the T5 text encoder of SD3 or Flux, which no Stable Diffusion 1, 2 or XL has"


def vectors_of(array: object, name: str) -> np.ndarray:
    """An array [n, D], or [D] as old files have it, of any floating-point type, as float32 [n, D].

    Raises:
      InputError: not an array of floating-point numbers, or of another rank, or empty, or with NaN or infinity in it.
    """
    if not isinstance(array, np.ndarray):
        raise InputError(f"{name!r} holds a {type(array).__name__} where the vectors of a word belong")
    if array.dtype.kind != "f" and array.dtype != ml_dtypes.bfloat16:
        raise InputError(f"{name!r} holds {array.dtype} numbers; the vectors of a word are floating-point")
    if array.ndim > 0 and array.shape[-1] == T5_WIDTH:
        raise InputError(f"{name!r} has vectors of {T5_WIDTH} numbers: {T5_WORD}")
    if array.ndim not in (1, 2) or 0 in array.shape:
        raise InputError(f"{name!r} has the shape {list(array.shape)}; the vectors of a word are [n, D]")
    with np.errstate(over="ignore"):  # numbers too large for float32 become infinite and are refused below
        vectors = array.astype(np.float32)
    if not np.isfinite(vectors).all():
        raise InputError(f"{name!r} holds NaN or infinite numbers; the word is spoilt, get or train it again")
    return vectors.reshape(-1, array.shape[-1])


def encoder_of(vectors: np.ndarray) -> str:
    """The text encoder that a single tensor is for: only SDXL's second one has width 1280."""
    return TEXT_ENCODERS[1] if vectors.shape[1] == FAMILIES["SDXL"]["text_encoder_2"] else TEXT_ENCODERS[0]
