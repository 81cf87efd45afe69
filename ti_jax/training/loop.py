"""A training run in three phases: `prepare` all that it needs, `compile_step`, and `run` to the last step."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ..config import TrainConfig, resolve
from ..config_yaml import dump_yaml
from ..embeddings import Embedding
from ..errors import InputError
from ..files import write_atomically
from ..machine import enable_compilation_cache, free_memory
from . import processes, run_folder, showing
from .actions import Action, Timetable, make_actions, or_warn
from .fitting import CompiledStep, checked, compile_fitting
from .job import Job, agree, prepare
from .parallel import replicate
from .processes import StopRequests, all_or_raise, is_leader, on_leader
from .reporting import Reporter, say_how_far
from .setup import row_figures
from .step import TrainState


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Attributes:
      embedding: the learned word. losses: float32, one for each update made by this process (a resumed run's own).
      output_dir: the run's folder. seconds: of each phase: "load", "encode", "compile", "train", "measure", "pictures".
      interrupted: the run was asked to stop (SIGTERM, Ctrl-C) and has saved a checkpoint before its last step.
    """

    embedding: Embedding
    losses: np.ndarray
    output_dir: Path
    seconds: dict[str, float]
    interrupted: bool = False


class _Stop:
    """Turns the first SIGTERM or Ctrl-C into a request that the loop honours at the end of the chunk."""

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[_Stop]:
        def ask(number: int, frame: object) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not in the main thread, where Python allows no handlers: whoever runs us stops us
            yield self
            return
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train(config: TrainConfig, devices: Sequence[jax.Device] | None = None, cores: int | None = None) -> TrainResult:
    """Learn a new word as the config says, and write it to ``config.output_dir``.

    Of several processes (see `processes`) each calls this with the same config; the first one writes.

    Args:
      devices: each of them takes ``config.train_batch_size`` samples of a batch; None: all that JAX has.
      cores: from `ti_jax.training.cores.use_cores`: on a CPU its first `cores` devices together take that many
        samples, and `devices` is not looked at; on a GPU or a TPU, and where it is None, nothing changes.

    Raises:
      InputError: something in the config, the pictures or the model is wrong, a disk is full, or the loss became
        non-finite (the last good rows are saved first); here or in another process.
      OutOfStep: likewise, where the other processes cannot be told, or one of them has ended.
    """
    config = resolve(config)
    processes.join(config)
    enable_compilation_cache()
    sharing = 1 if cores is None or jax.default_backend() != "cpu" else cores
    if sharing > 1:
        devices = jax.devices()[:sharing]
    with processes.in_step():
        job = agree(all_or_raise(lambda: prepare(config, devices, sharing)))
        step = compile_step(job)
        return run(job, step)


def compile_step(job: Job) -> CompiledStep:
    """The training step, compiled so that it fits the memory of every process' devices.

    Raises:
      InputError: it cannot.
    """
    memory = processes.smallest(free_memory(job.mesh.local_devices))
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
    on_leader(lambda: _open_folder(config, job.folder))
    processes.log_leader(_summary(job, step))
    with contextlib.ExitStack() as closing:
        if job.checkpoints is not None:
            closing.enter_context(contextlib.closing(job.checkpoints))
        state, losses, interrupted = _loop(job, step)
    embedding = on_leader(lambda: _finish(job, state, interrupted))
    return TrainResult(embedding, np.asarray(losses, np.float32), job.folder, job.clock.seconds, interrupted)


