"""Moments of pictures on disk, by content: a second run with the same pictures and model encodes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

from ti_jax.cache import cache_folder
from ti_jax.pipeline import StableDiffusion

# 30,000 pictures at 512 pixels, mirror images included.
CACHE_BYTES = 8 * 1000**3


class MomentsCache:
    """A folder with a file for each picture. What cannot be read or written is computed again, without a word."""

    def __init__(self, folder: Path):
        self.folder = folder

    def name(self, digest: str, shape: tuple[int, ...], sd: StableDiffusion, views: int, batch: int) -> str:
        """A file's name: a hash of all that the moments of a picture depend on, to the last bit.

        Args:
          digest: of its pixels, which have the ``shape``. views: 2 with the mirror image. batch: pictures that are
            encoded together.
        """
        device = jax.devices()[0]
        program: tuple = (sd.identity, np.dtype(sd.dtype).name, device.device_kind, metadata.version("jaxlib"), batch)
        if sd.networks.platform is not None and sd.networks.platform.compiler_options is not None:
            program += (sd.networks.platform.compiler_options,)
        return hashlib.sha256(f"{digest} {shape} {views} {program}".encode()).hexdigest()

    def read(self, name: str) -> np.ndarray | None:
        """The moments float32 [V, h, w, 2c] in a file; None if there is none, or it is damaged."""
        with contextlib.suppress(OSError, ValueError):
            content = (self.folder / name).read_bytes()
            checksum, shape, values = content[:32], content[32:64], content[64:]
            if hashlib.sha256(shape + values).digest() == checksum:
                return np.frombuffer(values, np.float32).reshape(np.frombuffer(shape, np.int64))
        return None

    def write(self, name: str, moments: np.ndarray) -> None:
        """Write the moments of a picture, float32 [V, h, w, 2c]."""
        content = np.array(moments.shape, np.int64).tobytes() + np.ascontiguousarray(moments).tobytes()
        temporary = self.folder / f".tmp-{secrets.token_hex(8)}"
        # Renamed but not synced: of thousands of files each sync would take as long as encoding. The checksum finds
        # what a crash has left half written.
        with contextlib.suppress(OSError):
            try:
                temporary.write_bytes(hashlib.sha256(content).digest() + content)
                os.replace(temporary, self.folder / name)
            finally:
                temporary.unlink(missing_ok=True)


def open_cache() -> MomentsCache | None:
    """The cache in ``~/.cache/ti_jax/moments``, reduced to `CACHE_BYTES`; None if that cannot be written."""
    folder = cache_folder("moments", CACHE_BYTES)
    return None if folder is None else MomentsCache(folder)
