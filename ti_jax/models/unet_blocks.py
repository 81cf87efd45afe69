"""Down, mid and up blocks of the UNet: residual blocks, each optionally followed by a transformer.

Held to diffusers' ``models/unets/unet_2d_blocks.py`` on PyTorch; attribute names are theirs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ti_jax.models.layers import Downsample2D, ResnetBlock2D, Upsample2D
from ti_jax.models.transformer import Transformer2DModel
from ti_jax.models.unet_config import Level, UNetConfig
from ti_jax.ops.rematerialisation import checkpointed


class UNetBlock(nn.Module):
    """Base class of down, mid and up blocks: makes their residual blocks and transformers.

    Attributes:
      config: of the whole UNet.
      level: sizes of this block.
      gradient_checkpointing: policy of residual and transformer blocks, see `checkpointed`.
    """

    config: UNetConfig
    level: Level
    gradient_checkpointing: str = "none"
    dtype: Any = jnp.float32

    def resnet(self, index: int) -> ResnetBlock2D:
        """Residual block number `index`."""
        block = checkpointed(ResnetBlock2D, self.gradient_checkpointing)
        config = self.config
        return block(self.level.channels, config.norm_num_groups, config.norm_eps, self.dtype, name=f"resnets_{index}")

    def attention(self, index: int) -> Transformer2DModel:
        """The transformer after residual block number `index`."""
        return Transformer2DModel(
            heads=self.level.heads,
            num_layers=self.level.depths[index],
            num_groups=self.config.norm_num_groups,
            use_linear_projection=self.config.use_linear_projection,
            only_cross_attention=self.level.only_cross_attention,
            gradient_checkpointing=self.gradient_checkpointing,
            dtype=self.dtype,
            name=f"attentions_{index}",
        )


class DownBlock2D(UNetBlock):
    """``DownBlock2D`` and ``CrossAttnDownBlock2D``."""

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """[B, H, W, C], time embedding [B, T], text [B, S, D] -> the block's output, and its skips."""
        skips = []
        for index in range(self.level.num_resnets):
            x = self.resnet(index)(x, time)
            if self.level.depths:
                x = self.attention(index)(x, context)
            skips.append(x)
        if self.level.resample:
            x = Downsample2D(self.config.downsample_padding, self.dtype, name="downsamplers_0")(x)
            skips.append(x)
        return x, tuple(skips)


class MidBlock2D(UNetBlock):
    """``UNetMidBlock2DCrossAttn`` and, with no attention, ``UNetMidBlock2D``."""

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array) -> jax.Array:
        """[B, H, W, C], time embedding [B, T], text [B, S, D] -> [B, H, W, C]."""
        x = self.resnet(0)(x, time)
        if self.level.depths:
            x = self.resnet(1)(self.attention(0)(x, context), time)
        return x


class UpBlock2D(UNetBlock):
    """``UpBlock2D`` and ``CrossAttnUpBlock2D``."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        skips: tuple[jax.Array, ...],
        time: jax.Array,
        context: jax.Array,
        size: tuple[int, int] | None,
    ) -> jax.Array:
        """Concatenate the skips, last first, and upsample to the size of the next block's skips.

        Args:
          x: [B, H, W, C].
          skips: [B, H, W, C'] for each residual block.
          time: embedding, [B, T].
          context: text, [B, S, D].
          size: height and width after the upsampler; None for the last block, which has none.
        """
        for index, skip in enumerate(reversed(skips)):
            x = self.resnet(index)(jnp.concatenate([x, skip], axis=-1), time)
            if self.level.depths:
                x = self.attention(index)(x, context)
        if size is not None:
            x = Upsample2D(self.dtype, name="upsamplers_0")(x, *size)
        return x
