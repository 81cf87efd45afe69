"""The cores of a CPU share a batch: what is learned is the same, and nothing happens where it is not wanted."""

import os
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

import ti_jax
from ti_jax.training.cpu_devices import use_cores
from ti_jax.training.parallel import make_mesh, replicate, without_copies


@pytest.fixture
def config(short_run):
    return replace(short_run, train_batch_size=4, max_train_steps=6, report_to="none")


def test_two_cores_learn_what_one_device_learns(config, tmp_path):
    whole = ti_jax.train(config, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:  # not the fixture: steps are shared with other runs
        patch.setattr("ti_jax.training.loop.use_cores", lambda config: 2)
        shared = ti_jax.train(replace(config, output_dir=str(tmp_path / "shared")))
    np.testing.assert_allclose(shared.losses, whole.losses, rtol=1e-5)
    learned = whole.embedding.vectors["text_encoder"]
    np.testing.assert_allclose(shared.embedding.vectors["text_encoder"], learned, rtol=1e-5, atol=1e-6)


def test_devices_of_a_cpu_share_weights():
    weights = {"kernel": jax.numpy.ones((64, 64))}
    everywhere = replicate(without_copies(weights), make_mesh(jax.devices()[:2]))["kernel"]
    places = {shard.data.unsafe_buffer_pointer() for shard in everywhere.addressable_shards}
    assert len(everywhere.addressable_shards) == 2 and places == {weights["kernel"].unsafe_buffer_pointer()}


def test_use_cores_before_anything_is_computed():
    """Of five cores, a batch of six is shared by three; later batches by as many of those as can."""
    code = """
import jax
from ti_jax import TrainConfig
from ti_jax.training import cpu_devices
cpu_devices._cores = lambda: 5
print([cpu_devices.use_cores(TrainConfig(train_batch_size=size)) for size in (6, 4, 9)], jax.device_count())
print([cpu_devices.use_cores(TrainConfig(train_batch_size=size)) for size in (6, 4, 9)], jax.device_count())
"""
    hidden = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert told.stdout.split("\n")[:2] == ["[3, 4, 3] 3", "[3, 1, 3] 3"]


def test_what_the_environment_says_stands(config, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    assert use_cores(config) is None
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    assert use_cores(config) is None
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
    assert use_cores(replace(config, distributed="always")) is None
