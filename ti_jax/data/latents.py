"""Pictures to VAE moments, once, so that the training loop never runs the VAE."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

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
    batch = min(ENCODE_BATCH, len(flat))
    # The last batch is filled up, so that one compiled program serves all.
    padded = np.concatenate([flat, np.repeat(flat[-1:], -len(flat) % batch, axis=0)])
    encoded = jnp.concatenate([sd.encode_image(padded[i : i + batch]) for i in range(0, len(padded), batch)])[
        : len(flat)
    ]
    return jnp.stack(jnp.split(encoded, len(views)), axis=1)
