"""The UNet of Stable Diffusion 1, 2 and XL (Rombach et al. 2022, arXiv 2112.10752; Podell et al. 2023, 2307.01952).

Held to diffusers' ``UNet2DConditionModel`` on PyTorch; attribute names are theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ti_jax.models.layers import Conv2d, GroupNorm, TimestepEmbedding, timestep_embedding
from ti_jax.models.unet_blocks import DownBlock2D, MidBlock2D, UpBlock2D
from ti_jax.models.unet_config import UNetConfig

__all__ = ["UNet2DConditionModel", "UNetConfig"]


class UNet2DConditionModel(nn.Module):
    """Noisy latents, timesteps and text -> predicted noise, velocity or sample.

    Attributes:
      config: sizes and options.
      dtype: of activations; norms and softmax are always float32 inside.
      gradient_checkpointing: rematerialisation policy of residual and transformer blocks: ``none``, ``policy`` or
        ``full``, see `checkpointed`.
    """

    config: UNetConfig
    dtype: Any = jnp.float32
    gradient_checkpointing: str = "none"

    @nn.compact
    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        encoder_hidden_states: jax.Array,
        added_cond: Mapping[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Predict noise, velocity or sample, as the model was trained to.

        Args:
          sample: latents [B, h, w, in_channels], of any size.
          timesteps: [B], integer or float.
          encoder_hidden_states: text [B, L, cross_attention_dim].
          added_cond: for SDXL (``addition_embed_type`` "text_time") ``text_embeds`` [B, P], the pooled text, and
            ``time_ids`` [B, 6]: original height and width, crop top and left, target height and width, in pixels.

        Returns:
          [B, h, w, out_channels], in `dtype`.
        """
        config = self.config
        sample, context = (array.astype(self.dtype) for array in (sample, encoder_hidden_states))
        time = self._time(timesteps, added_cond)

        x = Conv2d(config.block_out_channels[0], dtype=self.dtype, name="conv_in")(sample)
        skips = [x]
        for index, level in enumerate(config.down_levels):
            down = DownBlock2D(config, level, self.gradient_checkpointing, self.dtype, name=f"down_blocks_{index}")
            x, new_skips = down(x, time, context)
            skips += new_skips
        if config.mid_block_type is not None:
            mid = MidBlock2D(config, config.mid_level, self.gradient_checkpointing, self.dtype, name="mid_block")
            x = mid(x, time, context)
        for index, level in enumerate(config.up_levels):
            own_skips = tuple(skips[-level.num_resnets :])
            del skips[-level.num_resnets :]
            # Twice the size, unless the downsampler had rounded up.
            size = (skips[-1].shape[1], skips[-1].shape[2]) if level.resample else None
            up = UpBlock2D(config, level, self.gradient_checkpointing, self.dtype, name=f"up_blocks_{index}")
            x = up(x, own_skips, time, context, size)

        x = GroupNorm(config.norm_num_groups, config.norm_eps, silu=True, dtype=self.dtype, name="conv_norm_out")(x)
        return Conv2d(config.out_channels, dtype=self.dtype, name="conv_out")(x)

    def _time(self, timesteps: jax.Array, added_cond: Mapping[str, jax.Array] | None) -> jax.Array:
        """Time embedding [B, T], for SDXL with pooled text and sizes added."""
        config = self.config

        def waves(numbers: jax.Array, dimension: int) -> jax.Array:
            return timestep_embedding(numbers, dimension, config.flip_sin_to_cos, config.freq_shift)

        time = waves(timesteps, config.block_out_channels[0])
        time = TimestepEmbedding(config.time_embed_dim, self.dtype, name="time_embedding")(time)
        if config.addition_embed_type is None:
            if added_cond is not None:
                raise ValueError("this UNet takes no added_cond: its addition_embed_type is null")
            return time
        if added_cond is None:
            raise ValueError(
                "this UNet needs added_cond with text_embeds and time_ids: its addition_embed_type is text_time"
            )
        assert config.addition_time_embed_dim is not None  # required with text_time, see UNetConfig
        text_embeds, time_ids = added_cond["text_embeds"], added_cond["time_ids"]
        sizes = waves(time_ids.reshape(-1), config.addition_time_embed_dim).reshape(text_embeds.shape[0], -1)
        added = jnp.concatenate([text_embeds.astype(self.dtype), sizes], axis=-1)
        return time + TimestepEmbedding(config.time_embed_dim, self.dtype, name="add_embedding")(added)
