"""At published sizes, without memory: our trees are those of diffusers and transformers, every name and every shape."""

import diffusers
import jax
import jax.numpy as jnp
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict

from ti_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from ti_jax.models.shapes import param_shapes
from ti_jax.models.unet import UNet2DConditionModel, UNetConfig
from ti_jax.models.vae import AutoencoderKL, VAEConfig
from ti_jax.weights.names import shape_in_tree, tree_path

# The config.json files as they are published (stable-diffusion-v1-5, stable-diffusion-2-1, sdxl-base-1.0).
UNETS = {
    "sd1.5": {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
    "sd2.1": {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.10.0.dev0",
        "act_fn": "silu",
        "attention_head_dim": [5, 10, 20, 20],
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 1024,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "out_channels": 4,
        "sample_size": 96,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "upcast_attention": True,
        "use_linear_projection": True,
    },
    "sdxl": {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.19.0.dev0",
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "center_input_sample": False,
        "class_embed_type": None,
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_dim": 2048,
        "cross_attention_norm": None,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_only_cross_attention": None,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "out_channels": 4,
        "projection_class_embeddings_input_dim": 2816,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
        "sample_size": 128,
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "upcast_attention": None,
        "use_linear_projection": True,
    },
}
UNET_PARAMETERS = {"sd1.5": 859_520_964, "sd2.1": 865_910_724, "sdxl": 2_567_463_684}

VAES = {
    "sd1.5": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
}
VAES["sdxl"] = VAES["sd1.5"] | {
    "_diffusers_version": "0.20.0.dev0",
    "force_upcast": True,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
VAE_PARAMETERS = 83_653_863

VIT_L = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
TEXT_ENCODERS = {
    "ViT-L": VIT_L,
    "ViT-H": VIT_L
    | {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "projection_dim": 512,
    },
    "bigG": VIT_L
    | {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
    },
}
TEXT_PARAMETERS = {"ViT-L": 123_060_480, "ViT-H": 340_387_840, "bigG": 694_659_840}


def flat_shapes(module, *inputs) -> dict[tuple[str, ...], tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten_dict(param_shapes(module, *inputs)).items()}


def assert_same_tree(ours: dict, model: torch.nn.Module, component: str, parameters: int) -> None:
    """`model` is PyTorch's, on the meta device; its names and shapes are mapped as the loader maps a checkpoint's."""
    theirs = {}
    for name, parameter in model.named_parameters():
        path = tree_path(name, component, ours)
        theirs[path] = shape_in_tree(tuple(parameter.shape), path, parameter.ndim)
    assert theirs == ours
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == parameters


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# Inputs are those of `network_shapes`, so that other tests of these models share what is traced.
TIMESTEPS, IDS = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1,), (1, 4)))


@pytest.mark.parametrize("name", UNETS)
def test_unet(name):
    config = UNETS[name]
    added = {"text_embeds": array(1, 1280), "time_ids": array(1, 6)} if name == "sdxl" else None
    module = UNet2DConditionModel(UNetConfig.from_dict(config), jnp.bfloat16)
    side = 2 ** len(config["block_out_channels"])
    inputs = array(1, side, side, 4), TIMESTEPS, array(1, 4, config["cross_attention_dim"])
    ours = flat_shapes(module, *inputs, added)
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel.from_config(config)
    assert_same_tree(ours, model, "unet", UNET_PARAMETERS[name])


@pytest.mark.parametrize("name", VAES)
def test_vae(name):
    ours = flat_shapes(AutoencoderKL(VAEConfig.from_dict(VAES[name]), jnp.bfloat16), array(1, 32, 32, 3))
    with torch.device("meta"):
        model = diffusers.AutoencoderKL.from_config(VAES[name])
    assert_same_tree(ours, model, "vae", VAE_PARAMETERS)


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_text_encoder(name):
    config = TEXT_ENCODERS[name]
    module = CLIPTextModel(CLIPTextConfig.from_dict(config), jnp.bfloat16)
    ours = flat_shapes(module, IDS)
    with torch.device("meta"):
        architecture = getattr(transformers, config["architectures"][0])
        model = architecture(transformers.CLIPTextConfig(**config))
    assert_same_tree(ours, model, "text_encoder_2", TEXT_PARAMETERS[name])
