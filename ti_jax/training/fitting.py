"""How much the training step keeps for its backward pass: as told, or as much as the device's memory takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax

from ..config import Checkpointing

# Each keeps less, and computes more again, than the one before; see `ti_jax.models.checkpointing`.
WAYS: tuple[Checkpointing, ...] = ("none", "policy", "full")


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


def compile_step(
    lower: Callable[[Checkpointing], jax.stages.Lowered],
    gradient_checkpointing: Checkpointing | None,
    memory: float | None,
) -> CompiledStep | None:
    """Compile the training step as told, or in the first of `WAYS` that fits; in the last if none does.

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
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise
    sizes = program.memory_analysis()
    assert sizes is not None, "every backend that compiles has it"
    # Where a result takes the place of an argument, it is counted with both.
    arguments = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    temporary, code = sizes.temp_size_in_bytes, sizes.generated_code_size_in_bytes
    fits = memory is None or arguments + temporary + code <= memory
    return CompiledStep(way, program, arguments, temporary, code, fits)
