"""Derive the configuration of each component of a single-file checkpoint from the shapes of its tensors.

The results are the contents of the ``config.json`` files in a diffusers folder of the same model. Sizes come from the
tensors; what these do not show, such as the number of attention heads, comes from the family (see `Family`).
"""

from __future__ import annotations

import itertools
from typing import Any

from ti_jax.errors import InputError, listed
from ti_jax.weights.families import SDXL, UNET, VAE, Family, Shapes, TextEncoder

# Far more than any Stable Diffusion has. A damaged header may list a million layers, or an empty tensor of any size.
MAX_LAYERS = 200
MAX_SIZE = 1 << 20

CLIP_HEAD_CHANNELS = 64  # of every text encoder of the three families
NUM_TIME_IDS = 6  # of SDXL: original size, crop, target size

END_OF_TEXT_ID = 49407
"""End token id of the tokenizer that comes with the package."""


def text_encoder_config(shapes: Shapes, encoder: TextEncoder) -> dict[str, Any]:
    """``config.json`` of one text encoder.

    Raises:
      InputError: a tensor that determines a size is missing or has the wrong rank; names it.
    """
    prefix = encoder.prefix
    if encoder.layout == "open_clip":
        table, positions = f"{prefix}token_embedding.weight", f"{prefix}positional_embedding"
        layers, wide = f"{prefix}transformer.resblocks.{{}}.", "mlp.c_fc.weight"
    else:
        # transformers put ``text_model.`` in front of all names from 4.16 to 4; before and after that there is none.
        if f"{prefix}text_model.embeddings.token_embedding.weight" in shapes:
            prefix += "text_model."
        table, positions = (f"{prefix}embeddings.{kind}_embedding.weight" for kind in ("token", "position"))
        layers, wide = f"{prefix}encoder.layers.{{}}.", "mlp.fc1.weight"
    vocab_size, width = _shape(shapes, table, 2)
    num_layers = _count(shapes, layers + wide)
    config = {
        "architectures": ["CLIPTextModelWithProjection" if encoder.with_projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": _shape(shapes, layers.format(0) + wide, 2)[0],
        "num_hidden_layers": max(1, num_layers - layers_unused(encoder, num_layers)),
        "num_attention_heads": width // CLIP_HEAD_CHANNELS,
        "max_position_embeddings": _shape(shapes, positions, 2)[0],
        "hidden_act": "gelu" if encoder.layout == "open_clip" else "quick_gelu",
        "eos_token_id": END_OF_TEXT_ID,
    }
    if encoder.with_projection:
        config["projection_dim"] = _shape(shapes, f"{prefix}text_projection", 2)[1]
    return config


def layers_unused(encoder: TextEncoder, num_layers: int) -> int:
    """Number of the file's last layers that the published model does not use.

    Stable Diffusion 2 was trained on the output of the 23rd of OpenCLIP's 24 layers. Most files have the last layer all
    the same; a file with 23 has been cut already.
    """
    return 0 if num_layers == 23 else encoder.layers_unused


def unet_config(shapes: Shapes, family: Family, prediction_type: str) -> dict[str, Any]:
    """``config.json`` of the UNet. Raises as `text_encoder_config`."""
    channels, num_layers, depths = _down_levels(shapes)
    heads: int | list[int] = 8
    if family.head_channels is not None:
        heads = [max(1, width // family.head_channels) for width in channels]
    first = next((name for name in shapes if name.startswith(UNET) and name.endswith(".attn2.to_k.weight")), None)
    if first is None:
        raise InputError("its UNet has no cross-attention to text")
    proj_in = f"{first.partition('.transformer_blocks.')[0]}.proj_in.weight"
    mid_depth = _count(shapes, f"{UNET}middle_block.1.transformer_blocks.{{}}.norm1.weight")
    down_types = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    config = {
        "sample_size": family.sample_size[prediction_type],
        "in_channels": _shape(shapes, f"{UNET}input_blocks.0.0.weight", 4)[1],
        "out_channels": _shape(shapes, f"{UNET}out.2.weight", 4)[0],
        "block_out_channels": channels,
        "layers_per_block": num_layers,
        "down_block_types": down_types,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down_types)],
        # The last number is also the mid block's; the last level itself may have no transformer.
        "transformer_layers_per_block": [*(max(1, depth) for depth in depths[:-1]), mid_depth],
        "cross_attention_dim": _shape(shapes, first, 2)[1],
        "attention_head_dim": heads,
        "use_linear_projection": len(shapes.get(proj_in, ())) == 2,
    }
    if family is SDXL:
        width = _shape(shapes, f"{UNET}label_emb.0.0.weight", 2)[1]
        pooled = _shape(shapes, f"{family.text_encoders[-1].prefix}text_projection", 2)[1]
        per_number, rest = divmod(width - pooled, NUM_TIME_IDS)
        if rest or per_number < 1:
            raise InputError(
                f"its UNet takes {width} numbers in addition to the text; expected {pooled} of the pooled text and "
                f"{NUM_TIME_IDS} times as many for the picture's sizes"
            )
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": per_number,
            "projection_class_embeddings_input_dim": width,
        }
    return config


