"""``ti-jax plan``: memory and FLOPs of a training run, from its compiled step. No weights are loaded or allocated.

For a TPU slice the step is compiled ahead of time with libtpu, which runs on any Linux machine without the chips; for
an NVIDIA GPU that is not there with XLA's CUDA plug-in (`ti_jax.training.gpus`).
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ti_jax.config import PlanConfig, TrainConfig, concept_configs, resolve_plan
from ti_jax.data.augment import VIEWS
from ti_jax.data.dataset import Dataset, Negative
from ti_jax.data.picture_files import picture_paths
from ti_jax.data.sharing import share
from ti_jax.diffusion.losses import Objective
from ti_jax.diffusion.schedule import NoiseSchedule
from ti_jax.errors import InputError
from ti_jax.machine import SPARE, free_memory
from ti_jax.models.networks import make_networks, network_shapes
from ti_jax.ops.platform import Platform
from ti_jax.pipeline.model_description import check_family
from ti_jax.text.templates import for_captions, load_templates
from ti_jax.training import gpus
from ti_jax.training.chips import CHIPS, TERA, Chip, peak_flops
from ti_jax.training.compile import StepBuilder, compile_fitting
from ti_jax.training.feeding import WINDOWS, bytes_of, bytes_of_window, feeds, window_of, without_moments
from ti_jax.training.flops import batch_flops
from ti_jax.training.optimizer import make_optimizer
from ti_jax.training.parallel import make_mesh, replicate
from ti_jax.training.step import StepInputs, TrainState
from ti_jax.training.terms import Anchor, Context, Terms
from ti_jax.weights.hub import resolve as resolve_model
from ti_jax.weights.reference_configs import PUBLISHED
from ti_jax.weights.sources import open_source

PICTURES = 4  # of a concept without a folder; their moments are kilobytes, so that the number hardly matters
GIGA = 1e9
# Share of a chip's published peak that well-tuned diffusion models reach.
USUAL_UTILISATION = 0.4
BATCHES_TRIED = 8  # in looking for the largest that fits

# Here libtpu only compiles. By default it would query the cloud metadata server for its slice, warn that there is none,
# and lock the chips for one process.
LIBTPU_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


# Attention kernels in a compiled program, Pallas' on TPU and cuDNN's. XLA's cost analysis counts no FLOPs in them.
KERNELS = ("tpu_custom_call", "__cudnn$fmha")


@dataclass(frozen=True)
class Plan:
    """The needs of a compiled step.

    Attributes:
      model: as the user named it. devices: number and kind. batch: samples per device and micro-batch.
      samples: per update, over all devices.
      arguments, temporary, code: bytes on each device: weights and data; activations; the program.
      memory: bytes available on a device, None if unknown.
      flops: of one update on one device, as compiled; None where XLA does not count all of them: on CPU (loops) and
        with kernels such as attention's on TPU.
      least_flops: the least that the update needs, see `ti_jax.training.flops.least_flops`.
      crossing: bytes that each device sends per update, by kind of collective.
      peak: FLOP/s of the device in bfloat16, None if unknown or if bfloat16 is not used.
      largest_batch: the largest that fits, None if it was not searched for.
      gradient_checkpointing: the given policy, or the first one that fits.
      on_host: pictures whose moments are fed to the devices, see `ti_jax.training.feeding`; 0: they are there.
      tuned: whether the kernels are those of a run. On a GPU XLA chooses them by trying, which an absent one prevents.
    """

    model: str
    devices: str
    batch: int
    samples: int
    arguments: int
    temporary: int
    code: int
    memory: float | None
    flops: float | None
    least_flops: float
    crossing: Mapping[str, int]
    peak: float | None
    largest_batch: int | None = None
    gradient_checkpointing: str = "none"
    on_host: int = 0
    tuned: bool = True

    @property
    def peak_memory(self) -> int:
        """Bytes needed on each device."""
        return self.arguments + self.temporary + self.code

    def lines(self) -> Iterator[str]:
        """Lines to print."""
        of = f" of {self.memory / GIGA:.1f} GB" if self.memory else ""
        fits = "" if self.memory is None or self.peak_memory <= self.memory else ": IT DOES NOT FIT"
        yield f"{self.model}: {self.batch} per device on {self.devices}, {self.samples} samples per update"
        yield f"  memory         {self.peak_memory / GIGA:.2f} GB{of} per device{fits}"
        fed = f" without the moments of {self.on_host} pictures, which stay on the host" if self.on_host else ""
        yield f"    weights, data  {self.arguments / GIGA:.2f} GB{fed}"
        policy = f"--gradient_checkpointing {self.gradient_checkpointing}"
        yield f"    activations    {self.temporary / GIGA:.2f} GB with {policy}"
        yield f"    program        {self.code / GIGA:.2f} GB"
        least = f"at least {self.least_flops / TERA:.4g} TFLOP per update and device"
        compiled = f"; compiled: {self.flops / self.least_flops:.2f} times that" if self.flops else ""
        yield f"  work           {least}{compiled}"
        sent = ", ".join(f"{kind} {count / 1e3:.1f} kB" for kind, count in self.crossing.items()) or "nothing"
        yield f"  between devices  {sent} per update"
        if self.peak:
            flops = self.flops or self.least_flops
            floor, usual = (flops / self.peak / share * 1e3 for share in (1, USUAL_UTILISATION))
            if not self.tuned:
                yield (
                    "  time           not known: a GPU's kernels are chosen by trying them on it; the work alone takes "
                    f"{floor:.1f} ms per update at the published peak of {self.peak / TERA:.0f} TFLOP/s"
                )
        if self.peak and self.tuned:
            yield (
                f"  time           {floor:.1f} ms per update at the published peak of {self.peak / TERA:.0f} TFLOP/s, "
                f"{usual:.1f} ms at {USUAL_UTILISATION:.0%} of it: an estimate, nothing was run"
            )
        if self.largest_batch is not None:
            yield f"  largest batch  {self.largest_batch} per device"


def plan(config: PlanConfig) -> Plan:
    """Compile the config's training step, and report what it needs.

    Raises:
      InputError: no such model or topology, parts of different models, libtpu is not installed, or the step does not
        fit.
    """
    config = resolve_plan(config)
    devices = _devices(config.topology)
    dtypes = {None: Platform.of(devices[0]).dtype, "no": jnp.float32, "bf16": jnp.bfloat16}
    planner = Planner(config, dtypes[config.mixed_precision], devices)
    assert config.train_batch_size is not None, "the config is resolved"
    found = planner.at(config.train_batch_size)
    if found is None:
        raise InputError(
            f"a batch of {config.train_batch_size} at {planner.resolution} px does not fit: the compiler cannot "
            "allocate it in the device's memory; give a smaller --train_batch_size, or leave out "
            "--gradient_checkpointing"
        )
    if config.largest_batch:
        found = dataclasses.replace(found, largest_batch=_largest_batch(config, planner, found))
    return found


def _largest_batch(config: PlanConfig, planner: Planner, found: Plan) -> int:
    """The largest batch that fits; without --gradient_checkpointing, the one that fits with full rematerialisation."""
    if config.gradient_checkpointing is None and found.gradient_checkpointing != "full":
        config = dataclasses.replace(config, gradient_checkpointing="full")
        planner = Planner(config, planner.dtype, planner.mesh.devices.tolist())
        frugal = planner.at(found.batch)
        assert frugal is not None, "it takes less than what was found to fit"
        found = frugal
    return planner.largest(found)


def array(shape: tuple[int, ...], dtype: Any) -> Any:
    """A stand-in for an array: shape and dtype only."""
    return jax.ShapeDtypeStruct(shape, dtype)


class Planner:
    """Compiles one config's step for some devices, at any batch size."""

    def __init__(self, config: PlanConfig, dtype: Any, devices: Sequence[Any] | None = None):
        devices = jax.devices() if devices is None else devices
        configs = _configs(config)
        self.config, self.mesh, self.dtype = config, make_mesh(devices), dtype
        self.concepts = concept_configs(config)
        self.vectors = sum(concept.num_vectors for concept in self.concepts)
        self.networks = make_networks(configs, dtype, config.clip_skip)
        check_family(config.pretrained_model_name_or_path or "mini-sd", self.networks)
        self.schedule = NoiseSchedule.from_config(configs["scheduler"])
        factor = self.networks.latent_factor
        self.resolution = config.resolution or self.networks.unet.config.sample_size * factor
        if self.resolution % factor:
            raise InputError(f"--resolution {self.resolution}: must be a multiple of {factor}")
        self.on_cpu = devices[0].platform == "cpu"
        topology = config.topology
        self.card = gpus.parse(topology)[0] if topology is not None and gpus.is_gpu(topology) else None
        chip = CHIPS.get(devices[0].device_kind)
        self.memory = self._memory_for_the_step(devices, chip)
        self.peak = peak_flops(devices[0].device_kind, dtype)
        kind = chip.name if chip else devices[0].device_kind
        self.devices = f"{len(devices)} x {kind}, {np.dtype(dtype).name}, {self.resolution} px"

    def at(self, batch: int) -> Plan | None:
        """The plan for a batch per device; None if the compiler reports that it does not fit."""
        config = self.config
        builder, state = self.step(batch)
        frozen, memory, window, waiting = self._frozen(), self.memory, None, 0
        pictures = frozen.dataset.entries.shape[0]
        others = _bytes(frozen) - bytes_of(frozen.dataset)
        if memory is not None and feeds([frozen.dataset], self.mesh, memory - others):
            window = window_of(frozen.dataset, builder)
            frozen = frozen._replace(dataset=without_moments(frozen.dataset))
            waiting = (WINDOWS - 1) * bytes_of_window(window)
            memory -= waiting
        lower = partial(builder.lower, frozen, state, fed=window)
        with gpus.tracing_for(self.card):
            compiled = compile_fitting(lower, config.gradient_checkpointing, memory)
        if compiled is None:
            return None
        text = compiled.program.as_text()
        assert text is not None, "every backend that compiles has it"
        return Plan(
            model=config.pretrained_model_name_or_path or "mini-sd",
            devices=self.devices,
            batch=batch,
            samples=builder.samples,
            arguments=compiled.arguments + waiting,
            temporary=compiled.temporary,
            code=compiled.code,
            memory=self.memory,
            flops=self._counted_flops(compiled.program, text),
            least_flops=self.least_flops(batch) * config.gradient_accumulation_steps,
            crossing=crossing_bytes(text),
            peak=self.peak,
            gradient_checkpointing=compiled.gradient_checkpointing,
            on_host=0 if window is None else pictures,
            tuned=self.card is None,
        )

    def step(self, batch: int) -> tuple[StepBuilder, TrainState]:
        """The builder of the training step for a batch per device, and the shapes of its state."""
        config = self.config
        accumulation = config.gradient_accumulation_steps
        optimizer, _ = make_optimizer(config, config.max_train_steps or 1, batch * accumulation * self.mesh.size)
        rows = self._rows()
        state = TrainState(rows, jax.eval_shape(optimizer.init, rows), array((), jnp.int32), array((), jnp.bool_))
        builder = StepBuilder(
            self.networks, optimizer, self.mesh, batch_size=batch, accumulation=accumulation,
            longest_chunk=config.logging_steps, deterministic=config.deterministic,
        )  # fmt: skip
        return builder, state

    def timed(self, batch: int) -> tuple[float, float]:
        """Seconds to compile the step for a batch per device, and of one update; with weights and data of zeros.

        Raises:
          InputError: the loss is not finite, or zero: the device does not compute what it should.
        """
        builder, shapes = self.step(batch)
        began = time.perf_counter()
        lowered = builder.lower(self._frozen(), shapes, self.config.gradient_checkpointing or "none")
        program = lowered.compile()
        compiling = time.perf_counter() - began
        of_zeros = partial(jax.tree.map, lambda leaf: np.zeros(leaf.shape, leaf.dtype))
        data = of_zeros(self._frozen()._replace(key=array((), jnp.uint32)))  # NumPy has no zeros of a key's type
        frozen = replicate(data._replace(key=jax.random.key(0), schedule=self.schedule), self.mesh)
        state = replicate(of_zeros(shapes)._replace(ok=np.bool_(True)), self.mesh)
        count = replicate(np.int32(builder.longest_chunk), self.mesh)
        state, losses = program(frozen, state, count)  # the first call loads what the program needs
        jax.block_until_ready(losses)
        began = time.perf_counter()
        state, losses = program(frozen, state, count)
        loss = float(np.mean(jax.device_get(losses)))
        seconds = (time.perf_counter() - began) / builder.longest_chunk
        if not 0.0 < loss < math.inf:  # of a network that predicts zero: it is that of the noise alone
            raise InputError(f"a training step of zero weights has the loss {loss:g}, and should have a positive one")
        return compiling, seconds

    def _counted_flops(self, program: jax.stages.Compiled, text: str) -> float | None:
        """FLOPs of an update as the compiler counts them, None where it does not count all."""
        if self.on_cpu or self.card is not None or any(kernel in text for kernel in KERNELS):
            return None
        cost = program.cost_analysis()
        assert cost is not None, "every backend that compiles has it"
        # The cost analysis counts a loop's body once: the updates of a chunk, and the micro-batches of an update.
        return cost["flops"] * self.config.gradient_accumulation_steps

    def largest(self, first: Plan) -> int:
        """The largest batch that fits, 0 if none does, by extrapolation: memory is about linear in the batch."""
        memory = self.memory
        if memory is None:
            raise InputError("--largest_batch: it is not known how much memory these devices have")
        known = [first]
        fits, does_not = (first.batch, math.inf) if first.peak_memory <= memory else (0, first.batch)
        for _ in range(BATCHES_TRIED):
            if does_not - fits <= 1:
                break
            if len(known) == 1:
                guess = 2 * fits or first.batch // 2
            else:
                one, other = known[-2:]
                each = (other.peak_memory - one.peak_memory) / (other.batch - one.batch)
                guess = other.batch + int((memory - other.peak_memory) // max(each, 1.0))
            guess = int(max(fits + 1, min(guess, does_not - 1)))
            found = self.at(guess)
            if found is not None:
                known.append(found)
            if found is not None and found.peak_memory <= memory:
                fits = guess
            else:
                does_not = guess
        return fits

    def _memory_for_the_step(self, devices: Sequence[Any], chip: Chip | None) -> float | None:
        """Bytes available on each device; None if unknown."""
        if self.config.topology is None:
            return free_memory(devices)
        if self.card is not None:
            return gpus.available(self.card) * (1 - SPARE)
        return chip.memory * (1 - SPARE) if chip else None

    def _rows(self) -> dict[str, jax.Array]:
        return {
            name: array((self.vectors, module.config.hidden_size), jnp.float32)
            for name, module in self.networks.text_encoders
        }

    def _frozen(self) -> StepInputs:
        """The step's constant inputs, as shapes."""
        networks = self.networks
        shapes = network_shapes(networks)
        del shapes["vae"]
        params = jax.tree.map(lambda leaf: array(leaf.shape, self.dtype), shapes)
        side, channels = self.resolution // networks.latent_factor, networks.vae.config.latent_channels
        several, views = len(self.concepts), 2 if self.config.flip_probability else 1
        of_each = [_pictures(concept) for concept in self.concepts]
        pictures = sum(of_each)
        templates = [load_templates(each.learnable_property, each.templates) for each in self.concepts]
        variants = [len(for_captions(each, "object")[0]) for each in templates]
        number = array((), jnp.float32)
        return StepInputs(
            params=params,
            schedule=jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), self.schedule),
            dataset=Dataset(
                moments=array((pictures, views, side, side, 2 * channels), jnp.float32),
                ids={
                    name: array((sum(variants), module.config.max_position_embeddings), jnp.int32)
                    for name, module in networks.text_encoders
                },
                prompts_of=array((pictures, max(variants)), jnp.int32),
                prompt_counts=array((pictures,), jnp.int32) if len(set(variants)) > 1 else None,
                entries=array((pictures,), jnp.int32),
                time_ids=array((pictures, 2, 6), jnp.float32),
                flip_probability=number,
                latent_scale=number,
                latent_shift=number,
                sharing=jax.eval_shape(lambda: share(of_each, 1)) if several > 1 else None,
                negative=self._negative(),
            ),
            row_mask={name: array((self.vectors,), jnp.bool_) for name, _ in networks.text_encoders},
            key=jax.eval_shape(lambda: jax.random.key(0)),
            objective=Objective.of(self.config, self.schedule),
            terms=self._terms(),
        )

    def _terms(self) -> Terms | None:
        config, rows = self.config, self._rows()
        if not config.initializer_output and not config.context_loss:
            return None
        anchor = Anchor(rows, {name: array((self.vectors,), jnp.float32) for name in rows})
        prompts = sum(len(each.overview_prompts or ()) for each in self.concepts)
        long = {name: module.config.max_position_embeddings for name, module in self.networks.text_encoders}
        context = Context(
            {name: array((prompts, length), jnp.int32) for name, length in long.items()},
            {name: array((prompts, length), jnp.float32) for name, length in long.items()},
            {name: array((prompts, length, rows[name].shape[1]), jnp.float32) for name, length in long.items()},
        )
        return Terms(
            array((), jnp.float32),
            anchor if config.initializer_output else None,
            context if config.context_loss else None,
        )

    def _negative(self) -> Negative | None:
        if not self.config.learn_negative:
            return None
        encoders = self.networks.text_encoders
        ids = {name: array((1, module.config.max_position_embeddings), jnp.int32) for name, module in encoders}
        return Negative(ids, array((), jnp.float32))

    def least_flops(self, batch: int) -> float:
        """Least FLOPs of the loss and its gradient with respect to the rows, for a batch."""
        return batch_flops(self.networks, self._frozen(), self._rows(), batch)


