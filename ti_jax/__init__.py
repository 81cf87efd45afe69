"""Textual Inversion for Stable Diffusion in JAX/Flax."""
