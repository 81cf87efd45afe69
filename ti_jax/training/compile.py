"""Build and compile the training step, with the given rematerialisation policy or the first that fits in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ti_jax.config import Checkpointing
from ti_jax.errors import InputError
from ti_jax.machine import is_out_of_memory
from ti_jax.models.networks import Networks
from ti_jax.ops.platform import Platform
from ti_jax.training import multihost
from ti_jax.training.parallel import AXIS, is_single_cpu, make_run_steps, replicated_shapes
from ti_jax.training.step import Fed, StepInputs, TrainState, make_train_step

# Each stores fewer activations, and recomputes more, than the one before; see `ti_jax.ops.rematerialisation`.
REMAT_POLICIES: tuple[Checkpointing, ...] = ("none", "policy", "full")

# A model of fewer parameters learns a word on a CPU in less time than its step takes to compile. Its step is as fast at
# LLVM's first level of optimisation, and compiles in four fifths of the time; with 137M parameters it is 3% slower.
SMALL_MODEL = 50_000_000


@dataclass(frozen=True)
class StepBuilder:
    """A run's training step before compilation. A run, ``ti-jax plan`` and the benchmark all compile this one.

    Attributes:
      networks, optimizer: used by the step. mesh: the devices that it is mapped over.
      batch_size: samples per device and micro-batch. accumulation: micro-batches per update.
      longest_chunk: largest number of updates in one dispatch.
      deterministic: the same updates to the bit each time, also on a GPU.
    """

    networks: Networks
    optimizer: optax.GradientTransformationExtraArgs
    mesh: Mesh
    batch_size: int
    accumulation: int
    longest_chunk: int
    deterministic: bool = False

    @property
    def samples(self) -> int:
        """Samples per update, over all devices."""
        return self.batch_size * self.accumulation * self.mesh.size

    def lower(
        self,
        frozen: StepInputs,
        state: TrainState,
        gradient_checkpointing: Checkpointing,
        turns: bool = False,
        fed: Fed | None = None,
    ) -> jax.stages.Lowered:
        """``run_steps(frozen, state, count)`` of `make_run_steps`, traced and lowered.

        Args:
          frozen, state: arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes are used.
          turns: ``run_steps`` also takes ``turn``: there are several datasets.
          fed: shapes of the samples that ``run_steps`` takes, with their sharding; None: the dataset is on the device.
        """
        platform = Platform.of(self.mesh.devices.flat[0], self.deterministic)
        networks = self.networks.compiled_for(platform)
        step = make_train_step(
            networks.with_gradient_checkpointing(gradient_checkpointing),
            self.optimizer,
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            num_devices=self.mesh.size,
            axis_name=AXIS,
            shard_prompts=is_single_cpu(self.mesh),
        )
        first = [jnp.int32(0)] if turns or fed is not None else []
        shapes = replicated_shapes((frozen, state, jnp.int32(1), *first), self.mesh)
        options = {**(platform.compiler_options or {}), **_options_of_size(frozen, platform)}
        return make_run_steps(step, self.mesh, self.longest_chunk, options).lower(
            *shapes, *([] if fed is None else [fed])
        )


def _options_of_size(frozen: StepInputs, platform: Platform) -> dict[str, int]:
    small = sum(leaf.size for leaf in jax.tree.leaves(frozen.params)) < SMALL_MODEL
    fewer = platform.name == "cpu" and small and not jax.config.read("jax_disable_most_optimizations")
    return {"xla_backend_optimization_level": 1} if fewer else {}


@dataclass(frozen=True)
class CompiledStep:
    """The compiled training step of a dataset, and the device memory that it takes.

    Attributes:
      gradient_checkpointing: the rematerialisation policy that it was compiled with.
      program: the compiled ``run_steps(frozen, state, count)``; also with ``turn``, or ``place, fed``.
      arguments, temporary, code: bytes on each device: weights, data and results; activations; the program itself.
      fits: whether it fits in the free memory; True if that is unknown.
    """

    gradient_checkpointing: Checkpointing
    program: jax.stages.Compiled
    arguments: int
    temporary: int
    code: int
    fits: bool

    @property
    def memory(self) -> int:
        """Total bytes on each device."""
        return self.arguments + self.temporary + self.code


def compile_fitting(
    lower: Callable[[Checkpointing], jax.stages.Lowered],
    gradient_checkpointing: Checkpointing | None,
    memory: float | None,
) -> CompiledStep | None:
    """Compile with the given rematerialisation policy, or with the least recomputation that fits in ``memory``.

    Args:
      lower: returns the step lowered for a value of ``--gradient_checkpointing``.
      gradient_checkpointing: the policy; None: the first of `REMAT_POLICIES` that fits, the last if none fits. No
        policy after the first that fits is compiled.
      memory: bytes per device for the step, arguments included; None: unknown, and everything is taken to fit.

    Returns:
      The compiled step; None if the compiler reports that the device has too little memory.
    """
    found = None
    for policy in REMAT_POLICIES if gradient_checkpointing is None else (gradient_checkpointing,):
        found = None  # programs are large: free one before the next is compiled
        found = _compile(policy, lower(policy), memory)
        if found is not None and found.fits:
            break
    return found


def _compile(policy: Checkpointing, lowered: jax.stages.Lowered, memory: float | None) -> CompiledStep | None:
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise
    sizes = program.memory_analysis()
    assert sizes is not None, "every backend that compiles has it"
    # A donated argument and its result share memory, but are counted in both sizes.
    arguments = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    temporary, code = sizes.temp_size_in_bytes, sizes.generated_code_size_in_bytes
    fits = memory is None or arguments + temporary + code <= memory
    return CompiledStep(policy, program, arguments, temporary, code, fits)


def checked(compiled: CompiledStep | None, memory: float | None) -> CompiledStep:
    """Return the compiled step; warn if it takes more than `memory`, the free bytes of a device.

    Raises:
      InputError: `compiled` is None: the compiler reports that the step does not fit.
    """
    remedy = "give a smaller --train_batch_size (--gradient_accumulation_steps makes up for it) or --resolution"
    if compiled is None or compiled.gradient_checkpointing != "full":
        remedy += ", and leave out --gradient_checkpointing"
    if compiled is None:
        raise InputError(f"the compiler reports that the training step does not fit in the device's memory: {remedy}")
    if not compiled.fits and memory is not None:
        multihost.log_leader(
            f"warning: the training step takes {compiled.memory / 1e9:.1f} GB with --gradient_checkpointing "
            f"{compiled.gradient_checkpointing} and {memory / 1e9:.1f} GB are free, so it may not run: {remedy}"
        )
    return compiled
