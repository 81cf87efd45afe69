"""The folder of a run: one run at a time, and only files that a run has written are moved aside."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import ti_jax
from ti_jax.cli.main import main
from ti_jax.config import TrainConfig, resolve
from ti_jax.config.yaml import dump_yaml
from ti_jax.errors import InputError
from ti_jax.images import save_png
from ti_jax.training import run_folder

HOLD = """
import sys
from pathlib import Path
from ti_jax.training.run_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder):
    run = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert run.stdout.readline() == b"held\n"
    return run


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_gone(tmp_path):
    first = hold(tmp_path)
    with (
        pytest.raises(InputError, match=rf"another run is writing there \(process {first.pid}\)"),
        run_folder.locked(tmp_path),
    ):
        pass
    first.kill()  # no chance to clean up
    first.communicate()
    with run_folder.locked(tmp_path):
        second = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], input=b"", capture_output=True)
        assert second.returncode != 0 and f"process {os.getpid()}" in second.stderr.decode()
    with run_folder.locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_on_a_file_that_a_run_has_just_removed_is_none(tmp_path):
    """Whoever opened it before and locks it after would be in the folder together with whoever makes a new one."""
    lock = run_folder.fcntl.flock

    def late(file, how):
        monkeypatch.undo()
        (tmp_path / run_folder.LOCK_FILE).unlink()
        lock(file, how)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(run_folder.fcntl, "flock", late)
        with run_folder.locked(tmp_path):
            run = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], input=b"", capture_output=True)
            assert f"another run is writing there (process {os.getpid()})" in run.stderr.decode()


def test_a_refused_command_leaves_nothing(short_run, tmp_path):
    """Not even the folders that it had to make to see that they can be written."""
    with pytest.raises(InputError, match="nowhere: no such file"):
        ti_jax.train(replace(short_run, output_dir=str(tmp_path / "a" / "b"), embeddings=(str(tmp_path / "nowhere"),)))
    picture, scores, sheet = (str(tmp_path / "a" / "b" / name) for name in ("a.png", "a.json", "sheet.png"))
    nowhere = str(tmp_path / "nowhere")
    assert main(["infer", "--prompt", "a", "--embedding", nowhere, "--output", picture]) == 2
    assert main(["evaluate", nowhere, "--train_data_dir", short_run.train_data_dir, "--output", scores]) == 2
    assert main(["data", nowhere, "--contact_sheet", sheet]) == 2
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    assert main(["data", nowhere, "--contact_sheet", sheet]) == 2
    assert list((tmp_path / "a").iterdir()) == [], "what was there stays"


def test_a_fault_of_the_run_is_not_one_of_the_lock(tmp_path):
    with pytest.raises(FileNotFoundError), run_folder.locked(tmp_path):
        (tmp_path / "none").read_bytes()


def test_train_in_a_folder_of_another_run_moves_nothing(short_run, capsys):
    """The whole command; it is refused before the model is loaded."""
    folder = Path(short_run.output_dir)
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 3}\n')
    first = hold(folder)
    try:
        with pytest.raises(InputError, match="another run is writing there"):
            ti_jax.train(short_run)
    finally:
        first.communicate(b"")
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"], "the lock is gone with the run"


@pytest.fixture
def folder(tmp_path, short_run):
    """What a run leaves."""
    folder, config = tmp_path / "out", short_run
    for name in ("learned_embeds.safetensors", "learned_embeds-steps-5.safetensors", "logs/events.out.tfevents.1.a.2"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss": 0.1}) + "\n")
    (folder / "scores.jsonl").write_text(json.dumps({"step": 3}) + "\n")
    (folder / "scores.json").write_text(json.dumps({"token": "<x>"}))
    (folder / "config.yaml").write_text(dump_yaml(resolve(config)))
    for step in (5, 10):
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    (folder / "samples").mkdir()
    for name in ("overview.png", "samples/step-000005.png", "samples/overview-00.png"):
        save_png(folder / name, Image.new("RGB", (2, 2)), {"prompt": "x"})
    return folder


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() or not any(path.iterdir())}


def test_what_a_run_has_left_is_moved_aside(folder):
    before = files(folder)
    run_folder.check_free(folder)
    run_folder.prepare(folder, None)
    assert files(folder / "previous-1") == before
    assert {path.name for path in folder.iterdir() if not path.is_dir() or any(path.rglob("*.*"))} == {"previous-1"}


def test_what_others_have_left_stays(folder):
    others = ("README.md", "checkpoints/model.ckpt", "logs/build.txt", "samples/mine.png", "notes.txt")
    for name in others:
        (folder / name).write_text("# my project")
    run_folder.prepare(folder, None)
    assert {name for name in others if (folder / name).read_text() == "# my project"} == set(others)
    assert not (folder / "checkpoints" / "5").exists()


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "overview.png", "scores.json", "scores.jsonl"])
def test_a_file_of_others_that_would_be_written_over_is_refused(tmp_path, name):
    (tmp_path / name).write_text("model: mine\n")
    with pytest.raises(InputError, match=f"the {name} there is not from a run"):
        run_folder.check_free(tmp_path)


def test_resuming_moves_later_checkpoints_only(folder):
    before = files(folder)
    run_folder.prepare(folder, 5)
    assert files(folder / "previous-1") == {"checkpoints/10"}
    assert before - files(folder) == {"checkpoints/10"}
    run_folder.prepare(folder, 5)
    assert not (folder / "previous-2").exists()


def check_apart(data, output):
    run_folder.check_apart(TrainConfig(train_data_dir=str(data), output_dir=str(output)))


def test_a_run_cannot_write_among_its_pictures(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "link").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    for output in (data, data / "output", "data", "./data/", "data/a/b", "link", "link/output", "elsewhere/../data"):
        with pytest.raises(InputError, match="choose a folder outside it") as error:
            check_apart(data, output)
        assert f"--output_dir {output}: " in str(error.value) and f"--train_data_dir {data}" in str(error.value)
    for output in (tmp_path, tmp_path / "output", "output", "data2", "../data"):
        check_apart("data", output)


@pytest.mark.parametrize("inside", ["samples", "previous-3", "previous-1/samples", "checkpoints", "logs"])
def test_a_run_cannot_learn_from_what_runs_have_written(tmp_path, inside):
    with pytest.raises(InputError, match=r"^--train_data_dir .*: a folder that runs write to, in --output_dir "):
        check_apart(tmp_path / "out" / inside, tmp_path / "out")
    check_apart(tmp_path / "out" / "pictures", tmp_path / "out")


@pytest.mark.parametrize("data, output", [("data", "data"), ("data", "data/output"), ("out/samples", "out")])
def test_train_refuses_its_own_output_as_pictures(data, output, pictures, tmp_path, monkeypatch, capfd):
    """The whole command: one line, and nothing is written."""
    shutil.copytree(pictures, tmp_path / data)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    command = ["train", "--train_data_dir", data, "--output_dir", output, "--placeholder_token", "<new>"]
    assert main([*command, "--initializer_token", "person", "--max_train_steps", "1"]) == 2
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 1 and "--train_data_dir" in err[0] and "--output_dir" in err[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_read_only_disk_is_one_line_before_training(tmp_path, capfd):
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        assert main(["train", "--output_dir", str(tmp_path / "out"), "--max_train_steps", "1"]) == 2
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    (line,) = capfd.readouterr().err.splitlines()
    assert f"cannot write {tmp_path / 'out'}: the file system is read-only; choose another place" in line
