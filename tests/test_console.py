"""Consoles that are not UTF-8, and paths that are not UTF-8: no traceback, above all not after training."""

import os
import re
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


# Many commands in one process: each new one takes seconds to import JAX.
COMMANDS = """
import itertools, sys
from ti_jax.cli.main import main
for more, command in itertools.groupby(sys.argv[1:], lambda word: word != "+"):
    if not more:
        continue
    status = main(list(command))
    for stream in (sys.stdout, sys.stderr):
        print(f"<{status}>", file=stream, flush=True)
"""


def ti(*commands, **environment):
    """Run commands on one console, one after the other; the status of each, and what it says, in any encoding."""
    words = [word for command in commands for word in ("+", *command)]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *words],
        env=children.environment() | environment,
        capture_output=True, cwd=REPOSITORY,
    )  # fmt: skip
    said = (done.stdout + done.stderr).decode("latin-1")
    assert done.returncode == 0 and "Traceback" not in said and "Logging error" not in said, said
    out, err = (re.split(r"<(\d+)>\n", stream.decode("latin-1")) for stream in (done.stdout, done.stderr))
    assert out[1::2] == err[1::2] and len(out[1::2]) == len(commands)
    return list(zip(map(int, out[1::2]), out[::2], err[::2], strict=False))


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
    os.rename(concept / "1.png", concept / "caf\u00e9 \u4f60.png")
    (concept / "caf\u00e9 \u4f60.txt").write_text("x")
    out = tmp_path / "out \u4f60"
    config = replace(
        short_run, pretrained_model_name_or_path=str(model), train_data_dir=str(concept), output_dir=str(out),
        max_train_steps=2, placeholder_token="<\u4f60\u0130>", overview_prompts=("a {} \u4f60",),
    )  # fmt: skip
    flags = []
    for name in ("pretrained_model_name_or_path", "placeholder_token", "initializer_token",
                 "output_dir", "templates", "max_train_steps", "validation_inference_steps"):  # fmt: skip
        flags += [f"--{name}", str(getattr(config, name))]
    flags += ["--overview_prompts", *config.overview_prompts, "--validation_prompt", "a {}", "--validation_steps", "1"]
    broken = odd_folder / "with a broken one"
    shutil.copytree(concept, broken)
    (broken / f"broken {NO_UTF8}.png").write_bytes(b"no picture")
    file, saved_config = out / "learned_embeds.safetensors", str(out / "config.yaml")
    # A picture that cannot be read ends the run, and is named; a run; a picture; what the file has; what is wrong.
    refused, trained, drawn, inspected, wrong = ti(
        ["train", *flags, "--train_data_dir", str(broken)],
        ["train", *flags, "--train_data_dir", str(concept), "--report_to", "tensorboard"],
        ["infer", "--pretrained_model_name_or_path", str(model), "--embedding", str(file), "--prompt",
         "a <\u4f60\u0130> \u2192", "--num_inference_steps", "1", "--output", str(odd_folder / "a.png")],
        ["embedding", "inspect", str(file)],
        ["infer", "--embedding", str(odd_folder / "none"), "--prompt", "a"],
        **cp1252,
    )  # fmt: skip
    assert refused[0] == 2 and "broken caf" in refused[2].splitlines()[-1]
    assert trained[0] == drawn[0] == 0 and drawn[1].strip().endswith("a.png")
    assert inspected[0] == 0 and "learned_embeds" in inspected[1]
    assert wrong[0] == 2 and wrong[2].startswith("ti-jax: error: ") and wrong[2].count("\n") == 1

    assert ti_jax.Embedding.load(file).token == "<\u4f60\u0130>"
    with safe_open(file, framework="np") as stored:
        assert "caf\\udce9" in stored.metadata()["base_model"]
    saved = load_yaml(out / "config.yaml", TrainConfig)
    assert saved["train_data_dir"] == str(concept), "the very path, so that the run can be repeated"
    with Image.open(out / "overview.png") as picture:
        assert "\u4f60" in picture.info["parameters"]

    # On another console: the same again from the saved config; other formats.
    resumed, inspected, *converted, refused = ti(
        ["train", "--config", saved_config, "--resume_from_checkpoint", "latest", "--max_train_steps", "3"],
        ["embedding", "inspect", str(file)],
        *(["embedding", "convert", str(file), str(odd_folder / f"{NO_UTF8}.{end}")] for end in ("pt", "png")),
        ["train", *flags, "--train_data_dir", str(broken)],
        **ascii_only,
    )
    assert resumed[0] == 0 and "resuming at step 2 of 3" in resumed[2]
    assert inspected[0] == 0 and "learned_embeds" in inspected[1]
    assert [status for status, *_ in converted] == [0, 0]
    assert refused[0] == 2 and "broken caf" in refused[2].splitlines()[-1]


def test_words_prompts_and_paths_that_are_not_text(odd_folder, tmp_path):
    flags = ["placeholder_token", "initializer_token", "validation_prompt", "hub_model_id"]
    *words, folder = ti(
        *(["train", f"--{flag}", NO_UTF8, "--output_dir", str(tmp_path / "out")] for flag in flags),
        # TensorStore, which writes checkpoints, takes only paths in UTF-8.
        ["train", "--output_dir", str(odd_folder / "out")],
    )
    for flag, (status, _, told) in zip(flags, words, strict=True):
        assert status == 2 and flag in told and "UTF-8" in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()
    status, _, told = folder
    assert status == 2 and "not a path in UTF-8" in told and told.count("\n") == 1
    assert not list(odd_folder.iterdir())


def test_no_console_at_all():
    """As a service without stdout and stderr, or pythonw."""
    code = "import sys; sys.stdout = sys.stderr = None; from ti_jax.cli.main import main; sys.exit(main(['--version']))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
    code = code.replace("--version", "nonsense")
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 2
