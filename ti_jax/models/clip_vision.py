"""CLIP's vision tower, and both towers as one model that compares pictures with texts (arXiv 2103.00020).

Held to transformers' ``CLIPModel`` on PyTorch; attribute names are theirs. Pictures are [B, S, S, 3].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ti_jax.errors import InputError
from ti_jax.models.clip_layers import CLIPEncoder, CLIPOptions, layer_norm
from ti_jax.models.clip_text import CLIPTextConfig, CLIPTextModel


@dataclass(frozen=True)
class CLIPVisionConfig(CLIPOptions):
    """Sizes and options of a vision tower; defaults are transformers'."""

    FILE = "CLIP config.json, vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> CLIPVisionConfig:
        """From the ``vision_config`` of a CLIP model's ``config.json``.

        Raises:
          InputError: an option or value that is not implemented, or invalid sizes; names option and value.
        """
        return cls.read(config)

    def check(self) -> None:
        """See `Options`."""
        super().check()
        if self.hidden_size % self.num_attention_heads or self.image_size % self.patch_size or self.num_channels != 3:
            raise InputError(
                f"{self.FILE}: hidden_size must be a multiple of num_attention_heads, image_size of patch_size, and "
                "num_channels must be 3"
            )


class CLIPVisionTransformer(nn.Module):
    """Normalised pictures [B, S, S, 3] -> the class token's state after the final layer norm, [B, D]."""

    config: CLIPVisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Encode pictures of the config's ``image_size``."""
        hidden = CLIPVisionEmbeddings(self.config, self.dtype, name="embeddings")(pixels)
        hidden = layer_norm(self.config, self.dtype, "pre_layrnorm")(hidden)  # [sic]
        hidden = CLIPEncoder(self.config, self.dtype, causal=False, name="encoder")(hidden)[-1]
        return layer_norm(self.config, self.dtype, "post_layernorm")(hidden[:, 0])


class CLIPVisionEmbeddings(nn.Module):
    """Class token and patch tokens plus position embeddings: [B, S, S, 3] -> [B, 1 + patches, D]."""

    config: CLIPVisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Embed the patches."""
        config = self.config
        side = config.image_size
        if pixels.shape[1:] != (side, side, 3):
            raise ValueError(f"pictures of {side} x {side} x 3 expected, not {pixels.shape[1:]}")
        patches = nn.Conv(
            config.hidden_size,
            (config.patch_size,) * 2,
            strides=config.patch_size,
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            name="patch_embedding",
        )(pixels.astype(self.dtype))
        class_token = self.param("class_embedding", nn.initializers.normal(0.02), (config.hidden_size,))
        count = 1 + (side // config.patch_size) ** 2
        positions = nn.Embed(count, config.hidden_size, name="position_embedding")(jnp.arange(count))
        first = jnp.broadcast_to(class_token.astype(self.dtype), (pixels.shape[0], 1, config.hidden_size))
        tokens = jnp.concatenate([first, patches.reshape(pixels.shape[0], -1, config.hidden_size)], axis=1)
        return tokens + positions.astype(self.dtype)


class CLIPModel(nn.Module):
    """Both towers with their projections into a common space.

    Attributes:
      text_config: of the text encoder, which does not project by itself.
      vision_config: of the vision tower. projection_dim: of the common space.
    """

    text_config: CLIPTextConfig
    vision_config: CLIPVisionConfig
    projection_dim: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Create the submodules."""
        self.text_model = CLIPTextModel(self.text_config, self.dtype)
        self.vision_model = CLIPVisionTransformer(self.vision_config, self.dtype)
        self.text_projection = nn.Dense(self.projection_dim, use_bias=False, dtype=self.dtype)
        self.visual_projection = nn.Dense(self.projection_dim, use_bias=False, dtype=self.dtype)

    def image_features(self, pixels: jax.Array) -> jax.Array:
        """Normalised pictures [B, S, S, 3] -> unit vectors [B, projection_dim]."""
        return _unit(self.visual_projection(self.vision_model(pixels)))

    def text_features(self, input_ids: jax.Array) -> jax.Array:
        """Token ids int32 [B, L] -> unit vectors [B, projection_dim]."""
        return _unit(self.text_projection(self.text_model(input_ids).pooled))

    def __call__(self, pixels: jax.Array, input_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both, to initialise all parameters."""
        return self.image_features(pixels), self.text_features(input_ids)


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
