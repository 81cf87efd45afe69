"""A training run in three phases: `prepare` all its inputs, `compile_step`, and `run` to the last step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ti_jax import interrupts
from ti_jax.config import Checkpointing, TrainConfig, resolve
from ti_jax.config.yaml import dump_yaml
from ti_jax.data.buckets import shape_name
from ti_jax.embeddings import Embedding
from ti_jax.errors import InputError, listed
from ti_jax.files import write_atomically
from ti_jax.machine import enable_compilation_cache, free_memory
from ti_jax.remote import as_given
from ti_jax.training import multihost, run_folder, validation
from ti_jax.training.actions import Action, Timetable, make_actions, or_warn, save_state
from ti_jax.training.chips import peak_flops
from ti_jax.training.compile import CompiledStep, checked, compile_fitting
from ti_jax.training.cpu_devices import use_cores
from ti_jax.training.early_stop import EarlyStop, compile_early_stop
from ti_jax.training.feeding import WINDOWS, Feeder, bytes_of, feeds, placed, without_moments
from ti_jax.training.flops import batch_flops
from ti_jax.training.job import Job, agree, prepare
from ti_jax.training.multihost import StopRequests, all_or_raise, is_leader, on_leader
from ti_jax.training.pace import Pace
from ti_jax.training.parallel import replicate
from ti_jax.training.plateau import Seen
from ti_jax.training.profiling import Profiler
from ti_jax.training.remote_folder import RemoteFolder
from ti_jax.training.report import Reporter, Work, print_row_figures
from ti_jax.training.rows import row_figures
from ti_jax.training.run_page import RunPage, page_of
from ti_jax.training.step import StepInputs, TrainState
from ti_jax.training.uses import Base, example_prompt, uses


@dataclass(frozen=True)
class TrainResult:
    """What a run returns.

    Attributes:
      embeddings: the learned words. losses: float32, one for each update (after resuming: those made since).
      output_dir: the run's folder; where ``--output_dir`` is a URL, the one here that is sent there.
      seconds: wall time of each phase: "load", "encode", "compile", "train", "measure", "pictures".
      interrupted: the run was stopped early (Ctrl-C, SIGTERM, SIGHUP), after saving a checkpoint.
      early_stops: by token, the step at which ``--early_stop`` ended a word; one that learned to the last step is not
        in it.
    """

    embeddings: tuple[Embedding, ...]
    losses: np.ndarray
    output_dir: Path
    seconds: dict[str, float]
    interrupted: bool = False
    early_stops: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def embedding(self) -> Embedding:
        """The learned word; of several, the first."""
        return self.embeddings[0]


def train(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> TrainResult:
    """Learn a new word as configured, and write it to ``config.output_dir``.

    Compiled programs are cached on disk (`enable_compilation_cache`). With several processes (see `multihost`) each one
    calls this with the same config; only the leader process writes.

    Args:
      devices: to train on, each with ``config.train_batch_size`` samples of a batch. None: all devices; on a CPU the
        cores share these samples (`ti_jax.training.cpu_devices`).

    Raises:
      InputError: something in the config, the pictures or the model is wrong, another run uses the folder, a disk is
        full, or the loss became non-finite (the last finite rows are saved first); in this process or another one.
      OutOfStep: the same, but the other processes could not be notified, or one of them has ended.
    """
    config = resolve(config)
    cores = use_cores(config) if devices is None else None
    remote = RemoteFolder.of(config.output_dir)
    if remote is not None:
        config = dataclasses.replace(config, output_dir=str(remote.folder))
    multihost.join(config)
    enable_compilation_cache()
    sharing = 1
    if cores is not None and jax.default_backend() == "cpu":
        devices, sharing = jax.devices()[:cores], cores
    with multihost.in_step(), contextlib.ExitStack() as holding:
        job = agree(all_or_raise(lambda: prepare(config, devices, sharing, holding, remote)))
        return run(job, compile_step(job))


class Step(NamedTuple):
    """The compiled training step of one bucket. ``frozen``: its constant inputs, on the devices."""

    compiled: CompiledStep
    frozen: StepInputs
    feeder: Feeder | None  # None: the whole dataset is on the devices


def compile_step(job: Job) -> tuple[Step, ...]:
    """Place what is learned from, and compile the training step for each bucket, so that it fits in every device.

    Raises:
      InputError: it does not fit.
    """
    fed = feeds(
        [each.dataset for each in job.frozen], job.mesh, multihost.smallest(free_memory(job.mesh.local_devices))
    )
    inputs = all_or_raise(lambda: _placed(job, fed))
    free = multihost.smallest(free_memory(job.mesh.local_devices))
    with job.clock.phase("compile"):
        return all_or_raise(lambda: _compile_all(job, inputs, free))


def _placed(job: Job, fed: bool) -> list[tuple[StepInputs, Feeder | None]]:
    """The constant inputs of each bucket, and what feeds it."""
    datasets = [each.dataset for each in job.frozen]
    if not fed:
        return [(each._replace(dataset=placed(each.dataset, job.mesh)), None) for each in job.frozen]
    multihost.log_leader(
        f"the {sum(map(bytes_of, datasets)) / 1e9:.2g} GB of moments stay in the host's memory; it sends those of the "
        f"next updates to the devices while they compute"
    )
    return [
        (
            frozen._replace(dataset=without_moments(frozen.dataset)),
            Feeder(frozen.dataset, job.config.seed, job.builder, job.order, bucket),
        )
        for bucket, frozen in enumerate(job.frozen)
    ]


def _compile_all(job: Job, inputs: Sequence[tuple[StepInputs, Feeder | None]], free: float | None) -> tuple[Step, ...]:
    """The step of each bucket; all have the rematerialisation policy that the largest needs.

    Args:
      free: bytes on a device beside the inputs; None: unknown.
    """
    multihost.log_leader("compiling the training step: up to a minute the first time, for large models minutes")
    policy, found = job.config.gradient_checkpointing, dict[int, Step]()
    shapes = [each.dataset.latents[:2] for each in job.frozen]
    windows = WINDOWS * sum(feeder.nbytes for _, feeder in inputs if feeder is not None)
    for bucket in sorted(range(len(shapes)), key=lambda bucket: -math.prod(shapes[bucket])):
        began, (frozen, feeder), memory = time.perf_counter(), inputs[bucket], None
        if free is not None:  # a program's own arguments are counted with it
            own = sum(leaf.nbytes for leaf in jax.tree.leaves((frozen, job.start)))
            own += 0 if feeder is None else feeder.nbytes
            memory = free + own - windows - sum(each.compiled.code for each in found.values())
        window = None if feeder is None else feeder.shapes
        lower = partial(job.builder.lower, frozen, job.start, turns=job.order is not None, fed=window)
        compiled = checked(compile_fitting(lower, policy, memory), memory)
        policy, found[bucket] = compiled.gradient_checkpointing, Step(compiled, frozen, feeder)
        if job.order is not None:
            height, width = (side * job.sd.networks.latent_factor for side in shapes[bucket])
            multihost.log_leader(
                f"bucket of {shape_name((height, width))} pixels: {job.order.shares[bucket]:.1%} of the updates; its "
                f"training step took {time.perf_counter() - began:.1f} s to compile"
            )
    return tuple(found[bucket] for bucket in range(len(shapes)))


def run(job: Job, steps: Sequence[Step]) -> TrainResult:
    """Train to the last step, or until a stop is requested; then save the word and draw the overview.

    With ``--early_stop`` the last step of a word is the one where its loss has stopped falling, if that comes first.
    """
    summary = _summary(job, steps[0].compiled.gradient_checkpointing)
    with job.clock.phase("compile"):
        early_stop = all_or_raise(lambda: compile_early_stop(job, steps[0].frozen))
    # Save the policy that was chosen: with other free memory another one would be.
    config = dataclasses.replace(job.config, gradient_checkpointing=steps[0].compiled.gradient_checkpointing)
    # Earlier results are moved only now that all input has been checked: a mistyped command must not displace them.
    on_leader(lambda: _open_folder(config, job))
    multihost.log_leader(summary)
    job = dataclasses.replace(job, config=config)
    if is_leader():
        job = dataclasses.replace(job, page=RunPage(job))
    # With several processes an action runs on all or none of them, so that a stop waits for its end.
    with interrupts.deferred(abandon=jax.process_count() == 1):
        state, losses, stopped = _loop(job, steps, early_stop)
        embeddings, finished = on_leader(lambda: _finish(job, state, stopped))
    ends = {} if early_stop is None else early_stop.stops
    return TrainResult(embeddings, np.asarray(losses, np.float32), job.folder, job.clock.seconds, not finished, ends)


def _loop(job: Job, steps: Sequence[Step], early_stop: EarlyStop | None) -> tuple[TrainState, list[float], bool]:
    """Run the updates and the actions between them; returns (state, losses, stopped before the end)."""
    state, now = replicate(job.start, job.mesh), int(job.start.step)
    actions = make_actions(job)
    profiled = job.config.profile_steps
    watched = None if early_stop is None else early_stop.every
    timetable = Timetable(actions, job.builder.longest_chunk, job.total, profiled or (), watched)
    profiler = Profiler(profiled if is_leader() else None, job.folder / job.config.logging_dir)
    pace, losses, unlogged = Pace(job.builder.longest_chunk), [], []
    reporter = all_or_raise(
        lambda: Reporter(job.config, job.folder, now, job.total, work_of(job)) if is_leader() else None
    )

    def read(start: int, end: int, chunk: jax.Array, dispatched: float, seen: Seen | None) -> None:
        """Wait for a chunk's losses, and log them at the steps of the timetable."""
        values = np.asarray(chunk)[: end - start].tolist()
        if not np.isfinite(values).all():
            log(start)
            on_leader(partial(_give_up, job, state))
        pace.measured(end - start, dispatched)
        losses.extend(values)
        unlogged.extend(values)
        if reporter is not None:
            reporter.progress(len(values))
        if timetable.logs(end):
            log(end)
        if early_stop is not None and seen is not None:
            early_stop.read(seen, end, reporter)

    def ended() -> bool:
        return early_stop is not None and early_stop.ended

    def log(step: int) -> None:
        """Log the losses of the updates up to ``step`` that are not logged yet."""
        if reporter is not None and unlogged:
            rate = float(job.schedule(job.mixing.updates(step - 1)))
            reporter.chunk(step, list(unlogged), rate, job.samples_per_step * len(unlogged))
            page_of(job).refresh(step)
        unlogged.clear()

    pending = None  # the chunk whose losses are read after the next one is dispatched, so that the device never waits
    reads_first = _reads_first(job)
    stopping, requests = False, StopRequests()
    with contextlib.ExitStack() as closing:
        if reporter is not None:
            closing.enter_context(contextlib.closing(reporter))
        closing.callback(profiler.close)
        if now:
            left = [each for each in timetable.due(now) if not each.done(now)]
            on_leader(partial(_act, job, left, now, state, reporter))
        if early_stop is not None and not early_stop.begun:
            state, first = early_stop.observe(state)
            early_stop.read(first, now, reporter)
        while now < job.total and not stopping and not ended():
            if pending is not None and reads_first:
                with job.clock.phase("train"):
                    read(*pending)
                pending = None
                if ended():
                    break
            most = min(timetable.next(now) - now, pace.steps)
            bucket, turn, count = (0, now, most) if job.order is None else job.order.next(now, most)
            step = steps[bucket]
            requests.send(interrupts.requested())
            profiler.next_from(now)
            with job.clock.phase("train"):
                given: Sequence[Any] = ()
                if step.feeder is not None:
                    count, *given = step.feeder.next(turn, count)
                elif job.order is not None:
                    given = (replicate(np.int32(turn), job.mesh),)
                end, number = now + count, replicate(np.int32(count), job.mesh)
                dispatched = time.perf_counter()
                with profiler.step(now), jax.transfer_guard("disallow"):  # everything is on the devices already
                    state, chunk = step.compiled.program(step.frozen, state, number, *given)
                    seen = None
                    if early_stop is not None and end % early_stop.every == 0:
                        state, seen = early_stop.observe(state)
                if step.feeder is not None:
                    step.feeder.ahead(turn)
                if pending is not None:
                    read(*pending)
                    if ended():  # so that what was just dispatched did nothing
                        pending = None
                        break
            pending, now = (now, end, chunk, dispatched, seen), end
            due = timetable.due(now)
            if due or now == job.total or now in (profiled or ()):
                with job.clock.phase("train"):
                    read(*pending)
                pending = None
                profiler.reached(now)
            if due:
                on_leader(partial(_act, job, due, now, state, reporter))
            stopping = requests.received(interrupts.requested())
        if pending is not None:
            read(*pending)
        log(now)
        on_leader(partial(save_state, job, state))
        if stopping and reporter is not None:
            reporter.print_line(f"asked to stop: a checkpoint of step {now} is saved")
    return state, losses, now < job.total and not ended()


