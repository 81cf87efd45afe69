"""The run folders under one root: which there are, and what each says of its run. Nothing else is remembered."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ti_jax.config import TrainConfig, load_yaml, resolve
from ti_jax.config.concepts import slug
from ti_jax.errors import InputError
from ti_jax.files import disk_errors
from ti_jax.training.run_folder import CONFIG_FILE, EMBEDDING_FILE, LOCK_FILE, REPORT_FILE, holder

# In a run that was started from the page: the pictures dropped there, what was asked for, what the process says, and
# its number.
PICTURES, SETTINGS_FILE, LOG_FILE, PROCESS_FILE = "pictures", "settings.yaml", "training.log", ".ti_jax-process"
METRICS_FILE = "metrics.jsonl"

LOG_END = 20_000  # bytes of the log that are read
NEWEST = "the word as it is now"
HERE = "."  # the name of the root itself, where that is a run's folder

Status = Literal["starting", "learning", "stopping", "stopped", "finished", "failed"]


class Runs:
    """The run folders directly under a root. Symbolic links are not followed: a name leads nowhere else.

    Attributes:
      root: an absolute path without links.
    """

    def __init__(self, root: str | Path):
        self.root = Path(os.path.realpath(root))

    def names(self) -> list[str]:
        """Names of all runs, the one that was started last first."""
        found = []
        if _is_run(self.root):
            found.append((_began(self.root), HERE))
        try:
            with os.scandir(self.root) as entries:
                for entry in entries:
                    if _is_name(entry.name) and entry.is_dir(follow_symlinks=False) and _is_run(Path(entry.path)):
                        found.append((_began(Path(entry.path)), entry.name))
        except OSError:  # there is no root yet
            pass
        return [name for _, name in sorted(found, reverse=True)]

    def folder(self, name: Any) -> Path:
        """The folder of a run.

        Raises:
          InputError: not the name of a run here; also a path, or a link that leads elsewhere.
        """
        if name == HERE and _is_run(self.root):
            return self.root
        if isinstance(name, str) and _is_name(name):
            folder = self.root / name
            if folder.is_dir() and not folder.is_symlink() and _is_run(folder):
                return folder
        raise InputError(f"{name!r}: no run of that name in {self.root}; choose one from the list")

    def file(self, name: Any, path: Any) -> Path:
        """A file of a run by its path in the run's folder.

        Raises:
          InputError: there is none, or it lies elsewhere.
        """
        folder = self.folder(name)
        if isinstance(path, str) and path and "\0" not in path:
            real = Path(os.path.realpath(folder / path))
            if real.is_file() and real.is_relative_to(folder) and not Path(path).is_absolute() and ".." not in path:
                return real
        raise InputError(f"{path!r}: no such file in the folder of the run {name}; choose one from the list")

    def new(self, word: str) -> Path:
        """Make the folder of a new run, named after its word.

        Raises:
          InputError: it cannot be made.
        """
        base = slug(word)
        with disk_errors(self.root / base):
            self.root.mkdir(parents=True, exist_ok=True)
            for number in range(1, 10_000):
                folder = self.root / (base if number == 1 else f"{base}-{number}")
                try:
                    folder.mkdir()
                except FileExistsError:
                    continue
                return folder
        raise InputError(f"{self.root}: thousands of runs named {base}; move some away")


def _is_name(name: str) -> bool:
    """Whether it can be a run's: not a path, not hidden, and not where a run has moved earlier results."""
    return bool(name) and not re.search(r"[/\\\0]|^\.|^previous-\d+$", name)


def _is_run(folder: Path) -> bool:
    return any(_is_own_file(folder / name) for name in (CONFIG_FILE, SETTINGS_FILE))


def _is_own_file(path: Path) -> bool:
    """Whether it is a file, and no link to one elsewhere."""
    return path.is_file() and not path.is_symlink()


def _began(folder: Path) -> float:
    times = [(folder / name).stat().st_mtime for name in (CONFIG_FILE, SETTINGS_FILE) if (folder / name).exists()]
    return max(times, default=0.0)


@dataclass(frozen=True)
class State:
    """What a run's folder says.

    Attributes:
      says: one line for the user: the error that ended it, or what it does. step, total: updates; 0: not known.
      token: the word; of several, all of them. process: its number while it runs.
    """

    status: Status
    says: str
    step: int
    total: int
    token: str
    process: int | None

    @property
    def running(self) -> bool:
        """There is a process."""
        return self.process is not None


