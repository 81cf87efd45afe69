"""One run on several processes: two of four CPU devices each, over loopback, are one process of eight."""

import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import children
import numpy as np
import pytest

import ti_jax
from ti_jax.config.yaml import dump_yaml
from ti_jax.errors import InputError

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def config(short_run):
    return replace(short_run, train_batch_size=1, checkpointing_steps=6, report_to="none")


class Pair:
    """``train.py`` twice, as the two processes of a run; what each says goes into a file."""

    def __init__(self, config, tmp_path, *second_says, environment=None):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        self.logs = [tmp_path / f"process-{number}" for number in range(2)]
        (tmp_path / "run.yaml").write_text(dump_yaml(config))
        joining = ["--coordinator_address", address, "--num_processes", "2"]
        command = [sys.executable, str(REPOSITORY / "train.py"), "--config", str(tmp_path / "run.yaml"), *joining]
        self.runs = []
        for number, log in enumerate(self.logs):
            words = [*command, "--process_id", str(number), *(second_says if number == 1 else ())]
            with log.open("w") as told:
                self.runs.append(subprocess.Popen(words, stderr=told, stdout=told, env=children.environment(4)))

    def wait(self):
        """Exit statuses, and what the two said."""
        try:
            statuses = [run.wait(timeout=180) for run in self.runs]
        finally:
            for run in self.runs:
                run.kill()
        return statuses, [log.read_text() for log in self.logs]


def rows(folder):
    return ti_jax.Embedding.load(Path(folder) / "learned_embeds.safetensors").vectors["text_encoder"]


def test_two_processes_are_one_of_eight_devices(config, tmp_path):
    whole = ti_jax.train(replace(config, output_dir=str(tmp_path / "whole")))
    statuses, (first, second) = Pair(config, tmp_path, "--output_dir", str(tmp_path / "second")).wait()
    assert statuses == [0, 0], first + second
    learned = whole.embedding.vectors["text_encoder"]
    assert np.abs(rows(config.output_dir) - learned).max() <= 1e-6 * np.abs(learned).max()
    assert "8 x cpu in 2 processes" in first
    # The first alone writes and speaks.
    assert not (tmp_path / "second").exists() and "steps" not in second
    assert "process_id" not in (Path(config.output_dir) / "config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])  # 0 is the harder one: JAX's service for the processes lives there
def test_killing_one_ends_the_other_and_a_resumed_run_is_the_same_to_the_bit(config, tmp_path, killed):
    config = replace(config, max_train_steps=120, checkpointing_steps=10)
    statuses, told = Pair(replace(config, output_dir=str(tmp_path / "whole")), tmp_path).wait()
    assert statuses == [0, 0], told

    pair = Pair(config, tmp_path)
    checkpoint = Path(config.output_dir) / "checkpoints" / "20"
    while not checkpoint.exists() and pair.runs[0].poll() is None:
        time.sleep(0.02)
    pair.runs[killed].kill()
    statuses, told = pair.wait()
    # Where the first one is gone JAX itself may end the other, by SIGABRT.
    assert statuses[killed] == -signal.SIGKILL and statuses[1 - killed] in (2, -signal.SIGABRT), told
    *_, last = told[1 - killed].strip().splitlines()
    assert re.search(r"another (process|one) has", last) and "--resume_from_checkpoint latest" in last

    statuses, told = Pair(replace(config, resume_from_checkpoint="latest"), tmp_path).wait()
    assert statuses == [0, 0], told
    assert 20 <= int(re.search(r"resuming at step (\d+)", told[0])[1]) < 120
    assert np.array_equal(rows(config.output_dir), rows(tmp_path / "whole"))


def test_a_request_to_stop_reaches_all(config, tmp_path):
    config = replace(config, max_train_steps=100_000, checkpointing_steps=100_000)
    pair = Pair(config, tmp_path)
    metrics = Path(config.output_dir) / "metrics.jsonl"
    while pair.runs[0].poll() is None and not (metrics.exists() and metrics.stat().st_size > 1000):
        time.sleep(0.02)
    pair.runs[1].send_signal(signal.SIGTERM)
    statuses, told = pair.wait()
    assert statuses == [130, 130], told
    assert re.search(r"asked to stop: a checkpoint of step (\d+) is saved", told[0])


def test_what_is_wrong_in_one_process_ends_all_with_its_reason(config, tmp_path):
    statuses, (first, second) = Pair(config, tmp_path, "--train_data_dir", str(tmp_path / "none")).wait()
    assert statuses == [2, 2], first + second
    assert "process 1 of 2: " in first and str(tmp_path / "none") in first and "Traceback" not in first + second
    assert not (tmp_path / "out" / "config.yaml").exists()


@pytest.mark.slow  # how they agree: test_agreement
def test_processes_with_other_settings_are_refused(config, tmp_path):
    statuses, (first, second) = Pair(config, tmp_path, "--learning_rate", "0.5").wait()
    assert statuses == [2, 2], first + second
    assert "process 1 of 2: learning_rate: not the same as in process 0" in first


@pytest.mark.slow  # how they agree: test_agreement
def test_a_checkpoint_that_cannot_be_used_is_told_to_all(config, tmp_path):
    wrong = replace(config, resume_from_checkpoint=str(tmp_path / "7"))
    statuses, told = Pair(wrong, tmp_path).wait()
    assert statuses == [2, 2], told
    assert all("not a checkpoint folder" in text for text in told)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coordinator_address": "somewhere"}, "must be HOST:PORT"),
        ({"num_processes": 2, "process_id": 2}, "must be from 0 to 1"),
        ({"num_processes": 0}, "must be 1 or more"),
    ],
)
def test_settings_that_cannot_be(config, changes, message):
    with pytest.raises(InputError, match=message):
        ti_jax.train(replace(config, **changes))


