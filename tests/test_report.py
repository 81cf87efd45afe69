"""What the logs say of a run: speed, work, and the trace of some updates."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ti_jax
from ti_jax.config import PlanConfig, TrainConfig, resolve, resolve_plan
from ti_jax.errors import InputError
from ti_jax.ops.platform import Platform
from ti_jax.training import chips, loop, report
from ti_jax.training.actions import Timetable
from ti_jax.training.flops import batch_flops
from ti_jax.training.plan import Planner
from ti_jax.training.report import Reporter, Work, read_lines


@pytest.fixture
def clock(monkeypatch):
    """The reporter's clock: it goes on by two seconds at every look."""
    seconds = iter(range(0, 100, 2))
    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))


@pytest.mark.parametrize("work", [None, Work(flops=3e12, peak=100e12)])
def test_speed_and_work_are_shown_and_logged(tmp_path, clock, capsys, work):
    reporter = Reporter(TrainConfig(report_to=("none",)), tmp_path, 0, 10, work)
    reporter.chunk(5, [0.5, 0.25, 0.5, 0.25, 0.5], 1e-3, samples=80)
    reporter.progress(10)
    reporter.close()
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert line["samples_per_second"] == 40 and line["steps_per_second"] == 2.5
    shown = capsys.readouterr().err.splitlines()[-1]
    assert "loss=0.4000, samples/s=40.0" in shown
    if work is None:
        assert "mfu" not in line and "tflops_per_device" not in line and "MFU" not in shown
    else:  # 5 updates of 3 TFLOP in 2 s
        assert line["tflops_per_device"] == pytest.approx(7.5) and line["mfu"] == pytest.approx(0.075)
        assert "TFLOP/s=8, MFU=7.5%" in shown


@pytest.fixture(scope="module")
def planned(tiny_sd):
    """Networks and shapes of the tiny model, at 256 places in the first attention."""
    return Planner(
        resolve_plan(PlanConfig(pretrained_model_name_or_path=str(tiny_sd), resolution=32)), jnp.bfloat16,
        jax.devices()[:1],
    )  # fmt: skip


def test_attention_in_a_gpus_kernels_counts_as_the_products_that_it_is(planned):
    """Counted on the kernels' own program it would be none at all, or unknown."""
    frozen, rows = planned._frozen(), planned._rows()
    plain = batch_flops(planned.networks, frozen, rows, 2)
    for platform in (Platform("cuda", 9), Platform("tpu"), Platform("cpu")):
        assert batch_flops(planned.networks.compiled_for(platform), frozen, rows, 2) == plain
    assert 0 < plain < np.inf


def test_a_prompt_of_many_samples_is_encoded_once(planned):
    frozen, rows = planned._frozen(), planned._rows()

    def flops(batch, prompts):
        ids = {
            name: jax.ShapeDtypeStruct((prompts, ids.shape[1]), jnp.int32) for name, ids in frozen.dataset.ids.items()
        }
        return batch_flops(planned.networks, frozen._replace(dataset=frozen.dataset._replace(ids=ids)), rows, batch)

    sample = flops(3, 1) - flops(2, 1)  # of the UNet
    prompt = flops(2, 2) - flops(2, 1)  # of the text encoder
    assert sample > 0 and prompt > 0
    assert flops(8, 3) == pytest.approx(8 * sample + 3 * prompt, rel=1e-9)
    assert flops(2, 50) == flops(2, 2)


def test_the_work_of_an_update_is_that_of_its_batches_where_the_peak_is_known(planned, monkeypatch):
    builder = SimpleNamespace(batch_size=2, accumulation=3)
    devices = np.array([SimpleNamespace(device_kind="Test 1")])
    job = SimpleNamespace(
        builder=builder, mesh=SimpleNamespace(devices=devices), frozen=(planned._frozen(),), order=None,
        start=SimpleNamespace(rows=planned._rows()),
        sd=SimpleNamespace(dtype=jnp.bfloat16, networks=planned.networks),
    )  # fmt: skip
    assert loop.work_of(job) is None
    monkeypatch.setitem(chips.CHIPS, "Test 1", chips.Chip("a chip", 1e9, 5e12))
    assert loop.work_of(job) == Work(3 * planned.least_flops(2), 5e12)
    job.sd.dtype = jnp.float32
    assert loop.work_of(job) is None


