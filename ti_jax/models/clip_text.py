"""CLIP's text encoder (Radford et al. 2021, arXiv 2103.00020), with trained rows after its frozen token table.

Held to transformers' ``CLIPTextModel`` and ``CLIPTextModelWithProjection`` on PyTorch. Stable Diffusion uses no
padding mask, only the causal mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ti_jax.errors import InputError
from ti_jax.models.clip_layers import CLIPEncoder, CLIPOptions, layer_norm
from ti_jax.models.layers import Dense
from ti_jax.ops.attention import padded_for_cudnn
from ti_jax.ops.lookup import lookup
from ti_jax.ops.platform import current

ARCHITECTURES = ("CLIPTextModel", "CLIPTextModelWithProjection")

# Default before transformers 4.31. It was never the tokenizer's id; transformers uses the largest id instead.
HISTORIC_EOS_TOKEN_ID = 2


@dataclass(frozen=True)
class CLIPTextConfig(CLIPOptions):
    """Sizes and options of a text encoder; defaults are transformers'."""

    FILE = "text encoder config.json"

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    with_projection: bool = False
    """Whether the pooled state is projected: ``architectures`` names ``CLIPTextModelWithProjection``."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> CLIPTextConfig:
        """From the contents of a text encoder's ``config.json``.

        Raises:
          InputError: an option or value that is not implemented, or invalid sizes; names option and value.
        """
        model_type = config.get("model_type", "clip_text_model")
        if model_type != "clip_text_model":
            raise InputError(
                f"text encoder config.json: model_type {model_type!r}; only clip_text_model is implemented"
            )
        architectures = config.get("architectures") or ["CLIPTextModel"]
        if len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
            raise InputError(
                f"text encoder config.json: architectures {architectures!r}; implemented: {', '.join(ARCHITECTURES)}"
            )
        return cls.read(config, with_projection=architectures[0] == "CLIPTextModelWithProjection")

    def check(self) -> None:
        """See `Options`."""
        super().check()
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"{self.FILE}: hidden_size {self.hidden_size} is no multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )


class CLIPTextOutput(NamedTuple):
    """Output of the encoder for token ids [B, L]; P is the projection's width, or D without one.

    With ``clip_skip`` N the first two are of N layers before.
    """

    last_hidden_state: jax.Array  # [B, L, D], after the final layer norm
    penultimate_hidden_state: jax.Array  # [B, L, D], input of the last layer, without the final layer norm
    pooled: jax.Array  # [B, P], all layers' output at the first end-of-text token, projected if the model projects


def eos_positions(input_ids: jax.Array, config: CLIPTextConfig) -> jax.Array:
    """Position [B] of the first end-of-text token in ids [B, L]; 0 if there is none.

    With the historic ``eos_token_id`` 2 it is the first position of the largest id, as in transformers, but only among
    ids of the frozen table: the ids of new words are larger than the end-of-text token's.
    """
    if config.eos_token_id == HISTORIC_EOS_TOKEN_ID:
        return jnp.argmax(jnp.where(input_ids < config.vocab_size, input_ids, -1), axis=-1)
    return jnp.argmax(input_ids == config.eos_token_id, axis=-1)


class CLIPTextModel(nn.Module):
    """The whole encoder: ids [B, L] and trained rows [n, D] -> `CLIPTextOutput`.

    Attributes:
      config: sizes and options.
      dtype: of activations; layer norms and softmax are always float32 inside.
      clip_skip: number of last layers that the hidden states leave out. XLA drops layers that nothing is taken from.
    """

    config: CLIPTextConfig
    dtype: Any = jnp.float32
    clip_skip: int = 0

    @nn.compact
    def __call__(self, input_ids: jax.Array, rows: jax.Array | None = None) -> CLIPTextOutput:
        """Encode token ids.

        Args:
          input_ids: int32 [B, L], L at most ``max_position_embeddings``. Id ``vocab_size + r`` is row r of `rows`.
          rows: float32 [n, D], or None if there are no new words. Ids >= ``vocab_size + n`` encode as NaN.
        """
        hidden = CLIPTextEmbeddings(self.config, self.dtype, name="embeddings")(input_ids, rows)
        padded = padded_for_cudnn(hidden)  # at the end, where causal attention never looks
        states = CLIPEncoder(self.config, self.dtype, causal=True, name="encoder")(padded)
        if padded is not hidden:
            states = [state[:, : hidden.shape[1]] for state in states]
        final_layer_norm = layer_norm(self.config, self.dtype, "final_layer_norm")
        hidden = last = final_layer_norm(states[-1])
        if self.clip_skip:
            last = final_layer_norm(states[-1 - self.clip_skip])
        ends = eos_positions(input_ids, self.config)
        if current().deterministic:
            pooled = jax.vmap(lookup)(hidden, ends)
        else:
            pooled = jnp.take_along_axis(hidden, ends[:, None, None], axis=1)[:, 0]
        if self.config.with_projection:
            pooled = Dense(self.config.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection")(pooled)
        return CLIPTextOutput(last, states[-2 - self.clip_skip], pooled)


class CLIPTextEmbeddings(nn.Module):
    """Token embeddings, from the frozen table or the trained rows, plus position embeddings: [B, L] -> [B, L, D]."""

    config: CLIPTextConfig
    dtype: Any

    @nn.compact
    def __call__(self, input_ids: jax.Array, rows: jax.Array | None) -> jax.Array:
        """``where(id >= vocab_size, rows[id - vocab_size], table[id]) + positions``."""
        config = self.config
        length = input_ids.shape[1]
        if length > config.max_position_embeddings:
            raise ValueError(f"{length} tokens, but the encoder has {config.max_position_embeddings} positions")
        # Look up and add in float32 and round once: bfloat16 would lose most of a trained row's small updates.
        # (Cast after the lookup, not before, which would cast the whole tables.)
        tokens = nn.Embed(config.vocab_size, config.hidden_size, name="token_embedding")
        positions = nn.Embed(config.max_position_embeddings, config.hidden_size, name="position_embedding")
        if rows is None or rows.shape[0] == 0:
            embeddings = tokens(input_ids).astype(jnp.float32)
        else:
            is_new = input_ids >= config.vocab_size
            old = tokens(jnp.where(is_new, 0, input_ids)).astype(jnp.float32)
            take = lookup if current().deterministic else partial(jnp.take, axis=0)
            new = take(rows.astype(jnp.float32), jnp.where(is_new, input_ids - config.vocab_size, 0))
            embeddings = jnp.where(is_new[..., None], new, old)
        return (embeddings + positions(jnp.arange(length)).astype(jnp.float32)).astype(self.dtype)
