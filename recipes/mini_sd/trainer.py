"""The training loop of all stages: data-parallel steps, an average of the weights, and resume.

A stage is a loss function of (params, batch, key). The batch is drawn on the device from arrays that are stored there.
A checkpoint has everything that the next step depends on; a resumed run draws the same random numbers as an
uninterrupted one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import serialization
from jax.sharding import PartitionSpec as P

from ti_jax.files import write_atomically
from ti_jax.training.parallel import AXIS, make_mesh, replicate

Tree = Any
# Steps between updates of the moving average, whose memory traffic is a third of AdamW's.
AVERAGE_EVERY = 8


class State(NamedTuple):
    """Training state."""

    step: jax.Array
    params: Tree
    average: Tree  # exponential moving average of params
    optimizer: Tree


def root_key(seed: int) -> jax.Array:
    """The root key of all random numbers. "rbg" is several times as fast as the default on CPU."""
    return jax.random.key(seed + 1, impl="rbg")


def share(batch: int, draws: int = 1) -> int:
    """Number of pictures of a batch per device, each used `draws` times.

    Raises:
      ValueError: the devices cannot share the batch; with no picture, a device's loss would be the mean of nothing.
    """
    devices = jax.device_count()
    if batch % (draws * devices):
        raise ValueError(f"a batch of {batch} cannot be shared by {devices} devices, {draws} draws of each picture")
    return batch // (draws * devices)


def schedule(peak: float, steps: int, warmup: int) -> optax.Schedule:
    """Linear warm-up (at most a quarter of the steps), then cosine decay to a hundredth of the peak."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, min(warmup, steps // 4), steps, end_value=peak / 100)


def adamw(rate: optax.Schedule, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """AdamW with the gradient norm clipped to 1."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=weight_decay))


def fit(
    *,
    folder: Path,
    init: Callable[[jax.Array], Tree],
    loss: Callable[[Tree, Tree, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    data: Tree,
    optimizer: optax.GradientTransformation,
    steps: int,
    seed: int,
    decay: float = 0.999,
    report_every: int = 50,
    checkpoint_seconds: float = 180.0,
    on_report: Callable[[State], None] | None = None,
) -> Tree:
    """Train for `steps` steps, or resume from the checkpoint in `folder`.

    Args:
      folder: where ``checkpoint.msgpack`` and ``log.jsonl`` are written.
      init: key -> parameters.
      loss: (params, data, key) -> (loss, figures) on the part of the batch that one device draws with `key`.
      data: arrays that the loss draws its batch from, replicated on every device.
      optimizer: an optax transformation.
      steps: number of steps.
      seed: of all random numbers.
      decay: of the moving average; smaller at the beginning.
      report_every: steps between two log lines.
      checkpoint_seconds: seconds between two checkpoints.
      on_report: called with the state after each log line.

    Returns:
      The moving average of the parameters.
    """
    mesh = make_mesh()
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.msgpack"

    params = init(jax.random.key(seed))
    state = State(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    if checkpoint.exists():
        state = serialization.from_bytes(state, checkpoint.read_bytes())
        state = jax.tree.map(jnp.asarray, state)
        print(f"{folder.name}: on from step {int(state.step)}", flush=True)
    state, data = replicate((state, data), mesh)

    def step(state: State, data: Tree) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.fold_in(root_key(seed), state.step), jax.lax.axis_index(AXIS))

        (value, figures), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, data, key)
        gradients, figures = jax.lax.pmean((gradients, figures | {"loss": value}), AXIS)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(state.step + 1, params, state.average, optimizer_state), figures

    def moved(average: Tree, params: Tree, count: jax.Array) -> Tree:
        keep = jnp.minimum(decay, (1 + count) / (10 + count)) ** AVERAGE_EVERY
        return jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, average, params)

    # Without check_vma, as in `ti_jax.training.parallel`: each device has its own gradient until they are averaged.
    mapped = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(P(), P()), out_specs=(P(), P()), check_vma=False), donate_argnums=0
    )
    move_average = jax.jit(moved, donate_argnums=0)

    def save() -> None:
        write_atomically(checkpoint, serialization.to_bytes(jax.device_get(state)))

    number = int(state.step)
    saved = began = time.monotonic()
    sums: dict[str, float] = {}
    counted = 0
    with (folder / "log.jsonl").open("a") as log:
        pending = None
        while number < steps:
            state, figures = mapped(state, data)
            number += 1
            if number % AVERAGE_EVERY == 0:
                state = state._replace(average=move_average(state.average, state.params, jnp.float32(number)))
            if pending is not None:  # the previous step, so that the device never waits for the host
                for name, value in pending.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
                counted += 1
            pending = figures
            if number % report_every == 0 or number == steps:
                line = {name: round(value / max(counted, 1), 5) for name, value in sums.items()}
                now = time.monotonic()
                line = {"step": number, **line, "seconds": round(now - began, 1)}
                log.write(json.dumps(line) + "\n")
                log.flush()
                print(f"{folder.name}: {line}", flush=True)
                began, sums, counted = now, {}, 0
                if on_report is not None:
                    on_report(state)
            if time.monotonic() - saved > checkpoint_seconds or number == steps:
                save()
                saved = time.monotonic()
    return jax.tree.map(jnp.asarray, jax.device_get(state.average))
