"""The first phase of a run: check and build everything that it needs, before the first step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ti_jax.config import Checkpointing, TrainConfig, concept_configs
from ti_jax.data.buckets import BucketOrder
from ti_jax.data.concept import Concept, check_concepts, hash_of_vectors, with_rows
from ti_jax.data.dataset import digest_of_masks, hash_of_what_is_shown, make_datasets, small_buckets, weights_of
from ti_jax.data.inputs import Inputs, LogLine, read_all_inputs
from ti_jax.data.moments_cache import open_cache
from ti_jax.data.on_demand import digest_of_all
from ti_jax.diffusion.losses import Objective
from ti_jax.embeddings import Embedding
from ti_jax.files import writable_folder
from ti_jax.ops.platform import Platform
from ti_jax.pipeline import StableDiffusion
from ti_jax.pipeline.model_description import open_model_of
from ti_jax.training import ahead, multihost, run_folder
from ti_jax.training.checkpoint import Checkpoints, fingerprint
from ti_jax.training.compile import StepBuilder
from ti_jax.training.feeding import without_moments
from ti_jax.training.measure import ScoreTracker, make_score_tracker, measures
from ti_jax.training.mixing import Mixing, mixing_of
from ti_jax.training.multihost import is_leader
from ti_jax.training.optimizer import make_optimizer, warmup_note
from ti_jax.training.parallel import make_mesh, replicate, without_copies
from ti_jax.training.plateau import no_watch
from ti_jax.training.remote_folder import RemoteFolder
from ti_jax.training.rows import usual_norms
from ti_jax.training.step import StepInputs, TrainState
from ti_jax.training.terms import Terms
from ti_jax.training.validation import check_pictures_to_draw
from ti_jax.training.wandb_board import check_wandb

if TYPE_CHECKING:
    from ti_jax.training.run_page import RunPage


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
      sd: the frozen model; its weights on the first device are shared with the loop.
      concepts: what is learned, one or several; each has the folder of its results. mixing: how they share a batch.
      frozen: the step's constant inputs, for each bucket; all but the dataset are the same arrays. Moments and masks
        are on the host, all else on the devices.
      order: of the buckets; None: there is one. start: the initial state, as NumPy arrays.
      builder: of the training step. schedule: learning rate by update of a word. total: number of updates in the run.
      usual_norms: median norm of the frozen token embeddings, by text encoder.
      checkpoints: on the leader process only. So are the next two, one for each concept if the config asks for them:
      trackers: of scores. pushes: upload a concept's folder with its word.
      remote: where the folder is behind a URL, the leader's own; None: it is here.
      page: on the leader process, from the time on when the run begins to write into its folder.
    """

    config: TrainConfig
    folder: Path
    sd: StableDiffusion
    concepts: tuple[Concept, ...]
    mixing: Mixing
    frozen: tuple[StepInputs, ...]
    order: BucketOrder | None
    start: TrainState
    builder: StepBuilder
    schedule: optax.Schedule
    total: int
    usual_norms: dict[str, float]
    checkpoints: Checkpoints | None
    trackers: tuple[ScoreTracker, ...]
    pushes: tuple[Callable[[Path, Embedding], None], ...]
    remote: RemoteFolder | None
    clock: Clock = field(default_factory=Clock)
    page: RunPage | None = None

    @property
    def mesh(self) -> Mesh:
        """The devices of the run."""
        return self.builder.mesh

    @property
    def samples_per_step(self) -> int:
        """Samples per update, over all devices and micro-batches."""
        return self.builder.samples

    def prefix(self, concept: Concept) -> str:
        """Before the names of a concept's figures in the run's logs; one that is alone needs none."""
        return f"{concept.folder.name}/" if len(self.concepts) > 1 else ""

    def embeddings(self, state: TrainState) -> tuple[Embedding, ...]:
        """The words of all concepts; one that ``--early_stop`` has ended is that of the step where it ended."""
        rows, steps = state.shown_rows, [int(state.step)] * len(self.concepts)
        if state.watch is not None:
            ends = np.asarray(state.watch.stopped).tolist()
            steps = [step if end < 0 else end for step, end in zip(steps, ends, strict=True)]
        return tuple(concept.embedding(rows, step) for concept, step in zip(self.concepts, steps, strict=True))

    def send(self, must: bool = False) -> None:
        """Send what is new in the folder, where that is behind a URL.

        Args:
          must: what cannot be sent is an error, and not tried again later.
        """
        if self.remote is not None:
            self.remote.send(must)

    def save_words(self, state: TrainState) -> None:
        """Write the words of all concepts."""
        for concept, embedding in zip(self.concepts, self.embeddings(state), strict=True):
            run_folder.save_embedding(embedding, concept.folder)

    @property
    def fingerprint(self) -> dict:
        """Everything that the rows at a step depend on, see `ti_jax.training.checkpoint.fingerprint`."""
        first = self.concepts[0]
        pictures = [each for concept in self.concepts for each in concept.pictures.learned_from]
        return fingerprint(
            self.config,
            model_identity=self.sd.identity,
            prediction_type=self.sd.schedule.prediction_type,
            dtype=self.sd.dtype,
            pictures=digest_of_all([each.pixels for each in pictures]),
            masks=digest_of_masks(pictures),
            prompts=[prompt for concept in self.concepts for prompt in concept.learned_with],
            prompt_counts={int(count) for each in self.concepts for count in (each.prompts_of >= 0).sum(axis=1)},
            shown=hash_of_what_is_shown(self.concepts),
            words=first.words,
            initializer_embedding=first.metadata.get("initializer_embedding_hash"),
            embeddings=hash_of_vectors(first.others),
            global_batch=self.samples_per_step // self.config.gradient_accumulation_steps,
            total_steps=self.total,
            concepts=[
                [concept.token, len(concept.pictures.pixels), len(concept.prompts), concept.initializer]
                for concept in self.concepts
            ],
        )