def _reads_first(job: Job) -> bool:
    """Whether a chunk's losses are read before the next one is dispatched.

    On a CPU a dispatch may wait for the one before it and for its own end: the losses of both would be read together,
    and the second seem to have taken no time.
    """
    return job.mesh.devices.flat[0].platform == "cpu"


def work_of(job: Job) -> Work | None:
    """The work of an update on each device, on average over the buckets; None where the device's peak is unknown.

    Traces the networks: seconds.
    """
    builder = job.builder
    peak = peak_flops(job.mesh.devices.flat[0].device_kind, job.sd.dtype)
    if peak is None:
        return None
    of_bucket = [batch_flops(job.sd.networks, each, job.start.rows, builder.batch_size) for each in job.frozen]
    flops = float(np.average(of_bucket, weights=None if job.order is None else job.order.shares))
    return Work(flops * builder.accumulation, peak)


def _open_folder(config: TrainConfig, job: Job) -> None:
    assert job.checkpoints is not None, "only the leader process has them"
    job.checkpoints.identity["gradient_checkpointing"] = config.gradient_checkpointing
    resume_at = None if config.resume_from_checkpoint is None else int(job.start.step)
    run_folder.prepare(job.folder, resume_at, [each.folder for each in job.concepts if each.folder != job.folder])
    write_atomically(job.folder / run_folder.CONFIG_FILE, as_given(dump_yaml(config)).encode())
    job.send(must=True)


