"""Gradient checkpointing, or rematerialisation (Chen et al. 2016, arXiv 1604.06174): what the backward pass saves."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

_PRODUCT = "product"


def product(x: jax.Array) -> jax.Array:
    """`x` itself, marked as the output of a convolution or dense layer, which ``policy`` saves.

    Marked by name, because a policy on primitives does not see inside the custom gradients of `conv2d`, and cannot
    tell a dense layer (expensive and small) from attention scores (cheap and large).
    """
    return checkpoint_name(x, _PRODUCT)


def checkpointed(block: Any, gradient_checkpointing: str) -> Any:
    """A block (a Flax module class) with the given rematerialisation policy.

    Args:
      gradient_checkpointing: what is saved for the backward pass. ``none``: everything that it reads. ``policy``: the
        block's inputs and the outputs of its convolutions and dense layers; norms, nonlinearities and attention scores
        are recomputed. ``full``: the inputs alone; everything is recomputed.
    """
    if gradient_checkpointing == "none":
        return block
    if gradient_checkpointing == "policy":
        return nn.remat(block, policy=jax.checkpoint_policies.save_only_these_names(_PRODUCT))
    if gradient_checkpointing == "full":
        return nn.remat(block)
    raise ValueError(f"gradient_checkpointing {gradient_checkpointing!r}: must be none, policy or full")
