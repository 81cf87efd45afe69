"""Single-file checkpoints in the original layout: the same model as the diffusers folder that they were made from."""

import functools

import jax
import jax.numpy as jnp
import ldm_checkpoints
import numpy as np
import pytest
import torch
from diffusers_models import assert_close, channels_first, channels_last
from flax.traverse_util import flatten_dict
from safetensors.torch import save_file

import ti_jax
from ti_jax.errors import InputError

FAMILIES = ("sd1", "sd2", "sdxl")
PREDICTION = {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}
FLAG = {"sd1": None, "sd2": "v_prediction", "sdxl": None}
PROMPTS = ["a photo of a cat", "Two naïve dogs, don't bark!"]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """``model(family)`` -> its networks on PyTorch, its state dict in the original layout, folder and file."""

    def make(family):
        torch.manual_seed(0)
        networks = ldm_checkpoints.parts(family)
        where = tmp_path_factory.mktemp(family)
        ldm_checkpoints.pipeline(family, networks, PREDICTION[family]).save_pretrained(where / "folder")
        state = ldm_checkpoints.original(family, networks)
        save_file(state, where / "model.safetensors")
        return networks, state, where / "folder", where / "model.safetensors"

    return functools.cache(make)


def load(path, family, dtype=jnp.float32):
    return ti_jax.StableDiffusion.from_pretrained(path, dtype, prediction_type=FLAG[family])


def assert_same_trees(ours, theirs):
    ours, theirs = flatten_dict(ours.params), flatten_dict(theirs.params)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype
        assert np.asarray(leaf).tobytes() == np.asarray(theirs[path]).tobytes(), path


@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_folder_to_the_bit(model, family):
    _, _, folder, file = model(family)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_computes_what_diffusers_computes(model, family):
    networks, _, _, file = model(family)
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
