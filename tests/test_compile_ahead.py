"""What a run draws with is compiled beside its training step, once; a second start compiles nothing."""

import subprocess
import sys
import threading
from dataclasses import replace

import children
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ti_jax import interrupts
from ti_jax.evaluation.avatar_judge import Judge, JudgeConfig, Probe, judge_shapes
from ti_jax.training.loop import train


@pytest.fixture
def compiled():
    """The programs that are compiled or loaded, each with the thread that does so."""
    found = []

    def listen(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append((fun_name, threading.current_thread().name))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_pictures_are_compiled_beside_the_step_and_once(short_run, compiled):
    """Of validation there are two, of the overview four in a batch: two programs. No other test's have their size."""
    train(replace(short_run, resolution=24, validation_prompt="a {}", validation_steps=6, num_validation_images=2))
    drawing = [thread for name, thread in compiled if "_draw_batch" in name]
    assert drawing == ["beside", "beside"]
    assert [thread for name, thread in compiled if "run_steps" in name] == ["MainThread"]


def test_measuring_draws_with_the_program_of_the_overview(judged_sd, short_run, compiled):
    """As it does with the embedded model: as many steps of the sampler."""
    jax.clear_caches()  # those of other tests
    train(replace(short_run, pretrained_model_name_or_path=str(judged_sd), evaluate=True, evaluation_images=4,
                  validation_inference_steps=50))  # fmt: skip
    assert [thread for name, thread in compiled if "_draw_batch" in name] == ["beside"]


def test_what_cannot_be_compiled_ahead_does_not_end_the_run(short_run):
    """Nothing but a warning, where the picture is drawn."""
    calls = []

    def fail(*arguments, compile_only=False, **settings):
        calls.append(compile_only)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    with pytest.MonkeyPatch.context() as patch:  # not the fixture: the step is shared with other runs
        patch.setattr("ti_jax.StableDiffusion.generate", fail)
        result = train(replace(short_run, max_train_steps=2))
    assert np.isfinite(result.losses).all() and sorted(calls) == [False, True]


def test_a_program_ends_at_once_while_something_is_compiled(tmp_path):
    code = (
        "import time; from ti_jax import interrupts; interrupts.listen('x')\n"
        "interrupts.beside(lambda: time.sleep(60)); interrupts.leave(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=30, env=children.environment())
    assert done.returncode == 3


def test_what_is_over_is_not_abandoned():
    interrupts.beside(lambda: None).join()
    with pytest.raises(SystemExit):
        interrupts.leave(0)


@pytest.fixture
def judged_sd(tiny_sd, tmp_path):
    """The tiny model with a judge beside it, which has learned nothing."""
    folder = tmp_path / "judged"
    folder.mkdir()
    for path in tiny_sd.iterdir():
        (folder / path.name).symlink_to(path)
    config = JudgeConfig(
        attributes=(("top", ("red", "green")),), identity=("top",), probes=(Probe("a portrait of {}"),),
        channels=(8,), hidden=8, side=16,
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), judge_shapes(config))
    Judge(config, params).save(folder / "judge")
    return folder


PROGRAM = """
import collections, sys
import jax
from ti_jax.cli.main import main
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rsplit("/", 1)[-1]]))
status = main(sys.argv[1:])
print("counts", counts["compile_requests_use_cache"], counts["cache_misses"])
sys.exit(status)
"""


def test_a_second_start_compiles_nothing(judged_sd, pictures, tmp_path):
    """Scores included."""
    flags = ["--pretrained_model_name_or_path", str(judged_sd), "--train_data_dir", str(pictures), "--resolution", "16"]
    learning = [
        "train", *flags, "--placeholder_token", "<x>", "--initializer_token", "person", "--max_train_steps", "2",
        "--train_batch_size", "2", "--validation_inference_steps", "2", "--overview_prompts", "a {}", "--evaluate",
        "--evaluation_images", "1",
    ]  # fmt: skip

    def start(*arguments):
        environment = children.environment() | {
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"), "TI_JAX_CACHE": str(tmp_path / "moments"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=200, env=environment
        )
        assert done.returncode == 0, done.stderr
        return [int(number) for number in done.stdout.splitlines()[-1].split()[1:]]

    asked, missed = start(*learning, "--output_dir", str(tmp_path / "first"))
    assert asked >= missed > 2
    asked, missed = start(*learning, "--output_dir", str(tmp_path / "second"))
    assert asked > 2 and missed == 0
