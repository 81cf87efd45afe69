"""Encode the pictures to VAE moments once, so that the training loop never runs the VAE."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ti_jax.batches import in_batches
from ti_jax.pipeline import StableDiffusion

# Pictures per batch. The VAE's activations at full resolution set the peak memory: 8.9 GB for four pictures and 1.3 GB
# for one, in bfloat16 at 1024 pixels, compiled for a TPU v5e. It runs once, so that its speed hardly matters.
ENCODE_BATCH = 4
LARGE = 512  # pixels; pictures with a larger side are encoded one at a time


def encode_moments(sd: StableDiffusion, pixels: np.ndarray, with_mirrored: bool) -> jax.Array:
    """VAE mean and log-variance of each picture and of its mirror image.

    Args:
      pixels: float32 [N, H, W, 3] in [-1, 1].
      with_mirrored: also encode the pictures flipped left to right; flipping the latents would not be the same.

    Returns:
      float32 [N, 2, h, w, 2c] (without mirror images [N, 1, h, w, 2c]), unscaled.
    """
    views = [pixels, pixels[:, :, ::-1]] if with_mirrored else [pixels]
    flat = np.concatenate(views)
    encoded = in_batches(sd.encode_image, flat, encode_batch(flat.shape[1], len(flat)))
    return jnp.stack(jnp.split(jnp.asarray(encoded), len(views)), axis=1)


def encode_batch(resolution: int, count: int) -> int:
    """Batch size to encode ``count`` pictures with a side of ``resolution`` pixels."""
    return 1 if resolution > LARGE else min(ENCODE_BATCH, count)
