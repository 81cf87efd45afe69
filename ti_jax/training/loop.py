"""The training run: set up, compile, dispatch chunks of steps, and between chunks log, save, draw and resume."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..config import TrainConfig, resolve
from ..config_yaml import dump_yaml
from ..embeddings import Embedding
from ..errors import InputError
from ..files import ensure_writable_folder, write_atomically
from ..machine import free_memory
from ..pipeline import StableDiffusion
from . import processes, run_folder, showing
from .checkpoint import Checkpoints, fingerprint
from .fitting import CompiledStep, compile_step
from .measuring import Measuring, make_measuring
from .optimizer import make_optimizer
from .parallel import AXIS, make_mesh, make_run_steps, replicate, share_memory, without_copies
from .processes import StopRequests, all_or_raise, is_leader, on_leader
from .reporting import Reporter
from .setup import Concept, make_dataset, prepare_concept, row_figures
from .step import Frozen, TrainState, make_train_step


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


class _Clock:
    """Seconds of each phase of the run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def total_updates(config: TrainConfig, num_pictures: int, global_batch: int) -> int:
    """Updates in the run: ``max_train_steps``, or what ``num_train_epochs`` passes of the repeated pictures take."""
    if config.max_train_steps is not None:
        return config.max_train_steps
    assert config.num_train_epochs is not None, "the config is resolved"
    return config.num_train_epochs * math.ceil(num_pictures * config.repeats / global_batch)


