"""ti-jax ui without a browser: run folders, processes, what the page may choose, pictures and files."""

import json
import os
import subprocess
import sys
import time

import pytest
from PIL import Image
from words import sdxl_word, word

from ti_jax.cli import main
from ti_jax.config import ASSETS, TrainConfig, dump_yaml, load_yaml, resolve
from ti_jax.config.fields import settings_of
from ti_jax.embeddings import Embedding
from ti_jax.embeddings.formats import WRITTEN
from ti_jax.errors import InputError
from ti_jax.training.run_folder import LOCK_FILE, holder, locked
from ti_jax.ui import pictures, processes, saving
from ti_jax.ui.runs import (
    LOG_FILE,
    PICTURES,
    PROCESS_FILE,
    SETTINGS_FILE,
    Runs,
    config_of,
    log_end,
    place_of,
    process_of,
    records_of,
    state_of,
    words_of,
)
from ti_jax.ui.settings import EMBEDDED, EXAMPLE, Form, Models, further_settings, make_config, may_choose
from ti_jax.ui.trying import class_of


@pytest.fixture
def root(tmp_path):
    """A folder of runs with one of <cleo> that has only been asked for, and files around it that are nobody's."""
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "runs" / "cleo"
    folder.mkdir(parents=True)
    (folder / SETTINGS_FILE).write_text("placeholder_token: <cleo>\nmax_train_steps: 40\n")
    return tmp_path / "runs"


def write_log(folder, text):
    (folder / LOG_FILE).write_text(text)


def metrics(folder, *steps):
    lines = [json.dumps({"step": step, "loss": 0.5, "losses": [0.5]}) for step in steps]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 99']))


# -- run folders


def test_runs_are_found_in_their_folders_and_nowhere_else(root):
    later = root / "me"
    later.mkdir()
    (later / "config.yaml").write_text("placeholder_token: <me>\n")
    os.utime(later / "config.yaml", (2e9, 2e9))
    for name in ("no-run", ".hidden", "previous-1"):
        (root / name).mkdir()
    for name in (".hidden", "previous-1"):
        (root / name / "config.yaml").touch()
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "config.yaml").touch()
    (root / "link").symlink_to(outside)
    runs = Runs(root)
    assert runs.names() == ["me", "cleo"] and runs.folder("me") == later
    wrong = ["link", "no-run", ".hidden", "previous-1", "..", "../outside", "cleo/../me", str(outside), "/", "", ".",
             "cleo/", "cleo\0", "cleo\\x", None, 3, ["cleo"]]  # fmt: skip
    for name in wrong:
        with pytest.raises(InputError, match="no run of that name"):
            runs.folder(name)
    assert Runs(root / "none").names() == []


def test_a_run_in_the_root_itself_is_shown(root):
    (root / "config.yaml").write_text("placeholder_token: <x>\n")
    assert sorted(Runs(root).names()) == [".", "cleo"] and Runs(root).folder(".") == root


def test_files_of_a_run_lie_in_its_folder(root):
    runs, folder = Runs(root), root / "cleo"
    (folder / "samples").mkdir()
    (folder / "samples" / "a.png").touch()
    (folder / "link.png").symlink_to(root.parent / "secret.txt")
    (folder / "up").symlink_to(root.parent)
    assert runs.file("cleo", "samples/a.png") == folder / "samples" / "a.png"
    (folder / LOG_FILE).symlink_to(root.parent / "secret.txt")
    assert log_end(folder) == []
    (root / "linked").mkdir()
    (root / "linked" / "config.yaml").symlink_to(root.parent / "secret.txt")
    assert runs.names() == ["cleo"]
    wrong = ["link.png", "up/secret.txt", "../../secret.txt", str(root.parent / "secret.txt"), "samples", "", "x\0",
             str(folder / "samples" / "a.png"), None, 1]  # fmt: skip
    for path in wrong:
        with pytest.raises(InputError, match="no such file in the folder of the run"):
            runs.file("cleo", path)


def test_a_new_run_has_a_folder_of_its_own(root):
    runs = Runs(root)
    assert [runs.new("<Cat-Toy>").name for _ in range(3)] == ["cat-toy", "cat-toy-2", "cat-toy-3"]
    assert runs.new("../../etc").parent == root and runs.new("").parent == root


