"""Pixels of a large set of pictures: read and cropped again whenever they are needed, so that they fill no memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

# Most bytes of float32 pixels that are kept in memory: 85 pictures of 512 pixels, or 21 of 1024.
IN_MEMORY = 256 * 2**20


class OnDemand:
    """An array float32 [N, H, W, 3] whose items are made when they are asked for.

    Of NumPy's arrays it has ``shape``, ``len``, iteration, and indexing by a number or a slice.
    """

    def __init__(
        self, items: Sequence[Callable[[], np.ndarray]], shape: tuple[int, ...], digests: Sequence[str] | None = None
    ):
        """Args:
        items: make one item each, of this ``shape``. digests: a hash of each; None: they are made if asked for.
        """
        self._items, self._digests = list(items), digests
        # Of any length for a type checker, as an array's.
        self.shape: tuple[Any, ...] = (len(items), *shape)
        self.dtype = np.dtype(np.float32)

    @cached_property
    def digests(self) -> list[str]:
        """A hash of each item."""
        return list(map(digest_of, self)) if self._digests is None else list(self._digests)

    @property
    def digest(self) -> str:
        """A hash of all items."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (item() for item in self._items)

    def __getitem__(self, index: int | slice) -> np.ndarray:
        if isinstance(index, slice):
            found = [item() for item in self._items[index]]
            return np.stack(found) if found else np.zeros((0, *self.shape[1:]), np.float32)
        return self._items[index]()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


Pixels = np.ndarray | OnDemand


def digest_of(pixels: np.ndarray) -> str:
    """A hash of an array's contents."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


def digests_of(pixels: Pixels) -> list[str]:
    """A hash of each picture."""
    return pixels.digests if isinstance(pixels, OnDemand) else [digest_of(picture) for picture in pixels]


def digest_of_all(sets: Sequence[Pixels]) -> str:
    """A hash of all pictures of several sets; of one in memory, that of its bytes."""
    each = [pixels.digest if isinstance(pixels, OnDemand) else digest_of(pixels) for pixels in sets]
    return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()
