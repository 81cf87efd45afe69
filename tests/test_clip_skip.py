"""A text encoder whose config.json counts fewer layers than its weights have: clip skip made permanent."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import randomize
from safetensors.torch import load_file, save_file

from ti_jax.errors import InputError
from ti_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from ti_jax.models.shapes import param_shapes
from ti_jax.weights.config_files import read_component_config
from ti_jax.weights.load import load_component


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
    np.testing.assert_allclose(module.apply({"params": params}, ids).last_hidden_state, expected, rtol=0, atol=1e-5)


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
