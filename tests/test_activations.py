import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax
from jax.sharding import PartitionSpec as P

from ti_jax.ops.activations import gelu, quick_gelu, silu
from ti_jax.training.parallel import AXIS, make_mesh

X = np.concatenate([np.linspace(-8, 8, 401), [0.0, -100.0, 100.0]]).astype(np.float32)


def torch_gelu():
    x = torch.tensor(X, requires_grad=True)
    y = torch.nn.functional.gelu(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return y.detach().numpy(), gradient.numpy()


def test_gelu_and_its_gradient_equal_pytorch():
    value, gradient = torch_gelu()
    np.testing.assert_allclose(gelu(jnp.asarray(X)), value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: gelu(x).sum())(jnp.asarray(X)), gradient, rtol=1e-5, atol=1e-6)


def test_its_gradient_under_the_mapping_that_trains():
    """Each device sees the inputs times its own number, so that they vary over the axis as samples do."""

    def loss(x):
        return lax.pmean(gelu(x * (1.0 + lax.axis_index(AXIS))).sum(), AXIS)

    mapped = jax.jit(jax.shard_map(jax.grad(loss), mesh=make_mesh(), in_specs=P(), out_specs=P()))
    x = torch.tensor(X, requires_grad=True)
    devices = jax.device_count()
    total = sum(torch.nn.functional.gelu(x * (1.0 + device)).sum() for device in range(devices)) / devices
    (wanted,) = torch.autograd.grad(total, x)
    assert devices == 8
    np.testing.assert_allclose(mapped(jnp.asarray(X)), wanted.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (gelu, torch.nn.functional.gelu),
        (quick_gelu, lambda x: x * torch.sigmoid(1.702 * x)),
        (silu, torch.nn.functional.silu),
    ],
)
def test_bfloat16_is_as_exact_as_pytorch(ours, theirs):
    """One rounding of the exact value and of its gradient, where PyTorch's bfloat16 has one, or several."""
    low = torch.tensor(np.random.default_rng(0).normal(-1, 1.5, 20000)).bfloat16()

    def value_and_gradient(x):
        x = x.clone().requires_grad_()
        y = theirs(x)
        return [each.detach().double().numpy() for each in (y, torch.autograd.grad(y.sum(), x)[0])]

    x = jnp.asarray(low.float().numpy(), jnp.bfloat16)
    found = (ours(x), jax.grad(lambda x: ours(x).astype(jnp.float32).sum())(x))
    for own, exact, half in zip(found, value_and_gradient(low.double()), value_and_gradient(low), strict=True):
        assert own.dtype == jnp.bfloat16
        error, their_error = (np.abs(np.asarray(each, np.float64) - exact) for each in (own, half))
        assert np.all(error <= 2**-8 * np.abs(exact) + 1e-6)
        assert error.mean() <= 1.001 * their_error.mean()
