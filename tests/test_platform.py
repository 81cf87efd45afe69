"""What a device is, and what precision it computes in where none is asked for."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from ti_jax.ops.platform import Platform
from ti_jax.pipeline import StableDiffusion, model_description
from ti_jax.training import parallel


@pytest.mark.parametrize(
    ("name", "capability", "platform", "dtype"),
    [
        ("cpu", None, Platform("cpu"), jnp.float32),
        ("tpu", None, Platform("tpu"), jnp.bfloat16),
        ("gpu", "7.0", Platform("cuda", 7), jnp.float32),  # V100
        ("gpu", "7.5", Platform("cuda", 7), jnp.float32),  # T4
        ("gpu", "8.0", Platform("cuda", 8), jnp.bfloat16),
        ("gpu", "9.0", Platform("cuda", 9), jnp.bfloat16),
        ("cuda", "12.0", Platform("cuda", 12), jnp.bfloat16),
        ("gpu", "gfx90a", Platform("rocm"), jnp.bfloat16),
    ],
)
def test_bfloat16_is_for_devices_that_have_it(name, capability, platform, dtype, tiny_sd, monkeypatch):
    device = SimpleNamespace(platform=name)
    if capability is not None:
        device.compute_capability = capability
    assert (Platform.of(device), Platform.of(device).dtype) == (platform, dtype)
    monkeypatch.setattr(model_description, "Platform", SimpleNamespace(of=lambda _: platform))
    assert StableDiffusion.from_pretrained(tiny_sd).dtype == dtype


def test_this_machine():
    assert Platform.of(jax.devices("cpu")[0]) == Platform("cpu")


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    """A newer version may have lost it, and would refuse to compile anything."""
    parallel.cpu_options.cache_clear()
    assert parallel.cpu_options() == parallel.CPU_OPTIONS
    assert parallel.cuda_options() == parallel.CUDA_OPTIONS
    monkeypatch.setattr(parallel, "CPU_OPTIONS", {"xla_cpu_of_the_past": "1"})
    parallel.cpu_options.cache_clear()
    assert parallel.cpu_options() is None
    parallel.cpu_options.cache_clear()
