"""Consoles that are not UTF-8, and paths that are not UTF-8: no traceback, above all not after training."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import children
import pytest
from PIL import Image
from safetensors import safe_open

import ti_jax
from ti_jax.config import TrainConfig
from ti_jax.config.yaml import load_yaml

REPOSITORY = Path(__file__).parent.parent
NO_UTF8 = b"caf\xe9".decode("utf-8", "surrogateescape")  # Latin-1's bytes, as Python reads a path that has them

CONSOLES = {
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "ascii": {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
}


def ti(*arguments, status=0, **environment):
    """Run a command; what it says, in any encoding."""
    done = subprocess.run(
        [sys.executable, "-m", "ti_jax", *arguments],
        env=children.environment() | environment,
        capture_output=True, cwd=REPOSITORY,
    )  # fmt: skip
    said = (done.stdout + done.stderr).decode("latin-1")
    assert "Traceback" not in said and "Logging error" not in said, said
    assert done.returncode == status, said
    return done.stdout.decode("latin-1"), done.stderr.decode("latin-1")


@pytest.fixture
def odd_folder(tmp_path):
    """A folder whose name is not UTF-8."""
    folder = Path(tmp_path / NO_UTF8)
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    return folder


def test_everything_on_such_consoles_with_such_paths(tiny_sd, pictures, short_run, odd_folder, tmp_path):
    cp1252, ascii_only = CONSOLES.values()
    model, concept = odd_folder / f"{NO_UTF8} model", odd_folder / f"{NO_UTF8} pictures"
    shutil.copytree(tiny_sd, model)
    shutil.copytree(pictures, concept)
    os.rename(concept / "0.png", concept / f"{NO_UTF8}.png")
    (concept / f"broken {NO_UTF8}.png").write_bytes(b"no picture")
    (concept / "caf\u00e9 \u4f60.txt").write_text("x")
    out = tmp_path / "out \u4f60"
    config = replace(
        short_run, pretrained_model_name_or_path=str(model), train_data_dir=str(concept), output_dir=str(out),
        max_train_steps=2, placeholder_token="<\u4f60\u0130>", overview_prompts=("a {} \u4f60",),
    )  # fmt: skip
    flags = []
    for name in ("pretrained_model_name_or_path", "train_data_dir", "placeholder_token", "initializer_token",
                 "output_dir", "templates", "max_train_steps", "validation_inference_steps"):  # fmt: skip
        flags += [f"--{name}", str(getattr(config, name))]
    flags += ["--overview_prompts", *config.overview_prompts, "--validation_prompt", "a {}", "--validation_steps", "1"]
    # A picture that cannot be read ends the run, and is named.
    _, told = ti("train", *flags, status=2, **ascii_only)
    assert "broken caf" in told.splitlines()[-1]
    os.unlink(concept / f"broken {NO_UTF8}.png")
    ti("train", *flags, "--report_to", "tensorboard", **cp1252)

    file = out / "learned_embeds.safetensors"
    assert ti_jax.Embedding.load(file).token == "<\u4f60\u0130>"
    with safe_open(file, framework="np") as stored:
        assert "caf\\udce9" in stored.metadata()["base_model"]
    saved = load_yaml(out / "config.yaml", TrainConfig)
    assert saved["train_data_dir"] == str(concept), "the very path, so that the run can be repeated"
    with Image.open(out / "overview.png") as picture:
        assert "\u4f60" in picture.info["parameters"]

    # The same again from the saved config; a picture; scores; files; what is wrong.
    ti("train", "--config", str(out / "config.yaml"), "--resume_from_checkpoint", "latest", "--max_train_steps", "3",
       **ascii_only)  # fmt: skip
    drawn, _ = ti("infer", "--pretrained_model_name_or_path", str(model), "--embedding", str(file), "--prompt",
                  "a <\u4f60\u0130> \u2192", "--num_inference_steps", "1", "--output", str(odd_folder / "a.png"),
                  **cp1252)  # fmt: skip
    assert drawn.strip().endswith("a.png")
    for console in CONSOLES.values():
        told, _ = ti("embedding", "inspect", str(file), **console)
        assert "learned_embeds" in told
    for name in (f"{NO_UTF8}.pt", f"{NO_UTF8}.png"):
        ti("embedding", "convert", str(file), str(odd_folder / name), **ascii_only)
    _, told = ti("infer", "--embedding", str(odd_folder / "none"), "--prompt", "a", status=2, **cp1252)
    assert told.startswith("ti-jax: error: ") and told.count("\n") == 1


@pytest.mark.parametrize("flag", ["placeholder_token", "initializer_token", "validation_prompt", "hub_model_id"])
def test_words_and_prompts_that_are_not_text(flag, tmp_path):
    _, told = ti("train", f"--{flag}", NO_UTF8, "--output_dir", str(tmp_path / "out"), status=2)
    assert flag in told and "UTF-8" in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_checkpoints_cannot_be_saved_in(odd_folder):
    """TensorStore, which writes them, takes only paths in UTF-8."""
    _, told = ti("train", "--output_dir", str(odd_folder / "out"), status=2)
    assert "not a path in UTF-8" in told and told.count("\n") == 1
    assert not list(odd_folder.iterdir())


def test_no_console_at_all():
    """As a service without stdout and stderr, or pythonw."""
    code = "import sys; sys.stdout = sys.stderr = None; from ti_jax.cli.main import main; sys.exit(main(['--version']))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
    code = code.replace("--version", "nonsense")
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 2
