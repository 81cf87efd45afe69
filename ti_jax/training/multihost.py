"""One run on several processes, such as the hosts of a TPU pod: joining them, agreeing, and the leader process.

Each process has its own devices and runs the same program; only the leader (process 0) writes files and prints. What
differs between processes, such as a picture missing on one host or a request to stop, is sent to all of them, because
the others would otherwise wait for ever. A single process does none of this.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ti_jax.config import TrainConfig
from ti_jax.errors import InputError, OutOfStep, one_line, utf8
from ti_jax.machine import explaining_out_of_memory
from ti_jax.remote import as_given
from ti_jax.training.launchers import find_launch

T = TypeVar("T")

# A process without a heartbeat for this long is considered dead, and the others end.
HEARTBEAT_SECONDS = 60
# How long a finished process waits for the others to finish.
SHUTDOWN_SECONDS = 60

OUT_OF_MEMORY = (
    "give a smaller --train_batch_size (--gradient_accumulation_steps makes up for it), --gradient_checkpointing full "
    "or a smaller --resolution, or end other programs that use the device"
)
RESUME = "start all of them again, with --resume_from_checkpoint latest to go on from the last checkpoint"


class Agreed(InputError):
    """An error that all processes know of and end with."""


def join(config: TrainConfig) -> None:
    """Join the other processes of the run, if any, with ``jax.distributed.initialize``, before any other use of JAX.

    Raises:
      InputError: they cannot be found or reached, or JAX was used before.
    """
    if jax.distributed.is_initialized():
        return
    launch = find_launch(config)
    if launch is None:
        return
    # The loop handles SIGTERM itself.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            launch.coordinator_address,
            launch.num_processes,
            launch.process_id,
            launch.local_device_ids,
            cluster_detection_method="deactivate" if launch.complete else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError, OSError) as error:
        if "before any JAX" in one_line(error):
            raise InputError(
                f"{launch.evidence}, but JAX was used in this process before it could join the others, and each would "
                f"make a run of its own: start again and train first (in a notebook: restart the kernel), or give "
                f"--distributed never to train with this process's devices alone"
            ) from error
        raise InputError(
            f"{launch.evidence}, but this process cannot join the others ({one_line(error)}); give "
            f"--coordinator_address HOST:PORT, --num_processes and --process_id, or --distributed never to train with "
            f"this machine's devices alone"
        ) from error
    _watch()


def has_others(config: TrainConfig) -> bool:
    """Whether this is one of several processes."""
    return find_launch(config) is not None


def _watch() -> None:
    """Start a child process that prints one last line on stderr if JAX aborts this one because another one died.

    JAX aborts from C++ and no Python code runs after that, so that only a separate process can still print.
    """
    message = f"process {jax.process_index()} of {jax.process_count()} has ended early, or another one has: {RESUME}"
    watcher = subprocess.Popen(
        ["sh", "-c", f'read word || echo "{message}" >&2'], stdin=subprocess.PIPE, start_new_session=True
    )
    _dismiss.append(lambda: watcher.communicate(b"done\n"))
    atexit.register(_leave)


_dismiss: list[Callable[[], Any]] = []  # ends the watcher, if there is one


def _dismiss_watcher() -> None:
    while _dismiss:
        _dismiss.pop()()


def _leave() -> None:
    """At exit: wait for the other processes to finish."""
    _dismiss_watcher()
    jax.distributed.shutdown()


def is_leader() -> bool:
    """Whether this is the leader, the process that writes files and prints."""
    return jax.process_index() == 0


def log_leader(text: str) -> None:
    """Print a line on stderr, on the leader process only."""
    if is_leader():
        print(as_given(text), file=sys.stderr)


def all_or_raise(make: Callable[[], T]) -> T:
    """Call ``make`` on every process; return its result once it has succeeded on all of them.

    Raises:
      InputError: whatever it raised in another process, or an `InputError` that it raised here.
      Exception: anything else that it raised here, after it has been reported to the others.
    """
    if jax.process_count() == 1:
        return make()
    result: Any = None
    fault: Exception | None = None
    try:
        with explaining_out_of_memory(OUT_OF_MEMORY):
            result = make()
    except Exception as error:
        fault = error
    faults = _gather(b"" if fault is None else utf8(_described(fault)).encode())
    if fault is not None:
        raise _reported(fault)
    for number, message in enumerate(faults):
        if message:
            raise Agreed(f"process {number} of {len(faults)}: {message.decode()}")
    return result


def on_leader(make: Callable[[], T]) -> T:
    """Call ``make`` on the leader process only, and broadcast its (pickled) result to the others, which wait for it.

    Raises:
      InputError: whatever it raised there.
      Exception: on the leader, anything else that it raised, after it has been reported to the others.
    """
    if jax.process_count() == 1:
        return make()
    fault: Exception | None = None
    outcome = b""
    if is_leader():
        try:
            with explaining_out_of_memory(OUT_OF_MEMORY):
                outcome = pickle.dumps((make(), None))
        except Exception as error:
            fault = error
            outcome = pickle.dumps((None, _described(error)))
    result, message = pickle.loads(_gather(outcome)[0])
    if fault is not None:
        raise _reported(fault)
    if message is not None:
        raise Agreed(message)
    return result


_REPORTED = "This was reported to the other processes of the run."


def _described(fault: Exception) -> str:
    """A line on the fault for the other processes: an `InputError`'s message; of others also the class."""
    return str(fault) if isinstance(fault, InputError) else f"{type(fault).__name__}: {one_line(fault)}"


