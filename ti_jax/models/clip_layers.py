"""The transformer that CLIP's text encoder and its vision tower share (Radford et al. 2021, arXiv 2103.00020).

Held to transformers' ``CLIPEncoder`` on PyTorch; attribute names are theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
from flax import linen as nn

from ti_jax.models.layers import Dense
from ti_jax.ops.activations import gelu, quick_gelu
from ti_jax.ops.attention import dot_product_attention

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}


class CLIPTransformerConfig(Protocol):
    """The sizes of a transformer, as the configurations of the text encoder and of the vision tower have them."""

    @property
    def hidden_size(self) -> int: ...  # noqa: D102
    @property
    def intermediate_size(self) -> int: ...  # noqa: D102
    @property
    def num_hidden_layers(self) -> int: ...  # noqa: D102
    @property
    def num_attention_heads(self) -> int: ...  # noqa: D102
    @property
    def hidden_act(self) -> str: ...  # noqa: D102
    @property
    def layer_norm_eps(self) -> float: ...  # noqa: D102


class CLIPEncoder(nn.Module):
    """The transformer: [B, L, D] -> input and output of its last layer, [B, L, D] each."""

    config: CLIPTransformerConfig
    dtype: Any
    causal: bool

    @nn.compact
    def __call__(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Run all layers."""
        previous = hidden
        for index in range(self.config.num_hidden_layers):
            previous = hidden
            hidden = CLIPEncoderLayer(self.config, self.dtype, self.causal, name=f"layers_{index}")(hidden)
        return previous, hidden


class CLIPEncoderLayer(nn.Module):
    """Attention and feed-forward with pre-norm and residual connections: [B, L, D] -> [B, L, D]."""

    config: CLIPTransformerConfig
    dtype: Any
    causal: bool

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Run the layer."""
        config, dtype = self.config, self.dtype
        normed = layer_norm(config, dtype, "layer_norm1")(hidden)
        hidden = hidden + CLIPAttention(config, dtype, self.causal, name="self_attn")(normed)
        normed = layer_norm(config, dtype, "layer_norm2")(hidden)
        return hidden + CLIPMLP(config, dtype, name="mlp")(normed)


class CLIPAttention(nn.Module):
    """Self-attention: [B, L, D] -> [B, L, D]; with `causal`, token i attends to tokens 0..i."""

    config: CLIPTransformerConfig
    dtype: Any
    causal: bool

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Attend."""
        width, heads = self.config.hidden_size, self.config.num_attention_heads
        query, key, value = (
            Dense(width, dtype=self.dtype, name=name)(hidden).reshape(*hidden.shape[:2], heads, width // heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        attended = dot_product_attention(query, key, value, self.causal)
        return Dense(width, dtype=self.dtype, name="out_proj")(attended.reshape(hidden.shape))


class CLIPMLP(nn.Module):
    """Feed-forward: [B, L, D] -> [B, L, D]."""

    config: CLIPTransformerConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Run both dense layers, with the activation in between."""
        hidden = Dense(self.config.intermediate_size, dtype=self.dtype, name="fc1")(hidden)
        hidden = ACTIVATIONS[self.config.hidden_act](hidden)
        return Dense(self.config.hidden_size, dtype=self.dtype, name="fc2")(hidden)


def layer_norm(config: CLIPTransformerConfig, dtype: Any, name: str) -> nn.LayerNorm:
    """Layer norm over D; statistics in float32 and the two-pass variance, as in PyTorch."""
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name)
