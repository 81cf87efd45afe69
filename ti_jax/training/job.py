"""The first phase of a run: check and build everything that it needs, before the first step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ti_jax.config import Checkpointing, TrainConfig
from ti_jax.data.concept import Concept, Inputs, LogLine, check_concept, hash_of_vectors, read_inputs, with_rows
from ti_jax.data.dataset import make_dataset
from ti_jax.embeddings import Embedding
from ti_jax.files import ensure_writable_folder
from ti_jax.ops.platform import Platform
from ti_jax.pipeline import StableDiffusion
from ti_jax.pipeline.model_description import open_model_of
from ti_jax.training import multihost, run_folder
from ti_jax.training.checkpoint import Checkpoints, fingerprint
from ti_jax.training.compile import StepBuilder
from ti_jax.training.measure import ScoreTracker, make_score_tracker
from ti_jax.training.multihost import is_leader
from ti_jax.training.optimizer import make_optimizer, warmup_note
from ti_jax.training.parallel import make_mesh, replicate, without_copies
from ti_jax.training.rows import usual_norms
from ti_jax.training.step import StepInputs, TrainState
from ti_jax.training.validation import check_pictures_to_draw


class Clock:
    """Wall time in seconds of each phase of the run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent within it to the phase ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Job:
    """A run that is ready for its first step.

    Attributes:
      config: resolved, including ``resolution``. folder: the output folder.
      sd: the frozen model; its weights on the first device are shared with the loop. concept: what is learned.
      frozen: the step's constant inputs. start: the initial state, as NumPy arrays.
      builder: of the training step. schedule: learning rate by update. total: number of updates in the run.
      usual_norms: median norm of the frozen token embeddings, by text encoder.
      checkpoints, tracker, push: on the leader process only; the last two only if the config asks for them.
    """

    config: TrainConfig
    folder: Path
    sd: StableDiffusion
    concept: Concept
    frozen: StepInputs
    start: TrainState
    builder: StepBuilder
    schedule: optax.Schedule
    total: int
    usual_norms: dict[str, float]
    checkpoints: Checkpoints | None
    tracker: ScoreTracker | None
    push: Callable[[Path, Embedding], None] | None
    clock: Clock = field(default_factory=Clock)

    @property
    def mesh(self) -> Mesh:
        """The devices of the run."""
        return self.builder.mesh

    @property
    def samples_per_step(self) -> int:
        """Samples per update, over all devices and micro-batches."""
        return self.builder.samples

    @property
    def fingerprint(self) -> dict:
        """Everything that the rows at a step depend on, see `ti_jax.training.checkpoint.fingerprint`."""
        return fingerprint(
            self.config,
            model_identity=self.sd.identity,
            prediction_type=self.sd.schedule.prediction_type,
            dtype=self.sd.dtype,
            pixels=self.concept.pictures.pixels,
            prompts=self.concept.prompts,
            words=self.concept.words,
            initializer_embedding=self.concept.metadata.get("initializer_embedding_hash"),
            embeddings=hash_of_vectors(self.concept.others),
            global_batch=self.samples_per_step // self.config.gradient_accumulation_steps,
            total_steps=self.total,
        )


def prepare(
    config: TrainConfig, devices: Sequence[jax.Device] | None, sharing: int, holding: contextlib.ExitStack
) -> Job:
    """Load, check and build everything that the run needs, cheapest checks first. Nothing in the folder is changed.

    Every process does this for itself, so that it may fail in one of them; see `agree`.

    Args:
      config: resolved. devices: to train on; None: all. sharing: number of devices that share ``train_batch_size``.
      holding: receives the contexts to keep open until the run ends: the folder's lock and the checkpoints.

    Raises:
      InputError: something in the config, the pictures or the model is wrong.
    """
    clock = Clock()
    run_folder.check_apart(config)
    folder = Path(config.output_dir)
    if is_leader():
        ensure_writable_folder(folder)
        holding.enter_context(run_folder.locked(folder))
        run_folder.check_free(folder)
    inputs = read_inputs(config, multihost.log_leader)
    push = _open_hub(config) if is_leader() else None
    with clock.phase("load"):
        sd, concept = load(config, inputs)
    config = dataclasses.replace(config, resolution=concept.pictures.pixels.shape[1])
    tracker = make_score_tracker(config, sd, concept, folder) if is_leader() else None
    with clock.phase("encode"):
        dataset = make_dataset(config, sd, concept)

    mesh = make_mesh(devices)
    assert config.train_batch_size is not None, "the config is resolved"
    batch_size = config.train_batch_size // sharing
    samples_per_step = batch_size * config.gradient_accumulation_steps * mesh.size
    total = total_updates(config, len(concept.pictures.pixels), samples_per_step)
    optimizer, schedule = make_optimizer(config, total, samples_per_step)
    if (note := warmup_note(config, total)) is not None:
        multihost.log_leader(note)
    frozen = replicate(
        StepInputs(
            params=without_copies({name: tree for name, tree in sd.params.items() if name != "vae"}),
            schedule=sd.schedule,
            dataset=dataset,
            row_mask={name: jnp.asarray(mask) for name, mask in concept.row_mask.items()},
            key=jax.random.key(config.seed),
        ),
        mesh,
    )
    # Pictures are drawn with the loop's copy of the weights on the first device.
    drawn_with = jax.tree.map(lambda leaf: leaf.addressable_data(0), frozen.params)
    networks = sd.networks.compiled_for(Platform.of(mesh.devices.flat[0]))
    sd = dataclasses.replace(sd, params={**sd.params, **drawn_with}, networks=networks)
    rows = {name: jnp.asarray(value) for name, value in concept.rows.items()}
    start = jax.device_get(TrainState(rows, optimizer.init(rows), jnp.int32(0), jnp.bool_(True)))
    builder = StepBuilder(
        sd.networks,
        optimizer,
        mesh,
        batch_size=batch_size,
        accumulation=config.gradient_accumulation_steps,
        longest_chunk=min(config.logging_steps, total),
    )
    checkpoints = None
    if is_leader():
        checkpoints = Checkpoints(folder / "checkpoints", config.checkpoints_total_limit)
        holding.enter_context(contextlib.closing(checkpoints))
    return Job(
        config, folder, sd, concept, frozen, start, builder, schedule, total, usual_norms(sd), checkpoints, tracker,
        push, clock,
    )  # fmt: skip


