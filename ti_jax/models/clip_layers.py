"""The transformer that CLIP's text encoder and its vision tower share (Radford et al. 2021, arXiv 2103.00020).

Held to transformers' ``CLIPEncoder`` on PyTorch; attribute names are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import jax
from flax import linen as nn

from ti_jax.errors import InputError
from ti_jax.models.layers import Dense
from ti_jax.models.options import Options
from ti_jax.ops.activations import gelu, quick_gelu
from ti_jax.ops.attention import dot_product_attention

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}


@dataclass(frozen=True)
class CLIPOptions(Options):
    """The options of a transformer, as the configurations of the text encoder and of the vision tower have them."""

    # Of no bearing on what a frozen encoder computes: where the file comes from, how weights are initialised, token ids
    # that are the tokenizer's business. transformers used to save its options of text generation with every config.
    # fmt: off
    METADATA = frozenset(
        {"_name_or_path", "architectures", "model_type", "transformers_version", "torch_dtype", "dtype",
         "initializer_factor", "initializer_range", "bos_token_id", "pad_token_id", "_commit_hash",
         "chunk_size_feed_forward", "diversity_penalty", "encoder_no_repeat_ngram_size", "id2label", "label2id",
         "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
         "num_return_sequences", "repetition_penalty", "return_dict", "temperature", "top_k", "top_p", "typical_p"}
    )
    # fmt: on
    # Dropout must be off because a frozen encoder that draws is not the one published.
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {"attention_dropout": (0,), "dropout": (0,)}

    hidden_size: int
    intermediate_size: int
    projection_dim: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float

    def check(self) -> None:
        """See `Options`."""
        self.require_positive(*(field.name for field in fields(self) if field.type == "int"))
        if self.hidden_act not in ACTIVATIONS:
            raise InputError(f"{self.FILE}: hidden_act {self.hidden_act!r}; implemented: {', '.join(ACTIVATIONS)}")
        if not isinstance(self.layer_norm_eps, float):
            self.refuse("layer_norm_eps", "expected a number")


class CLIPEncoder(nn.Module):
    """The transformer: [B, L, D] -> its input and the output of each layer, [B, L, D] each."""

    config: CLIPOptions
    dtype: Any
    causal: bool

    @nn.compact
    def __call__(self, hidden: jax.Array) -> list[jax.Array]:
        """Run all layers."""
        states = [hidden]
        for index in range(self.config.num_hidden_layers):
            states.append(CLIPEncoderLayer(self.config, self.dtype, self.causal, name=f"layers_{index}")(states[-1]))
        return states


class CLIPEncoderLayer(nn.Module):
    """Attention and feed-forward with pre-norm and residual connections: [B, L, D] -> [B, L, D]."""

    config: CLIPOptions
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

    config: CLIPOptions
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

    config: CLIPOptions
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Run both dense layers, with the activation in between."""
        hidden = Dense(self.config.intermediate_size, dtype=self.dtype, name="fc1")(hidden)
        hidden = ACTIVATIONS[self.config.hidden_act](hidden)
        return Dense(self.config.hidden_size, dtype=self.dtype, name="fc2")(hidden)


def layer_norm(config: CLIPOptions, dtype: Any, name: str) -> nn.LayerNorm:
    """Layer norm over D; statistics in float32 and the two-pass variance, as in PyTorch."""
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name)
