"""Data parallelism: the mesh, replication, and the mapped loop of many updates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ti_jax.ops.platform import Platform
from ti_jax.training.step import Fed, StepInputs, TrainState

AXIS = "data"
SAMPLES = P(None, None, AXIS)  # of arrays [updates, accumulation, samples of a micro-batch on all devices, ...]

# XLA:CPU's default scheduler maximises concurrency, so that transposed kernels and rematerialised activations are live
# too early. The memory-optimised order costs no time, because each matmul uses all cores already. The option is
# internal to XLA: a version without it refuses to compile, see `cpu_options`.
CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

# XLA:GPU merges products of one array with several kernels (query, key and value): each step it then concatenates the
# kernels, and copies the parts out of the product. Apart they move less; see docs/gpu.md.
CUDA_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": "0"}


@functools.cache
def cpu_options() -> dict[str, str] | None:
    """`CPU_OPTIONS`, or None if this version of XLA does not have the option."""
    return _if_known(CPU_OPTIONS)


@functools.cache
def cuda_options() -> dict[str, str] | None:
    """`CUDA_OPTIONS`, or None if this version of XLA does not have the option."""
    return _if_known(CUDA_OPTIONS)


def _if_known(options: dict[str, str]) -> dict[str, str] | None:
    try:
        jax.jit(jnp.negative, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh of the devices (None: all), whose axis is data-parallel."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (AXIS,))


def is_single_cpu(mesh: Mesh) -> bool:
    """Whether all devices of the mesh belong to this process' CPU."""
    return mesh.devices.flat[0].platform == "cpu" and NamedSharding(mesh, P()).is_fully_addressable


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Replicate every leaf on all devices of the mesh.

    With several processes each one places the copies of its own devices: `jax.device_put` would first send all weights
    between the processes to check that they are equal.
    """
    everywhere = NamedSharding(mesh, P())
    if everywhere.is_fully_addressable:
        return jax.device_put(tree, everywhere)

    def put(leaf: jax.Array) -> jax.Array:
        copies = [jax.device_put(leaf, device) for device in mesh.local_devices]
        return jax.make_array_from_single_device_arrays(leaf.shape, everywhere, copies)

    return jax.tree.map(put, tree)


def sharded(tree: Any, mesh: Mesh) -> Any:
    """Give each device its own samples of every leaf [n, rounds, samples, ...], an array that all processes have."""

    def put(leaf: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, SAMPLES), lambda index: leaf[index])

    return jax.tree.map(put, tree)


def replicated_shapes(tree: Any, mesh: Mesh) -> Any:
    """`jax.ShapeDtypeStruct` of every leaf, sharded as `replicate` does: to compile without the arrays."""
    everywhere = NamedSharding(mesh, P())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), tree)


def without_copies(tree: Any) -> Any:
    """NumPy views of CPU arrays, so that `replicate` aliases them on all CPU devices instead of copying.

    Only for arrays that are never donated, such as the weights.
    """

    def shared(leaf: jax.Array) -> jax.Array | np.ndarray:
        return np.asarray(leaf) if next(iter(leaf.devices())).platform == "cpu" else leaf

    return jax.tree.map(shared, tree)


def make_run_steps(
    train_step: Callable[..., tuple[TrainState, jax.Array]],
    mesh: Mesh,
    max_steps: int,
    compiler_options: Mapping[str, Any] | None = None,
) -> jax.stages.Wrapped:
    """``run_steps(frozen, state, count, ...) -> (state, losses)``: up to ``count`` updates in one dispatch, jitted.

    ``count`` (at most ``max_steps``) is traced, so that one program serves every chunk. The loop ends early at a
    non-finite loss, and makes no update once ``--early_stop`` has ended all concepts. ``losses`` is float32
    [max_steps]; entries from ``count`` on are NaN. The state is donated. A run with several datasets also gives
    ``turn``, that of the first update: see `draw_sample`. One that is fed gives ``place, fed`` instead: the samples of
    a number of updates, sharded as `SAMPLES`, and which of them is the first.

    This is ``jax.jit(jax.shard_map(...))``, which is what ``jax.pmap`` has been since JAX 0.8. All other inputs and all
    outputs are replicated; devices differ only in the samples that they draw. ``check_vma`` is off because TPU kernels
    do not support it, so that a gradient within the step is per device, as under `jax.pmap`.
    """

    def updates(frozen: StepInputs, state: TrainState, count: jax.Array, *first: Any) -> tuple[TrainState, jax.Array]:
        def more(carry):
            index, state, _ = carry
            going = (index < count) & state.ok
            return going if state.watch is None else going & ~state.watch.ended

        def one(carry):
            index, state, losses = carry
            state, loss = train_step(frozen, state, *_of_update(index, *first))
            return index + 1, state, losses.at[index].set(loss)

        losses = jnp.full((max_steps,), jnp.nan, jnp.float32)
        _, state, losses = lax.while_loop(more, one, (jnp.int32(0), state, losses))
        return state, losses

    def run_steps(*arguments: Any) -> tuple[TrainState, jax.Array]:
        in_specs = tuple(SAMPLES if isinstance(each, Fed) else P() for each in arguments)
        return jax.shard_map(updates, mesh=mesh, in_specs=in_specs, out_specs=(P(), P()), check_vma=False)(*arguments)

    return jax.jit(run_steps, donate_argnums=1, compiler_options=options_for(mesh, compiler_options))


def options_for(mesh: Mesh, compiler_options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The given compiler options and those of the mesh's platform, for `jax.jit`."""
    own = {"cpu": cpu_options, "cuda": cuda_options}.get(Platform.of(mesh.devices.flat[0]).name)
    return {**(compiler_options or {}), **((own and own()) or {})} or None


def _of_update(index: jax.Array, first: jax.Array | None = None, window: Fed | None = None) -> tuple[Any, ...]:
    """What `make_run_steps` gives to a dispatch, for its update ``index``."""
    if first is None:
        return ()
    if window is None:
        return (first + index,)
    place = first + index
    return None, jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, place, keepdims=False), window)
