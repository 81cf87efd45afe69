"""Building the training step, and how much it keeps for its backward pass: as asked for, or what fits the memory."""

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
from ti_jax.training.parallel import AXIS, make_run_steps, replicated_shapes, share_memory
from ti_jax.training.step import Frozen, TrainState, make_train_step

# Each keeps less, and recomputes more, than the one before; see `ti_jax.ops.rematerialisation`.
WAYS: tuple[Checkpointing, ...] = ("none", "policy", "full")


@dataclass(frozen=True)
class StepBuilder:
    """The training step of a run, not compiled yet: what a run, ``ti-jax plan`` and the benchmark compile.

    Attributes:
      networks, optimizer: what it computes with. mesh: the devices that it is mapped over.
      batch_size: samples a device and micro-batch. accumulation: micro-batches an update.
      longest_chunk: most updates of one dispatch.
    """

    networks: Networks
    optimizer: optax.GradientTransformationExtraArgs
    mesh: Mesh
    batch_size: int
    accumulation: int
    longest_chunk: int

    @property
    def samples(self) -> int:
        """Samples that one update sees, over all devices."""
        return self.batch_size * self.accumulation * self.mesh.size

    def lower(self, frozen: Frozen, state: TrainState, gradient_checkpointing: Checkpointing) -> jax.stages.Lowered:
        """``run_steps(frozen, state, count)`` of `make_run_steps`, traced and lowered.

        Args:
          frozen, state: arrays, or `jax.ShapeDtypeStruct` in their place; only their shapes and types are used.
        """
        networks = self.networks.compiled_for(Platform.of(self.mesh.devices.flat[0]))
        step = make_train_step(
            networks.with_gradient_checkpointing(gradient_checkpointing),
            self.optimizer,
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            num_devices=self.mesh.size,
            axis_name=AXIS,
            shared_memory=share_memory(self.mesh),
        )
        shapes = replicated_shapes((frozen, state, jnp.int32(1)), self.mesh)
        return make_run_steps(step, self.mesh, self.longest_chunk).lower(*shapes)


@dataclass(frozen=True)
class CompiledStep:
    """A compiled program, and what of the device's memory it takes.

    Attributes:
      gradient_checkpointing: what it was compiled for.
      program: what came out.
      arguments, temporary, code: bytes on each device: weights, data and results; activations; the program itself.
      fits: in the memory that there was to be; True where that is not known.
    """

    gradient_checkpointing: Checkpointing
    program: jax.stages.Compiled
    arguments: int
    temporary: int
    code: int
    fits: bool

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return self.arguments + self.temporary + self.code


def compile_fitting(
    lower: Callable[[Checkpointing], jax.stages.Lowered],
    gradient_checkpointing: Checkpointing | None,
    memory: float | None,
) -> CompiledStep | None:
    """Compile the step with the given rematerialisation, or with the first of `WAYS` that fits; the last if none does.

    Args:
      lower: the step, lowered for a value of ``--gradient_checkpointing``.
      gradient_checkpointing: that value; None: the first that fits. Where the first does, nothing else is compiled.
      memory: bytes that a device has for the step, its arguments among them; None: not known, and everything fits.

    Returns:
      None if the compiler itself finds that the device has too little memory.
    """
    found = None
    for way in WAYS if gradient_checkpointing is None else (gradient_checkpointing,):
        found = None  # programs are large: not two at a time
        found = _compile(way, lower(way), memory)
        if found is not None and found.fits:
            break
    return found


def _compile(way: Checkpointing, lowered: jax.stages.Lowered, memory: float | None) -> CompiledStep | None:
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise
    sizes = program.memory_analysis()
    assert sizes is not None, "every backend that compiles has it"
    # Where a result takes the place of an argument, it is counted with both.
    arguments = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    temporary, code = sizes.temp_size_in_bytes, sizes.generated_code_size_in_bytes
    fits = memory is None or arguments + temporary + code <= memory
    return CompiledStep(way, program, arguments, temporary, code, fits)


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
        multihost.log_leader(
            f"warning: the training step takes {compiled.memory / 1e9:.1f} GB with --gradient_checkpointing "
            f"{compiled.gradient_checkpointing} and {memory / 1e9:.1f} GB are free, so it may not run: {remedy}"
        )
    return compiled
