"""Names of the original latent-diffusion layout -> those of a diffusers folder, for each component of a checkpoint.

A single-file checkpoint is the state dict of the code that Stable Diffusion was trained with (CompVis'
latent-diffusion; Stability AI's generative-models for SDXL). Its UNet has one list of down blocks and one of up blocks,
in which down- and upsamplers are counted, too; the VAE's decoder numbers its levels from the picture, not from the
latents; and OpenCLIP's text encoder stores query, key and value in one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ti_jax.models.unet_config import Level, UNetConfig
from ti_jax.models.vae import VAEConfig

# Parts of a residual block: the same in both, under other names.
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Part(NamedTuple):
    """How a tensor of a diffusers folder is taken from a tensor in the file.

    Attributes:
      name: as in a diffusers folder.
      third: 0, 1, 2: that third of the rows; None: all of them.
      transposed: the file has its transpose.
    """

    name: str
    third: int | None = None
    transposed: bool = False


def unet_modules(config: UNetConfig) -> dict[str, str]:
    """Modules of the original UNet (without ``model.diffusion_model.``) -> diffusers' names of them."""
    modules = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    if config.addition_embed_type is not None:
        modules |= {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
    modules |= _block("middle_block.0", "mid_block.resnets.0", RESNET)
    modules |= {"middle_block.1": "mid_block.attentions.0"}
    modules |= _block("middle_block.2", "mid_block.resnets.1", RESNET)
    number = 1
    for index, level in enumerate(config.down_levels):
        for layer in range(level.num_resnets):
            modules |= _unet_layer(f"input_blocks.{number}", f"down_blocks.{index}", layer, level)
            number += 1
        if level.resample:
            modules[f"input_blocks.{number}.0.op"] = f"down_blocks.{index}.downsamplers.0.conv"
            number += 1
    number = 0
    for index, level in enumerate(config.up_levels):
        for layer in range(level.num_resnets):
            modules |= _unet_layer(f"output_blocks.{number}", f"up_blocks.{index}", layer, level)
            number += 1
        if level.resample:
            # In the level's last block, after the residual block and the transformer if there is one.
            place = 2 if level.depths else 1
            modules[f"output_blocks.{number - 1}.{place}.conv"] = f"up_blocks.{index}.upsamplers.0.conv"
    return modules


def _unet_layer(block: str, theirs: str, layer: int, level: Level) -> dict[str, str]:
    modules = _block(f"{block}.0", f"{theirs}.resnets.{layer}", RESNET)
    return modules | ({f"{block}.1": f"{theirs}.attentions.{layer}"} if level.depths else {})


def vae_modules(config: VAEConfig) -> dict[str, str]:
    """Modules of the original autoencoder (without ``first_stage_model.``) -> diffusers' names of them."""
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    levels = len(config.block_out_channels)
    for half in ("encoder", "decoder"):
        modules |= {
            f"{half}.conv_in": f"{half}.conv_in",
            f"{half}.norm_out": f"{half}.conv_norm_out",
            f"{half}.conv_out": f"{half}.conv_out",
        }
        modules |= _block(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", VAE_RESNET)
        modules |= _block(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", VAE_ATTENTION)
        modules |= _block(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", VAE_RESNET)
    for index in range(levels):
        down, up = f"encoder.down.{index}", f"decoder.up.{index}"
        # diffusers' first decoder level is the last one in the file.
        down_block, up_block = f"encoder.down_blocks.{index}", f"decoder.up_blocks.{levels - 1 - index}"
        for layer in range(config.layers_per_block):
            modules |= _block(f"{down}.block.{layer}", f"{down_block}.resnets.{layer}", VAE_RESNET)
        for layer in range(config.layers_per_block + 1):
            modules |= _block(f"{up}.block.{layer}", f"{up_block}.resnets.{layer}", VAE_RESNET)
        modules[f"{down}.downsample.conv"] = f"{down_block}.downsamplers.0.conv"
        modules[f"{up}.upsample.conv"] = f"{up_block}.upsamplers.0.conv"
    return modules


def _block(ours: str, theirs: str, inside: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{old}": f"{theirs}.{new}" for old, new in inside.items()}


def renamed(name: str, modules: Mapping[str, str]) -> str | None:
    """`name` with its longest prefix that is a key of `modules` renamed; None if there is none."""
    words = name.split(".")
    for end in range(len(words) - 1, 0, -1):
        module = modules.get(".".join(words[:end]))
        if module is not None:
            return ".".join([module, *words[end:]])
    return None


def open_clip_parts(name: str) -> list[Part]:
    """Parts of a tensor of OpenCLIP's text encoder, under transformers' names; empty if it is not one of them."""
    whole = {
        "token_embedding.weight": Part("embeddings.token_embedding.weight"),
        "positional_embedding": Part("embeddings.position_embedding.weight"),
        "ln_final.weight": Part("final_layer_norm.weight"),
        "ln_final.bias": Part("final_layer_norm.bias"),
        # OpenCLIP computes x @ projection, a linear layer x @ weight.T.
        "text_projection": Part("text_projection.weight", transposed=True),
    }
    if name in whole:
        return [whole[name]]
    transformer, _, rest = name.partition(".resblocks.")
    number, _, inside = rest.partition(".")
    if transformer != "transformer" or not inside:
        return []
    layer = f"encoder.layers.{number}"
    for kind in ("weight", "bias"):
        if inside == f"attn.in_proj_{kind}":
            return [Part(f"{layer}.self_attn.{proj}.{kind}", third) for third, proj in enumerate(PROJECTIONS)]
    new = renamed(inside, OPEN_CLIP_LAYER)
    return [] if new is None else [Part(f"{layer}.{new}")]


# -- tensors that are not weights of the model

# The moving average (EMA) of the UNet's weights, and the loss networks of the autoencoder's training.
BUFFER_PREFIXES = ("model_ema.", "first_stage_model.model_ema.", "first_stage_model.loss.")

# Buffers of latent-diffusion's noise schedule, and markers of what the UNet predicts.
# fmt: off
_SCHEDULE = [
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "logvar",
    "scale_factor", "denoiser.sigmas", "v_pred", "ztsnr",
]
# fmt: on
# Positions 0, 1, 2, ...; the causal mask; the temperature of CLIP's loss; and ViT-L's projection into the space that
# CLIP shares with pictures, which no Stable Diffusion uses.
_OF_TEXT_ENCODERS = [
    f"{encoder}.{name}"
    for encoder in ("cond_stage_model", "conditioner.embedders.0", "conditioner.embedders.1")
    for name in (
        "transformer.text_model.embeddings.position_ids",
        "transformer.embeddings.position_ids",
        "model.attn_mask",
        "model.logit_scale",
        "logit_scale",
        "transformer.text_projection.weight",
    )
]
BUFFERS = frozenset([*_SCHEDULE, *_OF_TEXT_ENCODERS])


def is_buffer(name: str) -> bool:
    """Whether a tensor of a checkpoint is known not to be a weight."""
    return name in BUFFERS or name.startswith(BUFFER_PREFIXES)


def inside(names: Mapping[str, object], prefix: str) -> Iterator[tuple[str, str]]:
    """The names that begin with `prefix`, with and without it."""
    return ((name, name.removeprefix(prefix)) for name in names if name.startswith(prefix))
