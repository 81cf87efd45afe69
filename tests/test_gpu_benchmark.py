"""``benchmarks/gpu.py`` in small, on a CPU."""

import argparse
import ast
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
from gpu import Benchmark, Log, chosen, family, without_missing  # noqa: E402
from gpu_jobs import COMMAND, JOBS, OURS, Job, Options  # noqa: E402
from kernel_table import sources, table  # noqa: E402


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_contenders_are_timed_by_turns_and_each_result_is_a_line(tmp_path, tiny_sd):
    command = [
        sys.executable, "benchmarks/gpu.py", "--size", "mini", "--model", tiny_sd, "--only", "sd15-ours", "sd15-stock",
        "--no_torch_compile", "--dtype", "float32", "--batch", "2", "--steps", "2", "--rounds", "3", "--out", tmp_path,
        "--seconds", "600",
    ]  # fmt: skip
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    found = lines(done.stdout)
    assert done.returncode == 0 and lines((tmp_path / "results.jsonl").read_text()) == found
    assert found[0]["what"] == "machine" and found[0]["at"] < 5 and found[-1]["what"] == "end"
    ready = {line["job"]: line for line in found if line["what"] == "ready"}
    assert set(ready) == {"sd15-ours", "sd15-stock"} and ready["sd15-ours"]["temporary_gb"] > 0
    (kernels,) = (line for line in found if line["what"] == "kernels")
    assert kernels["job"] == "sd15-ours" and kernels["busy_ms"] > 0
    assert any("attn" in source for _, _, source, _, _ in kernels["kernels"]), "operations of the model are named"
    rounds = [line["job"] for line in found if line["what"] == "round"]
    assert rounds == ["sd15-ours", "sd15-stock"] * 3
    ours, stock = (line for line in found if line["what"] == "times")
    assert "ours_is_faster_by" not in ours and stock["ours_is_faster_by"] > 0
    assert found.index(kernels) < found.index(ours)


def fails(job, options, answer):
    raise ValueError("no such thing\nand more")


def spins(job, options, answer):
    """Makes a file longer and longer, and never is ready."""
    with open(options.out / job.key, "wb", buffering=0) as file:
        while True:
            file.write(b".")
            time.sleep(1e-3)


@pytest.fixture
def benchmark(tmp_path):
    def make(*jobs, seconds=20.0, memory=None):
        output, limits = io.StringIO(), argparse.Namespace(seconds=seconds, rounds=1, steps=1, size="mini")
        return Benchmark(jobs, Options({}, tmp_path), Log(output), memory, limits), output

    return make


def test_a_job_that_fails_is_a_line_and_those_that_do_not_fit_wait(benchmark):
    first, second = (Job("some", name, fails, (), gigabytes=3.0) for name in ("first", "second"))
    made, output = benchmark(first, second, memory=4.0)
    made.run()
    assert [(line["what"], line["job"], line["error"]) for line in lines(output.getvalue())] == [
        ("failed", "some-first", "ValueError: no such thing"),
        ("failed", "some-second", "ValueError: no such thing"),
    ]


def test_others_are_stopped_while_one_is_measured_and_the_end_is_kept(benchmark, tmp_path):
    made, output = benchmark(Job("some", "spins", spins, ()), seconds=100.0)
    made.start()
    (worker,) = made.workers
    file = tmp_path / "some-spins"
    until = time.time() + 60
    while not file.exists() and time.time() < until:
        time.sleep(0.05)
    with made.alone(None):
        time.sleep(0.2)
        before = file.stat().st_size
        time.sleep(0.3)
        assert file.stat().st_size == before
    made.limits.seconds = (made.log.seconds + 1.0) / gpu.END
    made.run()
    assert file.stat().st_size > before, "it went on"
    assert worker.stopped >= 0.5 and not worker.process.is_alive()
    assert lines(output.getvalue())[-1]["what"] == "unfinished"


def test_a_process_is_stopped_with_what_it_has_started():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"1\n"
    members = family(process.pid)
    assert len(members) == 2 and members[0] == process.pid
    for each in members:
        gpu.send(each, signal.SIGKILL)
    process.communicate()
    assert family(None) == []


def test_what_is_missing_is_one_line_and_the_rest_runs(monkeypatch):
    installed = gpu.installed
    monkeypatch.setattr(gpu, "installed", lambda module: module != "tyro" and installed(module))
    output = io.StringIO()
    able = without_missing(JOBS, Log(output))
    (line,) = lines(output.getvalue())
    assert line["what"] == "missing" and line["modules"] == ["tyro"]
    assert line["left_out"] == ["demo-demo", "repeat-usual", "repeat-deterministic"]
    assert len(able) == len(JOBS) - 3
    # Without PyTorch nobody can make the random weights either.
    monkeypatch.setattr(gpu, "installed", lambda module: module != "torch")
    assert {job.size for job in without_missing(JOBS, Log(output))} == {"mini"}


def test_what_is_asked_for_comes_with_its_model():
    def keys(*only, size="full"):
        return [job.key for job in chosen(argparse.Namespace(only=only, size=size))]

    assert keys("sdxl-ours") == ["model-sdxl", "sdxl-ours"]
    assert keys("mini") == ["mini-ours", "mini-no-graphs", "mini-all-graphs", "mini-deterministic"]
    assert keys("sdxl-ours", size="mini") == ["sdxl-ours"]
    assert keys() == [job.key for job in JOBS]


def test_needs_are_all_that_is_imported():
    """By reading: what the modules of ti_jax import at their top, the command line's and TensorBoard's apart."""
    package = ROOT / "ti_jax"
    commands = {package / "cli", package / "training" / "tensorboard.py"}
    page = package / "ui"  # in the browser: with an extra of its own
    for wanted, needs in ((False, OURS), (True, COMMAND)):
        found = set()
        for path in package.rglob("*.py"):
            if page in path.parents or (not wanted and commands.intersection((path, *path.parents))):
                continue
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    found.add(node.module.split(".")[0])
        found -= {*sys.stdlib_module_names, "ti_jax"}
        assert found and found <= {name.split(".")[0] for name in needs}


def test_kernels_are_summed_by_name_and_by_the_operation_that_they_come_from():
    program = """
      %fusion.1 = f32[2]{0} fusion(%a), kind=kLoop, metadata={op_name="jit(f)/unet/norm1/sub" source_line=3}
      ROOT %dot.2 = f32[2]{0} dot(%a, %b), metadata={op_name="jit(f)/unet/dot"}
      %copy.3 = f32[2]{0} copy(%a)
    """
    assert sources(program) == {"fusion.1": "jit(f)/unet/norm1/sub", "dot.2": "jit(f)/unet/dot"}
    launched = [("loop_fusion_1", "fusion.1", 2e6), ("loop_fusion_7", "fusion.7", 1e6), ("gemm", "dot.2", 4e6)] * 2
    found = table(launched, 2, program)
    assert (found["busy_ms"], found["launches"]) == (7.0, 3.0)
    assert found["kinds"] == [["gemm", 4.0, 1.0], ["loop_fusion", 3.0, 2.0]]
    assert found["kernels"] == [
        ["gemm", "dot.2", "jit(f)/unet/dot", 4.0, 1.0],
        ["loop_fusion_1", "fusion.1", "jit(f)/unet/norm1/sub", 2.0, 1.0],
        ["loop_fusion_7", "fusion.7", "", 1.0, 1.0],
    ]
