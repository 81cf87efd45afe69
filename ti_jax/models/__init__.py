"""The networks of Stable Diffusion in Flax Linen: what the checkpoints of diffusers and transformers describe."""