def _summary(job: Job, policy: Checkpointing) -> str:
    """One line: model, devices, precision, data and compile time."""
    on_hosts = "" if jax.process_count() == 1 else f" in {jax.process_count()} processes"
    checkpointing = "" if policy == "none" else f"gradient checkpointing {policy}; "
    words = f"{len(job.concepts)} words, " if len(job.concepts) > 1 else ""
    mixed = f" of {job.mixing.in_batch} words" if len(job.concepts) > 1 else ""
    pictures = sum(concept.pictures.files for concept in job.concepts)
    prompts = sum(len(concept.prompts) for concept in job.concepts)
    return (
        f"{job.sd.name}, {job.mesh.size} x {job.mesh.devices.flat[0].device_kind}{on_hosts}, "
        f"{np.dtype(job.sd.dtype).name}: {words}{pictures} pictures, {prompts} prompts, "
        f"{job.samples_per_step} samples{mixed} a step; {checkpointing}the training step took "
        f"{job.clock.seconds['compile']:.1f} s to compile"
    )


def _act(job: Job, due: Sequence[Action], step: int, state: TrainState, reporter: Reporter | None) -> None:
    """Run the actions of a step. Those skipped by a request to stop are run when the run resumes there."""
    assert reporter is not None, "only the leader process has one"
    with contextlib.suppress(interrupts.Interrupted):
        for action in due:
            action(step, state, reporter)
    job.send()
    reporter.pause()