def prepare(
    config: TrainConfig,
    devices: Sequence[jax.Device] | None,
    sharing: int,
    holding: contextlib.ExitStack,
    remote: RemoteFolder | None = None,
) -> Job:
    """Load, check and build everything that the run needs, cheapest checks first. Nothing in the folder is changed.

    Every process does this for itself, so that it may fail in one of them; see `agree`.

    Args:
      config: resolved. devices: to train on; None: all. sharing: number of devices that share ``train_batch_size``.
      holding: receives the contexts to keep open until the run ends: the folder's lock and the checkpoints.
      remote: what is behind the URL that was given for ``output_dir``, which is here now.

    Raises:
      InputError: something in the config, the pictures or the model is wrong.
    """
    clock = Clock()
    configs = concept_configs(config)
    if is_leader() and "wandb" in config.report_to:
        check_wandb()
    run_folder.check_apart(config)
    folder = Path(config.output_dir)
    if is_leader():
        for each in run_folder.folders(folder, configs):
            if each == folder or each.exists():
                holding.enter_context(writable_folder(each))
                holding.enter_context(run_folder.locked(each))
                if remote is not None and each == folder:
                    holding.enter_context(remote.opened())
                run_folder.check_free(each)
    mesh = make_mesh(devices)
    assert config.train_batch_size is not None, "the config is resolved"
    batch_size = config.train_batch_size // sharing
    samples_per_step = batch_size * config.gradient_accumulation_steps * mesh.size
    mixing = mixing_of(config, len(configs), samples_per_step)
    inputs = read_all_inputs(configs, multihost.log_leader)
    pushes = tuple(map(_open_hub, configs)) if is_leader() and config.push_to_hub else ()
    with clock.phase("load"):
        sd, concepts = load(configs, inputs)
    config = dataclasses.replace(config, resolution=concepts[0].config.resolution)
    measured = concepts if is_leader() and measures(config) else ()
    trackers = tuple(make_score_tracker(sd, concept) for concept in measured)
    platform = Platform.of(mesh.devices.flat[0], config.deterministic)
    sd = dataclasses.replace(sd, networks=sd.networks.compiled_for(platform))
    ahead.compile_pictures(sd, concepts, trackers, mesh.devices.flat[0])
    with clock.phase("encode"):
        datasets = make_datasets(config, sd, concepts, mixing.in_batch, open_cache())

    shown = sum(len(each.entries) // each.pictures.views for each in concepts)
    total = total_updates(config, shown, samples_per_step)
    updates = mixing.updates(total)
    optimizer, schedule = make_optimizer(config, updates, samples_per_step)
    if (note := warmup_note(config, updates)) is not None:
        multihost.log_leader(note)
    if (note := small_buckets(datasets, sd.networks.latent_factor, batch_size * mesh.size)) is not None:
        multihost.log_leader(note)
    first, *others = map(without_moments, datasets)
    shared = replicate(
        StepInputs(
            params=without_copies({name: tree for name, tree in sd.params.items() if name != "vae"}),
            schedule=sd.schedule,
            dataset=first,
            row_mask={name: jnp.asarray(mask) for name, mask in concepts[0].row_mask.items()},
            key=jax.random.key(config.seed),
            objective=Objective.of(config, sd.schedule),
            terms=Terms.of(concepts, sd),
        ),
        mesh,
    )
    frozen = tuple(
        shared._replace(dataset=each._replace(moments=dataset.moments, masks=dataset.masks))
        for each, dataset in zip([shared.dataset, *replicate(others, mesh)], datasets, strict=True)
    )
    order = BucketOrder(config.seed, weights_of(datasets)) if len(datasets) > 1 else None
    # Pictures are drawn with the loop's copy of the weights on the first device.
    drawn_with = jax.tree.map(lambda leaf: leaf.addressable_data(0), shared.params)
    sd = dataclasses.replace(sd, params={**sd.params, **drawn_with})
    rows = {name: jnp.asarray(value) for name, value in concepts[0].rows.items()}
    watch = no_watch(len(next(iter(rows.values()))), len(concepts)) if config.early_stop else None
    start = jax.device_get(TrainState(rows, optimizer.init(rows), jnp.int32(0), jnp.bool_(True), watch))
    builder = StepBuilder(
        sd.networks,
        optimizer,
        mesh,
        batch_size=batch_size,
        accumulation=config.gradient_accumulation_steps,
        longest_chunk=config.logging_steps,  # a trial of a few steps compiles what the whole run will use
        deterministic=config.deterministic,
    )
    checkpoints = None
    if is_leader():
        checkpoints = Checkpoints(folder / "checkpoints", config.checkpoints_total_limit)
        holding.enter_context(contextlib.closing(checkpoints))
    return Job(
        config, folder, sd, concepts, mixing, frozen, order, start, builder, schedule, total, usual_norms(sd),
        checkpoints, trackers, pushes, remote, clock,
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
    for embedding, tracker in zip(job.embeddings(state), job.trackers, strict=bool(job.trackers)):
        tracker.resume(embedding, int(state.step))
    return state, job.checkpoints.identity["gradient_checkpointing"]


def load(configs: Sequence[TrainConfig], inputs: Sequence[Inputs]) -> tuple[StableDiffusion, tuple[Concept, ...]]:
    """The frozen model, with the VAE's weights on the host, and the concepts.

    Raises:
      InputError: something is wrong with either.
    """
    sd, concepts = load_model_and_concepts(configs, inputs, multihost.log_leader)
    # The VAE encodes the pictures once and decodes now and then: its weights are on a device only while it runs.
    sd = dataclasses.replace(sd, params={**sd.params, "vae": jax.device_get(sd.params["vae"])})
    return sd, concepts


def _open_hub(config: TrainConfig) -> Callable[[Path, Embedding], None]:
    from ti_jax.training import hub

    return hub.open_repository(config)


def total_updates(config: TrainConfig, num_entries: int, global_batch: int) -> int:
    """Updates in the run: ``max_train_steps``, or those of ``num_train_epochs`` epochs over the repeated pictures."""
    if config.max_train_steps is not None:
        return config.max_train_steps
    assert config.num_train_epochs is not None, "the config is resolved"
    return config.num_train_epochs * math.ceil(num_entries * config.repeats / global_batch)


def load_model_and_concepts(
    configs: Sequence[TrainConfig], inputs: Sequence[Inputs], log: LogLine
) -> tuple[StableDiffusion, tuple[Concept, ...]]:
    """The model and the concepts, checked in order of cost: the weights are read last.

    Raises:
      InputError: something is wrong with the configs' words and prompts, the model, or the pictures to draw.
    """
    with open_model_of(configs[0]) as model:
        Objective.of(configs[0], model.schedule)  # checks the timesteps
        checked = check_concepts(configs, model, inputs, log)
        for concept in checked:
            check_pictures_to_draw(model, concept, log)
        sd = StableDiffusion.load(model)
    return sd, with_rows(checked, sd)


def prepare_concepts(configs: Sequence[TrainConfig], sd: StableDiffusion, log: LogLine) -> tuple[Concept, ...]:
    """The concepts, for a model that is already loaded.

    Raises:
      InputError: as `read_all_inputs` and `check_concepts`.
    """
    inputs = read_all_inputs(configs, log)
    return with_rows(check_concepts(configs, sd, inputs, log), sd)


def prepare_concept(config: TrainConfig, sd: StableDiffusion, log: LogLine) -> Concept:
    """The concept of a run that has one, as `prepare_concepts`."""
    (concept,) = prepare_concepts([config], sd, log)
    return concept
