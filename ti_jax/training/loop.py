"""A training run in three phases: `prepare` all that it needs, `compile_step`, and `run` to the last step."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np

from ti_jax import interrupts
from ti_jax.config import TrainConfig, resolve
from ti_jax.config.yaml import dump_yaml
from ti_jax.embeddings import Embedding
from ti_jax.errors import InputError
from ti_jax.files import write_atomically
from ti_jax.machine import enable_compilation_cache, free_memory
from ti_jax.training import multihost, run_folder, validation
from ti_jax.training.actions import Action, Timetable, make_actions, or_warn
from ti_jax.training.compile import CompiledStep, checked, compile_fitting
from ti_jax.training.cpu_devices import use_cores
from ti_jax.training.job import Job, agree, prepare
from ti_jax.training.multihost import StopRequests, all_or_raise, is_leader, on_leader
from ti_jax.training.parallel import replicate
from ti_jax.training.report import Reporter, print_row_figures
from ti_jax.training.rows import row_figures
from ti_jax.training.step import TrainState


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Attributes:
      embedding: the learned word. losses: float32, one for each update made by this process (a resumed run's own).
      output_dir: the run's folder. seconds: of each phase: "load", "encode", "compile", "train", "measure", "pictures".
      interrupted: the run was asked to stop (Ctrl-C, SIGTERM, SIGHUP) before it was done, and has saved a checkpoint.
    """

    embedding: Embedding
    losses: np.ndarray
    output_dir: Path
    seconds: dict[str, float]
    interrupted: bool = False


