"""ti-jax doctor: what it says of made machines, and of this one."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from ti_jax.cli import doctor
from ti_jax.cli.doctor import Finding, Machine, Report, judge, judge_disk
from ti_jax.cli.main import main
from ti_jax.config import PlanConfig, resolve_plan
from ti_jax.errors import InputError
from ti_jax.training.plan import Planner

CPU = Machine("cpu", nvidia=False, tpu=False, plugins={}, jax="0.10.2")
CUDA = {"jax-cuda12-plugin": "0.10.2"}


@pytest.mark.parametrize(
    ("machine", "level", "says", "advice"),
    [
        (CPU, "ok", "none: the CPU is used", ""),
        (replace(CPU, plugins={"libtpu": "0.0.30"}), "ok", "libtpu 0.0.30 is there for ti-jax plan", ""),
        (
            replace(CPU, plugins=CUDA),
            "note",
            "jax-cuda12-plugin 0.10.2 is there for ti-jax plan",
            "docker run --gpus all",
        ),
        (replace(CPU, backend="gpu", nvidia=True, plugins=CUDA), "ok", "used: gpu, by jax-cuda12-plugin 0.10.2", ""),
        (replace(CPU, nvidia=True), "problem", "its CUDA plug-in is not installed", "ti_jax[cuda13]"),
        # libtpu without a TPU: JAX_PLATFORMS is our own then, and not the reason.
        (replace(CPU, nvidia=True, plugins={"libtpu": "1"}, platforms="cpu"), "problem", "plug-in is not", "cuda13"),
        (replace(CPU, nvidia=True, plugins=CUDA, platforms="cpu"), "problem", "JAX_PLATFORMS is cpu", "unset"),
        (replace(CPU, nvidia=True, plugins=CUDA, visible=""), "note", "hidden by CUDA_VISIBLE_DEVICES", "unset"),
        (replace(CPU, nvidia=True, plugins=CUDA, refusal="no driver"), "problem", "use: no driver", "nvidia-smi"),
        (replace(CPU, tpu=True), "problem", "libtpu is not installed", "ti_jax[tpu]"),
        (replace(CPU, tpu=True, plugins={"libtpu": "1"}), "problem", "another process may hold it", "end other"),
        (replace(CPU, backend="tpu", tpu=True, plugins={"libtpu": "1"}), "ok", "used: tpu", ""),
        (replace(CPU, plugins={"jax-cuda13-plugin": "0.9.0"}), "problem", "do not go together", "jax[cuda13]==0.10.2"),
        (replace(CPU, plugins={**CUDA, "jax-cuda13-plugin": "0.10.2"}), "problem", "both installed", "uninstall"),
    ],
)
def test_an_accelerator_that_is_not_used_is_a_problem(machine, level, says, advice):
    found = judge(machine)
    assert found.level == level and says in found.says and advice in found.advice, found
    assert bool(found.advice) == (level != "ok")


@pytest.mark.parametrize(("size", "level"), [(5e8, "problem"), (5e9, "note"), (5e10, "ok")])
def test_a_disk_that_is_nearly_full(size, level):
    found = judge_disk({"/here": 10**12, "/there": int(size)})
    assert found.level == level and "free in /there" in found.says and bool(found.advice) == (level != "ok")


def test_a_check_that_fails_is_a_finding_and_the_others_go_on(monkeypatch):
    def broken():
        raise RuntimeError("no devices\nand a long trace")

    def refused():
        raise InputError("too little memory: close a program")

    def well():
        return Finding("c", "ok", "well")

    monkeypatch.setattr(doctor, "CHECKS", {"a": broken, "b": refused, "c": well})
    first, second, third = doctor.examine().findings
    assert first == Finding("a", "problem", "RuntimeError: no devices", "put this line into a bug report")
    assert (second.level, second.advice, third.level) == ("problem", "", "ok")
    assert list(Report([first, second, third]).lines())[-1] == "2 problems"


def test_a_missing_package_is_a_problem(monkeypatch):
    given = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name in ("flax", "torch") else given(name))
    found = doctor.versions()
    assert found.level == "problem" and "flax is missing" in found.says and "torch" not in found.says


def test_this_machine_is_examined(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret")
    monkeypatch.delitem(doctor.CHECKS, "training step")
    status = main(["doctor", "--json"])
    text = capsys.readouterr().out
    found = json.loads(text)
    assert status == (0 if found["ok"] else 1)
    by_name = {check["check"]: check for check in found["checks"]}
    assert list(by_name) == list(doctor.CHECKS) and "hf_a_secret" not in text
    assert by_name["hub login"]["token"] is True and by_name["versions"]["jax"]
    assert by_name["devices"]["platform"] == "cpu" and by_name["devices"]["free_bytes"] > 0
    assert by_name["compile cache"]["folder"] and by_name["accelerator"]["backend"] == "cpu"


def test_a_step_is_timed(tiny_sd):
    config = resolve_plan(PlanConfig(pretrained_model_name_or_path=str(tiny_sd), logging_steps=2))
    compiling, seconds = Planner(config, jnp.float32, jax.devices()[:1]).timed(2)
    assert compiling > 0 and 0 < seconds < 10


@pytest.mark.slow
def test_the_step_of_the_embedded_model_is_timed(capsys):
    main(["doctor"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "training step" in line)
    assert re.match(r"ok +training step +[0-9]+ ms \([0-9]+ samples/s\) for the embedded model, ", line)
