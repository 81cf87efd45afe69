"""A set whose moments do not fit the device: they stay on the host, which sends those of the next updates ahead.

The moments of 10,000 pictures of 512 pixels take 2.6 GB, mirror images included. Draws depend on seed, step and
position alone, so that the host can make those of later updates while the devices compute: it draws the pictures and
views of a window of updates as a step would, gathers their moments, and sends each device its own samples. The rows are
those of a run whose dataset is on the device, to the bit on a CPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ti_jax.data.buckets import BucketOrder
from ti_jax.data.dataset import Dataset
from ti_jax.data.sharing import order_of_epoch, turn_of_sample
from ti_jax.training.compile import StepBuilder
from ti_jax.training.parallel import SAMPLES, replicate
from ti_jax.training.step import Fed, is_mirrored, sample_key, shuffled

# Largest share of a device's free memory that the moments may take there. The rest is for activations, with which more
# is gained: what a step takes of the moments is a megabyte.
SHARE = 0.1
# Most bytes of a window on each device, all buckets together. Each bucket has up to `WINDOWS` at a time: one that is
# computed with, one whose first updates are already dispatched, and the one after it.
WINDOW_BYTES = 64 * 2**20
WINDOWS = 3


def bytes_of(dataset: Dataset) -> int:
    """Of a dataset's moments and masks, which may be `jax.ShapeDtypeStruct`."""
    return sum(each.size * each.dtype.itemsize for each in (dataset.moments, dataset.masks) if each is not None)


def stays_on_host(datasets: Sequence[Dataset], free: float | None) -> bool:
    """Whether moments and masks take more than their `SHARE` of the ``free`` bytes of a device (None: unknown)."""
    return free is not None and sum(map(bytes_of, datasets)) > SHARE * free


def feeds(datasets: Sequence[Dataset], mesh: Mesh, free: float | None) -> bool:
    """Whether a run feeds its devices; never on a CPU, where all devices share the arrays on the host.

    Args:
      free: bytes on a device, the least of all processes; None: unknown.
    """
    return mesh.devices.flat[0].platform != "cpu" and stays_on_host(datasets, free)


def placed(dataset: Dataset, mesh: Mesh) -> Dataset:
    """The dataset, of which moments and masks are on the host, with these on all devices of the mesh, too."""
    moments, masks = replicate((dataset.moments, dataset.masks), mesh)
    return dataset._replace(moments=moments, masks=masks)


def window_of(dataset: Dataset, builder: StepBuilder, buckets: int = 1) -> Fed:
    """`jax.ShapeDtypeStruct` of a window: leaves [updates, accumulation, samples of a micro-batch, ...], sharded.

    Args:
      dataset: its moments and masks may be shapes. buckets: in the run.
    """
    assert dataset.moments is not None, "their shape is used"
    per_picture = bytes_of(dataset) // math.prod(dataset.moments.shape[:2])
    most = WINDOW_BYTES // buckets // (per_picture * builder.batch_size * builder.accumulation)
    updates = max(1, min(builder.longest_chunk, int(most)))
    samples = (updates, builder.accumulation, builder.batch_size * builder.mesh.size)
    sharding = NamedSharding(builder.mesh, SAMPLES)

    def shapes(of: Any, dtype: Any) -> Any:
        return None if of is None else jax.ShapeDtypeStruct((*samples, *of.shape[2:]), dtype, sharding=sharding)

    number = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return Fed(
        shapes(number, jnp.int32),
        shapes(number, jnp.int32),
        shapes(dataset.moments, jnp.float32),
        shapes(dataset.masks, jnp.float32),
    )


