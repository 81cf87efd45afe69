"""Apply a compiled function to many rows in batches of a fixed size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def in_batches(function: Callable[[np.ndarray], Any], rows: np.ndarray, size: int) -> Any:
    """``function(rows)``, computed `size` rows at a time.

    Args:
      function: array [size, ...] -> array, or tree of arrays, [size, ...]; acts on each row independently.
      rows: [N, ...], N at least 1. The last batch is padded with its last row, so that one program serves any N.

    Returns:
      The results as NumPy arrays [N, ...].
    """
    parts = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
        parts.append(jax.tree.map(np.asarray, function(filled)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(rows)], *parts)