def state_of(folder: Path) -> State:
    """Read what a run's folder says now."""
    process = process_of(folder)
    log = log_end(folder)
    last = log[-1] if log else ""
    step = last_step(folder)
    try:
        config = config_of(folder)
    except InputError as error:
        return State("failed", str(error), step, 0, folder.name, process)
    token = config.placeholder_token or folder.name
    total = config.max_train_steps or 0

    def found(status: Status, says: str) -> State:
        return State(status, says, step, total, token, process)

    if process is not None:
        if any("stopping as soon as a checkpoint is saved" in line for line in log):
            return found("stopping", "a checkpoint is being saved")
        if not (folder / METRICS_FILE).exists() or holder(folder / LOCK_FILE) is None:
            return found("starting", last or "reading the model")
        if total and step >= total:
            return found("learning", "drawing the last pictures")
        return found("learning", "" if "learning:" in last else last)
    if (fault := _error_of(log)) is not None:
        return found("failed", fault)
    report = _report_says(folder)
    if report == "finished":
        return found("finished", "")
    if report.startswith("ended at"):
        return found("failed", report)
    if report.startswith("stopped"):
        return found("stopped", report)
    return found("stopped", "the process has ended before it was through; Resume goes on from the last checkpoint")


def process_of(folder: Path) -> int | None:
    """Number of the process that a run has, also while it is only reading its model; None: it does not run."""
    return holder(folder / LOCK_FILE) or holder(folder / LOG_FILE, folder / PROCESS_FILE)


def config_of(folder: Path) -> TrainConfig:
    """The run's settings: those that it has written, or those that it was asked for.

    Raises:
      InputError: they cannot be read, or not any more.
    """
    path = next((folder / name for name in (CONFIG_FILE, SETTINGS_FILE) if _is_own_file(folder / name)), None)
    if path is None:
        raise InputError(f"{folder}: neither {CONFIG_FILE} nor {SETTINGS_FILE} in it")
    config = TrainConfig(**load_yaml(path, TrainConfig))
    return config if path.name == CONFIG_FILE else resolve(config)


def words_of(folder: Path) -> dict[str, str]:
    """The learned words in a run's folder: what each is called on the page, and its path in the folder.

    Of several concepts each has its folder. The newest state comes first, then all copies, the last one first.
    """
    found: dict[str, str] = {}
    for inside in (folder, *sorted(path for path in folder.glob("*") if (path / EMBEDDING_FILE).is_file())):
        if inside.is_symlink() or (inside != folder and not _is_name(inside.name)):
            continue
        prefix = "" if inside == folder else f"{inside.name}, "
        copies = (re.fullmatch(r"learned_embeds-steps-(\d+)\.safetensors", path.name) for path in inside.glob("*"))
        steps = sorted((int(match[1]) for match in copies if match is not None), reverse=True)
        of_steps = {f"{prefix}step {step}": f"learned_embeds-steps-{step}.safetensors" for step in steps}
        newest = EMBEDDING_FILE if (inside / EMBEDDING_FILE).is_file() else next(iter(of_steps.values()), None)
        names = of_steps if newest is None else {f"{prefix}{NEWEST}": newest, **of_steps}
        found |= {label: (inside / name).relative_to(folder).as_posix() for label, name in names.items()}
    return found


def place_of(folder: Path, name: str) -> str:
    """Path of a run's file in its folder; of several concepts that of the first that has one."""
    found = [path for path in sorted(folder.glob(f"*/{name}")) if _is_name(path.parent.name)]
    return name if (folder / name).exists() or not found else found[0].relative_to(folder).as_posix()


def checkpoints_of(folder: Path) -> list[int]:
    """Steps of the checkpoints to resume from."""
    return sorted(int(path.name) for path in folder.glob("checkpoints/[0-9]*") if path.name.isdigit())


def records_of(folder: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``, but for a line that is only half written."""
    return list(_records(folder / METRICS_FILE))


def last_step(folder: Path) -> int:
    """The last update that was logged."""
    return max((record["step"] for record in _records(folder / METRICS_FILE, LOG_END)), default=0)


def _records(path: Path, end: int | None = None) -> Iterator[dict[str, Any]]:
    for line in _end_of(path, end).splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def log_end(folder: Path) -> list[str]:
    """The last lines of what the process has said; of a progress bar, what is on the screen at the end."""
    lines = (line.rpartition("\r")[2].strip() for line in _end_of(folder / LOG_FILE, LOG_END).split("\n"))
    return [line for line in lines if line]


def _end_of(path: Path, count: int | None) -> str:
    """The last bytes of a file as text; empty if there is none, or a link to one elsewhere."""
    if path.is_symlink():
        return ""
    try:
        with path.open("rb") as file:
            if count is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - count))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _error_of(log: list[str]) -> str | None:
    """The line that an error has ended a run with; None: no error has."""
    for number, line in enumerate(log):
        if (match := re.match(r"ti-jax: error: (.*)", line)) is not None:
            return match[1]
        if line.startswith("Traceback (most recent call last)"):
            return f"a fault of ti_jax: {log[-1]}" if number < len(log) - 1 else "a fault of ti_jax"
    return None


def _report_says(folder: Path) -> str:
    """How the run's own page says that it ended."""
    try:
        with (folder / REPORT_FILE).open(encoding="utf-8", errors="replace") as file:
            match = re.search(r'<div class="state">([^<]*)</div>', file.read(50_000))
    except OSError:
        return ""
    return "" if match is None else match[1].strip()
