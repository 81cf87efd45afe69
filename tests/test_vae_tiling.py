"""Whole pictures where there is memory for them, tiles where there is not, and each program compiled once."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ti_jax.errors import InputError
from ti_jax.pipeline import StableDiffusion, sampling, vae_tiling
from ti_jax.pipeline.sampling import image_keys, image_noise
from ti_jax.pipeline.vae_tiling import choose_tile

# PyTorch's own, inside the reference.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

PROMPT = "a portrait of a person with red hair"
# Latents of 12 x 8, and tiles of 8.
OPTIONS = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 24, "width": 16}


@pytest.fixture(scope="module")
def sd(tiny_sd):
    return StableDiffusion.from_pretrained(tiny_sd)


@pytest.mark.slow
def test_generate_in_tiles_is_the_pipeline_with_tiling(tiny_sd, sd):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipe.set_progress_bar_config(disable=True)
    noise = image_noise(image_keys(jnp.asarray([3], jnp.uint32)), 0, (12, 8, 4))
    latents = torch.tensor(np.asarray(noise).transpose(0, 3, 1, 2))
    pictures = {}
    for tiling, enable in (("never", pipe.vae.disable_tiling), ("always", pipe.vae.enable_tiling)):
        enable()
        theirs = np.stack(pipe(PROMPT, latents=latents, output_type="pil", **OPTIONS).images).astype(int)
        ours = np.stack(sd.generate(PROMPT, seed=3, vae_tiling=tiling, **OPTIONS)).astype(int)
        # A level rounds the other way where the fifth digit decides.
        assert np.abs(ours - theirs).max() <= 1 and (ours != theirs).mean() < 0.01
        pictures[tiling] = ours
    assert np.abs(pictures["always"] - pictures["never"]).max() > 5


def lower(sd, shape):
    """The decoder's program for a batch of latents [B, h, w, c], as `choose_tile` asks for it."""
    latents = jax.ShapeDtypeStruct(shape, jnp.float32)
    return lambda tile: jax.jit(lambda params, latents: sd.networks.decode_latents(params, latents, tile)).lower(
        sd.params, latents
    )


def test_auto_takes_what_there_is_memory_for(sd, capsys):
    shape = (4, 32, 32, 4)
    program = lower(sd, shape)

    def needs(tile):
        memory = program(tile).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    whole, one_by_one = needs(None), needs(32)
    assert whole > one_by_one

    def chosen(free):
        return choose_tile(sd.networks, shape[1:], shape[0], "auto", program, lambda: free)

    assert chosen(None) is None
    assert chosen(whole) is None
    assert chosen(whole - 1) == 32
    assert chosen(one_by_one) == 32
    assert capsys.readouterr().err == ""
    vae_tiling._print_once.cache_clear()
    assert chosen(one_by_one - 1) == 8
    assert chosen(0) == 8
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: too little memory is free for decoding 64 x 64 pixels at once: ")
    assert "in tiles of 16 pixels" in note


@pytest.mark.parametrize(
    ("shape", "tiling", "tile"),
    [
        ((1, 8, 8, 4), "always", None),
        ((1, 8, 8, 4), "auto", None),
        ((2, 8, 8, 4), "always", 8),
        ((1, 9, 8, 4), "always", 8),
        ((2, 9, 8, 4), "never", None),
    ],
)
def test_nothing_is_compiled_where_there_is_no_choice(sd, shape, tiling, tile):
    def program(tile):
        raise AssertionError("not to be compiled")

    assert choose_tile(sd.networks, shape[1:], shape[0], tiling, program, lambda: 0) == tile


def test_other_words_are_refused(sd):
    with pytest.raises(InputError, match="vae_tiling 'maybe': must be one of auto, always, never"):
        sd.generate(PROMPT, vae_tiling="maybe", **OPTIONS)
    with pytest.raises(InputError, match="vae_tiling 'maybe'"):
        sd.decode_latents(np.zeros((1, 8, 8, 4), np.float32), "maybe")


def test_decode_latents_takes_the_same_word(sd):
    latents = np.random.default_rng(0).normal(size=(1, 12, 8, 4)).astype(np.float32)
    whole, auto, tiled = (np.asarray(sd.decode_latents(latents, way)) for way in ("never", "auto", "always"))
    np.testing.assert_array_equal(auto, whole)
    assert np.abs(tiled - whole).max() > 0.01 and np.abs(tiled - whole).mean() < 0.2


def test_what_is_looked_at_is_what_runs(sd):
    """The program that the choice is made by is not compiled again when it draws."""
    sizes = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            sizes.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        before = sampling._draw_batch._cache_size()
        sd.generate([PROMPT] * 2, batch_size=2, **OPTIONS | {"num_inference_steps": 3})
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert sampling._draw_batch._cache_size() == before + 1
    # Beside it are programs of one operation.
    assert sum(seconds > max(sizes) / 3 for seconds in sizes) == 1
