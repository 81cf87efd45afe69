"""Decoding in tiles is diffusers' ``enable_tiling``, through the loader, and really takes the memory of a tile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers_models import VAE, assert_close, channels_first, channels_last, loaded_vae, torch_vae

from ti_jax.models.networks import make_networks, network_shapes
from ti_jax.models.vae_tiles import decode_in_tiles
from ti_jax.weights.reference_configs import SD15

FACTOR = 2
SMALL = VAE | dict(
    block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    sample_size=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """PyTorch's and ours, whose tiles are 8 latents, 16 pixels."""
    model = torch_vae(**SMALL)
    return model, *loaded_vae(model, tmp_path_factory.mktemp("vae"))


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def decode_with(module, params):
    return lambda latents: module.apply({"params": params}, latents, method="decode")


@torch.no_grad()
@pytest.mark.parametrize(
    ("height", "width"),
    [
        # Tiles of 8, 7 and 1, the last narrower than the overlap; and the side of one tile is divided, into 8 and 2.
        (13, 8),
        (3, 16),  # less than a step high, and tiles of 8, 8 and 4
        (8, 7),  # one tile
    ],
)
def test_tiles_are_those_of_diffusers(models, height, width):
    model, module, params = models
    assert module.config.tile_latent_size == model.tile_latent_min_size == 8
    latents = normal(2, height, width, 4)
    whole = channels_last(model.decode(channels_first(latents)).sample)
    model.enable_tiling()
    theirs = channels_last(model.decode(channels_first(latents)).sample)
    model.disable_tiling()
    tiled = jax.jit(lambda latents: decode_in_tiles(decode_with(module, params), latents, 8, FACTOR))(latents)
    assert tiled.shape == (2, FACTOR * height, FACTOR * width, 3)
    assert_close(tiled, theirs, 1e-4)
    # The reference really is another picture where there are several tiles.
    assert (np.abs(theirs - whole).max() > 0.01) == (max(height, width) > 8)


@torch.no_grad()
def test_a_tile_that_holds_the_picture_is_one_picture_after_the_other(models):
    model, module, params = models
    latents = normal(3, 12, 5, 4)
    model.enable_slicing()
    theirs = channels_last(model.decode(channels_first(latents)).sample)
    model.disable_slicing()
    seen = []

    def decode(latents):
        seen.append(latents.shape)
        return decode_with(module, params)(latents)

    assert_close(jax.jit(lambda latents: decode_in_tiles(decode, latents, 12, FACTOR))(latents), theirs, 1e-4)
    assert set(seen) == {(1, 12, 5, 4)}


@pytest.mark.parametrize("tile", [6, 7, 8])
def test_what_each_place_makes_by_itself_is_the_same_in_tiles_of_any_side(tile):
    """diffusers' picture has another size where a quarter of a tile is no whole number of latents."""

    def enlarge(latents):
        return jnp.repeat(jnp.repeat(latents, FACTOR, axis=1), FACTOR, axis=2)

    latents = normal(2, 11, 17, 3)
    tiled = jax.jit(lambda latents: decode_in_tiles(enlarge, latents, tile, FACTOR))(latents)
    np.testing.assert_allclose(tiled, enlarge(latents), atol=1e-6)


def test_every_size_of_tile_is_compiled_once(models):
    _, module, params = models
    seen = []

    def decode(latents):
        seen.append(latents.shape[1:3])
        return decode_with(module, params)(latents)

    jax.eval_shape(lambda latents: decode_in_tiles(decode, latents, 8, FACTOR), normal(2, 24, 24, 4))
    # 4 x 4 tiles, the last of each row and column of 6: ``lax.map`` looks at its function once.
    assert sorted(seen) == [(6, 6), (6, 8), (8, 6), (8, 8)]


@pytest.mark.slow
def test_full_size_takes_the_memory_of_a_tile():
    """Stable Diffusion 1.5 at 384 x 2048 px, by shapes alone: nothing is computed."""
    networks = make_networks(SD15, jnp.float32)
    params = {"vae": network_shapes(networks)["vae"]}
    assert networks.vae.config.tile_latent_size == 64

    def temporary(tile):
        latents = jax.ShapeDtypeStruct((1, 48, 256, 4), jnp.float32)
        program = jax.jit(lambda params, latents: networks.decode_latents(params, latents, tile))
        return program.lower(params, latents).compile().memory_analysis().temp_size_in_bytes

    whole, tiled = temporary(None), temporary(64)
    # Activations are those of 64 columns in 256. Beside them are the pictures themselves: 6 tiles of 2 MB, blended.
    assert whole / 4 < tiled < whole / 4 + 0.04e9