def _give_up(job: Job, state: TrainState) -> None:
    """Save the last finite rows, and end the run because its loss is not finite."""
    good = int(state.step)
    job.save_words(state)
    page_of(job).finish(job.embeddings(state), good, f"ended at step {good + 1}: the loss became non-finite")
    job.send()
    files = listed([str(concept.folder / run_folder.EMBEDDING_FILE) for concept in job.concepts], 3)
    raise InputError(
        f"the loss became non-finite at step {good + 1}; the rows of step {good} are saved in {files}: use a lower "
        f"--learning_rate ({float(job.schedule(job.mixing.updates(good))):g} there)"
    )


def _finish(job: Job, state: TrainState, stopped: bool) -> tuple[tuple[Embedding, ...], bool]:
    """Report what was learned; unless the run was stopped early, also measure the words, draw with them and push them.

    Returns:
      The final words, and whether everything was done.
    """
    last = int(state.step)
    job.send()
    embeddings = job.embeddings(state)
    for concept in job.concepts:
        print_row_figures(row_figures(concept, state.shown_rows, job.usual_norms), last, job.prefix(concept))
    try:
        if not stopped:
            embeddings = _measure(job, embeddings, last)
            for concept in job.concepts:
                with job.clock.phase("pictures"):
                    draw = partial(validation.save_overview, job.sd, concept, embeddings)
                    or_warn(f"the overview of {concept.token}", draw)
            page_of(job).finish(embeddings, last, "finished")  # before an upload, which may fail
            for concept, push, embedding in zip(job.concepts, job.pushes, embeddings, strict=bool(job.pushes)):
                interrupts.interruptible(partial(push, concept.folder, embedding))
    except interrupts.Interrupted:
        stopped = True
        multihost.log_leader(
            "stopped after the last step: --resume_from_checkpoint latest does what is left (scores, overview, upload)"
        )
    if stopped:
        page_of(job).finish(embeddings, last, f"stopped at step {last} of {job.total}")
    job.send(must=True)
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in job.clock.seconds.items())
    for concept, embedding in zip(job.concepts, embeddings, strict=True):
        if len(embedding.vectors) > 1:
            multihost.log_leader(
                f"{concept.folder / run_folder.ONE_FILE}: the same word in one file, for AUTOMATIC1111 and ComfyUI; "
                "learned_embeds and learned_embeds_2 are for diffusers"
            )
        file = concept.folder / run_folder.EMBEDDING_FILE
        end = f" ({phases})" if concept is job.concepts[-1] else ""
        multihost.log_leader(f"{file}: {embedding.token} after {embedding.metadata['steps']} steps{end}")
    multihost.log_leader(_what_next(job, embeddings[0], last, stopped))
    return embeddings, not stopped


