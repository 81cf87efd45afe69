"""Eight CPU devices for every test, how tests are compiled, and tiny Stable Diffusions in diffusers' layout.

``pytest -m quick`` runs what needs no compiler and no other process, ``pytest --optimise`` compiles as users do.
"""

import ctypes
import functools
import gc
import importlib.util
import inspect
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ti_jax.config import ASSETS, TrainConfig

# Tokens of the embedded model's tokenizer, which the tiny models have, too; ids from here on are new rows.
VOCAB = len(json.loads((ASSETS / "mini-sd" / "tokenizer" / "vocab.json").read_text(encoding="utf-8")))

# Before PyTorch starts: its threads and those of another worker would stand in each other's way.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Programs are compiled once: the workers of a session and the processes that tests start share this folder, which they
# have from the first process. With a JAX_COMPILATION_CACHE_DIR of yours, later sessions find them, too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="ti_jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
# Not the user's own moments.
os.environ.setdefault("TI_JAX_CACHE", os.environ["JAX_COMPILATION_CACHE_DIR"] + "-ti_jax")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Programs without the places in the source that each operation comes from: a tenth less to trace and compile.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Each thread that compiles would otherwise keep what it once freed for itself: a tenth of a worker's memory. (Read by
# glibc in the workers and in what they start.)
os.environ.setdefault("MALLOC_ARENA_MAX", "2")
NO_OPTIMISATIONS = "JAX_DISABLE_MOST_OPTIMIZATIONS"

# Most of the suite's time is compiling, and what is computed is right with or without the compiler's optimisations. But
# these modules and tests look at programs, memory or the last bits, or compute for so long that optimising takes less.
OPTIMISED = {
    "test_attention",
    "test_embedded_model",
    "test_memory",
    "test_negative::test_with_the_word_in_the_negative_prompt_the_judge_sees_somebody_else",
    "test_plan::test_for_a_tpu_slice",
}

# Compiled programs fill the memory: they are dropped when a worker holds so many bytes, and so many more than were left
# the last time. Until then they serve the next modules, too: after it the next training run compiles twenty small ones.
# (Where the system does not say what is held, they are dropped after each module.)
FULL, ROOM = 1.1e9, 0.15e9
# A test with the marker `heavy` takes most of a gigabyte: before it programs are dropped where more than this is held.
ROOMY = 0.9e9
# The steps of most runs are kept: those of the tiny model on one device and on eight.
KEPT = 2
_left = 0
_peak = 0, ""  # the most bytes that this process ever held, and the test that it was at
# A worker that ever held more than this fails the session: the suite is to run on a laptop. How the tests are dealt out
# to the workers changes what one holds by some hundred MB.
LIMIT = 2.1e9


def pytest_addoption(parser):
    parser.addoption("--optimise", action="store_true", help="compile every test as users do, not only some")


def pytest_configure(config):
    """What JAX reads when it starts. A program for one device runs as it does where there is only one."""
    # The workers use all cores: a program need not be cut into parts that threads compile, which takes longer in all.
    flags = ["--xla_force_host_platform_device_count=8", "--xla_cpu_parallel_codegen_split_count=1"]
    if metadata.version("jaxlib").startswith("0.10.") and not config.getoption("optimise"):
        # The older emitters, which later versions do not have, take half the time; they write what takes longer to run.
        flags.append("--xla_cpu_use_fusion_emitters=false")
    given = os.environ.get("XLA_FLAGS", "").split()  # a worker has those of the first process
    os.environ["XLA_FLAGS"] = " ".join([*given, *(flag for flag in flags if flag not in given)])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Choose how this test's programs are compiled, and those of processes that it starts; make room for it."""
    if item.get_closest_marker("heavy") and _held() > ROOMY:
        _drop_programs()
    names = {item.module.__name__, f"{item.module.__name__}::{item.originalname}"}
    unoptimised = not (item.config.getoption("optimise") or names & OPTIMISED)
    if os.environ.get(NO_OPTIMISATIONS) != str(int(unoptimised)):
        os.environ[NO_OPTIMISATIONS] = str(int(unoptimised))
        if (jax := sys.modules.get("jax")) is not None:
            jax.config.update("jax_disable_most_optimizations", unoptimised)
            jax.clear_caches()
    if "ti_jax.training.compile" in sys.modules:
        import programs

        programs.share("monkeypatch" not in item.fixturenames)