def _pictures(config: TrainConfig) -> int:
    """Pictures that a concept has, further views included."""
    folder = config.train_data_dir
    if folder is None or not Path(folder).is_dir():
        return PICTURES
    return len(picture_paths(folder, config.recursive)) * (VIEWS if config.augment else 1)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_TRANSFER = re.compile(
    r"= (?P<shape>\(.*?\)|\S+) "
    r"(?P<kind>all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)


def crossing_bytes(program: str) -> dict[str, int]:
    """Bytes of the results of each kind of collective, from a compiled program's text."""
    found: dict[str, int] = {}
    for match in _TRANSFER.finditer(program):
        parts = re.findall(r"(\w+)\[([\d,]*)\]", match["shape"])
        size = sum(_SIZES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in parts)
        found[match["kind"]] = found.get(match["kind"], 0) + size
    return found


def _configs(config: PlanConfig) -> Mapping[str, Mapping[str, Any]]:
    """The components' configurations: known ones for a published model's name, else those of the model itself."""
    name = config.pretrained_model_name_or_path
    if name is not None and name in PUBLISHED:
        return PUBLISHED[name]
    path = resolve_model(name, config.revision, config.variant, config.hub_token)
    with open_source(path, config.variant, config.prediction_type) as source:
        return source.configs


def _devices(topology: str | None) -> Sequence[Any]:
    """This machine's devices, or descriptions of GPUs or of a TPU slice's devices, which need not exist here."""
    if topology is None:
        return jax.devices()
    if gpus.is_gpu(topology):
        return gpus.topology_devices(topology)
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        message = "--topology needs libtpu, the TPU compiler: pip install 'ti_jax[plan]' (Linux only)"
        raise InputError(message) from error
    # Keep JAX from looking for a TPU; the little that is computed runs on the CPU.
    jax.config.update("jax_platforms", "cpu")
    for name, value in LIBTPU_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        message = f"--topology {topology}: {reason.rstrip('. ')}; it is written v5e:2x4, v6e:2x2, v5p:2x2x1 and so on"
        raise InputError(message) from error
