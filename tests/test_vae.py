"""The autoencoder is diffusers' AutoencoderKL, through the loader: encoder, decoder, and their gradient."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers_models import (
    VAE,
    VAES,
    assert_close,
    channels_first,
    channels_last,
    loaded_vae,
    torch_vae,
)

from ti_jax.errors import InputError
from ti_jax.models import vae
from ti_jax.models.vae import AutoencoderKL, VAEConfig


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@torch.no_grad()
@pytest.mark.parametrize("name", VAES)
def test_encoder_and_decoder(name, tmp_path):
    model = torch_vae(**VAES[name])
    module, params = loaded_vae(model, tmp_path)
    variables = {"params": params}
    pixels = normal(2, 16, 24, module.config.in_channels)
    distribution = model.encode(channels_first(pixels)).latent_dist
    moments = jax.jit(lambda pixels: module.apply(variables, pixels, method="encode"))(pixels)
    assert moments.shape == (2, 4, 6, 2 * module.config.latent_channels)
    mean, logvar = np.split(moments, 2, axis=-1)
    assert_close(mean, channels_last(distribution.mean), 1e-4)
    assert_close(logvar, channels_last(distribution.logvar), 1e-4)

    latents = normal(2, 4, 6, module.config.latent_channels, seed=1)
    decode = jax.jit(lambda latents: module.apply(variables, latents, method="decode"))
    assert_close(decode(latents), channels_last(model.decode(channels_first(latents)).sample), 1e-4)


# As one program: of each operation by itself JAX makes one, of which there are hundreds.
def encode(module, params, pixels):
    return jax.jit(lambda params, pixels: module.apply({"params": params}, pixels, method="encode"))(params, pixels)


@torch.no_grad()
def test_log_variance_is_clipped(tmp_path):
    model = torch_vae(**VAE)
    model.quant_conv.bias[4:] = torch.tensor([100.0, -100.0, 0.0, 19.0])
    module, params = loaded_vae(model, tmp_path)
    pixels = normal(1, 16, 16, 3)
    moments = encode(module, params, pixels)
    logvar = channels_last(model.encode(channels_first(pixels)).latent_dist.logvar)
    assert (logvar.min(), logvar.max()) == (-30, 20)
    np.testing.assert_allclose(moments[..., 4:], logvar, rtol=1e-4)


@torch.no_grad()
def test_picture_of_odd_size(tmp_path):
    """Downsampling pads at the bottom and right, so a last odd row or column still counts."""
    model = torch_vae(**VAE)
    module, params = loaded_vae(model, tmp_path)
    pixels = normal(1, 18, 21, 3)
    theirs = channels_last(model.encode(channels_first(pixels)).latent_dist.mean)
    ours = encode(module, params, pixels)[..., :4]
    assert_close(ours, theirs, 1e-4)


@torch.no_grad()
def test_whole_is_the_decoded_mean(tmp_path):
    model = torch_vae(**VAE)
    module, params = loaded_vae(model, tmp_path)
    pixels = normal(1, 16, 16, 3)
    theirs = channels_last(model(channels_first(pixels), sample_posterior=False).sample)
    assert_close(jax.jit(module.apply)({"params": params}, pixels), theirs, 1e-4)


def test_gradient_of_the_latents(tmp_path):
    model = torch_vae(**VAE)
    module, params = loaded_vae(model, tmp_path)
    latents, weights = normal(1, 4, 4, 4), normal(1, 16, 16, 3, seed=1)
    tensor = channels_first(latents).requires_grad_()
    (channels_first(weights) * model.decode(tensor).sample).sum().backward()
    ours = jax.jit(jax.grad(lambda z: jnp.sum(weights * module.apply({"params": params}, z, method="decode"))))(latents)
    assert_close(ours, channels_last(tensor.grad), 1e-4)


@torch.no_grad()
def test_mid_block_parts(tmp_path):
    model = torch_vae(**VAE)
    module, params = loaded_vae(model, tmp_path)
    params = params["decoder"]["mid_block"]
    x = normal(2, 3, 5, 24)
    ours = jax.jit(vae.AttentionBlock(4, jnp.float32).apply)({"params": params["attentions_0"]}, x)
    assert_close(ours, channels_last(model.decoder.mid_block.attentions[0](channels_first(x))), 1e-5)
    ours = jax.jit(vae.MidBlock2D(module.config, jnp.float32).apply)({"params": params}, x)
    assert_close(ours, channels_last(model.decoder.mid_block(channels_first(x))), 1e-5)


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_pytorch_is(tmp_path):
    model = torch_vae(**VAE)
    module, params = loaded_vae(model, tmp_path)
    half = AutoencoderKL(module.config, jnp.bfloat16)
    half_params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    pixels = normal(2, 16, 16, 3)
    exact = np.asarray(jax.jit(module.apply)({"params": params}, pixels))
    ours = jax.jit(half.apply)({"params": half_params}, pixels)
    assert ours.dtype == jnp.bfloat16
    theirs = model.to(torch.bfloat16)(channels_first(pixels).to(torch.bfloat16), sample_posterior=False).sample
    our_error = np.linalg.norm(np.asarray(ours, np.float32) - exact)
    their_error = np.linalg.norm(channels_last(theirs.float()) - exact)
    assert 0 < our_error < 1.25 * their_error < 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"_class_name": "AutoencoderTiny"}, "_class_name 'AutoencoderTiny'"),
        ({"act_fn": "relu"}, "act_fn is 'relu'"),
        ({"block_out_channels": []}, r"block_out_channels is \(\)"),
        ({"block_out_channels": [8, 16, 26]}, "norm_num_groups is 4; does not divide"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 2}, "down_block_types is"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types is .*'AttnDownEncoderBlock2D'"),
        ({"latent_channels": 0}, "latent_channels is 0"),
        ({"latents_mean": [0.1, 0.2, 0.3, 0.4]}, r"latents_mean = \[0.1"),
        ({"latents_std": [1.0, 1.0, 1.0, 1.0]}, r"latents_std = \[1.0"),
        ({"layers_per_block": [1, 1, 1]}, r"layers_per_block is \(1, 1, 1\)"),
        ({"mid_block_add_attention": None}, "mid_block_add_attention is None"),
        ({"norm_type": "spatial"}, "norm_type = 'spatial'"),
        ({"sample_size": 0}, "sample_size is 0"),
        ({"sample_size": []}, r"sample_size is \(\)"),
        ({"sample_size": [512, "512"]}, r"sample_size is \(512, '512'\)"),
        ({"scaling_factor": None}, "scaling_factor is None"),
        ({"scaling_factor": -1}, "scaling_factor is -1"),
        ({"shift_factor": "none"}, "shift_factor is 'none'"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 3}, "up_block_types is .*'AttnUpDecoderBlock2D'"),
        ({"use_quant_conv": 1}, "use_quant_conv is 1"),
    ],
)
def test_config_refuses_what_is_not_implemented(change, named):
    config = dict(torch_vae(**VAE).config)
    VAEConfig.from_dict(config)
    with pytest.raises(InputError, match=named) as error:
        VAEConfig.from_dict(config | change)
    assert "\n" not in str(error.value)


def test_published_config():
    """SD1.5's, which says less than diffusers writes now, and a shift as SD3's autoencoder has."""
    config = {
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
    }
    parsed = VAEConfig.from_dict(config)
    assert (parsed.scaling_factor, parsed.shift_factor, parsed.use_quant_conv) == (0.18215, None, True)
    parsed = VAEConfig.from_dict(config | {"scaling_factor": 1.5305, "shift_factor": 0.0609, "force_upcast": True})
    assert (parsed.scaling_factor, parsed.shift_factor) == (1.5305, 0.0609)
    hash(parsed)


def test_tiles_are_as_large_as_the_pictures_that_it_was_trained_on():
    config = dict(torch_vae(**VAE).config)
    for sample_size, tile in ((512, 128), ([768, 512], 192), (6, 4)):
        parsed = VAEConfig.from_dict(config | {"sample_size": sample_size})
        assert parsed.tile_latent_size == tile
        hash(parsed)
    del config["sample_size"]
    assert VAEConfig.from_dict(config).tile_latent_size == diffusers.AutoencoderKL(**config).tile_latent_min_size == 8
