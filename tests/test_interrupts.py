"""Ctrl-C, SIGTERM and SIGHUP: answered within two seconds wherever a program is, and nothing is lost."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import children
import jax
import numpy as np
import pytest

import ti_jax
from ti_jax import interrupts
from ti_jax.config.yaml import dump_yaml

REPOSITORY = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("nothing_is_ignored")
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
# As in a compiler or a device's runtime: the main thread is in C, and no handler of Python's can run in it.
BLOCK = """
import ctypes
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(128)
lock(mutex)
print("ready", flush=True)
lock(mutex)
"""


def program(code, tmp_path, before=""):
    """A program that listens; waits until it says that it is ready."""
    (tmp_path / "program.py").write_text(
        f"{before}\nfrom ti_jax import interrupts\ninterrupts.listen('program')\n{textwrap.dedent(code)}"
    )
    run = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert run.stdout.readline() == "ready\n"
    return run


def ended(run, number, seconds=2.0):
    """What the program says when it gets the signal, and its status, in at most so many seconds."""
    run.send_signal(number)
    try:
        _, told = run.communicate(timeout=seconds)
    finally:
        run.kill()
    return run.returncode, told


@pytest.mark.parametrize("number", SIGNALS)
def test_a_program_that_waits_in_c_ends_at_once(number, tmp_path):
    status, told = ended(program(BLOCK, tmp_path), number)
    assert (status, told) == (130, f"\nprogram: {number.name}: stopping\n")


def test_what_was_ignored_stays_ignored(tmp_path):
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"  # as nohup does
    run = program(BLOCK, tmp_path, before=ignore)
    run.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert run.poll() is None
    assert ended(run, signal.SIGTERM)[0] == 130


def test_where_there_is_something_to_save_it_is_saved_first(tmp_path):
    code = """
        import time
        with interrupts.deferred():
            print("ready", flush=True)
            while not interrupts.requested():
                time.sleep(0.01)
            time.sleep(0.5)
            print("saved", flush=True)
        interrupts.leave(130)
    """
    run = program(code, tmp_path)
    run.send_signal(signal.SIGTERM)
    saved, told = run.communicate(timeout=10)
    assert (run.returncode, saved) == (130, "saved\n")
    assert told == "\nprogram: SIGTERM: stopping as soon as a checkpoint is saved; once more ends the program at once\n"


def test_a_second_signal_ends_it_at_once(tmp_path):
    run = program("with interrupts.deferred():" + textwrap.indent(BLOCK, "    "), tmp_path)
    run.send_signal(signal.SIGINT)
    assert "SIGINT: stopping as soon as" in run.stderr.readline() + run.stderr.readline()
    assert ended(run, signal.SIGINT)[0] == 130


def test_a_file_that_is_being_written_becomes_whole(tmp_path):
    code = """
        import time
        with interrupts.whole():
            print("ready", flush=True)
            time.sleep(0.7)
            open("whole", "w").close()
        time.sleep(60)
    """
    run = program(code.replace('"whole"', repr(str(tmp_path / "whole"))), tmp_path)
    assert ended(run, signal.SIGINT)[0] == 130 and (tmp_path / "whole").exists()


def test_a_computation_is_dropped(tmp_path):
    """Its thread is in C when the program ends, as one that draws is in a device's runtime."""
    code = f"""
        def compute():
            exec({BLOCK!r})
        with interrupts.deferred():
            try:
                interrupts.interruptible(compute)
            except interrupts.Interrupted:
                print("dropped", flush=True)
        interrupts.leave(130)
    """
    run = program(code, tmp_path)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=2)
    assert (run.returncode, said) == (130, "dropped\n")


def test_what_is_not_interrupted_gives_its_result_or_its_error():
    def fail():
        raise KeyError("mine")

    for abandon in (True, False):
        with interrupts.deferred(abandon):
            assert interrupts.interruptible(lambda: 7) == 7
            with pytest.raises(KeyError, match="mine"):
                interrupts.interruptible(fail)
    assert interrupts.interruptible(lambda: 7) == 7


def test_in_a_library_the_signals_are_heard_within_only(capsys):
    before = [signal.getsignal(number) for number in SIGNALS]
    with interrupts.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert "SIGTERM: stopping as soon as a checkpoint is saved" in capsys.readouterr().err
    with interrupts.deferred():
        assert not interrupts.requested()


# -- train.py


@pytest.fixture
def config(short_run):
    return replace(
        short_run, max_train_steps=100_000, save_steps=100_000, checkpointing_steps=100_000, report_to="none",
        train_batch_size=1,
    )  # fmt: skip


def start(config, tmp_path):
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    command = [sys.executable, str(REPOSITORY / "train.py"), "--config", str(tmp_path / "run.yaml")]
    if config.resume_from_checkpoint:
        command += ["--resume_from_checkpoint", config.resume_from_checkpoint]
    environment = children.environment()
    with (tmp_path / "stderr").open("w") as log:
        return subprocess.Popen(command, stderr=log, stdout=log, env=environment)


def wait_for(condition, run):
    while not condition():
        assert run.poll() is None, "the run has ended"
        time.sleep(0.02)