@pytest.mark.parametrize(
    ("log", "report", "status", "says"),
    [
        ("", "", "stopped", "Resume goes on from the last checkpoint"),
        ("", "learning: 20 of 40 steps", "stopped", "Resume goes on"),
        ("a\nb\n", "finished", "finished", ""),
        ("", "stopped at step 20 of 40", "stopped", "stopped at step 20 of 40"),
        ("", "ended at step 3: the loss became non-finite", "failed", "the loss became non-finite"),
        ("reading\nti-jax: error: cat/0.png: broken; remove it\n", "", "failed", "cat/0.png: broken; remove it"),
        ("Traceback (most recent call last):\n  x\nKeyError: 'x'\n", "", "failed", "a fault of ti_jax: KeyError: 'x'"),
    ],
)
def test_what_a_folder_says_of_a_run_that_has_ended(root, log, report, status, says):
    folder = root / "cleo"
    write_log(folder, log)
    metrics(folder, 10, 20)
    (folder / "report.html").write_text(f'<html><div class="state">{report}</div>')
    state = state_of(folder)
    assert (state.status, state.step, state.total, state.token) == (status, 20, 40, "<cleo>")
    assert says in state.says and not state.running and [each["step"] for each in records_of(folder)] == [10, 20]


def test_what_a_folder_says_of_a_run_that_goes_on(root):
    folder = root / "cleo"
    with locked(folder):
        assert process_of(folder) == os.getpid() == holder(folder / LOCK_FILE)
        assert state_of(folder).status == "starting"
        metrics(folder, 10)
        write_log(folder, "compiling\n\rlearning:  20%\rlearning:  25% 10/40")
        assert state_of(folder).status == "learning" and state_of(folder).says == ""
        write_log(folder, "SIGTERM: stopping as soon as a checkpoint is saved; once more ends the program at once\n")
        assert state_of(folder).status == "stopping"
        with pytest.raises(InputError, match="was asked to stop"):
            processes.stop(folder)
        with pytest.raises(InputError, match="is going on already"):
            processes.resume(folder)
    assert holder(folder / LOCK_FILE) is None and not state_of(folder).running
    (folder / LOCK_FILE).write_text(str(os.getpid()))  # left by a process that was killed; its number is another's now
    assert holder(folder / LOCK_FILE) is None
    (folder / LOCK_FILE).write_text(str(2**22 + 1))
    assert holder(folder / LOCK_FILE) is None
    with pytest.raises(InputError, match="is not going on"):
        processes.stop(folder)


def test_settings_that_cannot_be_read_are_what_the_run_says(root):
    (root / "cleo" / "config.yaml").write_text("placeholder_token: <cleo>\nsteps: 3\n")
    state = state_of(root / "cleo")
    assert state.status == "failed" and "unknown key 'steps'" in state.says


def test_the_words_of_a_run(root):
    folder = root / "cleo"
    assert words_of(folder) == {}
    (folder / "learned_embeds-steps-8.safetensors").touch()
    assert list(words_of(folder).values()) == ["learned_embeds-steps-8.safetensors"] * 2  # the newest, and of step 8
    (folder / "learned_embeds-steps-8.safetensors").unlink()
    for name in ("learned_embeds.safetensors", "learned_embeds-steps-9.safetensors",
                 "learned_embeds-steps-10.safetensors", "learned_embeds_2.safetensors"):  # fmt: skip
        (folder / name).touch()
    assert list(words_of(folder)) == ["the word as it is now", "step 10", "step 9"]
    for name in ("ana", "previous-1"):
        (folder / name).mkdir()
        (folder / name / "learned_embeds.safetensors").touch()
        (folder / name / "progress.png").touch()
    assert words_of(folder)["ana, the word as it is now"] == "ana/learned_embeds.safetensors"
    assert not any("previous" in path for path in words_of(folder).values())
    assert place_of(folder, "progress.png") == "ana/progress.png"
    assert place_of(folder, "learned_embeds.safetensors") == "learned_embeds.safetensors"
    assert place_of(folder, "overview.png") == "overview.png"


# -- processes


def test_a_process_that_is_refused_says_why_in_its_folder(root):
    folder = root / "cleo"
    number = processes.start(folder, ["--learning_rat", "1"])
    assert process_of(folder) == number == int((folder / PROCESS_FILE).read_text())
    assert os.getsid(number) == number  # neither Ctrl-C here nor the end of this process reaches it
    with pytest.raises(InputError, match="is going on already"):
        processes.start(folder, [])
    state = wait_for(folder, lambda state: not state.running)
    assert state.status == "failed" and state.says == "unknown flag --learning_rat; did you mean --learning_rate?"