def _down_levels(shapes: Shapes) -> tuple[list[int], list[int], list[int]]:
    """For each down level: channels, number of residual blocks, depth of its transformers (0: none)."""
    levels: list[list[tuple[int, int]]] = [[]]
    for number in range(1, MAX_LAYERS):
        block = f"{UNET}input_blocks.{number}"
        if f"{block}.0.op.weight" in shapes:
            levels.append([])
        elif f"{block}.0.out_layers.3.weight" in shapes:
            width = _shape(shapes, f"{block}.0.out_layers.3.weight", 4)[0]
            levels[-1].append((width, _count(shapes, f"{block}.1.transformer_blocks.{{}}.norm1.weight", least=0)))
        else:
            break
    if not all(levels):
        raise InputError(f"its UNet's blocks ({UNET}input_blocks.*) are not those of a Stable Diffusion")
    return [level[0][0] for level in levels], [len(level) for level in levels], [level[0][1] for level in levels]


def vae_config(shapes: Shapes, family: Family, prediction_type: str) -> dict[str, Any]:
    """``config.json`` of the VAE. Raises as `text_encoder_config`."""
    levels = _count(shapes, f"{VAE}encoder.down.{{}}.block.0.conv2.weight")
    channels = [_shape(shapes, f"{VAE}encoder.down.{level}.block.0.conv2.weight", 4)[0] for level in range(levels)]
    return {
        "in_channels": _shape(shapes, f"{VAE}encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(shapes, f"{VAE}decoder.conv_out.weight", 4)[0],
        "latent_channels": _shape(shapes, f"{VAE}decoder.conv_in.weight", 4)[1],
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": _count(shapes, f"{VAE}encoder.down.0.block.{{}}.conv2.weight"),
        "scaling_factor": family.scaling_factor,
        "sample_size": family.sample_size[prediction_type] * 2 ** (levels - 1),
    }


def _shape(shapes: Shapes, name: str, ndim: int) -> tuple[int, ...]:
    """Shape of a tensor that the file must have."""
    if name not in shapes:
        raise InputError(f"{name} is missing")
    shape = shapes[name]
    if len(shape) != ndim or not all(1 <= size <= MAX_SIZE for size in shape):
        raise InputError(f"{listed([name])} has the shape {list(shape)}")
    return shape


def _count(shapes: Shapes, name: str, least: int = 1) -> int:
    """Number of consecutive tensors named `name` with 0, 1, 2, ... in it."""
    count = next(number for number in itertools.count() if name.format(number) not in shapes)
    if not least <= count <= MAX_LAYERS:
        raise InputError(f"{name.format('*')} is there {count} times")
    return count