def _reported(fault: Exception) -> Exception:
    """The exception that a process ends with after its fault was reported to the others."""
    if isinstance(fault, InputError):
        agreed = Agreed(str(fault))
        agreed.__cause__ = fault
        return agreed
    fault.add_note(_REPORTED)
    return fault


def smallest(value: float | None) -> float | None:
    """Minimum over processes, ignoring None (None if all are None): for decisions that must agree everywhere."""
    if jax.process_count() == 1:
        return value
    known = [number for number in map(pickle.loads, _gather(pickle.dumps(value))) if number is not None]
    return min(known, default=None)


def check_same(what: dict[str, Any]) -> None:
    """Check that ``what``, a dict of JSON values, is the same on every process as on the leader.

    Raises:
      InputError: names the entries that differ.
    """
    theirs = on_leader(lambda: what)
    all_or_raise(functools.partial(_compare, what, theirs))


def _compare(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    different = [name for name in theirs if mine[name] != theirs[name]]
    if different:
        raise InputError(
            f"{', '.join(different)}: not the same as in process 0; give all processes the same settings and files"
        )


def _gather(mine: bytes) -> list[bytes]:
    """All-gather bytes; returns one entry per process."""
    lengths = multihost_utils.process_allgather(np.int32(len(mine))).tolist()
    padded = np.zeros(max(*lengths, 1), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


@contextlib.contextmanager
def in_step() -> Iterator[None]:
    """Context around a whole run: out of memory becomes an `InputError`, and a fault of one process ends all of them.

    A fault of one process alone becomes an `OutOfStep`, and so does the loss of another process.
    """
    try:
        with explaining_out_of_memory(OUT_OF_MEMORY):
            yield
    except Agreed:
        raise
    except Exception as error:
        if jax.process_count() == 1 or _REPORTED in getattr(error, "__notes__", ()):
            raise
        _dismiss_watcher()
        if isinstance(error, InputError):
            raise OutOfStep(str(error)) from error
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise OutOfStep(f"another process has ended or cannot be reached ({one_line(error)}); {RESUME}") from error
        traceback.print_exc()  # for an `OutOfStep` only a line is printed
        raise OutOfStep(f"{_described(error)}; {RESUME}") from error


class StopRequests:
    """Sends a request to stop to all processes, so that all stop after the same chunk; never waits for the devices.

    The request is reduced over the processes on the devices, after the chunks dispatched before it; so it can be read
    once these are done.
    """

    def __init__(self) -> None:
        self._pending: jax.Array | None = None
        if jax.process_count() > 1:
            devices = np.asarray(jax.devices())
            mesh = jax.sharding.Mesh(devices, ("processes",))
            self._sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("processes"))
            everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            self._any = jax.jit(lambda asked: asked.any(), out_shardings=everywhere)

    def send(self, asked: bool) -> None:
        """Send whether this process was asked to stop; called for every chunk, before it is dispatched."""
        if jax.process_count() == 1:
            return
        local = [jax.device_put(np.asarray([asked]), device) for device in jax.local_devices()]
        shape = (jax.device_count(),)
        self._pending = self._any(jax.make_array_from_single_device_arrays(shape, self._sharding, local))

    def received(self, asked: bool) -> bool:
        """Whether any process had been asked to stop at the last `send`; for a single process, ``asked``."""
        return asked if self._pending is None else bool(np.asarray(self._pending.addressable_data(0)))
