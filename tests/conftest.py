"""Eight CPU devices for every test, how tests are compiled, and tiny Stable Diffusions in diffusers' layout.

pytest's own options here: ``--optimise`` compiles every test as users do.
"""

import ctypes
import functools
import gc
import os
import resource
import shutil
import sys
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

# Programs are compiled once: the workers of a session and the processes that tests start share this folder, which they
# have from the first process. With a JAX_COMPILATION_CACHE_DIR of yours, later sessions find them, too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="ti_jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# Most of the suite's time is compiling, and what is computed is right with or without the compiler's optimisations.
# These modules look at programs, at memory, or compute for so long that optimising them takes less.
OPTIMISED = {"test_attention", "test_embedded_model", "test_memory", "test_planning"}


def pytest_addoption(parser):
    parser.addoption("--optimise", action="store_true", help="compile every test as users do, not only some modules")


@pytest.fixture(scope="module", autouse=True)
def compiling(request):
    """Compile this module's tests with or without optimisations, and let go of its programs, which fill the memory."""
    optimised = request.config.getoption("optimise") or request.module.__name__ in OPTIMISED
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0" if optimised else "1")  # for the processes that tests start
        if (jax := sys.modules.get("jax")) is not None:
            jax.config.update("jax_disable_most_optimizations", not optimised)
        yield
    if (jax := sys.modules.get("jax")) is not None:
        jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # or the pieces between what is left stay with this process


# -- what the workers took

MEMORY = 2e9  # bytes; so that the suite runs on a laptop
_usage = {}


def _used():
    """CPU seconds of this process and of those that it started, and the most bytes that it held."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    unit = 1 if sys.platform == "darwin" else 1024
    return sum(each.ru_utime + each.ru_stime for each in (own, children)), own.ru_maxrss * unit


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """A worker of pytest-xdist is through."""
    if error is None:
        _usage[node.gateway.id] = node.workeroutput["used"]


def pytest_sessionfinish(session, exitstatus):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["used"] = _used()
        return
    if not _usage:
        _usage["this process"] = _used()
    if exitstatus == 0 and any(memory > MEMORY for _, memory in _usage.values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    for name, (seconds, memory) in sorted(_usage.items()):
        over = f", more than the {MEMORY / 1e9:.0f} GB that a worker may take" if memory > MEMORY else ""
        terminalreporter.write_line(f"{name}: {seconds:.0f} s of CPU time, {memory / 1e9:.1f} GB at most{over}")


# -- models and pictures

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
