"""Pictures to VAE moments, once, so that the training loop never runs the VAE."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ..batches import in_batches
from ..pipeline import StableDiffusion

ENCODE_BATCH = 4  # pictures at a time: the VAE's activations at full resolution are what fills the memory here


def encode_moments(sd: StableDiffusion, pixels: np.ndarray, with_mirrored: bool) -> jax.Array:
    """VAE mean and log-variance of each picture and of its mirror image.

    Args:
      pixels: float32 [N, H, W, 3] in [-1, 1].
      with_mirrored: also encode the pictures flipped left to right. The latents of a mirror image are not the mirrored
        latents, so it has to be encoded itself.

    Returns:
      float32 [N, 2, h, w, 2c] (without mirror images [N, 1, h, w, 2c]), unscaled.
    """
    views = [pixels, pixels[:, :, ::-1]] if with_mirrored else [pixels]
    flat = np.concatenate(views)
    encoded = in_batches(sd.encode_image, flat, min(ENCODE_BATCH, len(flat)))
    return jnp.stack(jnp.split(jnp.asarray(encoded), len(views)), axis=1)
