"""The networks of Stable Diffusion in Flax Linen, with the structure and names of diffusers and transformers."""
