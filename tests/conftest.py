"""Eight CPU devices for every test, and tiny Stable Diffusions in the layout that diffusers writes."""

import functools
import os
import shutil
import tempfile

import numpy as np
import pytest
from PIL import Image

from ti_jax.config import ASSETS, TrainConfig

# Before PyTorch starts: its threads and those of another worker would stand in each other's way.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before JAX starts. A program for one device runs as it does without this.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

# Tests compile the same step many times; programs of this session are compiled once. Children of a test share it.
_CACHE = tempfile.TemporaryDirectory(prefix="ti_jax-tests-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def randomize(module, seed):
    """Random values everywhere, norms and biases too: what starts at 0 or 1 would hide a fault."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(noise * (0.5 if "embedding" in name else fan_in**-0.5))


@pytest.fixture(scope="session")
def make_tiny_sd(tmp_path_factory):
    """``make_tiny_sd(prediction_type)`` -> a folder with a random Stable Diffusion, 16 px, latents 8x8x4."""

    def make(prediction_type="epsilon"):
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=788, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=32, bos_token_id=786, eos_token_id=787, pad_token_id=787,
            )
        )  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
            attention_head_dim=4, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, latent_channels=4, sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
        for seed, module in enumerate((text_encoder, unet, vae)):
            randomize(module, seed)
        folder = tmp_path_factory.mktemp("tiny-sd")
        StableDiffusionPipeline(
            text_encoder=text_encoder, unet=unet, vae=vae,
            tokenizer=CLIPTokenizer.from_pretrained(ASSETS / "mini-sd" / "tokenizer", model_max_length=32),
            scheduler=DDIMScheduler(**SCHEDULER, prediction_type=prediction_type, clip_sample=False),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(folder)  # fmt: skip
        return folder

    return functools.cache(make)


@pytest.fixture(scope="session")
def tiny_sd(make_tiny_sd):
    """A folder with a random Stable Diffusion that predicts noise."""
    return make_tiny_sd("epsilon")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """A folder with a random Stable Diffusion XL, 16 px, latents 8x8x4, text encoders of widths 32 and 48."""
    import diffusers
    import transformers

    def encoder(kind, **options):
        return kind(
            transformers.CLIPTextConfig(
                vocab_size=788, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=32, bos_token_id=786, eos_token_id=787, pad_token_id=787, **options,
            )
        )  # fmt: skip

    tokenizer = transformers.CLIPTokenizer.from_pretrained(ASSETS / "mini-sd" / "tokenizer", model_max_length=32)
    modules = dict(
        text_encoder=encoder(transformers.CLIPTextModel, hidden_size=32),
        text_encoder_2=encoder(
            transformers.CLIPTextModelWithProjection, hidden_size=48, hidden_act="gelu", projection_dim=24
        ),
        unet=diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=80, norm_num_groups=8,
            attention_head_dim=(4, 8), transformer_layers_per_block=(1, 2), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=16, scaling_factor=0.13025,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
    )  # fmt: skip
    for seed, module in enumerate(modules.values()):
        randomize(module, seed)
    folder = tmp_path_factory.mktemp("tiny-sdxl")
    diffusers.StableDiffusionXLPipeline(
        tokenizer=tokenizer, tokenizer_2=tokenizer, add_watermarker=False,
        scheduler=diffusers.EulerDiscreteScheduler(**SCHEDULER, timestep_spacing="leading"), **modules,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder with three random pictures of 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def short_run(tiny_sd, pictures, tmp_path):
    """The config of a training run of the tiny model."""
    templates = tmp_path / "templates.txt"
    templates.write_text("a portrait of {}\na drawing of {}\n")
    return TrainConfig(
        pretrained_model_name_or_path=str(tiny_sd), train_data_dir=str(pictures), placeholder_token="<new>",
        initializer_token="person", templates=str(templates), overview_prompts=("a portrait of {}",),
        learning_rate=1e-2, max_train_steps=12, logging_steps=3, validation_inference_steps=2,
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip


@pytest.fixture
def concept(tmp_path):
    """A copy of the embedded concept that a test may spoil."""
    return shutil.copytree(ASSETS / "concepts" / "cleo", tmp_path / "concept")
