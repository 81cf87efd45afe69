"""Published checkpoints of Stable Diffusion -> checked parameter trees, configs and tokenizers."""
