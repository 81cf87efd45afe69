"""Random diffusers models on PyTorch, and the same as ours by way of files and the loader."""

import json
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from ti_jax.models.shapes import param_shapes
from ti_jax.models.unet import UNet2DConditionModel, UNetConfig
from ti_jax.models.vae import AutoencoderKL, VAEConfig
from ti_jax.weights.load import load_component

CONTEXT_LENGTH = 5
BATCH = 2
CONTEXT_DIM = 24
POOLED_DIM = 16

SD1 = dict(
    sample_size=8,
    block_out_channels=(16, 32, 48),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=CONTEXT_DIM,
    attention_head_dim=4,
    norm_num_groups=8,
)
SDXL = SD1 | dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(2, 4, 6),
    use_linear_projection=True,
    transformer_layers_per_block=(3, 2, 1),
    addition_embed_type="text_time",
    addition_time_embed_dim=10,
    projection_class_embeddings_input_dim=POOLED_DIM + 6 * 10,
)
UNETS = {
    "sd1": SD1,
    "sd2": SD1 | dict(attention_head_dim=(2, 4, 6), use_linear_projection=True, upcast_attention=True),
    "sdxl": SDXL,
    # What remains of the options that published files of the three families use.
    "pruned": SD1 | dict(mid_block_type=None),
    "distilled-xl": SDXL
    | dict(
        mid_block_type="UNetMidBlock2D",
        layers_per_block=2,
        transformer_layers_per_block=(0, (2, 1), (1, 2)),
        reverse_transformer_layers_per_block=((2, 1, 3), (1, 2, 1), 0),
    ),
    "options": SD1
    | dict(
        in_channels=5,
        out_channels=3,
        layers_per_block=(1, 2, 1),
        only_cross_attention=(True, False, True),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-3,
        act_fn="swish",
    ),
}

VAE = dict(
    block_out_channels=(8, 16, 24),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=4,
    sample_size=16,
)
VAES = {
    "sd": VAE | dict(layers_per_block=2),
    "bare": VAE | dict(mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False),
    "wide-latents": VAE | dict(latent_channels=16, use_quant_conv=False, in_channels=1, out_channels=2),
}


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Random values everywhere: what starts at 0 or 1 (biases, norms) would hide a fault."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model.eval().requires_grad_(False)


def torch_unet(**options) -> diffusers.UNet2DConditionModel:
    """A random UNet of PyTorch."""
    return randomize(diffusers.UNet2DConditionModel(**options))


def torch_vae(**options) -> diffusers.AutoencoderKL:
    """A random autoencoder of PyTorch."""
    return randomize(diffusers.AutoencoderKL(**options))


def loaded_unet(model: diffusers.UNet2DConditionModel, folder: Path) -> tuple[UNet2DConditionModel, dict]:
    """`model` as ours, with its parameter tree."""
    model.save_pretrained(folder / "unet")
    config = UNetConfig.from_dict(json.loads((folder / "unet" / "config.json").read_text()))
    module = UNet2DConditionModel(config)
    inputs = unet_inputs(config, 8, 8)
    shapes = param_shapes(module, *inputs.values())
    return module, load_component(folder, "unet", shapes, jnp.float32)


def loaded_vae(model: diffusers.AutoencoderKL, folder: Path) -> tuple[AutoencoderKL, dict]:
    """`model` as ours, with its parameter tree."""
    model.save_pretrained(folder / "vae")
    config = VAEConfig.from_dict(json.loads((folder / "vae" / "config.json").read_text()))
    module = AutoencoderKL(config)
    shapes = param_shapes(module, jax.ShapeDtypeStruct((1, 16, 16, config.in_channels), jnp.float32))
    return module, load_component(folder, "vae", shapes, jnp.float32)


def unet_inputs(config: UNetConfig, height: int, width: int) -> dict:
    """Random arguments of a UNet, under their names."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    added_cond = None
    if config.addition_embed_type == "text_time":
        sizes = np.array([[512, 768, 0, 64, 1024, 1024], [1024, 1024, 0, 0, 1024, 1024]], np.float32)
        added_cond = {"text_embeds": normal(BATCH, POOLED_DIM), "time_ids": sizes}
    return {
        "sample": normal(BATCH, height, width, config.in_channels),
        "timesteps": np.array([0, 981], np.int32),
        "encoder_hidden_states": normal(BATCH, CONTEXT_LENGTH, CONTEXT_DIM),
        "added_cond": added_cond,
    }


def run_torch_unet(
    model: diffusers.UNet2DConditionModel,
    inputs: dict,
    context: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """What PyTorch makes of `unet_inputs` in `dtype`: [B, h, w, C]. `context` takes the place of the text."""
    context = torch.from_numpy(inputs["encoder_hidden_states"]) if context is None else context
    added_cond = inputs["added_cond"]
    if added_cond is not None:
        added_cond = {name: torch.from_numpy(array) for name, array in added_cond.items()}
        added_cond["text_embeds"] = added_cond["text_embeds"].to(dtype)
    output = model(
        channels_first(inputs["sample"]).to(dtype),
        torch.from_numpy(inputs["timesteps"]),
        context.to(dtype),
        added_cond_kwargs=added_cond,
    )
    return output.sample.permute(0, 2, 3, 1)


def channels_first(array: np.ndarray) -> torch.Tensor:
    """[B, H, W, C] -> PyTorch's [B, C, H, W]."""
    return torch.from_numpy(np.asarray(array)).permute(0, 3, 1, 2)


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    """PyTorch's [B, C, H, W] -> [B, H, W, C]."""
    return tensor.detach().permute(0, 2, 3, 1).numpy()


def assert_close(ours, theirs, tolerance: float) -> None:
    """No element is off by more than `tolerance` times the largest one."""
    theirs = np.asarray(theirs)
    assert np.std(theirs) > 0.01
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())
