"""Words of ours in diffusers itself, and the check of it that users have."""

import functools
import os
import sys

import numpy as np
import pytest
import torch
from conftest import VOCAB
from diffusers import (
    StableDiffusionPipeline,
)

from ti_jax.cli.verify import LIMIT, VerifyReport, verify
from ti_jax.config import ASSETS
from ti_jax.embeddings import Embedding
from ti_jax.errors import InputError
from ti_jax.pipeline import StableDiffusion

MINI_SD = ASSETS / "mini-sd"
WIDTH = 192
FILES = [("diffusers", ".safetensors"), ("diffusers", ".bin"), ("a1111", ".pt"), ("comfyui", ".safetensors")]


def word(n, dims=(WIDTH,), token="<cat-toy>"):
    rng = np.random.default_rng(0)
    names = ("text_encoder", "text_encoder_2")[: len(dims)]
    return Embedding(token, {name: 0.05 * rng.standard_normal((n, dim)) for name, dim in zip(names, dims, strict=True)})


@pytest.fixture(scope="module", autouse=True)
def load_each_model_once():
    """A frozen model does not change, and tracing its networks is most of the time that a check takes."""
    load = functools.cache(StableDiffusion.from_pretrained)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusion, "from_pretrained", load)
        yield
    load.cache_clear()


