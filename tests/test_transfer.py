"""ti-jax embedding transfer: a word of SD1.x as the start of one for SDXL, and back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from words import sdxl_word, word

from ti_jax.cli import main
from ti_jax.config import resolve
from ti_jax.embeddings import Embedding
from ti_jax.embeddings.transfer import TokenTable, to_sd15, to_sdxl
from ti_jax.errors import InputError
from ti_jax.pipeline import StableDiffusion
from ti_jax.text import text_encoders
from ti_jax.training.job import prepare_concept

IDS = {"red</w>": 0, "green</w>": 1, "re": 2, "<|startoftext|>": 3, "only-here</w>": 4}
FIRST = TokenTable(IDS, np.array([[2, 0, 0], [0, 3, 0], [1, 1, 0.0], [0, 0, 1], [0, 0, 1]], np.float32))
# The second tokenizer counts otherwise.
SECOND = TokenTable({"green</w>": 0, "red</w>": 1, "re": 2, "x</w>": 3}, np.arange(8, dtype=np.float32).reshape(4, 2))


def small(*vectors, **metadata):
    return Embedding("<a>", {"text_encoder": np.array(vectors, np.float32)}, metadata)


def test_the_second_encoder_starts_from_the_nearest_tokens_of_the_first():
    source = small([5, 1, 0], [-1, 0.1, 0], [1, 1.01, 9], base_model="a/b", base_model_hash="0", steps="7")
    moved, nearest = to_sdxl(source, FIRST, SECOND, "some/sdxl")
    np.testing.assert_array_equal(moved.vectors["text_encoder"], source.vectors["text_encoder"])
    # Nearest by angle, not by distance; no piece of a word, no special token, none that the second lacks.
    assert [each.word for each in nearest] == ["red", "green", "green"]
    assert nearest[0].cosine == pytest.approx(5 / 26**0.5)
    np.testing.assert_array_equal(moved.vectors["text_encoder_2"], [[2, 3], [0, 1], [0, 1]])
    assert moved.metadata == {
        "base_model": "some/sdxl", "transferred_from": "a/b", "nearest_tokens": "red green green", "steps": "7",
    }  # fmt: skip
    back = to_sd15(moved)
    assert list(back.vectors) == ["text_encoder"] and back.metadata["transferred_from"] == "some/sdxl"
    np.testing.assert_array_equal(back.vectors["text_encoder"], source.vectors["text_encoder"])


@pytest.mark.parametrize(
    ("move", "message"),
    [
        (lambda: to_sdxl(sdxl_word(), FIRST, SECOND, "m"), r"is for SDXL \(.*; --to sdxl takes a word of SD1.x$"),
        (lambda: to_sdxl(small([1, 2]), FIRST, SECOND, "m"), "the first text encoder of m has 3 numbers a vector: on"),
        (lambda: to_sdxl(small([1, 2, 3], [0, 0, 0]), FIRST, SECOND, "m"), "^<a>: vector 1 is zero, so that no token"),
        (lambda: to_sd15(word()), r"<cat-toy> is for SD1.x \(.*; --to sd15 takes a word of SDXL$"),
    ],
)  # fmt: skip
def test_words_that_cannot_move_are_refused(move, message):
    with pytest.raises(InputError, match=message):
        move()


@pytest.fixture
def tool(tmp_path, monkeypatch, capsys):
    """Runs the command in a folder of its own: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main.main(["embedding", "transfer", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err and (status == 0 or (out == "" and err.count("\n") == 1))
        return status, out, err

    return run


def test_the_command_writes_a_word_that_training_starts_from(tool, tiny_sdxl, short_run):
    sd = StableDiffusion.from_pretrained(tiny_sdxl)
    red = {name: sd.tokenizers[name].get_vocab()["red</w>"] for name in sd.tokenizers}
    table = sd.token_table("text_encoder")
    vectors = 3 * table[red["text_encoder"]] + 0.01 * table[5]
    Embedding("<cat>", {"text_encoder": np.stack([vectors, vectors])}).save("cat.safetensors")
    status, out, _ = tool("cat.safetensors", "--to", "sdxl", "--pretrained_model_name_or_path", tiny_sdxl)
    assert status == 0 and out.startswith("cat-sdxl.safetensors and cat-sdxl_2.safetensors: <cat>, 2 vectors, for ")
    assert "vector 1: the second text encoder starts from 'red', the nearest token (cosine 1.00)" in out

    changes = {
        "pretrained_model_name_or_path": str(tiny_sdxl), "initializer_token": None, "num_vectors": 2,
        "initializer_embedding": "cat-sdxl.safetensors",
    }  # fmt: skip
    concept = prepare_concept(resolve(replace(short_run, **changes)), sd, print)
    np.testing.assert_array_equal(concept.rows["text_encoder"], np.stack([vectors, vectors]))
    wanted = sd.token_table("text_encoder_2")[red["text_encoder_2"]]
    np.testing.assert_array_equal(concept.rows["text_encoder_2"], np.stack([wanted, wanted]))

    assert tool("cat-sdxl.safetensors", "back.safetensors", "--to", "sd15")[0] == 0
    np.testing.assert_array_equal(Embedding.load("back.safetensors").vectors["text_encoder"][0], vectors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.safetensors"], "--to is missing: the family to start a word for, sdxl or sd15"),
        ([], "files given: none; expected "),
        (["a", "b", "c", "--to", "sdxl"], "files given: a b c; expected "),
        (["a.safetensors", "--to", "sd3"], "--to sd3: must be sdxl or sd15"),
        (["missing.safetensors", "--to", "sdxl"], "missing.safetensors"),
        (["a.safetensors", "--to", "sdxl", "--pretrained_model_name_or_path", "{sd}"], "one text encoder; give "),
        (["a.safetensors", "--to", "sd15"], "--to sd15 takes a word of SDXL"),
        # Before SDXL is looked for: a model that would be downloaded need not be.
        (["xl.safetensors", "--to", "sdxl"], "--to sdxl takes a word of SD1.x"),
        (["small.safetensors", "--to", "sdxl"], "<a> is for a model with 2 numbers a vector, and the first text"),
        (["a.safetensors", "none/b.safetensors", "--to", "sdxl"], "cannot write none/b.safetensors: there is no such"),
        (["a.safetensors", "b.zip", "--to", "sdxl"], "b.zip: no format has this suffix"),
    ],
)  # fmt: skip
def test_bad_commands_are_one_line(tool, tiny_sd, tmp_path, arguments, message, monkeypatch):
    def read(path, *_):
        assert path == str(tiny_sd), f"{path} was looked for"
        return Path(path)

    monkeypatch.setattr(text_encoders, "resolve", read)
    word().save("a.safetensors")
    sdxl_word().save("xl.safetensors", format="comfyui")
    small([1, 2]).save("small.safetensors")
    status, _, err = tool(*(argument.format(sd=tiny_sd) for argument in arguments))
    assert status == 2 and message in err
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "xl.safetensors", "small.safetensors"}
