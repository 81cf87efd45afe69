"""Layers of the UNet and VAE that are functions of PyTorch or diffusers by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from ti_jax.models.layers import GroupNorm, timestep_embedding, upsample_nearest


@pytest.mark.parametrize("shape", [(2, 5, 3, 12), (1, 1, 1, 8), (3, 7, 8)])
@pytest.mark.parametrize(("mean", "silu"), [(0.0, True), (3.0, False)])
def test_group_norm_and_its_gradients(shape, mean, silu):
    rng = np.random.default_rng(0)
    channels = shape[-1]
    x = (rng.normal(size=shape) + mean).astype(np.float32)
    scale, bias = rng.normal(size=(2, channels)).astype(np.float32)
    weights = rng.normal(size=shape).astype(np.float32)
    norm = GroupNorm(num_groups=4, epsilon=1e-3, silu=silu)
    ours, pullback = jax.vjp(
        jax.jit(lambda x, scale, bias: norm.apply({"params": {"scale": scale, "bias": bias}}, x)), x, scale, bias
    )

    # In float64, since of a group of two numbers PyTorch's float32 makes errors of 1e-4.
    tensors = [torch.from_numpy(array).double().requires_grad_() for array in (x, scale, bias)]
    theirs = torch.nn.functional.group_norm(tensors[0].movedim(-1, 1), 4, tensors[1], tensors[2], 1e-3).movedim(1, -1)
    theirs = torch.nn.functional.silu(theirs) if silu else theirs
    np.testing.assert_allclose(ours, theirs.detach(), rtol=0, atol=1e-5)
    theirs.backward(torch.from_numpy(weights).double())
    for gradient, tensor in zip(pullback(weights), tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad, rtol=0, atol=1e-5 * max(1.0, tensor.grad.abs().max()))


@pytest.mark.parametrize("mean", [1e2, -1e4])
def test_group_norm_far_from_zero(mean):
    """In float32 E[x^2] - E[x]^2 would be nothing but rounding here. The truth is PyTorch's in float64."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(2, 16, 16, 8)) + mean).astype(np.float32)
    variables = {"params": {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}}
    ours = jax.jit(GroupNorm(num_groups=2, epsilon=1e-5).apply)(variables, x)
    exact = torch.nn.functional.group_norm(torch.from_numpy(x).double().movedim(-1, 1), 2, eps=1e-5).movedim(1, -1)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5)


def test_group_norm_of_a_constant_is_its_bias():
    variables = {"params": {"scale": np.full(8, 2, np.float32), "bias": np.arange(8, dtype=np.float32)}}
    x = np.full((1, 64, 64, 8), 0.1, np.float32)
    ours = jax.jit(GroupNorm(num_groups=2, epsilon=1e-6).apply)(variables, x)
    np.testing.assert_allclose(ours, np.broadcast_to(np.arange(8), x.shape), rtol=0, atol=1e-3)


def test_group_norm_has_float32_statistics_in_bfloat16():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 32, 32, 8)) + 20.0, jnp.bfloat16)
    variables = {"params": {"scale": jnp.ones(8, jnp.bfloat16), "bias": jnp.zeros(8, jnp.bfloat16)}}
    ours = GroupNorm(num_groups=2, epsilon=1e-5, dtype=jnp.bfloat16).apply(variables, x)
    exact = GroupNorm(num_groups=2, epsilon=1e-5).apply(variables, x)
    assert (ours.dtype, exact.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(ours, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("dimension", [16, 15])
@pytest.mark.parametrize("flip_sin_to_cos", [True, False])
@pytest.mark.parametrize("freq_shift", [0, 1])
def test_timestep_embedding(dimension, flip_sin_to_cos, freq_shift):
    timesteps = np.array([0.0, 1.0, 37.5, 999.0], np.float32)
    theirs = get_timestep_embedding(
        torch.from_numpy(timesteps), dimension, flip_sin_to_cos=flip_sin_to_cos, downscale_freq_shift=freq_shift
    )
    ours = jax.jit(timestep_embedding, static_argnums=(1, 2, 3))(timesteps, dimension, flip_sin_to_cos, freq_shift)
    # An angle of 999 has an absolute error of 999 * 2^-24 before any sine is taken, on either side.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours[:2], theirs[:2], rtol=0, atol=1e-6)
    assert ours.dtype == jnp.float32


@pytest.mark.parametrize(("old", "new"), [(3, 6), (4, 7), (2, 3), (5, 9)])
def test_upsample_nearest(old, new):
    resize = jax.jit(upsample_nearest, static_argnums=(1, 2))
    x = np.random.default_rng(0).normal(size=(2, old, 3, 4)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(x).movedim(-1, 1), size=(new, 3), mode="nearest")
    np.testing.assert_array_equal(resize(x, new, 1), theirs.movedim(1, -1))
    theirs = torch.nn.functional.interpolate(torch.from_numpy(x).movedim(-1, 1), size=(old, 6), mode="nearest")
    np.testing.assert_array_equal(resize(x, 6, 2), theirs.movedim(1, -1))