def _drop_programs():
    """Drop compiled programs but the steps that most runs share."""
    global _left
    if (jax := sys.modules.get("jax")) is not None:
        jax.clear_caches()
    if (programs := sys.modules.get("programs")) is not None:
        programs.forget(but=KEPT)
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # or the gaps between what is left stay with this process
    _left = _held()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Drop compiled programs where they fill the memory; remember the test that held the most."""
    global _peak
    if (most := _used()[1]) > _peak[0]:
        _peak = most, item.nodeid
    held, last = _held(), nextitem is None or nextitem.module is not item.module
    if held < max(FULL, _left + ROOM) if held else not last:
        return
    _drop_programs()


def pytest_collection_finish(session):
    """Tracing makes much garbage: what all imports have left is not to be looked at each time that it is collected."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _held():
    """Bytes that this process holds; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _used():
    """Seconds of CPU time of this process and of those that it started, and the most bytes that it ever held."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    unit = 1 if sys.platform == "darwin" else 1024
    return sum(each.ru_utime + each.ru_stime for each in (own, children)), own.ru_maxrss * unit


_usage = {}  # of each worker


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """A worker of pytest-xdist is through."""
    if error is None:
        _usage[node.gateway.id] = node.workeroutput["used"]


def pytest_sessionfinish(session, exitstatus):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["used"] = *_used(), _peak[1]
    elif not _usage:
        _usage["this process"] = *_used(), _peak[1]
    elif exitstatus == 0 and any(memory > LIMIT for _, memory, _ in _usage.values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    for name, (seconds, memory, test) in sorted(_usage.items()):
        over = f", more than the {LIMIT / 1e9:.1f} GB that it may take" if memory > LIMIT else ""
        held = f"{memory / 1e9:.1f} GB at most{over}, at {test}"
        terminalreporter.write_line(f"{name}: {seconds:.0f} s of CPU time, {held}")


# -- the quick tests

# Modules that compile next to nothing. Of their tests, those that are slow, have a model of PyTorch's, or start a
# process are not quick.
QUICK = {
    "test_agreement", "test_batches", "test_buckets", "test_caption_files", "test_cli", "test_config",
    "test_embedding_cards", "test_embedding_formats", "test_embedding_names", "test_embedding_tools",
    "test_embeddings", "test_embeddings_refused", "test_files", "test_flops", "test_folder", "test_images",
    "test_imports", "test_launchers", "test_memory", "test_model_card", "test_picture_folders",
    "test_picture_metadata", "test_picture_prompts", "test_progress", "test_run_folder", "test_schedule",
    "test_single_file_refused", "test_templates", "test_tensorboard", "test_tokenizer_files", "test_tokens",
    "test_weights", "test_weights_refusals", "test_words",
}  # fmt: skip
MODELS = {"make_tiny_sd", "tiny_sd", "tiny_sdxl"}
for _name in QUICK | OPTIMISED:
    assert Path(__file__).with_name(f"{_name.partition('::')[0]}.py").exists(), f"{_name} has another name now"


def _only_quick(config):
    return config.option.markexpr == "quick"


def pytest_ignore_collect(collection_path, config):
    """Do not even import what is not quick, nor what needs a PyTorch that is not installed."""
    if not collection_path.name.startswith("test_") or not _only_quick(config):
        return None
    if collection_path.stem not in QUICK:
        return True
    pytorch = r"^(import|from) (safetensors\.)?(torch|diffusers|ldm_checkpoints)\b"
    missing = importlib.util.find_spec("torch") is None and re.search(
        pytorch, collection_path.read_text(), re.MULTILINE
    )
    return True if missing else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.module.__name__ not in QUICK or item.get_closest_marker("slow") or MODELS & set(item.fixturenames):
            continue
        fixtures = [definitions[-1].func for definitions in item._fixtureinfo.name2fixturedefs.values()]
        its_own = [function for function in fixtures if function.__module__ == item.module.__name__]
        if not any("subprocess" in _names_read(function, set()) for function in (item.function, *its_own)):
            item.add_marker("quick")


def _names_read(function, seen):
    """Global names and attributes that a function reads, itself or in others of its module."""
    seen.add(function)
    function = inspect.unwrap(function)  # what a context manager or another decorator calls
    codes, names = [function.__code__], set()
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        names |= set(code.co_names)
    for name in set(names):
        called = function.__globals__.get(name)
        if inspect.isfunction(called) and called.__module__ == function.__module__ and called not in seen:
            names |= _names_read(called, seen)
    return names


@pytest.fixture
def nothing_is_ignored():
    """What a process ignores its children ignore too, and a shell has its background jobs ignore Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def held_to_be_quick(request):
    """With ``-m quick``: a test that starts a process or compiles for long fails, so that the choice stays true."""
    if not _only_quick(request.config):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", _refuse)
        yield from _compiling_little()


def _compiling_little():
    seconds = []
    if (jax := sys.modules.get("jax")) is None:
        yield
        return

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield
    jax.monitoring.unregister_event_duration_listener(listen)
    assert sum(seconds) < 2, "compiles for too long to be quick: see QUICK in conftest.py"


def _refuse(*args, **kwargs):
    pytest.fail("starts a process, so it is not quick: see QUICK in conftest.py")


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
    """``make_tiny_sd(prediction_type)`` -> a folder with a random Stable Diffusion, 16 px, latents 8x8x4.

    As small as can be, for many programs are made of it: middle blocks and levels are held to diffusers elsewhere.
    """

    def make(prediction_type="epsilon"):
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=32, bos_token_id=VOCAB - 2, eos_token_id=VOCAB - 1, pad_token_id=VOCAB - 1,
            )
        )  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(32,), layers_per_block=1, cross_attention_dim=32,
            attention_head_dim=4, norm_num_groups=8, mid_block_type=None,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",),
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, latent_channels=4, sample_size=16,
            mid_block_add_attention=False,
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
def make_tiny_sdxl(tmp_path_factory):
    """``make_tiny_sdxl(levels)`` -> a folder with a random Stable Diffusion XL whose UNet has one level or two."""
    return functools.cache(lambda levels: _tiny_sdxl(tmp_path_factory.mktemp("tiny-sdxl"), levels))


@pytest.fixture(scope="session")
def tiny_sdxl(make_tiny_sdxl):
    """A folder with a random Stable Diffusion XL, 16 px, latents 8x8x4, text encoders of widths 32 and 48."""
    return make_tiny_sdxl(1)


def _tiny_sdxl(folder, levels):
    import diffusers
    import transformers

    def encoder(kind, **options):
        return kind(
            transformers.CLIPTextConfig(
                vocab_size=VOCAB, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=32, bos_token_id=VOCAB - 2, eos_token_id=VOCAB - 1, pad_token_id=VOCAB - 1,
                **options,
            )
        )  # fmt: skip

    tokenizer = transformers.CLIPTokenizer.from_pretrained(ASSETS / "mini-sd" / "tokenizer", model_max_length=32)
    modules = dict(
        text_encoder=encoder(transformers.CLIPTextModel, hidden_size=32),
        text_encoder_2=encoder(
            transformers.CLIPTextModelWithProjection, hidden_size=48, hidden_act="gelu", projection_dim=24
        ),
        unet=diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64)[:levels], layers_per_block=1, cross_attention_dim=80,
            attention_head_dim=4 if levels == 1 else (4, 8), transformer_layers_per_block=2 if levels == 1 else (1, 1),
            norm_num_groups=8, use_linear_projection=True,
            mid_block_type=None if levels == 1 else "UNetMidBlock2DCrossAttn",
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")[-levels:],
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")[2 - levels :],
        ),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=16, scaling_factor=0.13025,
            mid_block_add_attention=False,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
    )  # fmt: skip
    for seed, module in enumerate(modules.values()):
        randomize(module, seed)
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


@pytest.fixture(scope="session")
def make_short_run(tiny_sd, pictures):
    """``make_short_run(folder)`` -> the config of a training run of the tiny model, whose files are in that folder."""

    def make(folder):
        templates = folder / "templates.txt"
        templates.write_text("a portrait of {}\na drawing of {}\n")
        return TrainConfig(
            pretrained_model_name_or_path=str(tiny_sd), train_data_dir=str(pictures), placeholder_token="<new>",
            initializer_token="person", templates=str(templates), overview_prompts=("a portrait of {}",),
            learning_rate=1e-2, max_train_steps=12, logging_steps=3, validation_inference_steps=2,
            output_dir=str(folder / "out"),
        )  # fmt: skip

    return make


@pytest.fixture
def short_run(make_short_run, tmp_path):
    """The config of a training run of the tiny model."""
    return make_short_run(tmp_path)


@pytest.fixture
def concept(tmp_path):
    """A copy of the embedded concept that a test may spoil."""
    return shutil.copytree(ASSETS / "concepts" / "cleo", tmp_path / "concept")


@pytest.fixture
def asked_of_a_gpu(monkeypatch):
    """What JAX asks of a GPU is answered here, by compute capability; what cuDNN's kernels take it checks itself."""
    from jax._src.cudnn import fused_attention_stablehlo

    def answer(compute_capability):
        monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
        monkeypatch.setattr(
            fused_attention_stablehlo, "check_compute_capability", lambda least: compute_capability >= float(least)
        )
        monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda _: False)

    return answer
