"""TensorBoard's event files, written record by record.

Messages and checksums are tensorboardX's. Its writer is not used, because it writes in background threads and reports a
full disk in tracebacks at exit.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ti_jax.files import append, disk_errors
from ti_jax.startup import without

# Of PyTorch it makes use for tensors alone, and importing that takes seconds.
with without("torch"):
    from tensorboardX import summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import masked_crc32c


class Board:
    """One event file, unbuffered: a record has been written when the call returns.

    Raises:
      InputError: a record cannot be written; the file is as it was.
    """

    def __init__(self, folder: Path, first_step: int):
        """Start a file; TensorBoard then hides records of earlier files from after ``first_step``."""
        self._path = folder / f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        with disk_errors(self._path):
            folder.mkdir(parents=True, exist_ok=True)
        self._write(Event(file_version="brain.Event:2"))
        if first_step:
            self._write(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def scalar(self, name: str, value: float, step: int) -> None:
        """One point of a curve."""
        self._write(Event(step=step, summary=summary.scalar(name, value)))

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """One picture."""
        self._write(Event(step=step, summary=summary.image(name, np.asarray(image), dataformats="HWC")))

    def close(self) -> None:
        """Nothing is left to be written."""

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        append(self._path, length + _checksum(length) + content + _checksum(content))


def _checksum(content: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(content))