def train(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> TrainResult:
    """Learn a new word as the config says, and write it to ``config.output_dir``.

    Compiled programs are kept on disk (`enable_compilation_cache`). Of several processes (see `processes`) each calls
    this with the same config; the first one writes.

    Args:
      devices: each of them takes ``config.train_batch_size`` samples of a batch. None: all that JAX has; on a CPU its
        cores share these samples (`ti_jax.training.cpu_devices`).

    Raises:
      InputError: something in the config, the pictures or the model is wrong, another run has the folder, a disk is
        full, or the loss became non-finite (the last good rows are saved first); here or in another process.
      OutOfStep: likewise, where the other processes cannot be told, or one of them has ended.
    """
    config = resolve(config)
    cores = use_cores(config) if devices is None else None
    multihost.join(config)
    enable_compilation_cache()
    sharing = 1
    if cores is not None and jax.default_backend() == "cpu":
        devices, sharing = jax.devices()[:cores], cores
    with multihost.in_step(), contextlib.ExitStack() as holding:
        job = agree(all_or_raise(lambda: prepare(config, devices, sharing, holding)))
        return run(job, compile_step(job))


def compile_step(job: Job) -> CompiledStep:
    """The training step, compiled so that it fits the memory of every process' devices.

    Raises:
      InputError: it cannot.
    """
    memory = multihost.smallest(free_memory(job.mesh.local_devices))
    if memory is not None:
        memory += sum(leaf.nbytes for leaf in jax.tree.leaves((job.frozen, job.start)))
    lower = partial(job.builder.lower, job.frozen, job.start)
    with job.clock.phase("compile"):
        return all_or_raise(lambda: checked(compile_fitting(lower, job.config.gradient_checkpointing, memory), memory))


def run(job: Job, step: CompiledStep) -> TrainResult:
    """Train to the last step, or to a request to stop; then save the word, and show what it draws."""
    # With what was chosen: another machine, or a fuller one, would choose something else.
    config = dataclasses.replace(job.config, gradient_checkpointing=step.gradient_checkpointing)
    # Only now, when nothing about the input can be wrong any more: a mistyped command displaces no results.
    on_leader(lambda: _open_folder(config, job))
    multihost.log_leader(_summary(job, step))
    # Several processes have to do an action together, or not at all: there it is finished first.
    with interrupts.deferred(abandon=jax.process_count() == 1):
        state, losses, stopped = _loop(job, step)
        embedding, finished = on_leader(lambda: _finish(job, state, stopped))
    return TrainResult(embedding, np.asarray(losses, np.float32), job.folder, job.clock.seconds, not finished)


def _loop(job: Job, step: CompiledStep) -> tuple[TrainState, list[float], bool]:
    """The updates, and the actions between them: (state, losses, stopped before the end)."""
    state, now = replicate(job.start, job.mesh), int(job.start.step)
    actions = make_actions(job)
    timetable = Timetable(actions, job.builder.longest_chunk, job.total)
    pace, losses, unlogged = Pace(job.builder.longest_chunk), [], []
    reporter = all_or_raise(lambda: Reporter(job.config, job.folder, now, job.total) if is_leader() else None)

    def read(start: int, end: int, chunk: jax.Array, dispatched: float) -> None:
        """Wait for a chunk's losses; log them where the timetable says so."""
        values = np.asarray(chunk)[: end - start].tolist()
        if not np.isfinite(values).all():
            on_leader(partial(_give_up, job, state))
        pace.measured(end - start, dispatched)
        losses.extend(values)
        unlogged.extend(values)
        if reporter is not None:
            reporter.progress(len(values))
            if end == timetable.next(end - 1) or end == now:
                rate = float(job.schedule(end - 1))
                reporter.chunk(end, list(unlogged), rate, job.samples_per_step * len(unlogged))
                unlogged.clear()

    pending = None  # a chunk whose losses are not read yet, so that the device has the next one to work on already
    stopping, requests = False, StopRequests()
    with contextlib.ExitStack() as closing:
        if reporter is not None:
            closing.enter_context(contextlib.closing(reporter))
        if now:
            on_leader(partial(_act, [each for each in timetable.due(now) if not each.done(now)], now, state, reporter))
        while now < job.total and not stopping:
            end = min(timetable.next(now), now + pace.steps)
            requests.send(interrupts.requested())
            with job.clock.phase("train"):
                dispatched, count = time.perf_counter(), replicate(np.int32(end - now), job.mesh)
                with jax.transfer_guard("disallow"):  # everything is on the devices already
                    state, chunk = step.program(job.frozen, state, count)
                if pending is not None:
                    read(*pending)
            pending, now = (now, end, chunk, dispatched), end
            due = timetable.due(now)
            if due or now == job.total:
                with job.clock.phase("train"):
                    read(*pending)
                pending = None
            if due:
                on_leader(partial(_act, due, now, state, reporter))
            stopping = requests.received(interrupts.requested())
        if pending is not None:
            read(*pending)
        on_leader(partial(_save, job, state))
        if stopping and reporter is not None:
            reporter.print_line(f"asked to stop: a checkpoint of step {now} is saved")
    return state, losses, now < job.total


class Pace:
    """How many updates a dispatch has, so that it takes about a second: no request to stop waits for longer.

    How the updates are cut into dispatches changes no number. Several processes take the slowest one's pace.
    """

    SECONDS = 1.0

    def __init__(self, longest: int):
        self.steps, self._longest = 1, longest
        self._settled = False
        self._last_read = 0.0

    def measured(self, steps: int, dispatched: float) -> None:
        """A chunk of ``steps`` was read just now; it began when it was ``dispatched``, or after the one before."""
        now = time.perf_counter()
        seconds = now - max(dispatched, self._last_read)
        self._last_read = now
        if self._settled:
            return
        wanted = min(max(1, int(steps * self.SECONDS / seconds)), 2 * self.steps, self._longest)
        agreed = int(multihost.smallest(wanted) or 1)
        # Agreeing takes the processes a round trip, so that they do it no more often than they must.
        self._settled = jax.process_count() > 1 and (agreed <= self.steps or agreed == self._longest)
        self.steps = agreed


def _open_folder(config: TrainConfig, job: Job) -> None:
    assert job.checkpoints is not None, "the first process has them"
    job.checkpoints.identity["gradient_checkpointing"] = config.gradient_checkpointing
    run_folder.prepare(job.folder, None if config.resume_from_checkpoint is None else int(job.start.step))
    write_atomically(job.folder / "config.yaml", dump_yaml(config).encode())


def _summary(job: Job, step: CompiledStep) -> str:
    """A line on what is trained, and on what."""
    on_hosts = "" if jax.process_count() == 1 else f" in {jax.process_count()} processes"
    policy = step.gradient_checkpointing
    checkpointing = "" if policy == "none" else f"gradient checkpointing {policy}; "
    return (
        f"{job.sd.name}, {job.mesh.size} x {job.mesh.devices.flat[0].device_kind}{on_hosts}, "
        f"{np.dtype(job.sd.dtype).name}: {len(job.concept.pictures.pixels)} pictures, {len(job.concept.prompts)} "
        f"prompts, {job.samples_per_step} samples a step; {checkpointing}the training step took "
        f"{job.clock.seconds['compile']:.1f} s to compile"
    )


def _act(due: Sequence[Action], step: int, state: TrainState, reporter: Reporter | None) -> None:
    """The actions of a step. What a request to stop leaves undone is done when the run resumes there."""
    assert reporter is not None, "the first process has one"
    with contextlib.suppress(interrupts.Interrupted):
        for action in due:
            action(step, state, reporter)
    reporter.pause()


def _save(job: Job, state: TrainState) -> None:
    """The word and a checkpoint; the word first, for on a disk that is nearly full it is the word that counts."""
    assert job.checkpoints is not None, "the first process has them"
    run_folder.save_embedding(job.concept.embedding(state.rows, int(state.step)), job.folder)
    job.checkpoints.save(state)


def _give_up(job: Job, state: TrainState) -> None:
    """End a run whose loss is not finite, with the last good rows saved."""
    good = int(state.step)
    run_folder.save_embedding(job.concept.embedding(state.rows, good), job.folder)
    raise InputError(
        f"the loss became non-finite at step {good + 1}; the rows of step {good} are saved in "
        f"{job.folder / run_folder.EMBEDDING_FILE}: use a lower --learning_rate "
        f"({float(job.schedule(good)):g} there)"
    )


def _finish(job: Job, state: TrainState, stopped: bool) -> tuple[Embedding, bool]:
    """Tell what was learned; unless the run is to go on later, measure it, draw with it and push it, too.

    Returns:
      The word that the run ends with, and whether it is done.
    """
    last = int(state.step)
    embedding = job.concept.embedding(state.rows, last)
    print_row_figures(row_figures(job.concept, state.rows, job.usual_norms), last)
    try:
        if not stopped:
            embedding = _measure(job, embedding, last)
            with job.clock.phase("pictures"):
                draw = partial(validation.save_overview, job.config, job.sd, job.concept, embedding, job.folder)
                or_warn("the overview", draw)
            if job.push is not None:
                interrupts.interruptible(partial(job.push, job.folder, embedding))
    except interrupts.Interrupted:
        stopped = True
        multihost.log_leader("asked to stop: all steps are made; --resume_from_checkpoint latest does what is left")
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in job.clock.seconds.items())
    if len(embedding.vectors) > 1:
        multihost.log_leader(
            f"{job.folder / run_folder.ONE_FILE}: the same word in one file, for AUTOMATIC1111 and ComfyUI; "
            "learned_embeds and learned_embeds_2 are for diffusers"
        )
    multihost.log_leader(f"{job.folder / run_folder.EMBEDDING_FILE}: {embedding.token} after {last} steps ({phases})")
    return embedding, not stopped


def _measure(job: Job, embedding: Embedding, step: int) -> Embedding:
    """The word that the run ends with: the last, or with ``--keep_best`` the best."""
    tracker = job.tracker
    if tracker is None:
        return embedding
    with job.clock.phase("measure"):
        found = or_warn("the word", lambda: tracker.finish(job.sd, embedding, step), "measured")
    if found is None:
        return embedding
    embedding, scores = found
    run_folder.save_embedding(embedding, job.folder)
    multihost.log_leader(f"{embedding.token} after {embedding.metadata['steps']} steps: {scores}")
    return embedding
