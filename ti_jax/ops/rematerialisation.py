"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): what a block keeps for the backward pass."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

_PRODUCT = "product"


def product(x: jax.Array) -> jax.Array:
    """`x` itself, marked as what a convolution or a dense layer has made: ``policy`` keeps it.

    By name, because a policy that looks at operations sees none within the forms that `conv2d` has for each platform,
    and cannot tell a dense layer, which costs much and is small, from attention's scores, which cost little and are
    large.
    """
    return checkpoint_name(x, _PRODUCT)


def checkpointed(block: Any, gradient_checkpointing: str) -> Any:
    """A block, a Flax module's class, that keeps no more for its backward pass than it is told to.

    Args:
      gradient_checkpointing: ``none``: all that the backward pass reads is kept. ``policy``: the block's inputs, and
        what its convolutions and dense layers make; norms, nonlinearities and attention's scores are computed again.
        ``full``: the inputs alone; everything is computed again.
    """
    if gradient_checkpointing == "none":
        return block
    if gradient_checkpointing == "policy":
        return nn.remat(block, policy=jax.checkpoint_policies.save_only_these_names(_PRODUCT))
    if gradient_checkpointing == "full":
        return nn.remat(block)
    raise ValueError(f"gradient_checkpointing {gradient_checkpointing!r}: must be none, policy or full")
