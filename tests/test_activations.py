import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from jax.sharding import PartitionSpec as P

from ti_jax.models.activations import gelu
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