def _loop(job: Job, step: CompiledStep) -> tuple[TrainState, list[float], bool]:
    """The updates, and the actions between them: (state, losses, stopped before the end)."""
    state, now = replicate(job.start, job.mesh), int(job.start.step)
    actions = make_actions(job)
    timetable = Timetable(actions, job.builder.longest_chunk, job.total)
    losses: list[float] = []
    reporter = all_or_raise(lambda: Reporter(job.config, job.folder, now, job.total) if is_leader() else None)

    def read(start: int, end: int, chunk: jax.Array) -> None:
        """Wait for a chunk's losses and log them."""
        values = np.asarray(chunk)[: end - start].tolist()
        if not np.isfinite(values).all():
            on_leader(partial(_give_up, job, state))
        losses.extend(values)
        if reporter is not None:
            reporter.chunk(end, values, float(job.schedule(end - 1)), job.samples_per_step * len(values))

    pending = None  # a chunk whose losses are not read yet, so that the device has the next one to work on already
    stopping, requests = False, StopRequests()
    with contextlib.ExitStack() as closing, _Stop().listening() as stop:
        if reporter is not None:
            closing.enter_context(contextlib.closing(reporter))
        while now < job.total and not stopping:
            end = timetable.next(now)
            requests.tell(stop.requested)
            with job.clock.phase("train"):
                state, chunk = step.program(job.frozen, state, jnp.int32(end - now))
                if pending is not None:
                    read(*pending)
            pending, now = (now, end, chunk), end
            due = timetable.due(now)
            if due or now == job.total:
                with job.clock.phase("train"):
                    read(*pending)
                pending = None
            if due:
                on_leader(partial(_act, due, now, state, reporter))
            stopping = requests.heard(stop.requested)
        if pending is not None:
            read(*pending)
        on_leader(partial(_save, job, state))
        if stopping and reporter is not None:
            reporter.say(f"asked to stop: a checkpoint of step {now} is saved")
    return state, losses, now < job.total


def _open_folder(config: TrainConfig, folder: Path) -> None:
    run_folder.prepare(folder, resume=config.resume_from_checkpoint is not None)
    write_atomically(folder / "config.yaml", dump_yaml(config).encode())


def _summary(job: Job, step: CompiledStep) -> str:
    """A line on what is trained, and on what."""
    on_hosts = "" if jax.process_count() == 1 else f" in {jax.process_count()} processes"
    way = step.gradient_checkpointing
    checkpointing = "" if way == "none" else f"gradient checkpointing {way}; "
    return (
        f"{job.sd.name}, {job.mesh.size} x {job.mesh.devices.flat[0].device_kind}{on_hosts}, "
        f"{np.dtype(job.sd.dtype).name}: {len(job.concept.pictures.pixels)} pictures, {len(job.concept.prompts)} "
        f"prompts, {job.samples_per_step} samples a step; {checkpointing}the training step took "
        f"{job.clock.seconds['compile']:.1f} s to compile"
    )


def _act(due: Sequence[Action], step: int, state: TrainState, reporter: Reporter | None) -> None:
    assert reporter is not None, "the first process has one"
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


def _finish(job: Job, state: TrainState, interrupted: bool) -> Embedding:
    """Tell what was learned; unless the run is to go on later, measure it, draw with it and push it, too."""
    last = int(state.step)
    embedding = job.concept.embedding(state.rows, last)
    say_how_far(row_figures(job.concept, state.rows, job.usual_norms), last)
    if not interrupted:
        embedding = _measure(job, embedding, last)
        with job.clock.phase("pictures"):
            draw = partial(showing.save_overview, job.config, job.sd, job.concept, embedding, job.folder)
            or_warn("the overview", draw)
        if job.push is not None:
            job.push(job.folder, embedding)
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in job.clock.seconds.items())
    if len(embedding.vectors) > 1:
        processes.log_leader(
            f"{job.folder / run_folder.ONE_FILE}: the same word in one file, for AUTOMATIC1111 and ComfyUI; "
            "learned_embeds and learned_embeds_2 are for diffusers"
        )
    processes.log_leader(f"{job.folder / run_folder.EMBEDDING_FILE}: {embedding.token} after {last} steps ({phases})")
    return embedding


def _measure(job: Job, embedding: Embedding, step: int) -> Embedding:
    """The word that the run ends with: the last, or with ``--keep_best`` the best."""
    measuring = job.measuring
    if measuring is None:
        return embedding
    with job.clock.phase("measure"):
        found = or_warn("the word", lambda: measuring.finish(job.sd, embedding, step), "measured")
    if found is None:
        return embedding
    embedding, scores = found
    run_folder.save_embedding(embedding, job.folder)
    processes.log_leader(f"{embedding.token} after {embedding.metadata['steps']} steps: {scores}")
    return embedding
