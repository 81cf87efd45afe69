"""One run on several processes: two of four CPU devices each, over loopback, are one process of eight."""

import json
import os
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

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent


SETTINGS = {"train_batch_size": 1, "checkpointing_steps": 6, "report_to": "none"}


@pytest.fixture
def config(short_run):
    return replace(short_run, **SETTINGS)


def joining():
    """The flags with which each of two processes joins the other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    together = ["--coordinator_address", address, "--num_processes", "2"]
    return [[*together, "--process_id", str(number)] for number in range(2)]


class Pair:
    """Two processes with four devices each; what each says goes into a file."""

    def __init__(self, commands, tmp_path):
        self.logs = [tmp_path / f"process-{number}" for number in range(2)]
        self.runs = []
        environment = children.environment(4) | {"PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, TESTS)))}
        for command, log in zip(commands, self.logs, strict=True):
            with log.open("w") as told:
                self.runs.append(subprocess.Popen(command, stderr=told, stdout=told, env=environment))

    def wait(self):
        """Exit statuses, and what the two said."""
        try:
            statuses = [run.wait(timeout=180) for run in self.runs]
        finally:
            for run in self.runs:
                run.kill()
        return statuses, [log.read_text() for log in self.logs]


def pair(config, tmp_path, *second_says):
    """``train.py`` twice, as the two processes of a run."""
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    command = [sys.executable, str(REPOSITORY / "train.py"), "--config", str(tmp_path / "run.yaml")]
    return Pair([[*command, *flags, *says] for flags, says in zip(joining(), ((), second_says), strict=True)], tmp_path)


# ``train.py`` several times in one process: a new one takes seconds to import JAX, and to trace the same step. A line
# with its exit status follows what each run says.
RUNS = """
import json, sys
from ti_jax import interrupts
interrupts.listen("train.py")
import programs
from ti_jax.cli.main import main
programs.share(True)
for flags in json.loads(sys.argv[1]):
    status = main(["train", *flags], prog="train.py")
    print(f"<{status}>", file=sys.stderr, flush=True)
