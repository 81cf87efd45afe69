"""Which base model a word was learned on: a hash that is taken while the weights stream by."""

from __future__ import annotations

import hashlib

import numpy as np

SAMPLED_BYTES = 4096


class Identity:
    """Hash over component, name, shape, dtype and a strided sample of at most 4 KiB of each tensor.

    Names are the tree's and shapes the leaf's, so the same numbers have the same identity in every layout of the files
    (single or sharded, safetensors or pickle, old or new names) and in whatever order they are read; dtype and sample
    are those of the file, so the dtype to compute in does not matter, while another variant (fp16) is another model.
    A sample suffices to tell models apart, and costs nothing beside reading them.

    One identity goes through the loading of all components of a model; `hexdigest` is asked for at the end.
    """

    def __init__(self) -> None:
        self._tensors: set[bytes] = set()

    def add(self, component: str, path: tuple[str, ...], shape: tuple[int, ...], tensor: np.ndarray) -> None:
        """Take in one tensor: its place and `shape` in the tree, and `tensor` as it stands in the file."""
        flat = tensor.reshape(-1)
        sampled = max(1, SAMPLED_BYTES // tensor.dtype.itemsize)
        stride = max(1, -(-flat.size // sampled))
        digest = hashlib.sha256(f"{component}\0{'/'.join(path)}\0{shape}\0{tensor.dtype.name}\0".encode())
        digest.update(flat[::stride].tobytes())
        self._tensors.add(digest.digest())

    def hexdigest(self) -> str:
        """64 hexadecimal digits for everything added so far."""
        return hashlib.sha256(b"".join(sorted(self._tensors))).hexdigest()
