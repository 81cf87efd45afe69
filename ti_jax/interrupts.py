"""Ctrl-C, SIGTERM and SIGHUP: answered at once, and honoured where nothing is lost.

Python runs a signal's handler only between two bytecodes of the main thread, which may wait for minutes in a compiler
or for a device. So a program has a thread that is woken by the signal itself (`signal.set_wakeup_fd`). It says that the
program is stopping and ends it, unless the main thread is within `deferred`: then that sees `requested`, and saves
first. A second signal always ends the program at once. Nothing here imports JAX, so that the first seconds count, too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

T = TypeVar("T")

STATUS = 130  # as a shell reports SIGINT
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

_PATIENCE = 5.0  # seconds that a file which is being written gets to become whole


class Interrupted(Exception):
    """A stop was requested; what was being computed has been dropped."""


class _State:
    program: str | None = None  # its name, where `listen` was called
    requested = False
    deferred = False
    abandon = False


_whole = threading.RLock()
_mode = threading.Lock()
_abandoned: list[threading.Thread] = []


def listen(program: str) -> None:
    """Have the signals end this program, from its main thread and before anything else is imported.

    What was ignored at the start, such as SIGHUP under ``nohup``, stays ignored.
    """
    _State.program = program
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)

    def watch() -> None:
        while True:
            for number in os.read(woken, 16):
                if number in SIGNALS:
                    _answer(number)

    threading.Thread(target=watch, daemon=True, name="interrupts").start()


def _answer(number: int) -> None:
    if _State.requested:
        _end(0.5)
    with _mode:
        _State.requested = True
        saving = _State.deferred
    _print(_message(number, saving))
    if not saving:
        _end(_PATIENCE)


def _message(number: int, saving: bool) -> str:
    what = "stopping as soon as a checkpoint is saved; once more ends the program at once" if saving else "stopping"
    name = f"{_State.program}: " if _State.program else ""
    return f"{name}{signal.Signals(number).name}: {what}"


def _print(text: str) -> None:
    """A line on stderr, whatever the main thread is doing with Python's stream."""
    try:
        os.write(2, f"\n{text}\n".encode())
    except OSError:  # the terminal is gone; what is written later must not fail over it
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (1, 2):
            os.dup2(nowhere, stream)


def _end(patience: float) -> NoReturn:
    """End the process without tearing down what its other threads are computing with."""
    _whole.acquire(timeout=patience)
    os._exit(STATUS)


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """Within it files are written that must not be left half done; a request to stop waits for its end."""
    with _whole:
        yield


@contextlib.contextmanager
def deferred(abandon: bool = True) -> Iterator[None]:
    """Within it a signal only sets `requested`; whoever is within looks at that, saves, and leaves.

    In a program that has not called `listen`, such as a notebook, the signals are heard within it alone, and a second
    one raises `KeyboardInterrupt`. Outside the main thread, where Python allows no handlers, nothing is heard.

    Args:
      abandon: whether `interruptible` may drop what it computes.
    """
    before: dict[int, object] = {}
    if _State.program is None:
        _State.requested = False
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, _ask) for number in SIGNALS if _is_heard(number)}
    with _mode:
        _State.deferred, _State.abandon = True, abandon
    try:
        yield
    finally:
        with _mode:
            _State.deferred = False
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if _State.program is None:  # the caller goes on, and no thread may outlive the interpreter
            while _abandoned:
                _abandoned.pop().join()


def _is_heard(number: int) -> bool:
    return signal.getsignal(number) not in (signal.SIG_IGN, None)


def _ask(number: int, frame: object) -> None:
    if _State.requested:
        raise KeyboardInterrupt
    _State.requested = True
    print(f"\n{_message(number, saving=True)}", file=sys.stderr, flush=True)


def requested() -> bool:
    """Whether a stop was requested."""
    return _State.requested


def interruptible(make: Callable[[], T]) -> T:
    """What ``make`` returns, computed in another thread; for what takes long and leaves nothing half done.

    Raises:
      Interrupted: within `deferred`, as soon as a stop is requested; ``make`` may go on, and its result is dropped.
    """
    if not _State.deferred or not _State.abandon:
        return make()
    outcome: list[tuple[T | None, BaseException | None]] = []

    def work() -> None:
        try:
            outcome.append((make(), None))
        except BaseException as error:  # whatever it is, it is raised again where the result is wanted
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True, name="interruptible")
    thread.start()
    while thread.is_alive():
        thread.join(0.05)
        if _State.requested and thread.is_alive():
            _abandoned.append(thread)
            raise Interrupted
    value, error = outcome[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def leave(status: int) -> NoReturn:
    """End the program. Where a computation was dropped the interpreter must not be torn down under it."""
    if not _abandoned:
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