def stop(run, number, tmp_path, seconds=60):
    """The program's status and what it said; that it is stopping it says within two seconds."""
    asked = time.monotonic()
    run.send_signal(number)
    said = f"{number.name}: stopping"
    try:
        while said not in (tmp_path / "stderr").read_text() and run.poll() is None:
            time.sleep(0.02)
        answered = time.monotonic() - asked
        run.wait(seconds)
    finally:
        run.kill()
    told = (tmp_path / "stderr").read_text()
    assert said in told and answered < 2.0, (answered, told)
    assert "Traceback" not in told and "Fatal" not in told, told
    return run.returncode, told


def training(config):
    metrics = Path(config.output_dir) / "metrics.jsonl"
    return lambda: metrics.exists() and metrics.stat().st_size > 300  # a record or two


def saved_step(config, told):
    (step,) = re.findall(r"asked to stop: a checkpoint of step (\d+) is saved", told)
    assert (Path(config.output_dir) / "checkpoints" / step).is_dir()
    return int(step)


def test_in_the_first_seconds(config, tmp_path):
    run = start(config, tmp_path)
    time.sleep(0.5)
    status, told = stop(run, signal.SIGINT, tmp_path)
    assert status == 130 and told.strip() == "train.py: SIGINT: stopping"


def test_while_training_a_checkpoint_is_saved_and_the_resumed_run_ends_the_same(config, tmp_path):
    config = replace(config, max_train_steps=400)
    run = start(config, tmp_path)
    wait_for(training(config), run)
    status, told = stop(run, signal.SIGHUP, tmp_path)
    step = saved_step(config, told)
    assert status == 130 and 0 < step < 400
    resumed = ti_jax.train(replace(config, resume_from_checkpoint="latest"), devices=jax.devices()[:1])
    whole = ti_jax.train(replace(config, output_dir=str(tmp_path / "whole")), devices=jax.devices()[:1])
    assert len(resumed.losses) == 400 - step
    assert np.array_equal(resumed.embedding.vectors["text_encoder"], whole.embedding.vectors["text_encoder"])


def test_while_pictures_are_drawn_a_checkpoint_is_saved_and_the_resumed_run_draws_them(config, tmp_path):
    many = replace(
        config, validation_prompt="a {}", validation_steps=4, num_validation_images=64, validation_inference_steps=900
    )
    (tmp_path / "run").mkdir()
    run = start(many, tmp_path / "run")
    wait_for(training(config), run)
    time.sleep(2)  # the first updates are made in no time
    status, told = stop(run, signal.SIGINT, tmp_path / "run", seconds=10)
    assert status == 130 and saved_step(config, told) == 4 and "warning" not in told
    picture = Path(config.output_dir) / "samples" / "step-000004.png"
    assert not picture.exists()
    short = replace(many, validation_inference_steps=2, max_train_steps=4, resume_from_checkpoint="latest")
    ti_jax.train(short, devices=jax.devices()[:1])
    assert picture.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_at_many_moments(config, tmp_path, number):
    """Each run stops a while later than the one before, and goes on where that was; drawing and saving are among it."""
    config = replace(
        config, validation_prompt="a {}", validation_steps=7, num_validation_images=2, validation_inference_steps=50,
        save_steps=5, checkpointing_steps=6, max_train_steps=200, resume_from_checkpoint="latest",
    )  # fmt: skip
    for moment in np.linspace(0.2, 25, 14):
        run = start(config, tmp_path)
        try:
            run.wait(moment)
        except subprocess.TimeoutExpired:
            status, told = stop(run, number, tmp_path)
            assert status == 130, told
        else:
            assert run.returncode == 0, (tmp_path / "stderr").read_text()
    folder = Path(config.output_dir)
    assert not list(folder.rglob(".tmp-*")) and not list(folder.rglob("*orbax-checkpoint-tmp*"))
    undisturbed = replace(config, output_dir=str(tmp_path / "whole"))
    for each in (config, undisturbed):
        run = start(each, tmp_path)
        assert run.wait() == 0
    rows, whole = (
        ti_jax.Embedding.load(Path(each.output_dir) / "learned_embeds.safetensors").vectors["text_encoder"]
        for each in (config, undisturbed)
    )
    assert np.array_equal(rows, whole)


def test_infer_ends_while_it_draws(tiny_sd, tmp_path):
    command = [
        sys.executable, str(REPOSITORY / "infer.py"), "--pretrained_model_name_or_path", str(tiny_sd), "--prompt", "a",
        "--num_inference_steps", "900", "--num_images", "64", "--output", str(tmp_path / "out.png"),
    ]  # fmt: skip
    compiled = tmp_path / "compiled"
    environment = {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with (tmp_path / "stderr").open("w") as log:
        run = subprocess.Popen(command, stderr=log, stdout=log, env=children.environment() | environment)
    wait_for(lambda: any(compiled.glob("*_draw_batch*")), run)
    time.sleep(0.5)
    assert run.poll() is None, (tmp_path / "stderr").read_text()
    status, told = stop(run, signal.SIGINT, tmp_path)
    assert (status, told.strip()) == (130, "infer.py: SIGINT: stopping")
