"""Pictures as arrays of one size, with what was cropped to make them so."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ti_jax.data.masks import Masks
from ti_jax.data.on_demand import Pixels


class Pictures(NamedTuple):
    """Pictures of one size: squares, or those of a bucket.

    Attributes:
      pixels: float32 [N, H, W, 3] in [-1, 1]; those of a large set are read again whenever they are needed.
      names: the files' names.
      original_sizes: int32 [N, 2], height and width in pixels before scaling, upright.
      crop_offsets: int32 [N, 2], what the crop cut at the top and at the left, in pixels after scaling.
      crop_boxes: int32 [N, 4], left, top, right and bottom of the crop, in pixels before scaling.
      masks: which parts are learned from; None: all of every picture.
      buckets: the same pictures in their buckets; empty if they are learned from as squares. Else the squares are only
        shown and measured with: they have no masks.
      views: views of each file: the plain pictures come first, then each file's second view, and so on.

    Sizes and offsets are inputs of SDXL (``original_size`` and ``crops_coords_top_left``).
    """

    pixels: Pixels
    names: tuple[str, ...]
    original_sizes: np.ndarray
    crop_offsets: np.ndarray
    crop_boxes: np.ndarray
    masks: Masks | None = None
    buckets: tuple[Bucket, ...] = ()
    views: int = 1

    @property
    def learned_from(self) -> list[Pictures]:
        """These pictures, or those in the buckets."""
        return [bucket.pictures for bucket in self.buckets] or [self]

    @property
    def files(self) -> int:
        """Number of different pictures, of which each has one view or several."""
        return len(self.names) // self.views


class Bucket(NamedTuple):
    """The pictures whose shape is nearest to a bucket's: ``indices`` int32 [n] among all, and cropped to its shape."""

    indices: np.ndarray
    pictures: Pictures
