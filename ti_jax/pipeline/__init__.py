"""A frozen Stable Diffusion with its weights, tokenizers and noise schedule, and sampling from it."""

from ti_jax.pipeline.stable_diffusion import StableDiffusion

__all__ = ["StableDiffusion"]