def test_a_run_outlives_who_started_it(root):
    """Also one that is only reading its model: another process finds it, and stops it."""
    folder = root / "cleo"
    program = (
        "import sys; from pathlib import Path; from ti_jax.ui import processes; processes.begin(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)
    state = state_of(folder)
    assert state.status == "starting"
    processes.stop(folder)
    wait_for(folder, lambda state: not state.running)


def wait_for(folder, holds):
    for _ in range(600):
        if holds(state := state_of(folder)):
            return state
        time.sleep(0.1)
    raise AssertionError(state)


# -- what the page may choose


def form(**given):
    return Form(**{"word": "<x>", **given})


def test_the_fields_become_the_settings_of_a_run(tmp_path):
    given = form(initializer="person", kind="style", steps="50", learning_rate="5e-3:20, 1e-3", vectors="2", batch="4",
                 prompts="a portrait of {}\n\n a drawing of {} ", further="seed: 7\nflip_probability: 0")  # fmt: skip
    config = make_config(given, Models([]), EXAMPLE, tmp_path / "run")
    assert (config.placeholder_token, config.initializer_token, config.num_vectors) == ("<x>", "person", 2)
    assert (config.max_train_steps, config.train_batch_size, config.seed) == (50, 4, 7)
    assert config.learning_rate == "5e-3:20, 1e-3" and config.flip_probability == 0
    assert config.validation_prompt == ("a portrait of {}", "a drawing of {}") and config.learnable_property == "style"
    assert config.validation_steps == config.save_steps == config.checkpointing_steps == 10
    (tmp_path / "settings.yaml").write_text(dump_yaml(config))
    assert resolve(TrainConfig(**load_yaml(tmp_path / "settings.yaml", TrainConfig))) == resolve(config)
    assert resolve(make_config(form(), Models([]), EXAMPLE, tmp_path)).max_train_steps == 60  # those of the model


def test_another_model_starts_from_the_settings_of_its_family(tmp_path):
    given = form(model="owner/name", initializer="toy", preset="sd15", steps="100", every="7")
    config = make_config(given, Models([]), EXAMPLE, tmp_path)
    assert config.pretrained_model_name_or_path == "owner/name" and config.train_batch_size == 4
    assert (config.max_train_steps, config.checkpointing_steps) == (100, 7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"word": " "}, "the new word is missing"),
        ({"word": "two words"}, "must be one word without spaces"),
        ({"model": "owner/name"}, "what to start from is missing"),
        ({"model": "owner/name", "initializer": "toy", "preset": "../sd15"}, "must be one of sd15, sd21, sdxl"),
        ({"model": "/etc"}, "neither a model of the list nor a hub id"),
        ({"model": "../x"}, "neither a model of the list nor a hub id"),
        ({"model": "ti_jax/assets"}, "neither a model of the list nor a hub id"),
        ({"model": "a/b.safetensors"}, "neither a model of the list nor a hub id"),
        ({"model": "gs://a/b"}, "neither a model of the list nor a hub id"),
        ({"model": None}, "neither a model of the list nor a hub id"),
        ({"steps": "1.5"}, "steps '1.5': must be a whole number"),
        ({"steps": "0"}, "steps '0': must be a whole number, 1 or more"),
        ({"learning_rate": "fast"}, "learning rate 'fast': must be a number"),
        ({"learning_rate": "-1"}, "--learning_rate -1.0: must be above 0"),
        ({"kind": "cat"}, "--learnable_property 'cat': must be object or style"),
        ({"prompts": "a cat"}, "the new word <x> is not in it"),
        ({"further": "sed: 1"}, "further settings: unknown key 'sed'; did you mean seed?"),
        ({"further": "templates: /etc/passwd"}, "further settings: templates cannot be chosen on the page"),
        ({"further": "seed: 1\noutput_dir: /tmp/x"}, "further settings: output_dir cannot be chosen on the page"),
        ({"further": "- a"}, "further settings: expected lines of"),
    ],
)
def test_what_the_page_cannot_choose_is_one_line(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(ASSETS.parents[1])
    with pytest.raises(InputError) as error:
        make_config(form(**given), Models([]), EXAMPLE, tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value) and "/tmp/ti_jax-" not in str(error.value)


def test_no_setting_that_names_a_file_or_sends_something_can_be_chosen():
    for name, about in settings_of(TrainConfig).items():
        if about.path is not None or about.secret:
            assert not may_choose(name)
    assert not any(map(may_choose, ("push_to_hub", "report_to", "hub_token", "coordinator_address", "variant")))
    assert may_choose("seed") and may_choose("optimizer") and further_settings(" \n") == {}


def test_models_are_those_that_were_named_at_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mini").mkdir(parents=True)
    (tmp_path / "models" / "mini" / "model_index.json").touch()
    (tmp_path / "models" / "one.safetensors").touch()
    (tmp_path / "models" / "notes.txt").touch()
    models = Models(["models"])
    assert list(models.offered) == [EMBEDDED, "models/mini", "models/one.safetensors"]
    assert models.path("models/mini") == str(tmp_path / "models" / "mini") and models.path(EMBEDDED) is None
    assert Models(["models/one.safetensors"]).path("models/one.safetensors").endswith("models/one.safetensors")
    with pytest.raises(InputError, match="neither a model of the list"):
        Models([]).path("models/mini")  # a folder here, and no hub id
    with pytest.raises(InputError, match=r"^--models nowhere: neither a diffusers folder"):
        Models(["nowhere"])


# -- pictures


def test_dropped_pictures_are_copied_and_looked_at(tmp_path):
    source, inside = tmp_path / "source", tmp_path / PICTURES
    for folder in (source, source / "again", inside):
        folder.mkdir()
    Image.new("RGB", (80, 64), "red").save(source / "a.png")
    Image.new("RGB", (64, 64), "blue").save(source / "again" / "a.png")
    (source / "a.txt").write_text("red paper\n")
    (source / "broken.jpg").write_text("no picture")
    files = [source / "a.png", source / "again" / "a.png", source / "a.txt", source / "broken.jpg"]
    pictures.copy_files(files, inside)
    assert sorted(path.name for path in inside.iterdir()) == ["a-2.png", "a.png", "a.txt", "broken.jpg"]
    found = pictures.look_at(inside, tmp_path, None)
    assert found.captions == {"a.png": "red paper", "a-2.png": "", "broken.jpg": ""} and found.refused == ["broken.jpg"]
    assert found.sheet is not None and any(each.startswith("broken.jpg: ") for each in found.remarks)
    pictures.write_captions(inside, pictures.captions_in([["a.png", ""], ["a-2.png", " blue paper "]]))
    assert not (inside / "a.txt").exists() and (inside / "a-2.txt").read_text() == "blue paper\n"
    for name in ("../source/a.png", "b.png", str(source / "a.png"), "a-2.txt"):
        with pytest.raises(InputError, match="no such picture"):
            pictures.write_captions(inside, {name: "x"})
    (source / "x.pdf").touch()
    with pytest.raises(InputError, match=r"^x.pdf: not a picture"):
        pictures.copy_files([source / "x.pdf"], inside)
    with pytest.raises(InputError, match="must be rows"):
        pictures.captions_in([["a.png"]])


# -- saving


@pytest.mark.parametrize("name", WRITTEN)
def test_a_word_is_saved_in_every_format(tmp_path, name):
    learned, out = tmp_path / "learned_embeds.safetensors", tmp_path / "out"
    word(2, token="<cat-toy>").save(learned)
    out.mkdir()
    (file,), warnings = saving.save_as(learned, name, out)
    assert file.stem == "cat-toy" and Embedding.load(file).num_vectors == 2 and warnings == []
    with pytest.raises(InputError, match="must be one of"):
        saving.save_as(learned, "list", out)


def test_an_sdxl_word_is_two_files_for_diffusers(tmp_path):
    learned, out = tmp_path / "learned_embeds.safetensors", tmp_path / "out"
    sdxl_word(1, token="<x>").save(learned)
    out.mkdir()
    files, _ = saving.save_as(learned, "diffusers", out)
    assert [path.name for path in files] == ["learned_embeds.safetensors", "learned_embeds_2.safetensors"]
    assert len(Embedding.load(files[0]).vectors) == 2
    programs = [use.program for use in saving.how_to_use(learned, resolve(TrainConfig()))]
    assert programs[:2] == ["ti_jax", "diffusers"]


def test_what_stands_for_a_word_that_is_left_out(root):
    assert class_of(config_of(root / "cleo")) == "a person"
    other = TrainConfig(pretrained_model_name_or_path="m", initializer_token="toy")
    assert class_of(other) == "toy"


# -- the command


def test_without_gradio_the_command_is_one_line(monkeypatch, capsys):
    from ti_jax.ui import server

    monkeypatch.setattr(server, "installed", lambda module: False)
    assert main.main(["ui"]) == 2
    assert capsys.readouterr().err == "ti-jax: error: ti-jax ui needs Gradio: pip install 'ti_jax[ui]'\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "--port 70000: must be from 0 to 65535"),
        (["--host", ""], "--host '': must be text that is not empty"),
        (["--output", "x"], "unknown flag --output"),
    ],
)
def test_flags_of_the_command_that_cannot_be(capsys, flags, message):
    assert main.main(["ui", *flags]) == 2
    assert f"error: {message}" in capsys.readouterr().err
