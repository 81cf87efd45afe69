"""One run on several processes, such as the hosts of a TPU pod: joining them, agreeing, and who writes.

Each process has its own devices and runs the same program; only the first writes files and speaks. What is not the same
everywhere, such as a missing picture on one host or a request to stop, has to be told to all, or the others would wait
for it for ever. Alone, a process does none of this.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import glob
import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..config import TrainConfig
from ..errors import InputError, OutOfStep, one_line

T = TypeVar("T")

# A process that is silent for so long is taken for dead, and ends the others.
HEARTBEAT_SECONDS = 60
# How long a process that is through waits for the others to be.
SHUTDOWN_SECONDS = 60

RESUME = "start all of them again, with --resume_from_checkpoint latest to go on from the last checkpoint"


class Agreed(InputError):
    """An error that all processes have been told of, and that all of them end with."""


def join(config: TrainConfig) -> None:
    """Join the other processes of the run, if it has any: ``jax.distributed.initialize``, before JAX is used otherwise.

    Raises:
      InputError: they cannot be found or reached, or JAX was used before.
    """
    if jax.distributed.is_initialized() or not has_others(config):
        return
    address = config.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = _number("JAX_NUM_PROCESSES") if config.num_processes is None else config.num_processes
    own = _number("JAX_PROCESS_ID") if config.process_id is None else config.process_id
    # The loop has a handler of SIGTERM of its own.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            count,
            own,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(
            f"cannot join the other processes ({one_line(error)}); give --coordinator_address HOST:PORT, "
            f"--num_processes and --process_id, or --distributed never to train with this machine's devices alone"
        ) from error
    _watch()


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is not None and not text.isdecimal():
        raise InputError(f"the environment variable {variable} is {text!r}; it must be a whole number")
    return None if text is None else int(text)


def has_others(config: TrainConfig) -> bool:
    """Whether this is one of several processes, or may be: on a TPU VM only JAX can tell."""
    if config.distributed != "auto":
        return config.distributed == "always"
    tasks = max(_number(name) or 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return config.coordinator_address is not None or "JAX_COORDINATOR_ADDRESS" in os.environ or tasks > 1 or _on_tpu()


def _on_tpu() -> bool:
    """Whether this is a TPU VM: only its libtpu can tell whether it is one of several."""
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    wanted = os.environ.get("JAX_PLATFORMS", "tpu").split(",")
    return bool(chips) and "tpu" in wanted and importlib.util.find_spec("libtpu") is not None


def _watch() -> None:
    """Have a clear last line on stderr where JAX ends this process because another one died: it does so from C++."""
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
      InputError: what it raised here, or what it raised in another process.
    """
    if jax.process_count() == 1:
        return make()
    result: Any = None
    fault: InputError | None = None
    try:
        result = make()
    except InputError as error:
        fault = error
    told = _gather(b"" if fault is None else str(fault).encode())
    if fault is not None:
        raise Agreed(str(fault)) from fault
    for number, message in enumerate(told):
        if message:
            raise Agreed(f"process {number} of {len(told)}: {message.decode()}")
    return result


def on_leader(make: Callable[[], T]) -> T:
    """What ``make`` returns in the first process, which alone calls it; other processes wait and get a copy.

    Raises:
      InputError: what it raised there.
    """
    if jax.process_count() == 1:
        return make()
    outcome: tuple[Any, str | None] = None, None
    if is_leader():
        try:
            outcome = make(), None
        except InputError as error:
            outcome = None, str(error)
    result, fault = pickle.loads(_gather(pickle.dumps(outcome))[0])
    if fault is not None:
        raise Agreed(fault)
    return result


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
    """Within it, what goes wrong in this process alone becomes an `OutOfStep`, as does another process that is gone."""
    try:
        yield
    except Agreed:
        raise
    except InputError as error:
        if jax.process_count() == 1:
            raise
        _dismiss_watcher()
        raise OutOfStep(str(error)) from error
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        _dismiss_watcher()
        raise OutOfStep(f"another process has ended or cannot be reached ({one_line(error)}); {RESUME}") from error


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

    def tell(self, asked: bool) -> None:
        """Say whether this process was asked, in every chunk and before it is given to the devices."""
        if jax.process_count() == 1:
            return
        local = [jax.device_put(np.asarray([asked]), device) for device in jax.local_devices()]
        shape = (jax.device_count(),)
        self._pending = self._any(jax.make_array_from_single_device_arrays(shape, self._sharding, local))

    def heard(self, asked: bool) -> bool:
        """Whether any process was asked, as of the last `tell`; alone, whether this one was."""
        return asked if self._pending is None else bool(np.asarray(self._pending.addressable_data(0)))