def next_stop(config: TrainConfig, step: int, total: int) -> int:
    """The step at which the host is next needed: to log, save, draw, or end."""
    intervals = [config.logging_steps, config.save_steps, config.checkpointing_steps]
    if config.validation_prompt is not None:
        intervals.append(config.validation_steps)
    if config.keep_best is not None:
        intervals.append(config.evaluation_steps)
    return min(total, *((step // interval + 1) * interval for interval in intervals))


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
    with processes.in_step():
        if cores is None or jax.default_backend() != "cpu":
            return _train(config, devices, 1)
        return _train(config, jax.devices()[:cores], cores)


def _train(config: TrainConfig, devices: Sequence[jax.Device] | None, sharing: int) -> TrainResult:
    clock = _Clock()
    folder = on_leader(lambda: ensure_writable_folder(config.output_dir))
    push = all_or_raise(lambda: _open_hub(config) if is_leader() else None)
    with clock.phase("load"):
        sd, concept = all_or_raise(lambda: _load(config))
    config = dataclasses.replace(config, resolution=concept.pictures.pixels.shape[1])
    measuring = all_or_raise(lambda: make_measuring(config, sd, concept, folder) if is_leader() else None)
    # Only now, when nothing about the input can be wrong any more: a mistyped command displaces no results.
    on_leader(lambda: _open_folder(config, folder))

    mesh = make_mesh(devices)
    with clock.phase("encode"):
        dataset = make_dataset(config, sd, concept)
    assert config.train_batch_size is not None, "the config is resolved"
    batch_size = config.train_batch_size // sharing
    samples_per_step = batch_size * config.gradient_accumulation_steps * mesh.size
    total = total_updates(config, len(concept.pictures.pixels), samples_per_step)
    optimizer, schedule = make_optimizer(config, total, samples_per_step)

    frozen = replicate(
        Frozen(
            params=without_copies({name: tree for name, tree in sd.params.items() if name != "vae"}),
            schedule=sd.schedule,
            dataset=dataset,
            row_mask={name: jnp.asarray(mask) for name, mask in concept.row_mask.items()},
            key=jax.random.key(config.seed),
        ),
        mesh,
    )
    # The loop's copy on the first device also serves to draw with.
    sd = dataclasses.replace(
        sd, params={**sd.params, **jax.tree.map(lambda leaf: leaf.addressable_data(0), frozen.params)}
    )
    rows = {name: jnp.asarray(value) for name, value in concept.rows.items()}
    start = TrainState(rows, optimizer.init(rows), jnp.int32(0), jnp.bool_(True))
    identity = fingerprint(
        config,
        model_identity=sd.identity,
        prediction_type=sd.schedule.prediction_type,
        dtype=sd.dtype,
        pixels=concept.pictures.pixels,
        prompts=concept.prompts,
        words=concept.words,
        initializer_embedding=concept.metadata.get("initializer_embedding_hash"),
        global_batch=samples_per_step // config.gradient_accumulation_steps,
        total_steps=total,
    )
    processes.check_same(identity)
    checkpoints = all_or_raise(
        lambda: Checkpoints(folder / "checkpoints", config.checkpoints_total_limit, identity) if is_leader() else None
    )
    with _closing(checkpoints):
        if config.resume_from_checkpoint is not None:
            start = on_leader(lambda: _resume(config, checkpoints, measuring, start, total))
        state = replicate(start, mesh)

        def lower(gradient_checkpointing: str) -> jax.stages.Lowered:
            train_step = make_train_step(
                sd.networks.with_gradient_checkpointing(gradient_checkpointing),
                optimizer,
                batch_size=batch_size,
                accumulation=config.gradient_accumulation_steps,
                num_devices=mesh.size,
                axis_name=AXIS,
                shared_memory=share_memory(mesh),
            )
            longest_chunk = min(config.logging_steps, total)
            return make_run_steps(train_step, mesh, longest_chunk).lower(frozen, state, jnp.int32(1))

        memory = processes.smallest(free_memory(mesh.local_devices))
        if memory is not None:
            memory += sum(leaf.nbytes for leaf in jax.tree.leaves((frozen, state)))
        with clock.phase("compile"):
            compiled = all_or_raise(lambda: checked(compile_step(lower, config.gradient_checkpointing, memory), memory))
        # Once more, with what was chosen: another machine, or a fuller one, would choose something else.
        config = dataclasses.replace(config, gradient_checkpointing=compiled.gradient_checkpointing)
        on_leader(lambda: write_atomically(folder / "config.yaml", dump_yaml(config).encode()))
        on_hosts = "" if jax.process_count() == 1 else f" in {jax.process_count()} processes"
        way = compiled.gradient_checkpointing
        checkpointing = "" if way == "none" else f"gradient checkpointing {way}; "
        processes.log_leader(
            f"{sd.name}, {mesh.size} x {mesh.devices.flat[0].device_kind}{on_hosts}, {np.dtype(sd.dtype).name}: "
            f"{len(concept.pictures.pixels)} pictures, {len(concept.prompts)} prompts, {samples_per_step} samples a "
            f"step; {checkpointing}the training step took {clock.seconds['compile']:.1f} s to compile"
        )
        run = _Run(config, sd, concept, folder, checkpoints, measuring, schedule, clock, total, samples_per_step)
        state, losses, interrupted = run.go(compiled.program, frozen, state)
    embedding = on_leader(lambda: run.finish(state, push, interrupted))
    return TrainResult(embedding, np.asarray(losses, np.float32), folder, clock.seconds, interrupted)


def _open_hub(config: TrainConfig) -> Callable[[Path, Embedding], None] | None:
    if not config.push_to_hub:
        return None
    from . import hub

    return hub.open_repository(config)


def _load(config: TrainConfig) -> tuple[StableDiffusion, Concept]:
    sd = StableDiffusion.from_config(config)
    # The autoencoder encodes the pictures once, and draws now and then: it lies on a device only while it runs.
    sd = dataclasses.replace(sd, params={**sd.params, "vae": jax.device_get(sd.params["vae"])})
    return sd, prepare_concept(config, sd, processes.log_leader)


def _open_folder(config: TrainConfig, folder: Path) -> None:
    run_folder.prepare(folder, resume=config.resume_from_checkpoint is not None)
    write_atomically(folder / "config.yaml", dump_yaml(config).encode())


def _closing(thing: Any) -> contextlib.AbstractContextManager:
    """Closes ``thing`` behind it, if it is not None."""
    return contextlib.nullcontext() if thing is None else contextlib.closing(thing)


def _resume(
    config: TrainConfig, checkpoints: Checkpoints | None, measuring: Measuring | None, start: TrainState, total: int
) -> TrainState:
    """The state to go on from, in arrays of the host."""
    assert config.resume_from_checkpoint is not None and checkpoints is not None, "the first process has them"
    restored = checkpoints.restore(config.resume_from_checkpoint, start)
    if restored is None:
        processes.log_leader(f"no checkpoint in {checkpoints.folder} yet: starting from the beginning")
    else:
        processes.log_leader(f"resuming at step {int(restored.step)} of {total}")
    state = jax.device_get(start if restored is None else restored)
    if measuring is not None:
        measuring.resume(int(state.step))
    return state


class _Run:
    """The host's side of the loop: everything between two dispatches, and behind the last."""

    def __init__(self, config, sd, concept, folder, checkpoints, measuring, schedule, clock, total, samples_per_step):
        self.config: TrainConfig = config
        self.sd: StableDiffusion = sd
        self.concept: Concept = concept
        self.folder: Path = folder
        self.checkpoints: Checkpoints = checkpoints
        self.measuring: Measuring | None = measuring
        self.schedule = schedule
        self.clock: _Clock = clock
        self.total: int = total
        self.samples_per_step: int = samples_per_step
        self.losses: list[float] = []

    def go(self, run_steps, frozen: Frozen, state: TrainState) -> tuple[TrainState, list[float], bool]:
        """Run to the last step, or to a request to stop: (state, losses, stopped early)."""
        step = int(state.step)
        pending = None  # a chunk whose losses are not read yet, so that the device has the next one to work on already
        stopping, requests = False, StopRequests()
        self.reporter = all_or_raise(
            lambda: Reporter(self.config, self.folder, step, self.total) if is_leader() else None
        )
        with _closing(self.reporter), _Stop().listening() as stop:
            while step < self.total and not stopping:
                end = next_stop(self.config, step, self.total)
                requests.tell(stop.requested)
                with self.clock.phase("train"):
                    state, losses = run_steps(frozen, state, jnp.int32(end - step))
                    if pending is not None:
                        self._read(*pending, state)
                pending = (step, end, losses)
                step = end
                if step == self.total or self._needed_at(step):
                    with self.clock.phase("train"):
                        self._read(*pending, state)
                    pending = None
                    on_leader(partial(self._events, step, state))
                stopping = requests.heard(stop.requested)
            if pending is not None:
                self._read(*pending, state)
            if stopping and self.reporter is not None:
                self.reporter.say(f"asked to stop: a checkpoint of step {step} is saved")
            on_leader(lambda: self.checkpoints.save(state))
        return state, self.losses, step < self.total

    def _read(self, start: int, end: int, losses: jax.Array, state: TrainState) -> None:
        """Wait for a chunk's losses and log them; a non-finite one ends the run with the last good rows saved."""
        values = np.asarray(losses)[: end - start].tolist()
        if not np.isfinite(values).all():
            on_leader(partial(self._give_up, state))
        self.losses += values
        if self.reporter is not None:
            self.reporter.chunk(end, values, float(self.schedule(end - 1)), self.samples_per_step * len(values))

    def _give_up(self, state: TrainState) -> None:
        good = int(state.step)
        run_folder.save_embedding(self.concept.embedding(state.rows, good), self.folder)
        raise InputError(
            f"the loss became non-finite at step {good + 1}; the rows of step {good} are saved in "
            f"{self.folder / run_folder.EMBEDDING_FILE}: use a lower --learning_rate "
            f"({float(self.schedule(good)):g} there)"
        )

    def _to_measure_at(self, step: int) -> bool:
        return self.config.keep_best is not None and step % self.config.evaluation_steps == 0

    def _needed_at(self, step: int) -> bool:
        config = self.config
        return (
            step % config.save_steps == 0
            or step % config.checkpointing_steps == 0
            or (config.validation_prompt is not None and step % config.validation_steps == 0)
            or self._to_measure_at(step)
        )

    def _events(self, step: int, state: TrainState) -> None:
        """Save and draw what is due at this step."""
        config, reporter = self.config, self.reporter
        assert reporter is not None, "the first process has one"
        for row in row_figures(self.sd, self.concept, state.rows):
            name = f"{row['encoder']}/row_{row['row']}"
            reporter.rows(step, {f"{name}/{key}": row[key] for key in ("distance", "cosine", "norm")})
        if step % config.checkpointing_steps == 0:
            self.checkpoints.save(state)
        if step % config.save_steps == 0:
            run_folder.save_embedding(self.concept.embedding(state.rows, step), self.folder, step)
        if config.validation_prompt is not None and step % config.validation_steps == 0:
            with self.clock.phase("pictures"):
                image = showing.save_validation(
                    config, self.sd, self.concept, self.concept.embedding(state.rows, step), self.folder, step
                )
            reporter.picture("validation", image, step)
        if self.measuring is not None and self._to_measure_at(step):
            with self.clock.phase("measure"):
                scores = self.measuring.measure(self.sd, self.concept.embedding(state.rows, step), step)
            reporter.say(f"step {step}: {scores}")
        reporter.pause()

    def finish(self, state: TrainState, push: Callable[[Path, Embedding], None] | None, interrupted: bool) -> Embedding:
        """Save the word; unless the run is to go on later, measure it, draw with it and push it, too."""
        final_step = int(state.step)
        embedding = self.concept.embedding(state.rows, final_step)
        run_folder.save_embedding(embedding, self.folder)
        say_how_far(row_figures(self.sd, self.concept, state.rows), final_step)
        if not interrupted:
            if self.measuring is not None:
                with self.clock.phase("measure"):
                    embedding, scores = self.measuring.finish(self.sd, embedding, final_step)
                run_folder.save_embedding(embedding, self.folder)
                processes.log_leader(f"{embedding.token} after {embedding.metadata['steps']} steps: {scores}")
            with self.clock.phase("pictures"):
                showing.save_overview(self.config, self.sd, self.concept, embedding, self.folder)
            if push is not None:
                push(self.folder, embedding)
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.clock.seconds.items())
        processes.log_leader(
            f"{self.folder / run_folder.EMBEDDING_FILE}: {embedding.token} after {final_step} steps ({phases})"
        )
        return embedding


def checked(compiled: CompiledStep | None, memory: float | None) -> CompiledStep:
    """The compiled step, if there is one; with a warning if it takes more than the `memory` in bytes that a device has.

    Raises:
      InputError: the compiler has found that it cannot fit.
    """
    remedy = "give a smaller --train_batch_size (--gradient_accumulation_steps makes up for it) or --resolution"
    if compiled is None or compiled.gradient_checkpointing != "full":
        remedy += ", and leave out --gradient_checkpointing"
    if compiled is None:
        raise InputError(f"the training step does not fit the device's memory, says the compiler: {remedy}")
    if not compiled.fits and memory is not None:
        processes.log_leader(
            f"warning: the training step takes {compiled.memory / 1e9:.1f} GB with --gradient_checkpointing "
            f"{compiled.gradient_checkpointing} and {memory / 1e9:.1f} GB are free, so it may not run: {remedy}"
        )
    return compiled


def say_how_far(figures: list[dict], step: int) -> None:
    """Tell on stderr how far each row moved, and warn of rows that did not."""
    for row in figures:
        where = f"row {row['row']}" + ("" if row["encoder"] == "text_encoder" else f" of {row['encoder']}")
        if row["distance"] == 0.0 and step > 0:
            print(
                f"warning: {where} did not move at all in {step} steps: nothing was learned (is the learning rate 0?)",
                file=sys.stderr,
            )
            continue
        print(
            f"{where} moved by {row['distance']:.3f} (cosine to its start {row['cosine']:.2f}); its norm is "
            f"{row['norm']:.2f}, the vocabulary's usual one {row['usual_norm']:.2f}",
            file=sys.stderr,
        )
        if row["norm"] > 4.0 * row["usual_norm"]:
            print(
                f"warning: {where} is much longer than the words that the model knows; it may drown the rest of a "
                f"prompt. A lower --learning_rate or fewer steps keep it shorter",
                file=sys.stderr,
            )
