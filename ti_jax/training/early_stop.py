"""``--early_stop``: a concept ends where its loss on fixed samples has stopped falling.

The training loss does not tell: it goes up and down with the pictures, noises and timesteps that are drawn. So a few
samples of each concept are drawn once, with timesteps spread over the schedule, and every so many updates a program of
its own computes their loss, without a gradient, and decides on the device. The host reads what was seen later, with
the losses of the updates before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from ti_jax.data.concept import Concept
from ti_jax.data.dataset import Dataset
from ti_jax.models.networks import Networks
from ti_jax.ops.matmul import exact_products
from ti_jax.ops.platform import Platform
from ti_jax.training import multihost
from ti_jax.training.feeding import without_moments
from ti_jax.training.job import Job
from ti_jax.training.parallel import AXIS, SAMPLES, options_for, replicate, replicated_shapes, sharded
from ti_jax.training.plateau import IN_WINDOW, Seen, observe
from ti_jax.training.report import Reporter
from ti_jax.training.step import Batch, StepInputs, TrainState, diffusion_loss

# Fixed samples of each concept: as few say the same as 32 of them, see recipes/mini_sd/NOTES.md.
SAMPLES_OF_A_CONCEPT = 8


class Fixed(NamedTuple):
    """The fixed samples of the concepts that are looked at in one bucket: arrays, or their sharding."""

    concepts: Any  # int32 [c]: which these are
    batches: Any  # a `Batch` with leaves [c, rounds, samples of a round on all devices, ...]


def fixed_samples(frozen: StepInputs, entries: np.ndarray, seed: Sequence[int]) -> Batch:
    """`SAMPLES_OF_A_CONCEPT` samples of a dataset's ``entries``, as NumPy arrays.

    They are drawn by the distributions of training, but timesteps lie in the middle of equal parts of their range.

    Args:
      frozen: its dataset has moments and masks. seed: of `numpy.random.default_rng`.
    """
    dataset, count = frozen.dataset, SAMPLES_OF_A_CONCEPT
    assert dataset.moments is not None, "the samples are made of them"
    low, high = frozen.objective.timestep_range or (0, frozen.schedule.alphas_cumprod.shape[0])
    random = np.random.default_rng(seed)
    pictures = np.resize(random.permutation(entries), count)
    mirrored = (random.random(count) < float(dataset.flip_probability)).astype(np.int32)
    prompts_of = np.asarray(dataset.prompts_of)
    counts = (prompts_of[pictures] >= 0).sum(axis=1)
    prompts = prompts_of[pictures, random.integers(counts)]
    mean, log_variance = np.split(np.asarray(dataset.moments)[pictures, mirrored], 2, axis=-1)
    latents = mean + np.exp(0.5 * log_variance) * random.standard_normal(mean.shape, np.float32)
    noise = random.standard_normal(mean.shape, np.float32)
    noise += np.float32(frozen.objective.noise_offset) * random.standard_normal(
        (count, 1, 1, mean.shape[-1]), np.float32
    )
    parts: dict[str, Any] = dict(
        latents=(latents - float(dataset.latent_shift)) * np.float32(dataset.latent_scale),
        noise=noise,
        timesteps=(low + (2 * np.arange(count) + 1) * (high - low) // (2 * count)).astype(np.int32),
        ids={name: np.asarray(ids)[prompts] for name, ids in dataset.ids.items()},
        time_ids=np.asarray(dataset.time_ids)[pictures, mirrored],
        prompts=prompts.astype(np.int32),
        masks=None if dataset.masks is None else np.asarray(dataset.masks)[pictures, mirrored],
    )
    return Batch(**parts)


def all_fixed(job: Job) -> tuple[Fixed, ...]:
    """The fixed samples of all concepts, as NumPy arrays; those of a concept are from the bucket with most of it."""
    entries = [_entries_of(frozen.dataset, len(job.concepts)) for frozen in job.frozen]
    bucket_of = np.argmax([list(map(len, of_concepts)) for of_concepts in entries], axis=0)
    devices = job.mesh.size
    in_round = devices * min(job.builder.batch_size, math.ceil(SAMPLES_OF_A_CONCEPT / devices))
    rounds = math.ceil(SAMPLES_OF_A_CONCEPT / in_round)
    # Where the samples do not fill the devices, the first of them are there once more.
    places = np.arange(rounds * in_round).reshape(rounds, in_round) % SAMPLES_OF_A_CONCEPT
    found = []
    for bucket in np.unique(bucket_of):
        concepts = np.flatnonzero(bucket_of == bucket).astype(np.int32)
        drawn = [
            fixed_samples(job.frozen[bucket], entries[bucket][concept], [job.config.seed, int(concept)])
            for concept in concepts
        ]
        found.append(Fixed(concepts, jax.tree.map(lambda *leaves: np.stack([each[places] for each in leaves]), *drawn)))
    return tuple(found)


def _entries_of(dataset: Dataset, concepts: int) -> list[np.ndarray]:
    """The dataset's entries of each concept."""
    entries = np.asarray(dataset.entries)
    if dataset.sharing is None:
        return [entries]
    start, size = np.asarray(dataset.sharing.start), np.asarray(dataset.sharing.size)
    return [entries[start[index] : start[index] + size[index]] for index in range(concepts)]


