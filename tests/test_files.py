import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from permissions import shared_folder, without_rights  # noqa: F401 (a fixture)

from ti_jax.config import TrainConfig
from ti_jax.embeddings import Embedding
from ti_jax.errors import InputError
from ti_jax.evaluation.scores import Scores
from ti_jax.files import append, disk_errors, ensure_writable_folder, write_atomically, write_together
from ti_jax.training.measure import ScoreTracker
from ti_jax.training.report import Reporter, read_lines


def only_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, b"one")
    assert path.read_bytes() == b"one"
    write_atomically(str(path), lambda file: (file.write(b"tw"), file.write(b"o")))
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_others_may_read_it_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "a")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path / "real") == ["a"]


def test_a_name_of_the_longest_length(tmp_path):
    write_atomically(tmp_path / ("n" * 255), b"x")
    with pytest.raises(InputError, match="the name is too long"):
        write_atomically(tmp_path / ("n" * 256), b"x")


@pytest.mark.parametrize("fault", [ValueError("a fault of ours"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file_and_no_other(tmp_path, fault):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def half(file):
        file.write(b"ne")
        raise fault

    with pytest.raises(type(fault)):
        write_atomically(path, half)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_files_that_belong_together_are_not_replaced_by_halves(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(b"old")

    def fails(file):
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=f"cannot write {tmp_path / 'b'}: the disk is full"):
        write_together({tmp_path / "a": b"new", tmp_path / "b": fails})
    assert [(tmp_path / name).read_bytes() for name in "ab"] == [b"old", b"old"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    write_together({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert [(tmp_path / name).read_bytes() for name in "ab"] == [b"1", b"2"]


# A program, not a function, because a file size limit holds for a whole process and cannot be raised again.
WRITE_TOO_MUCH = """
import os, resource, signal, sys
from pathlib import Path
from ti_jax.errors import InputError
from ti_jax.files import ensure_writable_folder, write_atomically
if len(sys.argv) > 2:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
folder = Path(sys.argv[1])
write_atomically(folder / "kept", b"old")
for attempt in (lambda: write_atomically(folder / "kept", bytes(1 << 20)),
                lambda: write_atomically(folder / "new", lambda file: [file.write(bytes(4096)) for _ in range(256)])):
    try:
        attempt()
    except InputError as error:
        print(error)
assert (folder / "kept").read_bytes() == b"old"
print(sorted(os.listdir(folder)))
"""


def write_too_much(*arguments):
    done = subprocess.run([sys.executable, "-c", WRITE_TOO_MUCH, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_file_larger_than_the_limit_of_the_process(tmp_path):
    said = write_too_much(tmp_path, str(64 << 10))
    assert said == [
        f"cannot write {tmp_path / name}: the file exceeds the size limit; raise the limit (ulimit -f) or choose "
        "another place"
        for name in ("kept", "new")
    ] + ["['kept']"]


@contextmanager
def tiny_disk(folder):
    """A disk of 64 KiB at ``folder``; yields whether the system lets us mount one."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", folder], check=True)


NO_MOUNT = "mounting a tmpfs is not permitted here; the test with a file size limit stands for it"


def test_a_full_disk(tmp_path):
    with tiny_disk(tmp_path) as mounted:
        if not mounted:
            pytest.skip(NO_MOUNT)
        said = write_too_much(tmp_path)
        remedy = "the disk is full; free some space or choose another place"
        assert said == [*(f"cannot write {tmp_path / name}: {remedy}" for name in ("kept", "new")), "['kept']"]
        with open(tmp_path / "ballast", "wb", buffering=0) as ballast, pytest.raises(OSError):
            while True:
                ballast.write(bytes(4096))
        with pytest.raises(InputError, match=f"cannot write {tmp_path}: {remedy}"):
            ensure_writable_folder(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["ballast", "kept"]
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        for attempt in (ensure_writable_folder, lambda folder: write_atomically(folder / "kept", b"new")):
            with pytest.raises(InputError, match="the file system is read-only") as error:
                attempt(tmp_path)
            only_line(error)
        assert (tmp_path / "kept").read_bytes() == b"old"


def test_no_permission(shared_folder):  # noqa: F811
    (shared_folder / "a").write_bytes(b"old")
    shared_folder.chmod(0o555)
    with without_rights():
        for attempt in (ensure_writable_folder, lambda folder: write_atomically(folder / "a", b"new")):
            with pytest.raises(InputError, match=f"cannot write {shared_folder}.*: no permission") as error:
                attempt(shared_folder)
            only_line(error)
    assert (shared_folder / "a").read_bytes() == b"old"
    assert os.listdir(shared_folder) == ["a"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"whole")
    (tmp_path / "folder").mkdir()
    for path, why in [
        (tmp_path / "file" / "a", "a part of the path is a file and not a folder"),
        (tmp_path / "missing" / "a", "there is no such folder"),
        (tmp_path / "folder", "a folder of that name is in the way"),
    ]:
        with pytest.raises(InputError, match=f"cannot write {path}: {why}") as error:
            write_atomically(path, b"x")
        only_line(error)
    for path, why in [
        (tmp_path / "file", "a file of that name is in the way"),
        (tmp_path / "file" / "a" / "b", "a part of the path is a file and not a folder"),
    ]:
        with pytest.raises(InputError, match=f"cannot write {path}: {why}"):
            ensure_writable_folder(path)
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"] and os.listdir(tmp_path / "folder") == []


def test_a_folder_is_made_with_its_parents_and_left_empty(tmp_path):
    assert ensure_writable_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    ensure_writable_folder(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []


def test_disk_errors_let_other_errors_through():
    with pytest.raises(InputError, match="mine"), disk_errors("x"):
        raise InputError("mine")
    with pytest.raises(KeyError), disk_errors("x"):
        raise KeyError("k")
    with pytest.raises(InputError, match="cannot write x: Input/output error"), disk_errors("x"):
        raise OSError(5, "Input/output error")


def fill(path):
    with path.open("wb", buffering=0) as ballast, pytest.raises(OSError):
        while True:
            ballast.write(bytes(4096))


def test_what_is_appended_is_there_as_a_whole_or_not_at_all(tmp_path):
    with tiny_disk(tmp_path) as mounted:
        if not mounted:
            pytest.skip(NO_MOUNT)
        log = tmp_path / "log"
        append(log, b"one\n")
        fill(tmp_path / "ballast")
        append(log, b"two\n")  # in the page that the file has
        with pytest.raises(InputError, match=f"cannot write {log}: the disk is full"):
            append(log, b"x" * 8192)  # the first 4088 bytes would find a place
        assert log.read_bytes() == b"one\ntwo\n"
        (tmp_path / "ballast").unlink()
        append(log, b"three\n")
        assert log.read_bytes() == b"one\ntwo\nthree\n"


@pytest.mark.parametrize("report_to", ["tensorboard", "none"])
def test_figures_that_cannot_be_logged_are_a_warning(tmp_path, capsys, report_to):
    with tiny_disk(tmp_path) as mounted:
        if not mounted:
            pytest.skip(NO_MOUNT)
        reporter = Reporter(TrainConfig(report_to=(report_to,)), tmp_path, 0, 9)
        reporter.chunk(1, [0.5], 1e-3, 1)
        fill(tmp_path / "ballast")
        for step in (2, 3):
            reporter.chunk(step, [0.5] * 1000, 1e-3, 1000)
        (tmp_path / "ballast").unlink()
        reporter.chunk(4, [0.5], 1e-3, 1)
        reporter.close()
        assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 4]
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert "metrics.jsonl: the disk is full" in line


class Rising:
    """An evaluator whose next score is always higher."""

    value = 0.0

    def scores(self, sd, embedding, others):
        self.value += 0.1
        return Scores(identity=self.value)


def test_a_best_word_that_cannot_be_saved_is_not_taken_for_the_best(tmp_path, capsys):
    with tiny_disk(tmp_path) as mounted:
        if not mounted:
            pytest.skip(NO_MOUNT)
        tracker = ScoreTracker(Rising(), (), tmp_path, "identity")
        word = Embedding("<x>", {"text_encoder": np.ones((1, 8), np.float32)})
        tracker.measure(None, word, 1)
        fill(tmp_path / "ballast")
        with pytest.raises(InputError, match="the disk is full"):
            tracker.measure(None, word, 2)
        assert tracker.best is not None and tracker.best[0] == 1  # the one that is in the file
        (tmp_path / "ballast").unlink()
        tracker.measure(None, word, 3)
        assert tracker.best[0] == 3 and [line["step"] for line in read_lines(tmp_path / "scores.jsonl")] == [1, 3]