def bytes_of_window(window: Fed) -> int:
    """On each device."""
    return sum(leaf.size * leaf.dtype.itemsize // leaf.sharding.num_devices for leaf in jax.tree.leaves(window))


def without_moments(dataset: Dataset) -> Dataset:
    """The dataset without moments and masks, as a program takes it that is fed."""
    return dataset._replace(moments=None, masks=None)


class Draws:
    """Pictures and views of the samples of a dataset, as `ti_jax.training.step.draw_sample` draws them.

    It sorts each epoch's entries once, not for each sample. All is computed on the host, or where JAX has no CPU device
    (JAX_PLATFORMS) on the first of its others, after what that was given before.
    """

    def __init__(self, dataset: Dataset, seed: int, global_batch: int):
        self._entries, self._global_batch = np.asarray(dataset.entries), global_batch
        self._device = _host_device()
        sharing = None if dataset.sharing is None else jax.device_get(dataset.sharing)
        self._sharing, self._orders = sharing, dict[tuple[int, int], np.ndarray]()
        probability = float(dataset.flip_probability)

        def of_all(of_sample: Callable[..., Any], updates: jax.Array) -> Any:
            return jax.vmap(jax.vmap(of_sample, (None, 0)), (0, None))(updates, jnp.arange(global_batch))

        def mirrored(steps: jax.Array) -> jax.Array:
            _, samples_key, _ = jax.random.split(jax.random.key(seed), 3)

            def of_sample(step: jax.Array, position: jax.Array) -> jax.Array:
                flip_key, *_ = jax.random.split(sample_key(samples_key, step, position), 4)
                return is_mirrored(flip_key, jnp.float32(probability))

            return of_all(of_sample, steps)

        def order(concept: jax.Array, epoch: jax.Array) -> jax.Array:
            order_key, _, _ = jax.random.split(jax.random.key(seed), 3)
            if sharing is None:
                return shuffled(order_key, len(self._entries), epoch)
            arrays = jax.tree.map(jnp.asarray, sharing)
            return order_of_epoch(arrays, len(self._entries), order_key, concept, epoch)

        def concepts(turns: jax.Array) -> tuple[jax.Array, jax.Array]:
            arrays = jax.tree.map(jnp.asarray, sharing)
            of_sample = functools.partial(turn_of_sample, arrays, global_batch=global_batch)
            return of_all(of_sample, turns)

        self._mirrored, self._order, self._turns = jax.jit(mirrored), jax.jit(order), jax.jit(concepts)

    def __call__(self, steps: np.ndarray, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pictures of the dataset and views, int32 [n, global_batch] each, of n updates.

        Args:
          steps: integers [n], the updates' numbers. turns: integers [n], how many before each had this dataset.
        """
        with jax.default_device(self._device):
            mirrored = np.asarray(self._mirrored(steps.astype(np.int32)))
            if self._sharing is None:
                concepts = np.zeros((len(turns), self._global_batch), np.int64)
                numbers = turns[:, None] * self._global_batch + np.arange(self._global_batch)
                sizes, starts = np.array([len(self._entries)]), np.zeros(1, int)
            else:
                concepts, numbers = map(np.asarray, self._turns(turns.astype(np.int32)))
                sizes, starts = self._sharing.size, self._sharing.start
            epochs, places = np.divmod(numbers, sizes[concepts])
            entries = starts[concepts]
            pairs = np.unique(np.stack([concepts, epochs], axis=-1).reshape(-1, 2), axis=0).tolist()
            self._orders = {
                (concept, epoch): self._orders[concept, epoch]
                if (concept, epoch) in self._orders
                else np.asarray(self._order(np.int32(concept), np.int32(epoch)))
                for concept, epoch in pairs
            }
        for concept, epoch in pairs:
            there = (concepts == concept) & (epochs == epoch)
            entries[there] += self._orders[concept, epoch][places[there]]
        return self._entries[entries], mirrored


def _host_device() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _as_numpy(array: Any) -> np.ndarray | None:
    return None if array is None else np.asarray(array)


class Feeder:
    """Feeds a run with one of its datasets, a window of updates at a time; windows begin at multiples of their length.

    Of several processes each has all moments, and sends the samples of its own devices.

    Attributes:
      shapes: of a window, see `window_of`. nbytes: of a window on each device.
    """

    def __init__(
        self, dataset: Dataset, seed: int, builder: StepBuilder, order: BucketOrder | None = None, bucket: int = 0
    ):
        """Args:
        dataset: with moments and masks as NumPy arrays. order: of the run's buckets, this is one; None: there is one.
        """
        self.shapes = window_of(dataset, builder, 1 if order is None else len(order.shares))
        self.nbytes = bytes_of_window(self.shapes)
        self._moments, self._masks = np.asarray(dataset.moments), _as_numpy(dataset.masks)
        self._draws = Draws(dataset, seed, builder.samples)
        self._order, self._bucket, self._mesh = order, bucket, builder.mesh
        self._length: int = self.shapes.pictures.shape[0]
        self._windows: dict[int, Fed] = {}  # by their number

    def next(self, turn: int, most: int) -> tuple[int, jax.Array, Fed]:
        """What to dispatch from a turn on: how many updates, at most ``most``, and the arguments of the program."""
        number, place = divmod(turn, self._length)
        if number not in self._windows:
            self._windows = {number: self._window(number)}
        return min(most, self._length - place), replicate(np.int32(place), self._mesh), self._windows[number]

    def ahead(self, turn: int) -> None:
        """Send what is needed after the window with the turn ``turn``: to be called while a dispatch of it runs."""
        number = turn // self._length
        self._windows = {each: window for each, window in self._windows.items() if each >= number}
        if number + 1 not in self._windows:
            self._windows[number + 1] = self._window(number + 1)

    def _window(self, number: int) -> Fed:
        turns = number * self._length + np.arange(self._length)
        steps = turns if self._order is None else self._order.steps(self._bucket, int(turns[0]), self._length)
        samples = self.shapes.pictures.shape
        pictures, mirrored = (each.reshape(samples) for each in self._draws(steps, turns))

        def put(shape: Any, take: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> jax.Array:
            def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None, "samples are sharded"
                return take(pictures[index[:3]], mirrored[index[:3]])

            return jax.make_array_from_callback(shape.shape, shape.sharding, of_device)

        shapes, moments, masks = self.shapes, self._moments, self._masks
        return Fed(
            put(shapes.pictures, lambda pictures, mirrored: pictures),
            put(shapes.mirrored, lambda pictures, mirrored: mirrored),
            put(shapes.moments, lambda pictures, mirrored: moments[pictures, mirrored]),
            None if masks is None else put(shapes.masks, lambda pictures, mirrored: masks[pictures, mirrored]),
        )