def rows_of(concepts: Sequence[Concept]) -> np.ndarray:
    """The concept of each of the run's rows, int32 [n]; -1: of none."""
    found = np.full(len(next(iter(concepts[0].rows.values()))), -1, np.int32)
    for index, concept in enumerate(concepts):
        found[concept.own] = index
    return found


def make_observation(networks: Networks, threshold: float):
    """``observation(frozen, fixed, concept_of_row, state) -> (state, Seen)`` of one device, under a mapped axis."""

    def observation(
        frozen: StepInputs, fixed: tuple[Fixed, ...], concept_of_row: jax.Array, state: TrainState
    ) -> tuple[TrainState, Seen]:
        assert state.watch is not None, "the run has --early_stop"
        stopped = state.watch.stopped

        def loss(concept_and_rounds: tuple[jax.Array, Batch]) -> jax.Array:
            concept, rounds = concept_and_rounds
            of_round = partial(diffusion_loss, networks, frozen, state.rows)
            return lax.cond(stopped[concept] < 0, lambda: jnp.mean(lax.map(of_round, rounds)), lambda: jnp.float32(0))

        losses = jnp.zeros(len(stopped), jnp.float32)
        with exact_products(networks.dtype):
            for each in fixed:
                losses = losses.at[each.concepts].set(lax.map(loss, (each.concepts, each.batches)))
        # The same on every device, as what follows from it must be.
        watch, seen = observe(state.watch, lax.pmean(losses, AXIS), state.step, threshold, concept_of_row)
        return state._replace(watch=watch), seen

    return observation


@dataclass
class EarlyStop:
    """The observations of a run, compiled, and what the host has read of them.

    Attributes:
      every: steps of the run between two observations. begun: whether there was one before the run resumed.
      stops: by token, the step at which a concept ended.
    """

    job: Job
    every: int
    begun: bool
    program: jax.stages.Compiled
    inputs: tuple[Any, ...]
    stops: dict[str, int]

    @property
    def ended(self) -> bool:
        """Whether all concepts have ended, as far as is read."""
        return len(self.stops) == len(self.job.concepts)

    def observe(self, state: TrainState) -> tuple[TrainState, Seen]:
        """Dispatch an observation; the state is donated."""
        return self.program(*self.inputs, state)

    def read(self, seen: Seen, step: int, reporter: Reporter | None) -> None:
        """Wait for an observation, log it, and say which concepts end."""
        losses, variances, stops = map(np.asarray, seen)
        for index, concept in enumerate(self.job.concepts):
            if concept.token in self.stops:
                continue
            if stops[index]:
                self.stops[concept.token] = step
            if reporter is None:
                continue
            figures = {"loss": float(losses[index])}
            if np.isfinite(variances[index]):
                figures |= {"variance": float(variances[index]), "stopped": float(stops[index])}
            prefix = f"{self.job.prefix(concept)}early_stop"
            reporter.rows(step, {f"{prefix}/{name}": value for name, value in figures.items()})
            if stops[index]:
                reporter.print_line(
                    f"{concept.token} ends at step {step}: the variance of its loss on fixed samples over the last "
                    f"{self.job.config.early_stop_window} updates is {variances[index]:.2g} of that since the start "
                    f"(--early_stop_threshold {self.job.config.early_stop_threshold:g})"
                )


def steps_between(job: Job) -> int:
    """Steps of the run in which each word has the updates between two losses of a window."""
    assert job.config.early_stop_window is not None, "the config is resolved"
    updates = math.ceil(job.config.early_stop_window / IN_WINDOW)
    return math.ceil(updates * job.mixing.concepts / job.mixing.in_batch)


def compile_early_stop(job: Job, frozen: StepInputs) -> EarlyStop | None:
    """Draw the fixed samples and compile their observation; None for a run without ``--early_stop``.

    Args:
      frozen: the step's constant inputs, on the devices, of any bucket.
    """
    if not job.config.early_stop:
        return None
    began = time.perf_counter()
    mesh, watch, threshold = job.mesh, job.start.watch, job.config.early_stop_threshold
    assert watch is not None and threshold is not None, "the config is resolved"
    platform = Platform.of(mesh.devices.flat[0], job.config.deterministic)
    networks = job.builder.networks.compiled_for(platform)
    fixed = tuple(Fixed(replicate(each.concepts, mesh), sharded(each.batches, mesh)) for each in all_fixed(job))
    inputs = (
        frozen._replace(dataset=without_moments(frozen.dataset)), fixed, replicate(rows_of(job.concepts), mesh)
    )  # fmt: skip
    samples = tuple(Fixed(P(), SAMPLES) for _ in fixed)
    mapped = jax.shard_map(
        make_observation(networks, threshold),
        mesh=mesh, in_specs=(P(), samples, P(), P()), out_specs=P(), check_vma=False,
    )  # fmt: skip
    options = options_for(mesh, platform.compiler_options)
    jitted = jax.jit(mapped, donate_argnums=3, compiler_options=options)
    program = jitted.lower(*inputs, replicated_shapes(job.start, mesh)).compile()
    every = steps_between(job)
    multihost.log_leader(
        f"--early_stop looks at the loss on fixed samples every {every} steps, with a program that took "
        f"{time.perf_counter() - began:.1f} s to compile"
    )
    stops = {
        concept.token: int(step)
        for concept, step in zip(job.concepts, np.asarray(watch.stopped), strict=True)
        if step >= 0
    }
    return EarlyStop(job, every, bool(watch.seen.any()), program, inputs, stops)
