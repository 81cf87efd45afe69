"""The folder of a run behind a URL: a run works in a folder of this machine, and what it writes there is sent.

A file appears behind the URL only when it is whole, a checkpoint's last file after all others, and an old file goes
when its successor is there. So a machine may vanish at any moment: a run on another one goes on from the newest
checkpoint that has arrived whole. Files are sent after each action of a run, and retried with the next; the end of a
run waits for them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ti_jax.errors import InputError
from ti_jax.files import as_url, disk_errors
from ti_jax.remote import RUNS, Stamp, Storage, local_stamp, place_of, read_record, write_record

LOCK = ".ti_jax-lock"
# A lock is renewed this often, and taken over from a run that has not renewed it for so long.
RENEW_SECONDS, PATIENCE_SECONDS = 20.0, 60.0

_CHECKPOINT = re.compile(r"(checkpoints/\d+)/(.+)")
_LAST = "_CHECKPOINT_METADATA"  # without it Orbax takes a folder for no checkpoint
_OURS_ALONE = re.compile(r"(^|/)(\.ti_jax-lock$|\.tmp-)|orbax-checkpoint-tmp")
_ASIDE = re.compile(r"(previous-\d+)/")


class RemoteFolder:
    """A run's folder behind a URL.

    Attributes:
      url: of the folder. folder: where the run works meanwhile, in the user's cache.
    """

    def __init__(self, url: str):
        self.url, self.folder = url, place_of(url, RUNS)
        self._sent: dict[str, tuple[int, int]] = {}
        self._token, self._beat = secrets.token_hex(8), 0
        self._lost = threading.Event()
        self._warned = False

    @classmethod
    def of(cls, output_dir: str) -> RemoteFolder | None:
        """That of a URL; None for a path of this machine."""
        url = as_url(output_dir)
        return None if url is None else cls(url)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Lock the folder for this run, and make the one here as it is. The one here is locked already.

        Raises:
          InputError: another run has it; it cannot be read or written.
        """
        self._storage = Storage(self.url)
        self._lock()
        ended = threading.Event()
        renewing = threading.Thread(target=self._renew, args=[ended], daemon=True, name="lock")
        renewing.start()
        try:
            self._fetch()
            yield
            self.send(must=True)
        except BaseException:
            with contextlib.suppress(InputError):
                self.send()
            raise
        finally:
            ended.set()
            renewing.join()
            self._unlock()

    def send(self, must: bool = False) -> None:
        """Send what has been written here since the last time, and remove what has been removed.

        Args:
          must: what cannot be sent is an error; otherwise a warning, and the next call tries again.

        Raises:
          InputError: another run has taken the folder over; with ``must`` also if something cannot be sent.
        """
        self._check_lock(must)
        try:
            self._send()
        except InputError as error:
            kept = f"all is in {self.folder.as_uri()}"
            if must:
                raise InputError(
                    f"{error}. Not all has been sent; {kept}, and the same command on this machine sends it first"
                ) from error
            if not self._warned:
                tqdm.write(f"warning: {error}; {kept}, and is sent as soon as that works", file=sys.stderr)
            self._warned = True

    def _send(self) -> None:
        here = self._here()
        new = [name for name, stamp in here.items() if self._sent.get(name) != stamp]
        gone = [name for name in self._sent if name not in here]
        if not new and not gone:
            return
        for rank in range(3):
            self._storage.send([name for name in new if _rank(name) == rank], self.folder)
        for rank in (2, 1, 0):
            self._storage.remove([name for name in gone if _rank(name) == rank])
        self._sent = here
        self._keep_record(self._listing())

    def _here(self) -> dict[str, tuple[int, int]]:
        """Size and time of the files here, by name."""
        names = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        stamps = {name: local_stamp(self.folder / name) for name in names if not _OURS_ALONE.search(name)}
        return {name: stamp for name, stamp in stamps.items() if stamp is not None}

    def _listing(self) -> dict[str, Stamp]:
        return {name: stamp for name, stamp in self._storage.listing().items() if not _OURS_ALONE.search(name)}

    def _keep_record(self, there: dict[str, Stamp]) -> None:
        record = {name: [there[name], stamp] for name, stamp in self._sent.items() if name in there}
        write_record(RUNS, self.url, record)

    def _fetch(self) -> None:
        """Make the folder here as the one behind the URL, but for the results of earlier runs in ``previous-N``."""
        there = self._listing()
        if "" in there:
            raise InputError(f"--output_dir {self.url}: a file; give a folder")
        record = read_record(RUNS, self.url)
        known = {name: Stamp(*stamp) for name, (stamp, _) in record.items()}
        here = self._here()
        before = {name: (size, changed) for name, (_, (size, changed)) in record.items()}
        unsent = [name for name, stamp in here.items() if before.get(name) != stamp]
        wanted = {name: stamp for name, stamp in there.items() if not _ASIDE.match(name)}
        if unsent and record and known == {name: there.get(name) for name in known} and known.keys() >= wanted.keys():
            print(f"{self.url}: sending first what an earlier run here could not", file=sys.stderr)
            self._sent = before
            self._send()
            return
        self._keep_aside(unsent)
        whole = {name for name in wanted if _is_whole(name, wanted)}
        self._storage.remove(wanted.keys() - whole)
        for name in here.keys() - whole:
            (self.folder / name).unlink(missing_ok=True)
        new = [name for name in whole if known.get(name) != there[name] or here.get(name) != before.get(name)]
        self._storage.fetch(new, self.folder)
        for name in {found[1] for found in map(_ASIDE.match, there) if found}:
            (self.folder / name).mkdir(exist_ok=True)  # so that the next results to be moved aside have another number
        _remove_empty(self.folder)
        self._sent = {name: stamp for name, stamp in self._here().items() if name in whole}
        self._keep_record(there)

    def _keep_aside(self, names: list[str]) -> None:
        """Move files that an earlier run here could not send, where another run has gone on meanwhile."""
        if not names:
            return
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}-unsent-{number}")).exists():
            number += 1
        with disk_errors(aside):
            for name in names:
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).rename(aside / name)
        print(f"{self.url}: what an earlier run here could not send is kept in {aside}", file=sys.stderr)

    def _lock(self) -> None:
        """Take the lock; from a run that has ended without giving it back after some time.

        Raises:
          InputError: another run renews it.
        """
        found = self._storage.read(LOCK)
        holder = _parsed(found)
        if found and not _has_ended(holder):
            who = f"{holder.get('host', 'another machine')}, process {holder.get('process', '?')}"
            print(
                f"{self.url}: a run of {who} had this folder; waiting {PATIENCE_SECONDS:.0f} s for a sign of it",
                file=sys.stderr,
            )
            end = time.monotonic() + PATIENCE_SECONDS
            while time.monotonic() < end:
                time.sleep(min(2.0, PATIENCE_SECONDS / 10))
                now = self._storage.read(LOCK)
                if now is None:
                    break
                if now != found:
                    raise InputError(
                        f"--output_dir {self.url}: another run is writing there ({who}); wait for its end, stop it, or "
                        f"give another --output_dir"
                    )
        self._write_lock()

    def _write_lock(self) -> None:
        self._beat += 1
        holder = {
            "token": self._token, "host": socket.gethostname(), "boot": _boot(), "process": os.getpid(),
            "renewed": self._beat,
        }  # fmt: skip
        self._storage.write(LOCK, json.dumps(holder).encode())

    def _is_ours(self) -> bool:
        return _parsed(self._storage.read(LOCK)).get("token") == self._token

    def _renew(self, ended: threading.Event) -> None:
        while not ended.wait(RENEW_SECONDS):
            with contextlib.suppress(InputError):  # the network is away; the next time
                if not self._is_ours():
                    self._lost.set()
                    return
                self._write_lock()

    def _check_lock(self, must: bool) -> None:
        try:
            ours = self._is_ours()
        except InputError:  # then nothing can be sent either, which is said there
            return
        if self._lost.is_set() or not ours:
            raise InputError(
                f"--output_dir {self.url}: another run has taken it over, as this one had given no sign for a while; "
                f"what this one has learned since is in {self.folder.as_uri()}"
            )

    def _unlock(self) -> None:
        with contextlib.suppress(InputError):
            if self._is_ours():
                self._storage.remove([LOCK])


def _rank(name: str) -> int:
    """In which order files are sent: a checkpoint after the words and logs, and what makes it one last."""
    found = _CHECKPOINT.fullmatch(name)
    return 0 if found is None else 2 if found[2] == _LAST else 1


def _is_whole(name: str, names: dict[str, Stamp]) -> bool:
    """Whether a file belongs to no checkpoint, or to one that has arrived whole."""
    found = _CHECKPOINT.fullmatch(name)
    return found is None or f"{found[1]}/{_LAST}" in names


def _remove_empty(folder: Path) -> None:
    """Remove folders in which no file is left, but those of earlier runs' results."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not _ASIDE.match(f"{path.relative_to(folder).as_posix()}/"):
            with contextlib.suppress(OSError):
                path.rmdir()


def _parsed(lock: bytes | None) -> dict:
    try:
        found = json.loads(lock or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _boot() -> str:
    """What tells processes that have their numbers together from others: the start of this machine, and the container.

    Empty where the system does not say.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _has_ended(holder: dict) -> bool:
    """Whether a lock is of a process of this machine that has ended."""
    if holder.get("host") != socket.gethostname() or not _boot() or holder.get("boot") != _boot():
        return False
    try:
        os.kill(int(holder.get("process", 0)), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    return False
