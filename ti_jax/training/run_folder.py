"""The folder of a run: its lock, its file names, and moving an earlier run's results aside."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from ti_jax.config import TrainConfig, concept_configs
from ti_jax.embeddings import Embedding
from ti_jax.errors import InputError
from ti_jax.files import disk_errors
from ti_jax.interrupts import whole
from ti_jax.remote import as_given, place_of

try:
    import fcntl
except ImportError:  # Windows has no flock; two runs in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

CONFIG_FILE = "config.yaml"
EMBEDDING_FILE = "learned_embeds.safetensors"
ONE_FILE = "learned_embeds_sdxl.safetensors"  # of an SDXL word, for AUTOMATIC1111 and ComfyUI
OVERVIEW_FILE = "overview.png"
PROGRESS_FILE = "progress.png"
REPORT_FILE = "report.html"
LOCK_FILE = ".ti_jax-lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder for one run. The system releases the lock when the process ends, however it ends.

    Raises:
      InputError: another run has it.
    """
    if fcntl is None:
        yield
        return
    path = folder / LOCK_FILE
    with _locked_file(folder, path) as file:
        with disk_errors(path):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _locked_file(folder: Path, path: Path) -> TextIO:
    """The file ``path``, open and locked."""
    while True:
        with disk_errors(path):
            file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                number = file.read().strip()
            raise InputError(
                f"--output_dir {folder}: another run is writing there{f' (process {number})' if number else ''}; wait "
                f"for its end, stop it, or give another --output_dir"
            ) from None
        except OSError:  # a file system without locks
            return file
        # A run that ended in between has removed the file that we opened, and others lock a new one.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def holder(lock: Path, number: Path | None = None) -> int | None:
    """Number of the process that holds a lock file; None: no process does.

    Args:
      number: the file with that number; None: the lock file itself, as `locked` writes it.
    """
    try:
        text = (number or lock).read_text(encoding="utf-8").strip()
        # The lock is tried only if there is such a process: a run that is starting must not find it taken by us.
        if not text.isdecimal() or not exists(int(text)):
            return None
        if fcntl is None:
            return int(text)
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(text)
    except OSError:  # no such file, or one of somebody else
        return None
    return None


