"""Clip skip: by its flag as in diffusers, or by a config.json that has fewer layers than the weights."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import randomize
from PIL import Image
from safetensors.torch import load_file, save_file
from test_step import Problem, relative, torch_rows

from ti_jax.cli.infer import draw
from ti_jax.cli.verify import verify
from ti_jax.config import EvaluateConfig, InferConfig, resolve_evaluate, resolve_infer
from ti_jax.embeddings import Embedding
from ti_jax.errors import InputError
from ti_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from ti_jax.models.shapes import param_shapes
from ti_jax.pipeline import StableDiffusion
from ti_jax.pipeline.model_description import open_model_of
from ti_jax.weights.config_files import read_component_config
from ti_jax.weights.load import load_component

CASE = Path(__file__).parent / "cases" / "clipskip_text_encoder_config.json"


@pytest.fixture
def cut(tmp_path):
    """A text encoder of three layers, of which its config.json counts two."""
    config = transformers.CLIPTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=8, eos_token_id=39,
    )  # fmt: skip
    model = transformers.CLIPTextModel(config)
    randomize(model, 0)
    model.save_pretrained(tmp_path / "text_encoder")
    file = tmp_path / "text_encoder" / "config.json"
    file.write_text(file.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    return tmp_path


def load(folder):
    module = CLIPTextModel(CLIPTextConfig.from_dict(read_component_config(folder, "text_encoder")))
    return module, load_component(folder, "text_encoder", param_shapes(module, jnp.zeros((1, 8), jnp.int32)), "float32")


def test_as_transformers_loads_it(cut, caplog):
    module, params = load(cut)
    assert [record.getMessage() for record in caplog.records] == [
        "text_encoder: 1 layers of its weights are not used, as num_hidden_layers in its config.json is 2 (clip skip)"
    ]
    ids = np.array([[3, 5, 7, 39, 39, 39, 39, 39]], np.int32)
    theirs = transformers.CLIPTextModel.from_pretrained(cut / "text_encoder").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.long)).last_hidden_state.numpy()
    ours = jax.jit(module.apply)({"params": params}, ids).last_hidden_state
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_a_config_with_a_layer_less_as_transformers_writes_it(tmp_path):
    """The file that is advised for clip skip: the text encoder's own, with a smaller num_hidden_layers."""
    config = transformers.CLIPTextConfig.from_pretrained(CASE)
    config.num_hidden_layers += 1
    model = transformers.CLIPTextModel(config)
    randomize(model, 0)
    model.save_pretrained(tmp_path / "text_encoder")
    shutil.copy(CASE, tmp_path / "text_encoder" / "config.json")
    module, params = load(tmp_path)
    ids = np.array([[49406, 320, 1125, 49407, 49407, 49407, 49407, 49407]], np.int32)
    with torch.no_grad():
        states = model.eval()(torch.tensor(ids, dtype=torch.long), output_hidden_states=True).hidden_states
        norm = getattr(model, "text_model", model).final_layer_norm
        expected = norm(states[-2]).numpy()
    ours = jax.jit(module.apply)({"params": params}, ids).last_hidden_state
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("damage", ["lacks one", "has one more", "mis-shaped", "of the layers that count"])
def test_only_whole_layers(cut, damage):
    file = cut / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.2.mlp.fc1.bias" in name)
    if damage == "lacks one":
        del tensors[name]
    elif damage == "has one more":
        tensors[name.replace("fc1", "fc3")] = tensors[name].clone()
    elif damage == "mis-shaped":
        tensors[name] = tensors[name][:5].clone()
    else:
        tensors[name.replace("layers.2", "layers.1").replace("fc1", "fc3")] = tensors[name].clone()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match="unexpected"):
        load(cut)


# -- the flag


def save_word(path, dims):
    rng = np.random.default_rng(0)
    Embedding("<cat-toy>", {name: 0.05 * rng.standard_normal((2, dim)) for name, dim in dims.items()}).save(path)
    return path


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl"])
def test_prompts_are_encoded_as_diffusers_pipelines_do(family, tmp_path, request):
    model = request.getfixturevalue(family)
    plain, skipping = (StableDiffusion.from_pretrained(model, jnp.float32, clip_skip=skip) for skip in (0, 1))
    word = save_word(tmp_path / "a.safetensors", plain.embedding_dims)
    report = verify(word, model, "a portrait of {}", clip_skip=1)
    assert report.ok, report
    ids = plain.tokenize(["a portrait"])
    ours, with_all = skipping.encode_text(ids), plain.encode_text(ids)
    assert relative(ours.context, with_all.context) > 0.1
    if family == "tiny_sdxl":
        assert np.array_equal(ours.pooled, with_all.pooled)


def test_fewer_layers_in_the_config_are_the_same(tiny_sd, tmp_path):
    """Which is how models with clip skip were published before pipelines had the setting."""
    shutil.copytree(tiny_sd, tmp_path / "model")
    file = tmp_path / "model" / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] - 1}))
    older = StableDiffusion.from_pretrained(tmp_path / "model", jnp.float32)
    skipping = StableDiffusion.from_pretrained(tiny_sd, jnp.float32, clip_skip=1)
    ids = older.tokenize(["a portrait of a person"])
    np.testing.assert_allclose(older.encode_text(ids).context, skipping.encode_text(ids).context, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl"])
def test_twenty_steps_equal_a_pytorch_loop(family, pictures, tmp_path, request):
    model = request.getfixturevalue(family)
    problem = Problem(model, pictures, tmp_path, clip_skip=1)
    state, losses = problem.run(num_devices=1, batch_size=2)
    rows, their_losses = torch_rows(problem, model, "epsilon")
    assert relative(losses, their_losses) < 1e-5
    for name in state.rows:
        assert relative(state.rows[name], rows[name]) < 1e-5
        assert relative(state.rows[name], problem.concept.rows[name]) > 0.01, "nothing was learned"
    assert problem.concept.metadata["clip_skip"] == "1"


def test_a_picture_is_drawn_with_it_and_says_so(tiny_sd, tmp_path):
    drawn = []
    for skip in (0, 1):
        config = InferConfig(
            prompt=("a portrait of a person",), pretrained_model_name_or_path=str(tiny_sd), num_inference_steps=1,
            output=str(tmp_path / f"{skip}.png"), clip_skip=skip,
        )  # fmt: skip
        (path,) = draw(resolve_infer(config))
        drawn.append(Image.open(path))
    assert "Clip skip" not in drawn[0].text["parameters"]
    assert "Clip skip: 2," in drawn[1].text["parameters"]
    assert not np.array_equal(drawn[0], drawn[1])


def test_a_word_is_measured_with_it(tiny_sd):
    config = EvaluateConfig(train_data_dir="cat", pretrained_model_name_or_path=str(tiny_sd), clip_skip=1)
    with open_model_of(resolve_evaluate(config)) as model:
        assert [module.clip_skip for _, module in model.networks.text_encoders] == [1]


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl"])
def test_one_layer_stays(family, request):
    message = "--clip_skip 2: text_encoder of this model has 2 layers, of which at most 1 can be left out"
    with pytest.raises(InputError, match=message):
        StableDiffusion.from_pretrained(request.getfixturevalue(family), clip_skip=2)