def test_no_others_to_be_found_is_one_line(config, tmp_path):
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), "--distributed", "always"],
        env=children.environment(4), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "--coordinator_address HOST:PORT" in done.stderr


@pytest.mark.slow
def test_torchrun_starts_one_run(config, tmp_path):
    """As of diffusers' script, not two in one folder."""
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
         str(REPOSITORY / "train.py"), "--config", str(tmp_path / "run.yaml")],
        env=children.environment(4), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("8 x cpu in 2 processes") == 1
    whole = ti_jax.train(replace(config, output_dir=str(tmp_path / "whole"))).embedding.vectors["text_encoder"]
    assert np.abs(rows(config.output_dir) - whole).max() <= 1e-6 * np.abs(whole).max()


FAULTY = """
import os, sys, time
import jax, ti_jax
from ti_jax.training import multihost
number = int(sys.argv[1])
multihost.join(ti_jax.TrainConfig(coordinator_address=sys.argv[2], num_processes=2, process_id=number))
def fail():
    if number == int(sys.argv[4]):
        raise KeyError("the moon")
start = time.monotonic()
try:
    with multihost.in_step():
        getattr(multihost, sys.argv[3])(fail)
except Exception as error:
    print(type(error).__name__, error, time.monotonic() - start < 20, flush=True)
"""


@pytest.mark.parametrize(("agree", "faulty"), [("all_or_raise", 1), ("on_leader", 0)])
def test_any_fault_of_one_process_is_reported_to_the_others(agree, faulty):
    """At once, not when its heartbeat is missed; and it is the faulty process that shows where it was."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", FAULTY, str(number), address, agree, str(faulty)],
            env=children.environment(4) | {"PYTHONPATH": str(REPOSITORY)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        said = [run.communicate(timeout=120)[0].splitlines()[-1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert said[faulty] == "KeyError 'the moon' True"
    assert (
        said[1 - faulty]
        == {
            "all_or_raise": "Agreed process 1 of 2: KeyError: 'the moon' True",
            "on_leader": "Agreed KeyError: 'the moon' True",
        }[agree]
    )