def exists(process: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def folders(folder: Path, configs: Sequence[TrainConfig]) -> list[Path]:
    """The run's folder and, where they have their own, those of its concepts."""
    return list(dict.fromkeys([folder, *(Path(config.output_dir) for config in configs)]))


def check_apart(config: TrainConfig) -> None:
    """Make sure that no run learns from what runs write. Symbolic links are followed.

    Raises:
      InputError: ``--output_dir`` is a concept's ``--train_data_dir`` or inside it, or in the folder ``--concepts``, or
        a ``--train_data_dir`` is one of the folders that runs write to in ``--output_dir`` (``samples``,
        ``previous-1``, ...).
    """
    concepts = concept_configs(config)
    # A dataset of the hub has its folder elsewhere.
    read = [("--train_data_dir", each.train_data_dir) for each in concepts if each.train_data_dir is not None]
    if config.concepts is not None and os.path.isdir(place_of(config.concepts)):
        read.append(("--concepts", config.concepts))
    for folder in folders(Path(config.output_dir), concepts):
        output = Path(os.path.realpath(as_given(str(folder))))
        for flag, given in read:
            pictures = Path(os.path.realpath(as_given(given)))
            if output.is_relative_to(pictures):
                raise InputError(
                    f"--output_dir {config.output_dir}: in the folder of the pictures, {flag} {given}, and a run would "
                    f"learn from what another has drawn; choose a folder outside it"
                )
            inside = pictures.relative_to(output).parts if pictures.is_relative_to(output) else ()
            if inside and (inside[0] in ("samples", "logs", "checkpoints") or inside[0].startswith("previous-")):
                raise InputError(
                    f"{flag} {given}: a folder that runs write to, in --output_dir {config.output_dir}; choose another "
                    f"--output_dir"
                )


def _always(path: Path) -> bool:
    return True


def _says(*patterns: str) -> Callable[[Path], bool]:
    """Whether a text file has all the patterns."""

    def check(path: Path) -> bool:
        text = path.read_text(encoding="utf-8", errors="replace")
        return all(re.search(pattern, text, re.M) for pattern in patterns)

    return check


def _is_a_log(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(8)
    return start in (b'{"step":', b"")


def _is_our_png(path: Path) -> bool:
    """A picture that says how it was drawn has a text chunk; an overview's names the word."""
    with path.open("rb") as file:
        start = file.read(4096)
    return start.startswith(b"\x89PNG") and b"parameters" in start


# Patterns of the files that runs write, and a check that tells them from other files of the same name.
_RESULTS: tuple[tuple[str, Callable[[Path], bool]], ...] = (
    ("learned_embeds*.safetensors", _always),
    ("checkpoints/[0-9]*", lambda path: path.is_dir() and path.name.isdigit()),
    ("samples/step-*.png", _always),
    ("samples/overview-*.png", _always),
    ("logs/events.out.tfevents.*", _always),
    ("logs/wandb", lambda path: (path / "run-id.txt").is_file()),
    ("logs/plugins/profile/*", lambda path: any(path.glob("*.xplane.pb"))),
    ("metrics.jsonl", _is_a_log),
    ("scores.jsonl", _is_a_log),
    ("scores.json", _says('"token"')),
    (CONFIG_FILE, _says("^(placeholder_token|concepts):", "^output_dir:")),
    (OVERVIEW_FILE, _is_our_png),
    (PROGRESS_FILE, _is_our_png),
    (REPORT_FILE, _says('<meta name="generator" content="ti_jax')),
    ("README.md", _says("^- textual_inversion$", "learned_embeds")),
)
# Files that a run overwrites.
_WRITTEN = ("metrics.jsonl", "scores.jsonl", "scores.json", CONFIG_FILE, OVERVIEW_FILE, PROGRESS_FILE, REPORT_FILE)


def results(folder: Path) -> list[Path]:
    """Files and checkpoint folders of an earlier run."""
    return [path for pattern, ours in _RESULTS for path in sorted(folder.glob(pattern)) if ours(path)]


def _earlier_concepts(folder: Path) -> list[Path]:
    """The folders of the concepts of an earlier run of several in ``folder``; a run of one leaves a config."""
    config = folder / CONFIG_FILE
    if not config.is_file() or not _says("^concepts:", "^output_dir:")(config):
        return []
    inside = (path.parent for path in sorted(folder.glob(f"*/{EMBEDDING_FILE}")))
    return [each for each in inside if (each / "samples").is_dir() and not (each / CONFIG_FILE).exists()]


def check_free(folder: Path) -> None:
    """Check that no file would be overwritten that is not from a run.

    Raises:
      InputError: names the file.
    """
    with disk_errors(folder):
        ours = set(results(folder))
        for name in _WRITTEN:
            if (folder / name).exists() and folder / name not in ours:
                raise InputError(
                    f"--output_dir {folder}: the {name} there is not from a run, and would be written over; move it, "
                    f"or give another --output_dir"
                )


def prepare(folder: Path, resume_at: int | None, concepts: Sequence[Path] = ()) -> None:
    """Move the results of an earlier run to ``previous-N``.

    Args:
      concepts: the folders in it for the results of the run's concepts, where they have their own.
      resume_at: the step that the run resumes from: only checkpoints of later steps are moved. None: everything.

    Raises:
      InputError: the folder cannot be written.
    """
    with disk_errors(folder), whole():
        if resume_at is None:
            inside = [*concepts, *_earlier_concepts(folder)]
            earlier = [path for each in dict.fromkeys([folder, *inside]) for path in results(each)]
        else:
            steps = (folder / "checkpoints").glob("[0-9]*")
            earlier = [path for path in steps if path.name.isdigit() and int(path.name) > resume_at]
        if earlier:
            number = 1
            while (aside := folder / f"previous-{number}").exists():
                number += 1
            for path in earlier:
                target = aside / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
            of = "the results of an earlier run" if resume_at is None else f"checkpoints after step {resume_at}"
            print(as_given(f"{of} are moved to {aside}"), file=sys.stderr)
        for each in concepts or [folder]:
            (each / "samples").mkdir(parents=True, exist_ok=True)


def save_embedding(embedding: Embedding, folder: Path, step: int | None = None) -> None:
    """Write the word in diffusers' format, as ``learned_embeds.safetensors`` or under the name of its step.

    diffusers reads an SDXL word from two files. AUTOMATIC1111 and ComfyUI read one file with ``clip_l`` and ``clip_g``,
    which is also written, but not for the copies of earlier steps.
    """
    embedding.save(folder / (EMBEDDING_FILE if step is None else copy_name(step)), format="diffusers")
    if step is None and len(embedding.vectors) > 1:
        embedding.save(folder / ONE_FILE, format="comfyui")


def copy_name(step: int) -> str:
    """File name of the copy saved at a step."""
    return f"learned_embeds-steps-{step}.safetensors"
