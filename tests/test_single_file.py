"""Single-file checkpoints in the original layout: the same model as the diffusers folder that they were made from."""

import functools
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ldm_checkpoints
import numpy as np
import pytest
import torch
import transformers
from diffusers_models import assert_close, channels_first, channels_last
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.torch import save_file

import ti_jax
from ti_jax.cli import infer
from ti_jax.config import InferConfig, resolve_infer
from ti_jax.diffusion.samplers import make_sampler
from ti_jax.errors import InputError
from ti_jax.text.text_encoders import TextEncoders
from ti_jax.weights.families import SD1, SD2
from ti_jax.weights.ldm_configs import layers_unused
from ti_jax.weights.sources import open_source

FAMILIES = ("sd1", "sd2", "sdxl")
PREDICTION = {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}
FLAG = {"sd1": None, "sd2": "v_prediction", "sdxl": None}
SAYS_V = {"modelspec.prediction_type": "v"}
PROMPTS = ["a photo of a cat", "Two naïve dogs, don't bark!"]


@functools.lru_cache(maxsize=1)  # they take 100 MB each
def model(family):
    """The family's networks on PyTorch and their state dict in the original layout."""
    torch.manual_seed(0)
    networks = ldm_checkpoints.parts(family)
    return networks, ldm_checkpoints.original(family, networks)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """``files(family)`` -> the model as a folder and as a single file."""

    def make(family):
        networks, state = model(family)
        where = tmp_path_factory.mktemp(family)
        ldm_checkpoints.pipeline(family, networks, PREDICTION[family]).save_pretrained(where / "folder")
        save_file(state, where / "model.safetensors")
        return where / "folder", where / "model.safetensors"

    yield functools.cache(make)
    model.cache_clear()  # or the last one stays for the rest of the session


def load(path, family, dtype=jnp.float32):
    return ti_jax.StableDiffusion.from_pretrained(path, dtype, prediction_type=FLAG[family])


def assert_same_trees(ours, theirs):
    ours, theirs = flatten_dict(ours.params), flatten_dict(theirs.params)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype
        assert np.asarray(leaf).tobytes() == np.asarray(theirs[path]).tobytes(), path


@pytest.mark.heavy
@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_folder_to_the_bit(files, family):
    folder, file = files(family)
    ours, theirs = load(file, family), load(folder, family)
    assert_same_trees(ours, theirs)
    # A run's checkpoints go on with either.
    assert ours.identity == theirs.identity
    for name, ids in theirs.tokenize(PROMPTS).items():
        np.testing.assert_array_equal(ours.tokenize(PROMPTS)[name], ids)
    np.testing.assert_array_equal(ours.schedule.alphas_cumprod, theirs.schedule.alphas_cumprod)
    assert ours.schedule.prediction_type == theirs.schedule.prediction_type == PREDICTION[family]
    assert ours.zeros_for_empty_prompt == theirs.zeros_for_empty_prompt
    assert ours.networks.vae.config.scaling_factor == theirs.networks.vae.config.scaling_factor


@pytest.mark.heavy
@pytest.mark.parametrize("family", FAMILIES)
def test_computes_what_diffusers_computes(files, family):
    networks, file = model(family)[0], files(family)[1]
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(2, 16, 16, 4)).astype(np.float32)
    pixels = rng.uniform(-1, 1, size=(2, 32, 32, 3)).astype(np.float32)
    theirs = ldm_checkpoints.torch_outputs(
        family, networks, PROMPTS, channels_first(latents), torch.tensor([17, 801]), channels_first(pixels)
    )
    with jax.default_matmul_precision("highest"):
        sd = load(file, family)
        cond = sd.encode_text(sd.tokenize(PROMPTS))
        assert_close(cond.context, theirs.context, 1e-4)
        if family == "sdxl":
            assert_close(cond.pooled, theirs.pooled, 1e-4)
        assert_close(sd.predict_noise(latents, np.array([17, 801]), cond), channels_last(theirs.noise), 1e-4)
        assert_close(sd.encode_image(pixels), channels_last(theirs.moments), 1e-4)
        assert_close(sd.decode_latents(latents), channels_last(theirs.decoded), 1e-4)


# -- kinds of files


def rewrite(path, state, **metadata):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata or None)
    return path


