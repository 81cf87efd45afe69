"""What a word says of itself to others: the hub's model card, names instead of paths, and one file beside the pair."""

import ast

import numpy as np
import pytest
import safetensors.numpy
import yaml
from huggingface_hub import ModelCard
from words import assert_same, sdxl_word, word

from ti_jax.config import TrainConfig, resolve
from ti_jax.data.concept import public_name
from ti_jax.embeddings import Embedding
from ti_jax.training import run_folder
from ti_jax.training.hub import model_card

METADATA = {"base_model": "org/model", "steps": "500", "initializer_token": "toy"}


def card_of(make, tmp_path, token="<cat-toy>", metadata=METADATA, **settings):
    settings = {"pretrained_model_name_or_path": "org/model", **settings}
    config = resolve(
        TrainConfig(
            train_data_dir="cat", placeholder_token=token, initializer_token="toy", output_dir="out", **settings
        )
    )
    text = model_card(config, make(2, token=token, metadata=metadata), "me/cat", tmp_path)
    _, front, body = text.split("---\n", 2)
    (code,) = body.split("```")[1::2]
    return yaml.safe_load(front), body, ast.parse(code.removeprefix("python\n")), code


def loads(code):
    calls = [node for node in ast.walk(code) if isinstance(node, ast.Call)]
    found = [call for call in calls if getattr(call.func, "attr", "") == "load_textual_inversion"]
    return [
        ([arg.value for arg in call.args], {word.arg: ast.unparse(word.value) for word in call.keywords})
        for call in found
    ]


def test_the_card_of_a_word(tmp_path):
    front, body, code, text = card_of(word, tmp_path)
    assert front["library_name"] == "diffusers" and front["base_model"] == "org/model" and "license" not in front
    assert front["instance_prompt"] == "<cat-toy>" and "textual_inversion" in front["tags"] and "widget" not in front
    assert loads(code) == [(["me/cat"], {"weight_name": "'learned_embeds.safetensors'"})]
    assert 'StableDiffusionPipeline.from_pretrained("org/model")' in text and "_2" not in body


def test_the_card_of_an_sdxl_word_loads_both_files(tmp_path):
    front, body, code, text = card_of(sdxl_word, tmp_path)
    assert 'StableDiffusionXLPipeline.from_pretrained("org/model")' in text
    second = {
        "weight_name": "'learned_embeds_2.safetensors'",
        "text_encoder": "pipe.text_encoder_2",
        "tokenizer": "pipe.tokenizer_2",
    }
    assert loads(code) == [(["me/cat"], {"weight_name": "'learned_embeds.safetensors'"}), (["me/cat"], second)]
    assert "AUTOMATIC1111 and ComfyUI read `learned_embeds_sdxl.safetensors`" in body
    assert "stable-diffusion-xl" in front["tags"]


def test_license_and_pictures_of_a_card(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "overview-04.png").write_bytes(b"")
    front, *_ = card_of(word, tmp_path, hub_license="cc-by-4.0", overview_prompts=('a "{}": here', "{} again"))
    assert front["license"] == "cc-by-4.0"
    assert front["widget"] == [{"text": 'a "<cat-toy>": here', "output": {"url": "samples/overview-04.png"}}]


def test_a_card_has_no_local_path(tmp_path):
    model = tmp_path / "secret" / "my-model"
    model.mkdir(parents=True)
    metadata = {**METADATA, "base_model": public_name(str(model))}
    front, body, _, text = card_of(word, tmp_path, metadata=metadata, pretrained_model_name_or_path=str(model))
    assert "base_model" not in front and "secret" not in body and 'from_pretrained("path/to/my-model")' in text


@pytest.mark.parametrize("given", ["{}", "{}/", "{}/../my-model"])
def test_names_of_models(tmp_path, given):
    (tmp_path / "my-model").mkdir()
    assert public_name(given.format(tmp_path / "my-model")) == "my-model"
    assert public_name("org/model") == "org/model" and public_name("mini-sd") == "mini-sd"


def test_an_sdxl_run_leaves_a_pair_and_one_file(tmp_path):
    embedding = sdxl_word(2)
    run_folder.save_embedding(embedding, tmp_path, 7)
    assert not (tmp_path / run_folder.ONE_FILE).exists()
    run_folder.save_embedding(embedding, tmp_path)
    one = safetensors.numpy.load_file(tmp_path / run_folder.ONE_FILE)
    assert sorted(one) == ["clip_g", "clip_l"]
    for key, name in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
        np.testing.assert_array_equal(one[key], embedding.vectors[name])
    assert_same(Embedding.load(tmp_path), embedding)
    assert_same(Embedding.load(tmp_path / run_folder.ONE_FILE), embedding)


def test_the_hub_reads_the_card_as_it_is_meant(tmp_path):
    """Its own library takes the front matter apart; it refuses what the hub would, and loses nothing."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "overview-04.png").write_bytes(b"")
    config = resolve(
        TrainConfig(
            pretrained_model_name_or_path="org/model", train_data_dir="cat", placeholder_token="<cat-toy>",
            initializer_token="toy", output_dir="out", hub_license="cc-by-4.0", overview_prompts=("{}: yes", "no: {}"),
        )
    )  # fmt: skip
    text = model_card(config, word(2, token="<cat-toy>", metadata=METADATA), "me/cat", tmp_path)
    card = ModelCard(text)
    assert card.data.to_dict() == yaml.safe_load(text.split("---\n")[1])
    assert (card.data.base_model, card.data.license, card.data.pipeline_tag) == (
        "org/model",
        "cc-by-4.0",
        "text-to-image",
    )
    assert card.text.lstrip().startswith("# `<cat-toy>`")