def _what_next(job: Job, embedding: Embedding, step: int, stopped: bool) -> str:
    """The command that goes on with a run that was stopped, or draws with the first word of one that is through."""
    if stopped:
        config = shlex.quote(str(job.folder / run_folder.CONFIG_FILE))
        return (
            f"stopped at step {step} of {job.total}; to go on: ti-jax train --config {config} "
            "--resume_from_checkpoint latest"
        )
    concept = job.concepts[0]
    base = Base(concept.config.pretrained_model_name_or_path, clip_skip=concept.config.clip_skip)
    ours, *_ = uses(embedding, example_prompt(concept.config), str(concept.folder), base)
    command = str(ours.code).replace(" \\\n    ", " ")
    files = (concept.folder / each for each in (run_folder.OVERVIEW_FILE, run_folder.REPORT_FILE))
    shown = " and ".join(str(each) for each in files if each.exists())
    return (f"look at {shown}; " if shown else "") + f"to draw: {command}"


def _measure(job: Job, embeddings: tuple[Embedding, ...], step: int) -> tuple[Embedding, ...]:
    """The final words: the last, or with ``--keep_best`` the best of each."""
    final = list(embeddings)
    for index, (concept, tracker) in enumerate(zip(job.concepts, job.trackers, strict=bool(job.trackers))):
        with job.clock.phase("measure"):
            finish = partial(tracker.finish, job.sd, embeddings[index], step)
            found = or_warn(f"the word {concept.token}", finish, "measured")
        if found is None:
            continue
        embedding, scores = found
        run_folder.save_embedding(embedding, concept.folder)
        multihost.log_leader(f"{embedding.token} after {embedding.metadata['steps']} steps: {scores}")
        final[index] = embedding
    return tuple(final)