# -- diffusers loads what we save


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(("form", "suffix"), FILES)
def test_diffusers_loads_our_files(tmp_path, form, suffix, n):
    pipeline = StableDiffusionPipeline.from_pretrained(MINI_SD).to(torch.float32)
    embedding = word(n)
    path = tmp_path / f"a{suffix}"
    embedding.save(path, format=form)
    # A file keyed by emb_params does not say its word.
    pipeline.load_textual_inversion(str(path), **({"token": "<cat-toy>"} if form == "comfyui" else {}))

    words = ["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "<cat-toy>_3"][:n]
    assert set(pipeline.tokenizer.added_tokens_encoder) >= set(words)
    assert "<cat-toy>_4" not in pipeline.tokenizer.added_tokens_encoder and len(pipeline.tokenizer) == VOCAB + n
    ids = pipeline.tokenizer.convert_tokens_to_ids(words)
    assert ids == list(range(VOCAB, VOCAB + n))
    rows = pipeline.text_encoder.get_input_embeddings().weight[ids].detach().numpy()
    assert rows.dtype == np.float32 and rows.tobytes() == embedding.vectors["text_encoder"].tobytes()
    converted = pipeline.maybe_convert_prompt("a portrait of <cat-toy>, smiling", pipeline.tokenizer)
    assert converted == f"a portrait of {' '.join(words)}, smiling"


def test_diffusers_loads_our_folder(tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(MINI_SD)
    word(2).save(tmp_path / "learned_embeds.safetensors")
    pipeline.load_textual_inversion(str(tmp_path))
    assert "<cat-toy>_1" in pipeline.tokenizer.get_vocab()


# -- verify


@pytest.mark.parametrize(("n", "form", "suffix"), [(1, *FILES[0]), *((4, *file) for file in FILES)])
def test_verify(tmp_path, capfd, tiny_sd, n, form, suffix):
    path = tmp_path / f"a{suffix}"
    word(n, dims=(32,)).save(path, format=form)
    report = verify(path, tiny_sd, "a portrait of {} with red hair")
    assert report.ok and report.rows_equal and report.prompt == "a portrait of <cat-toy> with red hair"
    assert 0.0 <= report.relative_difference <= LIMIT == 1e-5
    summary = report.summary()
    count = "1 vector" if n == 1 else "4 vectors"
    assert summary.startswith(f"{path}: ok: <cat-toy> ({count}) with {tiny_sd} in diffusers ")
    assert str(report) == summary and "\n" not in summary
    assert capfd.readouterr().err == ""


def test_verify_with_the_embedded_model_of_a_folder_and_the_word_alone(tmp_path):
    word(2).save(tmp_path / "learned_embeds.safetensors")
    report = verify(str(tmp_path))
    assert report.ok and report.prompt == "<cat-toy>" and report.path == tmp_path / "learned_embeds.safetensors"
    assert " with mini-sd in " in report.summary()


@pytest.mark.parametrize(("form", "name"), [("diffusers", "a"), ("diffusers", "a_2"), ("comfyui", "a")])
def test_verify_of_an_sdxl_word(tmp_path, tiny_sdxl, form, name):
    word(3, dims=(32, 48)).save(tmp_path / "a.safetensors", format=form)
    report = verify(tmp_path / f"{name}.safetensors", tiny_sdxl, "a portrait of {} with red hair")
    assert report.ok and report.num_vectors == 3


def test_verify_sees_a_difference(tmp_path, tiny_sd):
    """Words that are expanded already: diffusers expands the first once more, we do not."""
    word(2, dims=(32,)).save(tmp_path / "a.safetensors")
    report = verify(tmp_path / "a.safetensors", tiny_sd, "a portrait of <cat-toy> <cat-toy>_1 with red hair")
    assert report.rows_equal and report.relative_difference > LIMIT and not report.ok
    assert ": FAILED: " in report.summary()


def test_a_report_fails_on_either():
    def report(rows_equal, relative):
        return VerifyReport("a", "<x>", 1, "m", "<x>", rows_equal, 1e-6, relative, "diffusers")

    assert report(True, 1e-5).ok and not report(True, 1.1e-5).ok and not report(True, float("nan")).ok
    assert not report(False, 0.0).ok and "its rows DIFFER" in report(False, 0.0).summary()


def refusal(*args):
    with pytest.raises(InputError) as error:
        verify(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_verify_refuses(tmp_path, tiny_sd):
    path = tmp_path / "a.safetensors"
    word(1, dims=(32,)).save(path)
    assert refusal(path, tiny_sd, "a portrait of a person") == (
        f"--prompt 'a portrait of a person' does not hold the word '<cat-toy>' of {path}; put it in"
    )
    word(1, dims=(768,)).save(path)
    assert "is for SD1.x (768 numbers a vector), but the model here is a model with 32" in refusal(path, tiny_sd)
    word(1, dims=(32,), token="person").save(path)
    assert "'person' is a word that this tokenizer knows already" in refusal(path, tiny_sd)
    assert "no such file" in refusal(tmp_path / "b.safetensors", tiny_sd)
    assert "a folder without model_index.json" in refusal(path, tmp_path)
    # The paper's files have no name, without which diffusers cannot read them.
    torch.save({"string_to_param": {"<x>": torch.ones(1, 32)}}, tmp_path / "x.pt")
    assert "diffusers does not load it (" in refusal(tmp_path / "x.pt", tiny_sd)


@pytest.mark.parametrize("missing", ["torch", "diffusers"])
def test_verify_without_pytorch_or_diffusers(tmp_path, monkeypatch, missing):
    word(1).save(tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, missing, None)
    said = refusal(tmp_path / "a.safetensors")
    assert said == f"verifying needs PyTorch and diffusers, and {missing} is missing: pip install 'ti_jax[torch]'"
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_single_file_models_are_not_for_diffusers(tmp_path):
    word(1).save(tmp_path / "a.safetensors", format="diffusers")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        InputError, match=r"model\.safetensors: a single file, for which diffusers would download"
    ) as error:
        verify(tmp_path / "a.safetensors", tmp_path / "model.safetensors")
    assert "\n" not in str(error.value)


def test_verify_says_why_a_capital_letter_and_several_vectors_fail(tmp_path, tiny_sd):
    """diffusers looks for words to expand in the lower-cased prompt; written out, or in lower case, it finds them."""
    word(3, dims=(32,), token="<Cat>").save(tmp_path / "a.safetensors")
    report = verify(tmp_path / "a.safetensors", tiny_sd)
    assert report.rows_equal and not report.ok
    assert "save it as <cat>, or write <Cat> <Cat>_1 <Cat>_2 there" in report.summary()
    assert verify(tmp_path / "a.safetensors", tiny_sd, "a <Cat> <Cat>_1 <Cat>_2 here").ok
    word(3, dims=(32,), token="<cat>").save(tmp_path / "b.safetensors")
    assert verify(tmp_path / "b.safetensors", tiny_sd).ok
    word(1, dims=(32,), token="<Cat>").save(tmp_path / "c.safetensors")
    assert verify(tmp_path / "c.safetensors", tiny_sd).ok
