"""Fingerprint of a base model: a hash that is computed while its weights are loaded."""

from __future__ import annotations

import hashlib

import numpy as np

SAMPLED_BYTES = 4096


class Identity:
    """Hash over component, name, shape, dtype and a strided sample of at most 4 KiB of each tensor.

    Names and shapes are those of the parameter tree, so the same weights have the same hash in any file layout (single
    or sharded, safetensors or pickle, old or new names) and in any order of reading. dtype and sample are those of the
    file: the compute dtype does not matter, while another variant (fp16) is another model. A sample is enough to
    distinguish models, and costs nothing compared with reading them.

    One `Identity` is passed to the loading of all components of a model; call `hexdigest` at the end.
    """

    def __init__(self) -> None:
        self._tensors: set[bytes] = set()

    def add(self, component: str, path: tuple[str, ...], shape: tuple[int, ...], tensor: np.ndarray) -> None:
        """Add one tensor: its path and `shape` in the tree, and `tensor` as it is stored in the file."""
        flat = tensor.reshape(-1)
        sampled = max(1, SAMPLED_BYTES // tensor.dtype.itemsize)
        stride = max(1, -(-flat.size // sampled))
        digest = hashlib.sha256(f"{component}\0{'/'.join(path)}\0{shape}\0{tensor.dtype.name}\0".encode())
        digest.update(flat[::stride].tobytes())
        self._tensors.add(digest.digest())

    def hexdigest(self) -> str:
        """64 hexadecimal digits of the hash over everything added so far."""
        return hashlib.sha256(b"".join(sorted(self._tensors))).hexdigest()