# -- the trace


@pytest.mark.parametrize("steps", [(0, 13), (20, 25)])
def test_a_trace_of_updates_that_the_run_does_not_make_is_refused(steps):
    with pytest.raises(InputError, match=r"^--profile_steps .*: the run ends after 12 updates \(--max_train_steps\)"):
        resolve(TrainConfig(max_train_steps=12, profile_steps=steps))
    assert resolve(TrainConfig(num_train_epochs=1, profile_steps=steps)).profile_steps == steps


def test_dispatches_end_at_the_edges_of_a_trace():
    timetable = Timetable([SimpleNamespace(every=4)], 10, 30, stops=(3, 7))
    step, stops = 0, []
    while step < 14:
        step = timetable.next(step)
        stops.append(step)
    assert stops == [3, 4, 7, 8, 10, 12, 16]
    assert timetable.due(3) == [] and len(timetable.due(4)) == 1


def test_losses_are_logged_at_their_interval_and_where_a_run_may_be_resumed():
    timetable = Timetable([SimpleNamespace(every=7), SimpleNamespace(every=None)], 10, 34, stops=(3,))
    assert [step for step in range(1, 35) if timetable.logs(step)] == [7, 10, 14, 20, 21, 28, 30, 34]


@pytest.mark.parametrize("devices", [1, 2])
def test_no_two_chunks_seem_to_end_together(short_run, devices):
    """On a CPU a dispatch may wait for its end: a chunk that is read only then would have taken no time."""
    config = replace(short_run, max_train_steps=30, train_batch_size=16 // devices, report_to="none")
    result = ti_jax.train(config, devices=jax.devices()[:devices])
    records = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    seconds = [len(record["losses"]) / record["steps_per_second"] for record in records if "losses" in record]
    assert len(seconds) == 10 and min(seconds) > np.median(seconds) / 10, seconds


# Of jaxlib 0.12, while it makes the type of an event's stats; as an error it would end the process.
@pytest.mark.filterwarnings("ignore:builtin type event_stats has no __module__:DeprecationWarning")
def test_the_updates_of_profile_steps_are_traced_and_no_others(short_run, capsys):
    whole = ti_jax.train(short_run, devices=jax.devices()[:1])
    config = replace(short_run, profile_steps=(3, 8), output_dir=short_run.output_dir + "-traced", save_steps=4)
    result = ti_jax.train(config, devices=jax.devices()[:1])
    assert np.array_equal(result.losses, whole.losses)
    (file,) = (result.output_dir / "logs").glob("plugins/profile/*/*.xplane.pb")
    assert f"tensorboard --logdir {result.output_dir / 'logs'}" in capsys.readouterr().err
    events = [
        event for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines for event in line.events if event.name == "train"
    ]  # fmt: skip
    starts = sorted(dict(event.stats)["step_num"] for event in events)
    assert starts[0] == 3 and 4 in starts and starts[-1] < 8
    logged = [json.loads(line)["step"] for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert {3, 8} <= set(logged)


def test_a_trace_that_cannot_be_made_is_a_warning(short_run, tmp_path, capsys):
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # all calls of a whole run take gigabytes
    jax.profiler.start_trace(str(tmp_path / "other"), profiler_options=options)
    try:
        result = ti_jax.train(replace(short_run, profile_steps=(1, 2), max_train_steps=2), devices=jax.devices()[:1])
    finally:
        jax.profiler.stop_trace()
    told = capsys.readouterr().err
    assert "warning: --profile_steps: nothing is traced: " in told and len(result.losses) == 2
