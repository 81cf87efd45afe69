"""One run on several processes, such as the hosts of a TPU pod: joining them, agreeing, and who writes.

Each process has its own devices and runs the same program; only the first writes files and speaks. What is not the same
everywhere, such as a missing picture on one host or a request to stop, is reported to all, or the others would wait
for it for ever. Alone, a process does none of this.
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
from ti_jax.training.launchers import find_launch

T = TypeVar("T")

# A process that is silent for so long is taken for dead, and ends the others.
HEARTBEAT_SECONDS = 60
# How long a process that is through waits for the others to be.
SHUTDOWN_SECONDS = 60

OUT_OF_MEMORY = (
    "give a smaller --train_batch_size (--gradient_accumulation_steps makes up for it), --gradient_checkpointing full "
    "or a smaller --resolution, or end other programs that use the device"
)
RESUME = "start all of them again, with --resume_from_checkpoint latest to go on from the last checkpoint"


class Agreed(InputError):
    """An error that all processes have been told of, and that all of them end with."""


def join(config: TrainConfig) -> None:
    """Join the other processes of the run, if it has any: ``jax.distributed.initialize``, before JAX is used otherwise.

    Raises:
      InputError: they cannot be found or reached, or JAX was used before.
    """
    if jax.distributed.is_initialized():
        return
    launch = find_launch(config)
    if launch is None:
        return
    # The loop has a handler of SIGTERM of its own.
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
    """Start a child process that prints the last line on stderr where JAX aborts this one because another has died.

    JAX does so from C++: no Python code runs after that, so only another process can still say what has happened.
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
    """At the end of the program: wait for the others to be through."""
    _dismiss_watcher()
    jax.distributed.shutdown()


def is_leader() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def log_leader(text: str) -> None:
    """A line on stderr, by the first process."""
    if is_leader():
        print(text, file=sys.stderr)


def all_or_raise(make: Callable[[], T]) -> T:
    """What ``make`` returns here, once it has succeeded in every process.

    Raises:
      InputError: what it raised in another process, whatever that was, or an `InputError` that it raised here.
      Exception: anything else that it raised here, after the others have been told.
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
    """What ``make`` returns in the first process, which alone calls it; other processes wait and get a copy.

    Raises:
      InputError: what it raised there, whatever that was.
      Exception: in the first process, anything else that it raised, after the others have been told.
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


_REPORTED = "The other processes of the run have been told."


def _described(fault: Exception) -> str:
    """For the other processes: the message of an `InputError`, which explains itself; otherwise also its class."""
    return str(fault) if isinstance(fault, InputError) else f"{type(fault).__name__}: {one_line(fault)}"


def _reported(fault: Exception) -> Exception:
    """What a process ends with after the others have been told of its fault."""
    if isinstance(fault, InputError):
        agreed = Agreed(str(fault))
        agreed.__cause__ = fault
        return agreed
    fault.add_note(_REPORTED)
    return fault


def smallest(value: float | None) -> float | None:
    """The smallest of what each process has, of those that are not None: for choices that all must make alike."""
    if jax.process_count() == 1:
        return value
    known = [number for number in map(pickle.loads, _gather(pickle.dumps(value))) if number is not None]
    return min(known, default=None)


def check_same(what: dict[str, Any]) -> None:
    """Hold the values of ``what``, which JSON could have, to those of the first process.

    Raises:
      InputError: names what another process has otherwise.
    """
    theirs = on_leader(lambda: what)
    all_or_raise(functools.partial(_compare, what, theirs))


def _compare(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    different = [name for name in theirs if mine[name] != theirs[name]]
    if different:
        raise InputError(
            f"{', '.join(different)} not as in the first process; give all processes the same settings and files"
        )


def _gather(mine: bytes) -> list[bytes]:
    """What every process gives, by process."""
    lengths = multihost_utils.process_allgather(np.int32(len(mine))).tolist()
    padded = np.zeros(max(*lengths, 1), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


@contextlib.contextmanager
def in_step() -> Iterator[None]:
    """Around the whole of a run: too little memory is an `InputError`, and a fault of one process ends all of them.

    What goes wrong in one process alone becomes an `OutOfStep`, as does another process that is gone.
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
    """Tells all processes in the same chunk that one of them was asked to stop, without waiting for the devices.

    A request is summed over the processes by the devices, behind the chunks that they were given before; so it can be
    read once these are done.
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
        """Say whether this process was asked, in every chunk and before it is given to the devices."""
        if jax.process_count() == 1:
            return
        local = [jax.device_put(np.asarray([asked]), device) for device in jax.local_devices()]
        shape = (jax.device_count(),)
        self._pending = self._any(jax.make_array_from_single_device_arrays(shape, self._sharding, local))

    def received(self, asked: bool) -> bool:
        """Whether any process was asked, as of the last `send`; alone, whether this one was."""
        return asked if self._pending is None else bool(np.asarray(self._pending.addressable_data(0)))
