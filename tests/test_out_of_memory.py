"""Too little memory at run time: one line with the remedy, and what was saved before stays."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ti_jax
from ti_jax.cli import main
from ti_jax.config import ASSETS
from ti_jax.errors import InputError
from ti_jax.machine import explaining_out_of_memory, is_out_of_memory
from ti_jax.training import loop


def ask_for_too_much():
    """A quadrillion bytes: more than a process can address, whatever the machine has."""
    return jnp.zeros(10**15, jnp.uint8).block_until_ready()


def test_a_device_that_has_too_little_memory_is_recognised():
    with pytest.raises(jax.errors.JaxRuntimeError) as device:
        ask_for_too_much()
    assert is_out_of_memory(device.value)
    with pytest.raises(MemoryError) as machine:
        np.ones(10**15, np.uint8)
    assert is_out_of_memory(machine.value)
    assert not is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: something else"))
    # What storage libraries say where a disk is full.
    assert not is_out_of_memory(ValueError("RESOURCE_EXHAUSTED: Error writing a file"))


def test_only_that_is_explained():
    with pytest.raises(InputError, match=r"^out of memory \(RESOURCE_EXHAUSTED: .*\): do this$"):
        explaining_out_of_memory("do this")(ask_for_too_much)()
    for other in (InputError("RESOURCE_EXHAUSTED in a file's name"), KeyError("x")):
        with pytest.raises(type(other)) as raised, explaining_out_of_memory("do this"):
            raise other
        assert raised.value is other


def test_a_batch_too_large_for_the_step(short_run):
    """The compiler of the CPU, like that of GPUs, finds nothing wrong with it."""
    config = replace(short_run, train_batch_size=10**9, gradient_checkpointing="none")
    with pytest.raises(InputError, match=r"out of memory \(RESOURCE_EXHAUSTED: .*smaller --train_batch_size"):
        ti_jax.train(config, devices=jax.devices()[:1])


def test_what_was_saved_before_stays(short_run):
    act = loop._act

    def act_and_run_out(job, due, step, *rest):
        act(job, due, step, *rest)
        if step == 6:
            ask_for_too_much()

    config = replace(short_run, checkpointing_steps=3, save_steps=3)
    with pytest.MonkeyPatch.context() as patch:  # not the fixture: the step is shared with other runs
        patch.setattr(loop, "_act", act_and_run_out)
        with pytest.raises(InputError, match="out of memory"):
            ti_jax.train(config, devices=jax.devices()[:1])
    assert (Path(config.output_dir) / "learned_embeds-steps-6.safetensors").exists()
    again = ti_jax.train(replace(config, resume_from_checkpoint="latest"), devices=jax.devices()[:1])
    assert len(again.losses) == 6


@pytest.mark.parametrize(
    ("command", "remedies"),
    [
        (["infer", "--prompt", "a person"], ("--batch_size", "--vae_tiling always")),
        (["evaluate", "word.safetensors", "--train_data_dir", str(ASSETS / "concepts" / "cleo")], ("--batch_size",)),
    ],
)
def test_drawing_and_measuring_say_what_to_do(tmp_path, monkeypatch, capfd, command, remedies):
    monkeypatch.chdir(tmp_path)
    width = json.loads((ASSETS / "mini-sd" / "text_encoder" / "config.json").read_text())["hidden_size"]
    ti_jax.Embedding("<new>", {"text_encoder": np.ones((1, width), np.float32)}).save(tmp_path / "word.safetensors")
    monkeypatch.setattr(ti_jax.StableDiffusion, "generate", lambda *_, **__: ask_for_too_much())
    assert main.main(command) == 2
    *_, last = capfd.readouterr().err.splitlines()
    assert last.startswith("ti-jax: error: out of memory (RESOURCE_EXHAUSTED: "), last
    assert all(remedy in last for remedy in remedies), last