def agree(job: Job) -> Job:
    """Check that the job is the same on all processes, and load the checkpoint to resume from on the leader.

    Raises:
      InputError: settings or files differ between processes, or the checkpoint cannot be used.
    """
    identity = job.fingerprint
    multihost.check_same(identity)
    if job.checkpoints is not None:
        job.checkpoints.identity = identity
    if job.config.resume_from_checkpoint is None:
        return job
    start, gradient_checkpointing = multihost.on_leader(lambda: _resume(job))
    config = dataclasses.replace(job.config, gradient_checkpointing=gradient_checkpointing)
    return dataclasses.replace(job, start=start, config=config)


def _resume(job: Job) -> tuple[TrainState, Checkpointing | None]:
    """The state to resume from, as NumPy arrays, and the rematerialisation policy that it was computed with."""
    assert job.config.resume_from_checkpoint is not None and job.checkpoints is not None, (
        "only the leader process has them"
    )
    restored = job.checkpoints.restore(job.config.resume_from_checkpoint, job.start)
    if restored is None:
        multihost.log_leader(f"no checkpoint in {job.checkpoints.folder} yet: starting from the beginning")
    else:
        multihost.log_leader(f"resuming at step {int(restored.step)} of {job.total}")
    state = jax.device_get(job.start if restored is None else restored)
    if job.tracker is not None:
        step = int(state.step)
        job.tracker.resume(job.concept.embedding(state.rows, step), step)
    return state, job.checkpoints.identity["gradient_checkpointing"]


def load(config: TrainConfig, inputs: Inputs) -> tuple[StableDiffusion, Concept]:
    """The frozen model, with the VAE's weights on the host, and the concept.

    Raises:
      InputError: something is wrong with either.
    """
    sd, concept = load_model_and_concept(config, inputs, multihost.log_leader)
    # The VAE encodes the pictures once and decodes now and then: its weights are on a device only while it runs.
    sd = dataclasses.replace(sd, params={**sd.params, "vae": jax.device_get(sd.params["vae"])})
    return sd, concept


def _open_hub(config: TrainConfig) -> Callable[[Path, Embedding], None] | None:
    if not config.push_to_hub:
        return None
    from ti_jax.training import hub

    return hub.open_repository(config)


def total_updates(config: TrainConfig, num_pictures: int, global_batch: int) -> int:
    """Updates in the run: ``max_train_steps``, or those of ``num_train_epochs`` epochs over the repeated pictures."""
    if config.max_train_steps is not None:
        return config.max_train_steps
    assert config.num_train_epochs is not None, "the config is resolved"
    return config.num_train_epochs * math.ceil(num_pictures * config.repeats / global_batch)


def load_model_and_concept(config: TrainConfig, inputs: Inputs, log: LogLine) -> tuple[StableDiffusion, Concept]:
    """The model and the concept, checked in order of cost: the weights are read last.

    Raises:
      InputError: something is wrong with the config's words and prompts, the model, or the pictures to draw.
    """
    with open_model_of(config) as model:
        checked = check_concept(config, model, inputs, log)
        check_pictures_to_draw(config, model, checked, log)
        sd = StableDiffusion.load(model)
    return sd, with_rows(config, checked, inputs, sd)


def prepare_concept(config: TrainConfig, sd: StableDiffusion, log: LogLine) -> Concept:
    """The concept, for a model that is already loaded.

    Raises:
      InputError: as `read_inputs` and `check_concept`.
    """
    inputs = read_inputs(config, log)
    return with_rows(config, check_concept(config, sd, inputs, log), inputs, sd)
