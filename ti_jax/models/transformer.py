"""The transformer blocks of the UNet.

Held to diffusers' ``attention_processor.py``, ``attention.py`` and ``transformers/transformer_2d.py`` on PyTorch;
attribute names are theirs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ti_jax.models.layers import NO_PADDING, Conv2d, Dense, GroupNorm
from ti_jax.ops.activations import gelu
from ti_jax.ops.attention import dot_product_attention, padded_for_cudnn
from ti_jax.ops.rematerialisation import checkpointed


class Attention(nn.Module):
    """Multi-head attention, C a multiple of `heads`: [B, L, C] -> [B, L, C]."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """Attend to `context` [B, S, D], or to `hidden` itself if that is None."""
        width = hidden.shape[-1]
        key_length = None if context is None else context.shape[1]
        context = hidden if context is None else padded_for_cudnn(context)

        def heads(x: jax.Array, name: str) -> jax.Array:
            projected = Dense(width, use_bias=False, dtype=self.dtype, name=name)(x)
            return projected.reshape(*x.shape[:2], self.heads, width // self.heads)

        query, key, value = heads(hidden, "to_q"), heads(context, "to_k"), heads(context, "to_v")
        attended = dot_product_attention(query, key, value, key_length=key_length)
        return Dense(width, dtype=self.dtype, name="to_out_0")(attended.reshape(hidden.shape))


class GEGLU(nn.Module):
    """``a gelu(b)`` of two projections a and b (Shazeer 2020): [B, L, C] -> [B, L, features]."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Apply the projection and the gate."""
        projected, gate = jnp.split(Dense(2 * self.features, dtype=self.dtype, name="proj")(hidden), 2, axis=-1)
        # Float32 until the final rounding, as inside PyTorch's GELU.
        return (projected * gelu(gate.astype(jnp.float32))).astype(self.dtype)


class FeedForward(nn.Module):
    """Gated feed-forward of four times the width: [B, L, C] -> [B, L, C]."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Apply both layers."""
        width = hidden.shape[-1]
        hidden = GEGLU(4 * width, self.dtype, name="net_0")(hidden)
        return Dense(width, dtype=self.dtype, name="net_2")(hidden)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward, each with pre-norm: [B, L, C] -> [B, L, C].

    With `only_cross_attention` the first attention is a cross-attention, too.
    """

    heads: int
    only_cross_attention: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array, context: jax.Array) -> jax.Array:
        """`context` is the text, [B, S, D]."""
        for number, attended in ((1, context if self.only_cross_attention else None), (2, context)):
            attention = Attention(self.heads, dtype=self.dtype, name=f"attn{number}")
            hidden = hidden + attention(self._norm(f"norm{number}")(hidden), attended)
        return hidden + FeedForward(self.dtype, name="ff")(self._norm("norm3")(hidden))

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name=name)


class Transformer2DModel(nn.Module):
    """Transformer blocks over a picture's pixels, with a residual connection: [B, H, W, C] -> [B, H, W, C].

    Attributes:
      num_layers: number of transformer blocks.
      use_linear_projection: project by dense layers (SD2, SDXL) rather than 1x1 convolutions (SD1).
      gradient_checkpointing: policy of each transformer block, see `checkpointed`.
    """

    heads: int
    num_layers: int
    num_groups: int
    use_linear_projection: bool = False
    only_cross_attention: bool = False
    gradient_checkpointing: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """`context` is the text, [B, S, D]."""
        channels = x.shape[-1]

        def projection(name: str) -> nn.Module:
            if self.use_linear_projection:
                return Dense(channels, dtype=self.dtype, name=name)
            return Conv2d(channels, 1, padding=NO_PADDING, dtype=self.dtype, name=name)

        block = checkpointed(BasicTransformerBlock, self.gradient_checkpointing)
        normed, x = GroupNorm(self.num_groups, 1e-6, dtype=self.dtype, name="norm").beside(x)
        hidden = projection("proj_in")(normed)
        hidden = hidden.reshape(x.shape[0], -1, channels)
        for index in range(self.num_layers):
            name = f"transformer_blocks_{index}"
            hidden = block(self.heads, self.only_cross_attention, self.dtype, name=name)(hidden, context)
        return x + projection("proj_out")(hidden.reshape(x.shape))
