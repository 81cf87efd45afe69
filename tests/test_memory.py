"""How much a training step keeps: the first way that fits the memory, which is read where the system tells it."""

import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from ti_jax import machine
from ti_jax.config import PlanConfig, resolve_plan
from ti_jax.machine import free_memory
from ti_jax.training.compile import REMAT_POLICIES, compile_fitting
from ti_jax.training.plan import Planner, plan

BATCH = 2


@pytest.fixture(scope="module")
def config(tiny_sd):
    return PlanConfig(pretrained_model_name_or_path=str(tiny_sd), train_batch_size=BATCH)


def planner(config, way=None):
    config = resolve_plan(replace(config, gradient_checkpointing=way))
    return Planner(config, jnp.float32, jax.devices()[:1])


@pytest.fixture(scope="module")
def sizes(config):
    """Bytes of the whole step, each way."""
    return {way: planner(config, way).at(BATCH).peak_memory for way in REMAT_POLICIES}


@pytest.mark.slow
def test_each_way_takes_less_than_the_one_before(sizes):
    assert sizes["none"] > sizes["policy"] > sizes["full"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "chosen"),
    [
        (lambda sizes: sizes["none"], "none"),
        (lambda sizes: sizes["none"] - 1, "policy"),
        (lambda sizes: sizes["policy"] - 1, "full"),
        (lambda sizes: sizes["full"] - 1, "full"),
    ],
)
def test_the_first_that_fits_is_chosen(config, sizes, limit, chosen):
    automatic = planner(config)
    automatic.memory = limit(sizes)
    found = automatic.at(BATCH)
    assert (found.gradient_checkpointing, found.peak_memory) == (chosen, sizes[chosen])
    fits = sizes[chosen] <= automatic.memory
    text = "\n".join(found.lines())
    assert f"GB with --gradient_checkpointing {chosen}\n" in text
    assert ("DOES NOT FIT" in text) == (not fits)


@pytest.mark.slow
def test_the_largest_batch_is_that_of_full_where_nothing_is_told(config, sizes, monkeypatch):
    monkeypatch.setattr(Planner, "_memory_for_the_step", lambda *_: sizes["none"])
    monkeypatch.setattr(Planner, "largest", lambda self, first: (self.config.gradient_checkpointing, first.peak_memory))
    monkeypatch.setattr("ti_jax.training.plan._devices", lambda _: jax.devices()[:1])
    assert plan(replace(config, largest_batch=True)).largest_batch == ("full", sizes["full"])


def lowered():
    return jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((10,), jnp.float32))


def test_nothing_is_compiled_beyond_the_first_that_fits():
    tried = []

    def lower(way):
        tried.append(way)
        return lowered()

    assert compile_fitting(lower, None, None).gradient_checkpointing == "none"
    assert compile_fitting(lower, None, 1e9).gradient_checkpointing == "none"
    assert compile_fitting(lower, "full", 1e9).gradient_checkpointing == "full"
    assert compile_fitting(lower, "none", 0).gradient_checkpointing == "none"
    assert tried == ["none", "none", "full", "none"]
    # 40 bytes in, and as many out.
    assert compile_fitting(lower, None, 80).fits and not compile_fitting(lower, None, 79).fits
    assert tried[4:] == ["none", *REMAT_POLICIES]


class Refused:
    """What a compiler says that lays out the memory itself."""

    def __init__(self, message):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_compiler_that_finds_no_room_says_that_it_does_not_fit():
    no_room = Refused("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm.")
    found = compile_fitting(lambda way: no_room if way == "none" else lowered(), None, 1e9)
    assert found.gradient_checkpointing == "policy" and found.fits
    assert compile_fitting(lambda way: no_room, None, 1e9) is None
    assert compile_fitting(lambda way: no_room, "policy", None) is None
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compile_fitting(lambda way: Refused("INTERNAL: something else"), None, 1e9)


def test_this_machines_memory_is_read():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_memory(jax.devices()[:1]) < total


def test_devices_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(machine, "_available", lambda: 8e9)
    monkeypatch.setattr(machine, "_left_in_groups", lambda: None)
    assert free_memory(jax.devices()[:1]) == pytest.approx(8e9 * (1 - machine.SPARE))
    assert free_memory(jax.devices()) == pytest.approx(1e9 * (1 - machine.SPARE))
    monkeypatch.setattr(machine, "_left_in_groups", lambda: 4e9)
    assert free_memory(jax.devices()[:1]) == pytest.approx(4e9 * (1 - machine.SPARE))
    monkeypatch.setattr(machine, "_left_in_groups", lambda: None)
    monkeypatch.setattr(machine, "_available", lambda: None)
    assert free_memory(jax.devices()) is None


class Accelerator:
    platform = "gpu"

    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def test_a_device_tells_its_limit_and_what_is_in_use():
    assert free_memory([Accelerator({"bytes_limit": 1000, "bytes_in_use": 100})]) == pytest.approx(850)
    assert free_memory([Accelerator({"bytes_limit": 1000})] * 2) == pytest.approx(950)
    assert free_memory([Accelerator({})]) is None
    assert free_memory([Accelerator(None)]) is None


def test_what_linux_has_to_give(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:       24000000 kB\nMemAvailable:   18739608 kB\n")
    assert machine._available(tmp_path / "meminfo") == 18739608 * 1024
    assert machine._available(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("line", "folder", "limit", "used", "files"),
    [
        ("0::/a/b", "", "memory.max", "memory.current", "inactive_file"),
        ("4:cpu,memory:/a/b", "memory/", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_limits_of_control_groups(tmp_path, line, folder, limit, used, files):
    own, root = tmp_path / "own", tmp_path / "root"

    def group(path, *sizes):
        place = root / folder / path
        place.mkdir(parents=True, exist_ok=True)
        for name, size in zip((limit, used), sizes, strict=True):
            (place / name).write_text(f"{size}\n")
        return place

    own.write_text(f"9:pids:/x\n{line}\n")
    assert machine._left_in_groups(own, root) is None
    group("a/b", "max", 100)
    assert machine._left_in_groups(own, root) is None
    place = group("a", 1000, 300)  # holds for b, too
    assert machine._left_in_groups(own, root) == 700
    (place / "memory.stat").write_text(f"anon 1\n{files} 50\n")
    assert machine._left_in_groups(own, root) == 750
    group("a/b", 400, 100)
    assert machine._left_in_groups(own, root) == 300
    group("", 250, 0)  # as a container sees its own group
    assert machine._left_in_groups(own, root) == 250
    assert machine._left_in_groups(tmp_path / "none", root) is None
