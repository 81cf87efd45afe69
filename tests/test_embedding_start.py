"""Runs that start from a learned word, and the traps that other tools fell into, from files to trained rows."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import VOCAB

import ti_jax
from ti_jax.cli import main
from ti_jax.config import resolve
from ti_jax.config.yaml import load_yaml
from ti_jax.pipeline import StableDiffusion
from ti_jax.text import tokens
from ti_jax.training.hub import model_card
from ti_jax.training.job import prepare_concept


def small(n=3, token="<old>", seed=0, dim=32):
    rows = np.random.default_rng(seed).standard_normal((n, dim)) * 0.1
    return ti_jax.Embedding(token, {"text_encoder": rows})


@pytest.fixture
def config(tiny_sd, pictures, tmp_path):
    templates = tmp_path / "templates.txt"
    templates.write_text("a portrait of {}\na drawing of {} and <other>\n")
    small(2, "<other>", seed=1).save(tmp_path / "other.safetensors")
    small().save(tmp_path / "my old cat.pt", format="a1111")
    return ti_jax.TrainConfig(
        pretrained_model_name_or_path=str(tiny_sd), train_data_dir=str(pictures), placeholder_token="<new>",
        initializer_embedding=str(tmp_path / "my old cat.pt"), num_vectors=3, templates=str(templates),
        embeddings=(str(tmp_path / "other.safetensors"),), overview_prompts=("a portrait of {}",), train_batch_size=2,
        learning_rate=1e-2, adam_weight_decay=0.1, max_train_steps=4, logging_steps=2, validation_inference_steps=2,
        checkpointing_steps=2, output_dir=str(tmp_path / "out"),
    )  # fmt: skip


def train(config):
    return ti_jax.train(config, devices=jax.devices()[:1])


def rows(result):
    return result.embedding.vectors["text_encoder"]


def test_a_run_starts_from_the_word_and_trains_all_of_it(config, tmp_path):
    """Trap: of several vectors only the first trains. (Frozen rows under weight decay: see test_train.py.)"""
    start = small().vectors["text_encoder"]
    model = ti_jax.StableDiffusion.from_config(config)
    concept = prepare_concept(resolve(config), model, print)
    np.testing.assert_array_equal(concept.rows["text_encoder"][:3], start)
    assert concept.row_mask["text_encoder"].tolist() == [True] * 3 + [False] * 2
    result = train(config)
    moved = np.linalg.norm(rows(result) - start, axis=1)
    assert (moved > 1e-3).all(), moved
    assert len(rows(result)) == 3
    # It is recorded, in the run's config and in what it exports.
    assert load_yaml(tmp_path / "out" / "config.yaml", ti_jax.TrainConfig)["initializer_embedding"].endswith("cat.pt")
    metadata = ti_jax.Embedding.load(tmp_path / "out" / "learned_embeds.safetensors").metadata
    assert metadata["initializer_embedding"] == Path(config.initializer_embedding).name
    assert len(metadata["initializer_embedding_hash"]) == 16 and "initializer_token" not in metadata


@pytest.mark.slow
def test_a_resumed_run_goes_on_from_its_checkpoint_and_not_from_the_file(config, tmp_path):
    """Trap: a resumed run that begins at step 0."""
    whole = train(config)
    other = str(tmp_path / "cut")
    train(replace(config, max_train_steps=2, output_dir=other))
    resumed = train(replace(config, output_dir=other, resume_from_checkpoint="latest"))
    assert len(resumed.losses) == 2 and np.array_equal(rows(resumed), rows(whole))
    small(seed=5).save(config.initializer_embedding, format="a1111")
    with pytest.raises(ti_jax.InputError, match=r"belongs to another run .*initializer_embedding .* there, .* here"):
        train(replace(config, output_dir=other, resume_from_checkpoint="latest"))


def test_the_card_of_a_pushed_word_says_where_it_started(config, tmp_path):
    metadata = {"base_model": "m", "steps": "4", "initializer_embedding": "a/old cat.pt"}
    card = model_card(config, ti_jax.Embedding("<new>", small().vectors, metadata), "me/new", tmp_path)
    assert "starting from another learned word, `old cat.pt`." in card


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num_vectors", "2"], "my old cat.pt: the word has 3 vectors and --num_vectors is 2; give --num_vectors 3"),
        (["--initializer_embedding", "sdxl.safetensors"], "the word '<new>' is for SDXL (768 and 1280 numbers a vec"),
        (["--initializer_embedding", "nope.pt"], "nope.pt: no such file"),
        (["--initializer_token", "person"], "--initializer_token 'person' and --initializer_embedding "),
    ],
)
def test_words_that_a_run_cannot_start_from(config, tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    pair = {"clip_l": torch.ones(3, 768), "clip_g": torch.ones(3, 1280)}
    safetensors.torch.save_file(pair, tmp_path / "sdxl.safetensors")
    given = {"pretrained_model_name_or_path": config.pretrained_model_name_or_path, "num_vectors": "3",
             "train_data_dir": config.train_data_dir, "placeholder_token": "<new>", "output_dir": "never",
             "initializer_embedding": config.initializer_embedding, "overview_prompts": "a {}"}  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    assert main.main(["train", *words, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.startswith("ti-jax: error: ") and err.count("\n") == 1, err
    assert not (tmp_path / "never" / "config.yaml").exists()


def test_a_word_that_no_prompt_holds_is_told_before_the_run(config, tmp_path):
    """Trap: a word that is in none of the captions, so that nothing is learned and nobody is told."""
    (tmp_path / "templates.txt").write_text("a portrait of a person\n")
    with pytest.raises(ti_jax.InputError, match="templates"):
        train(config)


# -- words in files, and prompts with them


@pytest.fixture(scope="module")
def sd(make_tiny_sd):
    return StableDiffusion.from_pretrained(str(make_tiny_sd("epsilon")))


def ids(sd, prompt, words):
    return tokens.prompt_ids(sd.tokenizers["text_encoder"], prompt, words, sd.vocab_sizes["text_encoder"])


def test_one_word_inside_another(sd, tmp_path):
    """Trap: <cat> and <cat-toy> in one prompt, whichever file comes first."""
    small(1, "cat").save(tmp_path / "a.safetensors")
    small(2, "cat-toy", 1).save(tmp_path / "b.safetensors", format="comfyui")
    for order in ("ab", "ba"):
        words, table = tokens.combine([ti_jax.Embedding.load(tmp_path / f"{name}.safetensors") for name in order])
        first, second = (0, 1) if order == "ab" else (2, 0)
        found = [i for i in ids(sd, "a cat-toy and a cat", words) if i >= VOCAB]
        assert found == [VOCAB + second, VOCAB + 1 + second, VOCAB + first]
        np.testing.assert_array_equal(table["text_encoder"][first], small(1).vectors["text_encoder"][0])


def test_a_prompt_that_is_expanded_already(sd, tmp_path):
    """Trap: <x> <x>_1 <x>_2, as diffusers writes it, expanded once more."""
    small(3, "<x>").save(tmp_path / "a.bin")
    words, _ = tokens.combine([ti_jax.Embedding.load(tmp_path / "a.bin")])
    once = ids(sd, "a <x> here", words)
    assert ids(sd, "a <x> <x>_1 <x>_2 here", words) == once
    assert [i for i in once if i >= VOCAB] == [VOCAB, VOCAB + 1, VOCAB + 2]


def test_a_word_that_the_reader_renames(sd, tmp_path):
    """Trap: a file keyed by a word other than the one in the prompt: the word is the one that was asked for."""
    safetensors.torch.save_file({"emb_params": torch.ones(2, 32)}, tmp_path / "a.safetensors")
    safetensors.torch.save_file({"<theirs>": torch.ones(2, 32)}, tmp_path / "b.safetensors")
    for name, own in (("a", "a"), ("b", "<theirs>")):
        path = tmp_path / f"{name}.safetensors"
        assert ti_jax.Embedding.load(path).token == own
        words, _ = tokens.combine([ti_jax.Embedding.load(path, token="<mine>")])
        assert [i for i in ids(sd, "a <mine> and <theirs>", words) if i >= VOCAB] == [VOCAB, VOCAB + 1]
    ti_jax.Embedding.load(tmp_path / "b.safetensors", token="<mine>").save(tmp_path / "c.safetensors")
    assert list(safetensors.torch.load_file(tmp_path / "c.safetensors")) == ["<mine>"]