@pytest.fixture
def lightning(monkeypatch):
    """The class of PyTorch Lightning that the pickles of the first Stable Diffusions name."""
    modules = {
        name: types.ModuleType(name)
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    kind = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    modules["pytorch_lightning.callbacks.model_checkpoint"].ModelCheckpoint = kind
    return kind


@pytest.mark.parametrize("kind", ["training", "bare", "before PyTorch 1.6", "safetensors in disguise"])
def test_ckpt(files, tmp_path, kind, lightning, monkeypatch):
    state, file = model("sd1")[1], files("sd1")[1]
    path = tmp_path / "model.ckpt"
    if kind == "training":
        # As Lightning writes it: keyed by the callback's class, with the callback's state beside the weights.
        torch.save(
            {"epoch": 3, "global_step": 470000, "state_dict": state, "callbacks": {lightning: {"best": 1}}}, path
        )
    elif kind == "safetensors in disguise":
        path.write_bytes(file.read_bytes())
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "bare")
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    ours, theirs = load(path, "sd1"), load(file, "sd1")
    assert_same_trees(ours, theirs)
    assert ours.identity == theirs.identity


@pytest.mark.parametrize(("stored", "suffix"), [(torch.float16, "safetensors"), (torch.bfloat16, "ckpt")])
def test_half_precision(files, tmp_path, stored, suffix):
    state, file = model("sdxl")[1], files("sdxl")[1]
    state = {name: tensor.to(stored) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    path = tmp_path / f"model.{suffix}"
    if suffix == "ckpt":
        torch.save(state, path)
    else:
        rewrite(path, state)
    for dtype in (jnp.float32, jnp.bfloat16):
        sd = load(path, "sdxl", dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(sd.params)} == {jnp.dtype(dtype)}
        # A third of what OpenCLIP keeps in one tensor.
        ours = sd.params["text_encoder_2"]["encoder"]["layers_1"]["self_attn"]["k_proj"]["kernel"]
        theirs = state["conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"].chunk(3)[1].T
        theirs = theirs.to(torch.bfloat16 if dtype == jnp.bfloat16 else torch.float32).float()
        np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs.numpy())
    assert sd.identity != load(file, "sdxl").identity  # as another variant of a folder


def test_names_that_differ_between_files(files, tmp_path):
    """Without ``text_model.``, as transformers once wrote it, and the VAE's attention as linear layers."""
    state, file = model("sd1")[1], files("sd1")[1]
    names = {name: name.replace(".text_model.", ".") for name in state}
    other = {names[name]: t[..., 0, 0] if ".attn_1." in name and t.ndim == 4 else t for name, t in state.items()}
    assert other.keys() != state.keys()
    assert_same_trees(load(rewrite(tmp_path / "a.safetensors", other), "sd1"), load(file, "sd1"))


def test_23_layers_are_all_used():
    """An SD2 file whose last layer was left away has the 23 that count; any other number has one too many."""
    (encoder,) = SD2.text_encoders
    assert [layers_unused(encoder, count) for count in (3, 22, 23, 24)] == [1, 1, 0, 1]
    (encoder,) = SD1.text_encoders
    assert layers_unused(encoder, 12) == 0


# -- what it predicts


@pytest.mark.parametrize(
    ("family", "markers", "metadata", "flag", "predicts"),
    [
        ("sd1", (), {}, None, "epsilon"),
        ("sd1", (), {}, "v_prediction", "v_prediction"),
        ("sdxl", (), {}, None, "epsilon"),
        ("sdxl", ("v_pred",), {}, None, "v_prediction"),
        ("sdxl", ("v_pred", "ztsnr"), {}, "v_prediction", "v_prediction"),
        # Merging programs copy headers; tensors and the user know better.
        ("sdxl", ("v_pred",), {"modelspec.prediction_type": "epsilon"}, None, "v_prediction"),
        ("sd2", (), {"modelspec.prediction_type": "v"}, "epsilon", "epsilon"),
        ("sd2", (), {"modelspec.prediction_type": "v"}, None, "v_prediction"),
        ("sd2", (), {"modelspec.predict_key": "epsilon"}, None, "epsilon"),
        ("sd2", (), {}, "epsilon", "epsilon"),
    ],
)
def test_prediction_type(tmp_path, family, markers, metadata, flag, predicts):
    state = model(family)[1] | {name: torch.empty(0) for name in markers}
    path = rewrite(tmp_path / "model.safetensors", state, **metadata)
    with open_source(path, None, flag) as source:
        scheduler = source.configs["scheduler"]
        assert scheduler["prediction_type"] == predicts
        assert bool(scheduler.get("rescale_betas_zero_snr")) == ("ztsnr" in markers)
        if family == "sd2":
            assert source.configs["unet"]["sample_size"] == {"epsilon": 64, "v_prediction": 96}[predicts]
            # Of the small autoencoder here, whose latents are half as large as its pictures.
            assert source.configs["vae"]["sample_size"] == 2 * source.configs["unet"]["sample_size"]
        for name in (None, "ddim", "euler", "euler_a", "dpm++"):
            sampler = make_sampler(name, scheduler, 10)
            assert sampler.prediction_type == predicts and (sampler.clip_range is None)
        # Drawing starts from the timestep that is pure noise, if there is one.
        assert (make_sampler(None, scheduler, 10).timesteps[0] == 999) == ("ztsnr" in markers)


