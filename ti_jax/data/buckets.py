"""Aspect-ratio buckets: the shapes that pictures are cropped to, and the order in which a run learns from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ti_jax.config import TrainConfig
from ti_jax.errors import InputError

Shape = tuple[int, int]  # height and width in pixels


def bucket_shapes(resolution: int, step: int, max_aspect_ratio: float) -> tuple[Shape, ...]:
    """The shapes of the buckets: the square first, then ever longer ones, each upright and lying.

    Sides are multiples of ``step``. For each long side the other is the largest with which the area is at most that of
    ``resolution`` squared, so that no bucket needs more memory than the square. Both are the rule of kohya's scripts.

    Args:
      resolution: side of the square in pixels. max_aspect_ratio: of the long side to the short one.

    Raises:
      InputError: there would be no shape but the square.
    """
    square = resolution // step * step
    shapes = [(square, square)]
    for longer in range(square + step, resolution**2, step):
        shorter = resolution**2 // longer // step * step
        if shorter < step or longer > max_aspect_ratio * shorter:  # so is every longer one
            break
        shapes += [(longer, shorter), (shorter, longer)]
    if square < step or len(shapes) == 1:
        raise InputError(
            f"--aspect_ratio_buckets: at {resolution} pixels no bucket but the square has sides that are multiples of "
            f"--bucket_step {step} and a ratio of at most --max_aspect_ratio {max_aspect_ratio:g}; give a smaller "
            f"--bucket_step, like {_smaller_step(resolution)}, or a larger --max_aspect_ratio"
        )
    return tuple(shapes)


def shapes_of(config: TrainConfig, resolution: int) -> tuple[Shape, ...]:
    """The shapes of the buckets that a run asks for; none if it learns from squares.

    Raises:
      InputError: as `bucket_shapes`.
    """
    if not config.aspect_ratio_buckets:
        return ()
    assert config.bucket_step is not None and config.max_aspect_ratio is not None, "the config is resolved"
    return bucket_shapes(resolution, config.bucket_step, config.max_aspect_ratio)


def _smaller_step(resolution: int) -> int:
    """A step that suits ``resolution``: an eighth of it, in multiples of 8."""
    return max(8, resolution // 64 * 8)


def nearest_shape(width: int, height: int, shapes: Sequence[Shape]) -> Shape:
    """The shape whose aspect ratio is nearest to that of a picture: the least is cropped; of two the larger."""
    ratio = math.log(width / height)
    return min(shapes, key=lambda shape: (abs(math.log(shape[1] / shape[0]) - ratio), -shape[0] * shape[1]))


def shape_name(shape: Shape) -> str:
    """Width x height, as picture viewers show it."""
    return f"{shape[1]} x {shape[0]}"


class BucketOrder:
    """Which bucket each update learns from: a function of the seed and the update's number alone.

    Buckets take turns in proportion to the pictures that they show in an epoch. The turns of one with a share ``s`` are
    stratified: turn ``k`` is at the time ``(k + u) / s`` with a uniform ``u``, and updates go through all turns by
    time. So at any update a bucket has had its share of those before to within about one update for each bucket, and
    every picture is seen equally often, also if its bucket has fewer pictures than a batch.
    """

    def __init__(self, seed: int, entries: Sequence[float]):
        """Args:
        entries: pictures that each bucket shows in an epoch, repeats included, or other numbers in such a proportion.
        """
        self._seed, self._shares = seed, np.asarray(entries) / sum(entries)
        self._buckets = self._turns = np.zeros(0, np.int32)

    def turn(self, step: int) -> tuple[int, int]:
        """The bucket of update ``step``, and how many updates before it had the same bucket."""
        while step >= len(self._buckets):
            self._extend(max(1024, 2 * len(self._buckets)))
        return int(self._buckets[step]), int(self._turns[step])

    @property
    def shares(self) -> list[float]:
        """The part of all updates that each bucket has."""
        return [float(share) for share in self._shares]

    def next(self, step: int, most: int) -> tuple[int, int, int]:
        """`turn`, and the number of updates in a row from ``step`` on that have the same bucket, at most ``most``."""
        bucket, turn = self.turn(step)
        return bucket, turn, next((count for count in range(1, most) if self.turn(step + count)[0] != bucket), most)

    def steps(self, bucket: int, turn: int, count: int) -> np.ndarray:
        """The updates with a bucket's turns from ``turn`` on, integers [count]."""
        while len(found := np.flatnonzero(self._buckets == bucket)) < turn + count:
            self._extend(max(1024, 2 * len(self._buckets)))
        return found[turn : turn + count]

    def _extend(self, updates: int) -> None:
        """Compute the turns of the first ``updates``: those that were known stay the same."""
        times, buckets, turns = [], [], []
        for bucket, share in enumerate(self._shares):
            # By time t at least t - (number of buckets) turns are over.
            count = math.ceil((updates + len(self._shares)) * share)
            # The legacy generator: its numbers are the same in every version of NumPy, and those of a longer array
            # begin with those of a shorter one.
            jitter = np.random.RandomState([self._seed, bucket]).random_sample(count)
            times.append((np.arange(count) + jitter) / share)
            buckets.append(np.full(count, bucket, np.int32))
            turns.append(np.arange(count, dtype=np.int32))
        order = np.lexsort((np.concatenate(buckets), np.concatenate(times)))[:updates]
        self._buckets, self._turns = np.concatenate(buckets)[order], np.concatenate(turns)[order]
