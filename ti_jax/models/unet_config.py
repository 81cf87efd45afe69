"""Sizes and options of a UNet, read from a diffusers ``config.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ti_jax.errors import InputError
from ti_jax.models.options import DIFFUSERS_METADATA, SILU, Options, is_number, is_positive

DOWN_BLOCK_TYPES = ("CrossAttnDownBlock2D", "DownBlock2D")
MID_BLOCK_TYPES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
UP_BLOCK_TYPES = ("CrossAttnUpBlock2D", "UpBlock2D")


@dataclass(frozen=True)
class Level:
    """Sizes of one resolution level of the UNet: of a down, mid or up block.

    Attributes:
      channels: of the block's output.
      heads: of its attention layers.
      depths: number of transformer blocks after each residual block; empty if the block has no cross-attention.
      num_resnets: number of residual blocks.
      only_cross_attention: the transformer blocks have no self-attention.
      resample: a down- or upsampler follows.
    """

    channels: int
    heads: int
    depths: tuple[int, ...]
    num_resnets: int
    only_cross_attention: bool = False
    resample: bool = False


@dataclass(frozen=True)
class UNetConfig(Options):
    """Sizes and options; defaults are diffusers'. A single number instead of a tuple is for every level."""

    FILE = "unet config.json"
    # The number of heads belongs to ``addition_embed_type`` "text", which is refused. Both values of
    # ``upcast_attention`` are fine: attention scores are always float32.
    METADATA = DIFFUSERS_METADATA | {"addition_embed_type_num_heads", "upcast_attention"}
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "attention_type": ("default",),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "dropout": (0, 0.0),
        "mid_block_scale_factor": (1, 1.0),
        "resnet_out_scale_factor": (1, 1.0),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_type": ("positional",),
    }

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    """The *number* of heads, despite its name, which diffusers keeps for published files."""
    num_attention_heads: int | tuple[int, ...] | None = None
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """From the contents of a UNet's ``config.json``.

        Raises:
          InputError: an option or value that is not implemented, or inconsistent sizes; names option and value.
        """
        class_name = config.get("_class_name", "UNet2DConditionModel")
        if class_name != "UNet2DConditionModel":
            raise InputError(f"unet config.json: _class_name {class_name!r}; only UNet2DConditionModel is implemented")
        # Files with these as a list have the same value for every level or side.
        same = {name: _if_all_equal(config[name]) for name in ("sample_size", "cross_attention_dim") if name in config}
        return cls.read({**config, **same})

    @property
    def time_embed_dim(self) -> int:
        """Width of the time embedding."""
        return 4 * self.block_out_channels[0]

    @property
    def down_levels(self) -> tuple[Level, ...]:
        """Levels of the down blocks, in order."""
        depths = self._per_level("transformer_layers_per_block")
        last = len(self.block_out_channels) - 1
        return tuple(
            self._level(index, kind.startswith("CrossAttn"), depths[index], layers, resample=index < last)
            for index, (kind, layers) in enumerate(
                zip(self.down_block_types, self._per_level("layers_per_block"), strict=True)
            )
        )

    @property
    def mid_level(self) -> Level:
        """The mid block: two residual blocks with a transformer in between, or a single residual block."""
        depth = self._per_level("transformer_layers_per_block")[-1]
        attends = self.mid_block_type == "UNetMidBlock2DCrossAttn"
        level = self._level(-1, attends, depth, 1)
        # The mid block ignores only_cross_attention.
        return dataclasses.replace(level, num_resnets=2 if attends else 1, only_cross_attention=False)

    @property
    def up_levels(self) -> tuple[Level, ...]:
        """Levels of the up blocks, in order; they go over the resolutions in reverse."""
        if self.reverse_transformer_layers_per_block is None:
            depths = self._per_level("transformer_layers_per_block")[::-1]
        else:
            depths = self.reverse_transformer_layers_per_block
        last = len(self.block_out_channels) - 1
        return tuple(
            self._level(last - index, kind.startswith("CrossAttn"), depths[index], layers + 1, resample=index < last)
            for index, (kind, layers) in enumerate(
                zip(self.up_block_types, self._per_level("layers_per_block")[::-1], strict=True)
            )
        )

    def _level(
        self, index: int, attends: bool, depth: int | tuple[int, ...], num_resnets: int, resample: bool = False
    ) -> Level:
        depths = (depth,) * num_resnets if isinstance(depth, int) else depth
        return Level(
            channels=self.block_out_channels[index],
            heads=self._per_level("attention_head_dim" if self.num_attention_heads is None else "num_attention_heads")[
                index
            ],
            depths=depths if attends else (),
            num_resnets=num_resnets,
            only_cross_attention=self._per_level("only_cross_attention")[index],
            resample=resample,
        )

    def _per_level(self, option: str) -> tuple[Any, ...]:
        value = getattr(self, option)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    def check(self) -> None:
        """See `Options`."""
        channels = self.block_out_channels
        if not isinstance(channels, tuple) or not all(map(is_positive, channels)) or not channels:
            self.refuse("block_out_channels", "expected a list of positive integers")
        self._check_choices()
        self._check_numbers()
        self._check_levels()

    def _check_choices(self) -> None:
        if self.act_fn not in SILU:
            self.refuse("act_fn", f"implemented: {', '.join(SILU)}")
        if self.mid_block_type not in MID_BLOCK_TYPES:
            self.refuse("mid_block_type", "implemented: UNetMidBlock2DCrossAttn, UNetMidBlock2D, null")
        for option, types in (("down_block_types", DOWN_BLOCK_TYPES), ("up_block_types", UP_BLOCK_TYPES)):
            if not isinstance(getattr(self, option), tuple) or not set(getattr(self, option)) <= set(types):
                self.refuse(option, f"a list of {' and '.join(types)} is implemented")
        if self.addition_embed_type not in (None, "text_time"):
            self.refuse("addition_embed_type", "implemented: text_time, null")
        if self.addition_embed_type is None and self.projection_class_embeddings_input_dim is not None:
            self.refuse("projection_class_embeddings_input_dim", "implemented with addition_embed_type text_time only")
        self.require_switches("flip_sin_to_cos", "use_linear_projection")
        if not all(isinstance(value, bool) for value in _flatten(self.only_cross_attention)):
            self.refuse("only_cross_attention", "expected true or false, or a list of them")

    def _check_numbers(self) -> None:
        scalars = ["sample_size", "in_channels", "out_channels", "norm_num_groups", "cross_attention_dim"]
        per_level = ["block_out_channels", "layers_per_block", "attention_head_dim", "num_attention_heads"]
        per_level += ["transformer_layers_per_block", "reverse_transformer_layers_per_block"]
        if self.addition_embed_type == "text_time":
            scalars += ["addition_time_embed_dim", "projection_class_embeddings_input_dim"]
        self.require_positive(*scalars)
        for option in per_level:
            value = getattr(self, option)
            if value is None and option in ("num_attention_heads", "reverse_transformer_layers_per_block"):
                continue
            # A level without cross-attention may have 0 transformer blocks.
            least = 0 if option.endswith("transformer_layers_per_block") else 1
            if not all(is_positive(number, least) for number in _flatten(value)):
                self.refuse(option, "expected positive integers")
        if not isinstance(self.downsample_padding, int) or self.downsample_padding not in (0, 1):
            self.refuse("downsample_padding", "implemented: 0 and 1")
        for option in ("norm_eps", "freq_shift"):
            value = getattr(self, option)
            if not is_number(value) or value < 0:
                self.refuse(option, "expected a number")
        if self.block_out_channels[0] // 2 <= self.freq_shift:
            self.refuse("freq_shift", "expected less than half of the first of block_out_channels")

    def _check_levels(self) -> None:
        levels = len(self.block_out_channels)
        for option in (
            "down_block_types",
            "up_block_types",
            "layers_per_block",
            "attention_head_dim",
            "num_attention_heads",
            "only_cross_attention",
            "transformer_layers_per_block",
            "reverse_transformer_layers_per_block",
        ):
            value = getattr(self, option)
            if isinstance(value, tuple) and len(value) != levels:
                self.refuse(option, f"expected {levels} entries, as many as block_out_channels has")
            if "transformer" not in option and any(isinstance(each, tuple) for each in self._per_level(option)):
                self.refuse(option, "expected a single value for each level")
        nested = any(isinstance(depth, tuple) for depth in self._per_level("transformer_layers_per_block"))
        if nested and self.reverse_transformer_layers_per_block is None:
            self.refuse("transformer_layers_per_block", "needs reverse_transformer_layers_per_block, too")
        reverse = self.reverse_transformer_layers_per_block
        if reverse is not None and not isinstance(reverse, tuple):
            self.refuse("reverse_transformer_layers_per_block", "expected a list")
        for option, down in (("transformer_layers_per_block", True), ("reverse_transformer_layers_per_block", False)):
            for level in self.down_levels if down else self.up_levels:
                if level.depths and len(level.depths) < level.num_resnets:
                    self.refuse(option, f"expected {level.num_resnets} entries for {level.num_resnets} layers")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                self.refuse("norm_num_groups", f"does not divide {channels} of block_out_channels")
        for level in (*self.down_levels, self.mid_level, *self.up_levels):
            if level.depths and level.channels % level.heads:
                raise InputError(
                    f"unet config.json: {level.heads} attention heads (attention_head_dim or num_attention_heads) do "
                    f"not divide the {level.channels} channels of block_out_channels"
                )


def _if_all_equal(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) and value and value.count(value[0]) == len(value) else value


def _flatten(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in _flatten(item)] if isinstance(value, tuple) else [value]
