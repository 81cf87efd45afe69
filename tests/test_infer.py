"""``infer.py`` and ``verify`` end to end on the embedded model, in small pictures and few steps."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ti_jax.cli import main
from ti_jax.cli.infer import output_paths
from ti_jax.config import ASSETS
from ti_jax.embeddings import Embedding

ROOT = Path(__file__).parents[1]
QUICK = ["--num_inference_steps", "2", "--height", "32", "--width", "40"]


@pytest.fixture(scope="module")
def word(tmp_path_factory) -> str:
    """File of a word <x> of one row for the embedded model."""
    row = np.random.default_rng(0).normal(scale=0.05, size=(1, 192)).astype(np.float32)
    path = tmp_path_factory.mktemp("word") / "x.safetensors"
    Embedding("<x>", {"text_encoder": row}).save(path)
    return str(path)


def infer(*args: str) -> int:
    return main.main(["infer", *QUICK, *args], prog="infer.py")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def text_of(path: Path) -> str:
    """What a picture says of how it was drawn."""
    with Image.open(path) as image:
        return image.info["parameters"]


def test_one_picture_goes_to_output_several_beside_it():
    assert output_paths(Path("a/out.png"), 1) == ([Path("a/out.png")], None)
    paths, grid = output_paths(Path("a/out.png"), 2)
    assert paths == [Path("a/out-0.png"), Path("a/out-1.png")]
    assert grid == Path("a/out-grid.png")
    paths, _ = output_paths(Path("x.y.PNG"), 11)
    assert (paths[0], paths[10]) == (Path("x.y-00.PNG"), Path("x.y-10.PNG"))


# One compiled program draws in every test that is not slow: one picture at a time, with rows and guidance.
PROGRAM = ["--batch_size", "1", "--scheduler", "euler_a"]


def test_pictures_of_several_prompts_with_a_learned_word(tmp_path, capsys, word):
    output = tmp_path / "new" / "o.png"
    args = [*PROGRAM, "--embedding", word, "--negative_prompt", "a beard", "--guidance_scale", "2.5"]
    prompts = ["a portrait of <x>", "a drawing of a person"]
    assert infer("--prompt", *prompts, "--num_images", "2", "--seed", "5", "--output", str(output), *args) == 0

    written = [output.parent / name for name in ("o-0.png", "o-1.png", "o-2.png", "o-3.png", "o-grid.png")]
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(path) for path in written]
    assert err == ""
    assert sorted(output.parent.iterdir()) == written
    drawn = [pixels(path) for path in written]
    assert [picture.shape for picture in drawn] == [(32, 40, 3)] * 4 + [(64, 80, 3)]
    np.testing.assert_array_equal(np.block([[[drawn[0]], [drawn[1]]], [[drawn[2]], [drawn[3]]]]), drawn[4])
    for number in range(4):
        assert text_of(written[number]).splitlines()[:-1] == [prompts[number // 2], "Negative prompt: a beard"]
        settings = f"Steps: 2, Sampler: Euler a, CFG scale: 2.5, Seed: {5 + number}, Size: 40x32, Model: mini-sd, "
        assert text_of(written[number]).splitlines()[-1].startswith(settings)

    # What a picture's text says draws it again by itself.
    again = tmp_path / "again.png"
    assert infer("--prompt", prompts[0], "--seed", "6", "--output", str(again), *args) == 0
    assert capsys.readouterr().out == f"{again}\n"
    np.testing.assert_array_equal(pixels(again), drawn[1])

    for other in (["--negative_prompt", "a smile"], ["--guidance_scale", "6"]):
        changed = tmp_path / "changed.png"
        assert infer("--prompt", prompts[0], "--seed", "6", "--output", str(changed), *args, *other) == 0
        assert np.abs(pixels(changed) - drawn[1]).max() > 1, other


@pytest.mark.slow
def test_sampler_steps_and_batch_size_reach_the_drawing(tmp_path):
    def drawn(*args: str) -> np.ndarray:
        assert infer("--prompt", "a person", "--num_images", "2", "--output", str(tmp_path / "o.png"), *args) == 0
        return pixels(tmp_path / "o-grid.png")

    first = drawn(*PROGRAM)
    assert np.abs(drawn("--batch_size", "1") - first).max() > 1
    assert "Sampler: DDIMScheduler, " in text_of(tmp_path / "o-0.png")  # the checkpoint's own
    assert np.abs(drawn(*PROGRAM, "--num_inference_steps", "3") - first).max() > 1
    # Another program may round otherwise.
    np.testing.assert_allclose(drawn(*PROGRAM, "--batch_size", "2"), first, atol=1)
    # The embedded model's tiles are 64 pixels.
    wide, tiled = (drawn(*PROGRAM, "--width", "72", "--vae_tiling", tiling) for tiling in ("never", "always"))
    assert np.abs(wide - tiled).max() > 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--embedding", "nope.safetensors"], "nope.safetensors"),
        (["--plain_prompts", "--prompt", "a person " * 40], "takes 80 tokens where the text encoder reads 38"),
        (["--output", "{tmp}/folder.png"], "--output {tmp}/folder.png: a folder; give the name of a .png file in it"),
        (["--output", "{tmp}/file/o.png"], "{tmp}/file"),
        (
            ["--negative_prompt", "x", "--guidance_scale", "1"],
            "--negative_prompt: does nothing with --guidance_scale 1;",
        ),
        (["--pretrained_model_name_or_path", "{tmp}"], "{tmp}: a folder without model_index.json"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, capsys, args, message):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    args = [arg.replace("{tmp}", str(tmp_path)) for arg in args]
    assert infer("--prompt", "a person", "--output", str(tmp_path / "o.png"), *args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("infer.py: error: ")
    assert message.replace("{tmp}", str(tmp_path)) in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_word_of_another_model_family_is_refused(tmp_path, capsys):
    Embedding("<y>", {"text_encoder": np.ones((1, 768), np.float32)}).save(tmp_path / "y.safetensors")
    assert infer("--prompt", "a <y>", "--embedding", str(tmp_path / "y.safetensors")) == 2
    err = capsys.readouterr().err
    assert "y.safetensors" in err
    assert "768" in err
    assert err.count("\n") == 1


def test_a_word_that_no_prompt_uses_is_pointed_out(tmp_path, capsys, word):
    args = [*PROGRAM, "--embedding", word, "--output", str(tmp_path / "o.png")]
    assert infer("--prompt", "a person", *args) == 0
    assert capsys.readouterr().err == f"warning: no prompt has the word <x> of {word} in it\n"


def test_verify_tells_its_finding_and_refuses_a_prompt_without_the_word(capsys, word):
    model = str(ASSETS / "mini-sd")
    assert main.main(["verify", word, "--prompt", "a portrait of {}", "--pretrained_model_name_or_path", model]) == 0
    out, err = capsys.readouterr()
    assert "a portrait of <x>" in out
    assert model in out
    assert err == ""
    assert main.main(["verify", word, "--prompt", "a person"]) == 2
    assert capsys.readouterr().err.startswith("ti-jax: error: --prompt 'a person' does not hold the word '<x>'")


@pytest.mark.slow
def test_train_py_and_infer_py_as_the_readme_starts(tmp_path):
    """Learn a word with a few steps in one process and draw with it in another."""

    def run(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, ROOT / command[0], *command[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=900
        )

    done = run("train.py", "--max_train_steps", "3", "--train_batch_size", "2", "--validation_inference_steps", "1")
    assert done.returncode == 0, done.stderr
    output = tmp_path / "output"
    assert {"learned_embeds.safetensors", "overview.png", "config.yaml"} <= {path.name for path in output.iterdir()}

    done = run(
        "infer.py", "--embedding", "output/learned_embeds.safetensors", "--prompt", "a portrait of <cleo>", *QUICK
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("out.png\n", "")
    assert text_of(tmp_path / "out.png").startswith("a portrait of <cleo>\n")

    again = run("train.py", "--config", "output/config.yaml", "--output_dir", "again")
    assert again.returncode == 0, again.stderr
    first, second = (
        Embedding.load(path / "learned_embeds.safetensors").vectors["text_encoder"]
        for path in (output, tmp_path / "again")
    )
    np.testing.assert_array_equal(first, second)
