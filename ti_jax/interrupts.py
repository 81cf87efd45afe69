"""Ctrl-C, SIGTERM and SIGHUP: acknowledged at once, and obeyed where nothing is lost.

Python runs signal handlers only between two bytecodes of the main thread, which may be blocked for minutes by the
compiler or a device. So a separate thread is woken by the signal itself (`signal.set_wakeup_fd`). It prints that the
program is stopping and ends it, unless the main thread is within `deferred`: then that one checks `requested`, and
saves first. A second signal always ends the program at once. Nothing here imports JAX, so that signals are also handled
while it is imported.
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

_PATIENCE = 5.0  # seconds to wait for a file that is being written


class Interrupted(Exception):
    """A stop was requested; the running computation was abandoned."""


class _State:
    program: str | None = None  # its name, once `listen` was called
    requested = False
    deferred = False
    abandon = False


_whole = threading.RLock()
_mode = threading.Lock()
_abandoned: list[threading.Thread] = []


def listen(program: str) -> None:
    """Handle the signals in this program; call it in the main thread, before anything else is imported.

    Signals that were ignored at the start, such as SIGHUP under ``nohup``, stay ignored.
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
    """Print a line on stderr, bypassing Python's stream, which the main thread may be using."""
    try:
        os.write(2, f"\n{text}\n".encode())
    except OSError:  # the terminal is gone; later writes must not fail because of that
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (1, 2):
            os.dup2(nowhere, stream)


def _end(patience: float) -> NoReturn:
    """End the process without tearing down the interpreter under its other threads."""
    _whole.acquire(timeout=patience)
    os._exit(STATUS)


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """Context for writing files that must not be left incomplete: a stop waits for its end."""
    with _whole:
        yield


@contextlib.contextmanager
def deferred(abandon: bool = True) -> Iterator[None]:
    """Context in which a signal only sets `requested`; the code inside polls that, saves, and leaves.

    In a program that has not called `listen`, such as a notebook, signals are handled only within it, and a second one
    raises `KeyboardInterrupt`. Outside the main thread, where Python allows no handlers, they are not handled.

    Args:
      abandon: whether `interruptible` may abandon its computation.
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
    """Call ``make`` in another thread and return its result; for long computations without side effects.

    Raises:
      Interrupted: within `deferred`, as soon as a stop is requested; ``make`` may go on, and its result is discarded.
    """
    if not _State.deferred or not _State.abandon:
        return make()
    outcome: list[tuple[T | None, BaseException | None]] = []

    def work() -> None:
        try:
            outcome.append((make(), None))
        except BaseException as error:  # of any kind: it is raised again in the calling thread
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


def beside(work: Callable[[], None]) -> threading.Thread:
    """Start ``work`` in another thread, for what may be abandoned when the program ends (`leave`), and return that."""
    thread = threading.Thread(target=work, name="beside")
    thread.start()
    _abandoned.append(thread)
    return thread


def leave(status: int) -> NoReturn:
    """End the program. If a computation still runs in a thread, skip the teardown, which would crash or wait for it."""
    if not any(thread.is_alive() for thread in _abandoned):
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
