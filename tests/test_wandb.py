"""``--report_to wandb``, in its offline mode: what a run leaves, resumed and not, and what is refused."""

import struct
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

import ti_jax
from ti_jax.config import TrainConfig
from ti_jax.errors import InputError
from ti_jax.training.report import Reporter
from ti_jax.training.wandb_board import WandbBoard, _settings, check_wandb


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No network, and nothing of the home folder's."""
    # Here and not above: every process of the session collects this file, and it takes 100 MB.
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()
    yield
    wandb.teardown()


def stored(path):
    """The records in a .wandb file: after 7 bytes a log like LevelDB's, blocks of 32 kB of (checksum, length, kind)."""
    from wandb.proto import wandb_internal_pb2

    content, place, part = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        length, kind = struct.unpack_from("<HB", content, place + 4)
        if kind == 0:  # the rest of the block is empty
            place += -place % 32768
            continue
        part += content[place + 7 : place + 7 + length]
        place += 7 + length
        if 32768 - place % 32768 < 7:
            place += -place % 32768
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(part)
            part = b""


def records(folder):
    """What the files of all runs have, in the order of their times: name and id, then each step's values."""
    import wandb

    wandb.teardown()  # `finish` does not wait until wandb's own process has written the last of a run's file
    runs = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        found = []
        for record in stored(path):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append({item.key or "/".join(item.nested_key): item.value_json for item in items})
            if record.WhichOneof("record_type") == "run":
                found.append({"id": record.run.run_id, "name": record.run.display_name})
        runs.append(found)
    return runs


def test_curves_and_pictures_are_logged_under_their_steps(tmp_path):
    reporter = Reporter(TrainConfig(report_to=("wandb",), placeholder_token="<x>"), tmp_path, 0, 9)
    reporter.chunk(4, [0.5, 0.25], 1e-3, 8)
    reporter.picture("validation", Image.fromarray(np.full((4, 4, 3), 7, np.uint8)), 4)
    reporter.chunk(8, [0.125], 1e-3, 8)
    reporter.close()
    ((run, *lines),) = records(tmp_path / "logs")
    assert run["name"] == "<x>" and run["id"] == (tmp_path / "logs" / "wandb" / "run-id.txt").read_text()
    assert [line["_step"] for line in lines] == ["4", "8"]
    assert lines[0]["loss"] == "0.375" and lines[1]["loss"] == "0.125"
    assert any(key.partition("/")[0] == "validation" for key in lines[0])
    (picture,) = (tmp_path / "logs").glob("wandb/offline-run-*/files/media/images/*.png")
    assert (np.asarray(Image.open(picture)) == 7).all()


def test_a_resumed_run_goes_on_under_its_id_and_a_new_one_does_not(tmp_path):
    ids = []
    for first_step in (0, 3, 0):
        WandbBoard(TrainConfig(placeholder_token="<x>"), tmp_path, first_step).close()
        ids.append((tmp_path / "wandb" / "run-id.txt").read_text())
    assert ids[0] == ids[1] != ids[2]


def test_a_run_reports_to_both_and_the_next_moves_it_aside(short_run):
    config = replace(short_run, report_to=("tensorboard", "wandb"), max_train_steps=2, logging_steps=1)
    for _ in range(2):
        out = ti_jax.train(config, devices=jax.devices()[:1]).output_dir
    for logs in (out / "logs", out / "previous-1" / "logs"):
        ((_, *lines),) = records(logs)
        assert [line["_step"] for line in lines] == ["1", "2"] and all("loss" in line for line in lines)
        assert list(logs.glob("events.out.tfevents.*"))


def test_settings_are_shown_without_secrets_and_paths():
    config = TrainConfig(hub_token="hf_secret", train_data_dir="/home/me/cat", seed=7, output_dir="out")
    shown = _settings(config)
    assert shown["seed"] == 7 and "hf_secret" not in str(shown) and "/home/me" not in str(shown)
    assert _settings(replace(config, pretrained_model_name_or_path="a/b"))["pretrained_model_name_or_path"] == "a/b"


def test_a_missing_wandb_is_told_with_the_extra(short_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"^--report_to wandb: wandb is not installed: pip install 'ti_jax\[wandb\]'"):
        ti_jax.train(replace(short_run, report_to=("wandb",)))


def test_nobody_logged_in_is_told_before_the_model_is_read(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(InputError, match=r"^--report_to wandb: No API key configured.*WANDB_MODE=offline"):
        check_wandb()


def test_a_board_that_fails_is_a_warning(tmp_path, monkeypatch, capsys):
    import wandb

    def fail(*arguments, **settings):
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", fail)
    reporter = Reporter(TrainConfig(report_to=("wandb",)), tmp_path, 0, 9)
    reporter.chunk(4, [0.5], 1e-3, 8)
    reporter.close()
    assert "warning: wandb: no route to host; figures are missing in the logs" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