def test_prediction_type_that_cannot_be(files, tmp_path):
    state, (folder, file) = model("sd2")[1], files("sd2")
    with pytest.raises(
        InputError, match=r"2\.x checkpoint, which does not say what it predicts; add --prediction_type"
    ):
        ti_jax.StableDiffusion.from_pretrained(file)
    marked = rewrite(tmp_path / "a.safetensors", state | {"v_pred": torch.empty(0)})
    with pytest.raises(
        InputError, match=r"says that it predicts v .it has a tensor v_pred., against --prediction_type"
    ):
        ti_jax.StableDiffusion.from_pretrained(marked, prediction_type="epsilon")
    with pytest.raises(InputError, match=r"--prediction_type epsilon: .*folder says v_prediction in its scheduler/"):
        ti_jax.StableDiffusion.from_pretrained(folder, prediction_type="epsilon")


# -- all of it


@pytest.mark.slow
def test_train_and_draw(files, pictures, tmp_path):
    folder, file = files("sd1")
    templates = tmp_path / "templates.txt"
    templates.write_text("a photo of {}\na drawing of {}\n")

    def config(path, name, steps=4, **more):
        return ti_jax.TrainConfig(
            pretrained_model_name_or_path=str(path), train_data_dir=str(pictures), placeholder_token="<cat-toy>",
            initializer_token="toy", templates=str(templates), overview_prompts=("a photo of {}",), resolution=32,
            train_batch_size=2, learning_rate=1e-2, max_train_steps=steps, validation_inference_steps=2,
            checkpointing_steps=2, mixed_precision="no", output_dir=str(tmp_path / name), **more,
        )  # fmt: skip

    def rows(config):
        result = ti_jax.train(config, devices=jax.devices()[:1])
        return result.embedding, result.embedding.vectors["text_encoder"]

    _, uninterrupted = rows(config(folder, "a"))
    # The first half from the folder, the rest from the file: the same run.
    half = str(tmp_path / "a" / "checkpoints" / "2")
    embedding, resumed = rows(config(file, "b", resume_from_checkpoint=half))
    np.testing.assert_array_equal(resumed, uninterrupted)
    assert embedding.metadata["base_model"] == file.name
    with pytest.raises(InputError, match="prediction_type epsilon there, v_prediction here"):
        rows(config(file, "c", prediction_type="v_prediction", resume_from_checkpoint=half))

    draw = InferConfig(
        prompt=("a <cat-toy> on a beach",), embedding=(str(tmp_path / "b" / "learned_embeds.safetensors"),),
        pretrained_model_name_or_path=str(file), num_inference_steps=2, height=32, width=32,
        output=str(tmp_path / "out.png"),
    )  # fmt: skip
    (path,) = infer.draw(resolve_infer(draw))
    with Image.open(path) as picture:
        assert picture.size == (32, 32) and np.asarray(picture).std() > 1


MEASURE = """
    import re, sys
    from pathlib import Path
    import jax, jax.numpy as jnp
    from ti_jax.pipeline import StableDiffusion
    from ti_jax.pipeline.model_description import open_model

    def kibibytes(what):
        return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

    small = StableDiffusion.from_pretrained(sys.argv[1], jnp.float32)  # what is imported and compiled
    with open_model(sys.argv[2], jnp.float32) as model:  # and its tokenizer
        before = kibibytes("VmRSS")
        sd = StableDiffusion.load(model)
    print(kibibytes("VmHWM") - before, sum(leaf.nbytes for leaf in jax.tree.leaves(sd.params)) // 1024)
"""


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_memory_is_the_tree_and_a_tensor(tmp_path):
    networks = ldm_checkpoints.parts("sd2", vocab_size=49408)
    small = rewrite(tmp_path / "small.safetensors", ldm_checkpoints.original("sd2", networks), **SAYS_V)
    # Four kernels of 24 MiB, as is the table of tokens.
    wide = transformers.CLIPTextConfig(**ldm_checkpoints.OPEN_CLIP | dict(intermediate_size=49152, num_hidden_layers=2))
    networks["text_encoder"] = transformers.CLIPTextModel(wide)
    state = ldm_checkpoints.original("sd2", networks)
    large = rewrite(tmp_path / "large.safetensors", state, **SAYS_V)
    del networks, state
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(small), str(large)]
    peak, tree = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert 120 * 1024 < tree < peak < tree + (24 + 24) * 1024


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_looked_at_with_a_single_file_too(files, family):
    """Also with one that does not say what its UNet predicts, which does not matter here."""
    folder, file = files(family)
    ours, theirs = TextEncoders.from_pretrained(str(file)), TextEncoders.from_pretrained(str(folder))
    assert ours.embedding_dims == theirs.embedding_dims
    assert_same_trees(ours, theirs)