interrupts.leave(status)
"""


@pytest.fixture(scope="module")
def runs(make_short_run, tmp_path_factory):
    """Three runs of one pair of processes, by name: the config of each, and for both the status and what they said.

    "whole"; "wrong", of which the second process does not find the pictures; and "stopped" by a signal to the second.
    """
    folder = tmp_path_factory.mktemp("runs")
    config = replace(make_short_run(folder), **SETTINGS)
    endless = {"max_train_steps": 100_000, "checkpointing_steps": 100_000}
    configs = {
        name: replace(config, output_dir=str(folder / name), **changes)
        for name, changes in (("whole", {}), ("wrong", {}), ("stopped", endless))
    }
    second_says = {
        "whole": ["--output_dir", str(folder / "second")],
        "wrong": ["--train_data_dir", str(folder / "none")],
    }
    for name, each in configs.items():
        (folder / f"{name}.yaml").write_text(dump_yaml(each))

    def flags(name, number):
        return ["--config", str(folder / f"{name}.yaml"), *(second_says.get(name, []) if number == 1 else [])]

    both = Pair(
        [
            [sys.executable, "-c", RUNS, json.dumps([[*flags(name, number), *join] for name in configs])]
            for number, join in enumerate(joining())
        ],
        folder,
    )
    metrics = folder / "stopped" / "metrics.jsonl"
    while both.runs[0].poll() is None and not (metrics.exists() and metrics.stat().st_size > 1000):
        time.sleep(0.02)
    both.runs[1].send_signal(signal.SIGTERM)
    statuses, told = both.wait()
    assert statuses == [130, 130], told
    *parts, _ = zip(*(re.split(r"<(\d+)>\n", each) for each in told), strict=True)
    return {
        name: (configs[name], [int(status) for status in parts[2 * index + 1]], parts[2 * index])
        for index, name in enumerate(configs)
    }


def rows(folder):
    return ti_jax.Embedding.load(Path(folder) / "learned_embeds.safetensors").vectors["text_encoder"]


def test_two_processes_are_one_of_eight_devices(runs, tmp_path):
    config, statuses, (first, second) = runs["whole"]
    assert statuses == [0, 0], first + second
    whole = ti_jax.train(replace(config, output_dir=str(tmp_path / "whole")))
    learned = whole.embedding.vectors["text_encoder"]
    assert np.abs(rows(config.output_dir) - learned).max() <= 1e-6 * np.abs(learned).max()
    assert "8 x cpu in 2 processes" in first
    # The first alone writes and speaks.
    folder = Path(config.output_dir)
    assert not (folder.parent / "second").exists() and "steps" not in second
    assert "process_id" not in (folder / "config.yaml").read_text()


def test_what_is_wrong_in_one_process_ends_all_with_its_reason(runs):
    config, statuses, (first, second) = runs["wrong"]
    assert statuses == [2, 2], first + second
    folder = Path(config.output_dir)
    assert "process 1 of 2: " in first and str(folder.parent / "none") in first and "Traceback" not in first + second
    assert not (folder / "config.yaml").exists()


def test_a_request_to_stop_reaches_all(runs):
    config, statuses, (first, second) = runs["stopped"]
    assert statuses == [130, 130], first + second
    (step,) = re.findall(r"asked to stop: a checkpoint of step (\d+) is saved", first)
    assert (Path(config.output_dir) / "checkpoints" / step).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])  # 0 is the harder one: JAX's service for the processes lives there
def test_killing_one_ends_the_other_and_a_resumed_run_is_the_same_to_the_bit(config, tmp_path, killed):
    config = replace(config, max_train_steps=120, checkpointing_steps=10)
    statuses, told = pair(replace(config, output_dir=str(tmp_path / "whole")), tmp_path).wait()
    assert statuses == [0, 0], told

    both = pair(config, tmp_path)
    checkpoint = Path(config.output_dir) / "checkpoints" / "20"
    while not checkpoint.exists() and both.runs[0].poll() is None:
        time.sleep(0.02)
    both.runs[killed].kill()
    statuses, told = both.wait()
    # Where the first one is gone JAX itself may end the other, by SIGABRT.
    assert statuses[killed] == -signal.SIGKILL and statuses[1 - killed] in (2, -signal.SIGABRT), told
    *_, last = told[1 - killed].strip().splitlines()
    assert re.search(r"another (process|one) has", last) and "--resume_from_checkpoint latest" in last

    statuses, told = pair(replace(config, resume_from_checkpoint="latest"), tmp_path).wait()
    assert statuses == [0, 0], told
    assert 20 <= int(re.search(r"resuming at step (\d+)", told[0])[1]) < 120
    assert np.array_equal(rows(config.output_dir), rows(tmp_path / "whole"))


@pytest.mark.slow  # how they agree: test_agreement
def test_processes_with_other_settings_are_refused(config, tmp_path):
    statuses, (first, second) = pair(config, tmp_path, "--learning_rate", "0.5").wait()
    assert statuses == [2, 2], first + second
    assert "process 1 of 2: learning_rate: not the same as in process 0" in first


@pytest.mark.slow  # how they agree: test_agreement
def test_a_checkpoint_that_cannot_be_used_is_told_to_all(config, tmp_path):
    wrong = replace(config, resume_from_checkpoint=str(tmp_path / "7"))
    statuses, told = pair(wrong, tmp_path).wait()
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
multihost.join(ti_jax.TrainConfig(coordinator_address=sys.argv[3], num_processes=2, process_id=number))
for agree, faulty in [("all_or_raise", 1), ("on_leader", 0)]:
    def fail():
        if number == faulty:
            raise KeyError("the moon")
    start = time.monotonic()
    try:
        with multihost.in_step():
            getattr(multihost, agree)(fail)
    except Exception as error:
        print(agree, type(error).__name__, error, time.monotonic() - start < 20, flush=True)
"""


def test_any_fault_of_one_process_is_reported_to_the_others(tmp_path):
    """At once, not when its heartbeat is missed; and it is the faulty process that shows where it was."""
    both = Pair([[sys.executable, "-c", FAULTY, str(number), *join] for number, join in enumerate(joining())], tmp_path)
    _, (first, second) = both.wait()
    assert "all_or_raise Agreed process 1 of 2: KeyError: 'the moon' True\n" in first
    assert "all_or_raise KeyError 'the moon' True\n" in second
    assert "on_leader KeyError 'the moon' True\n" in first
    assert "on_leader Agreed KeyError: 'the moon' True\n" in second
