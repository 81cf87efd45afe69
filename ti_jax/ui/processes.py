"""Training processes: starting, stopping and resuming them. None of them needs the page, or this process, to go on.

A run that is started here is ``ti-jax train`` with its own session, so that neither Ctrl-C in the server's terminal nor
the server's end reaches it. It inherits its log's file with a lock on it, which the system releases when the process
ends, however it ends: so any server knows whether it runs, also before it has locked its folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from ti_jax.errors import InputError
from ti_jax.files import disk_errors, write_atomically
from ti_jax.ui.runs import (
    CONFIG_FILE,
    LOG_FILE,
    PICTURES,
    PROCESS_FILE,
    SETTINGS_FILE,
    checkpoints_of,
    process_of,
    state_of,
)

try:
    import fcntl
except ImportError:  # Windows: a run is known by its number alone
    fcntl = None  # type: ignore[assignment]


def start(folder: Path, flags: Sequence[str]) -> int:
    """Start ``ti-jax train`` with these flags for a run's folder, and return the number of its process.

    Raises:
      InputError: a process has the folder already, or none can be started.
    """
    path = folder / LOG_FILE
    with disk_errors(path), path.open("ab") as log:
        if process_of(folder) is not None or not _locked(log.fileno()):
            raise InputError(f"the run in {folder} is going on already; stop it first")
        log.truncate(0)
        child = subprocess.Popen(
            [*python(), "ti_jax", "train", *flags],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            close_fds=True,
        )
        write_atomically(folder / PROCESS_FILE, str(child.pid).encode())
    # Or it would stay in the table of processes after its end.
    threading.Thread(target=child.wait, daemon=True, name=f"run {child.pid}").start()
    return child.pid


def python() -> list[str]:
    """The command line up to the name of a module, which is found where this process finds it: of the files in the
    working directory only if this one reads them, too.
    """
    here = {"", os.getcwd()} & set(sys.path)
    return [sys.executable, *([] if here else ["-P"]), "-m"]


def _locked(file: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def begin(folder: Path) -> int:
    """Start a new run with its `SETTINGS_FILE`; see `start`."""
    return start(folder, ["--config", str(folder / SETTINGS_FILE), "--output_dir", str(folder)])


def resume(folder: Path, steps: int | None = None) -> int:
    """Start a run again from its last checkpoint, or from its start if it has none; see `start`.

    Args:
      steps: the last step, if it is to be another one than before.
    """
    kept = folder / CONFIG_FILE
    flags = ["--config", str(kept if kept.is_file() else folder / SETTINGS_FILE), "--output_dir", str(folder)]
    if (folder / PICTURES).is_dir():  # the folder may have been moved
        flags += ["--train_data_dir", str(folder / PICTURES)]
    if checkpoints_of(folder):
        flags += ["--resume_from_checkpoint", "latest"]
    if steps is not None:
        flags += ["--max_train_steps", str(steps)]
    return start(folder, flags)


def stop(folder: Path) -> None:
    """Ask a run's process to stop as soon as it has saved a checkpoint.

    Raises:
      InputError: there is no process, it is not ours, or it was asked before: a second signal would end it at once.
    """
    state = state_of(folder)
    if state.process is None:
        raise InputError(f"the run in {folder} is not going on")
    if state.status == "stopping":
        raise InputError(f"the run in {folder} was asked to stop; it is saving a checkpoint")
    try:
        os.kill(state.process, signal.SIGTERM)
    except ProcessLookupError:
        pass
    except PermissionError as error:
        raise InputError(f"process {state.process} of {folder} belongs to another user, who has to stop it") from error
