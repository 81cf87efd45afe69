"""The text encoder is transformers' CLIPTextModel, through the loader, with rows behind its table."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from ti_jax.errors import InputError
from ti_jax.models.clip_layers import CLIPMLP, CLIPAttention, CLIPEncoderLayer
from ti_jax.models.clip_text import CLIPTextConfig, CLIPTextModel, eos_positions
from ti_jax.models.shapes import param_shapes
from ti_jax.ops import attention
from ti_jax.ops.platform import PLAIN, Platform, compiling_for
from ti_jax.weights.load import load_component

VOCAB, BOS, EOS = 60, 58, 59
LENGTH = 9
NUM_ROWS = 3

SD1 = dict(hidden_act="quick_gelu", num_hidden_layers=2, eos_token_id=2, architecture="CLIPTextModel")
CONFIGS = {
    "sd1": SD1,
    "sd1-modern": SD1 | dict(eos_token_id=EOS),
    "sd2": SD1 | dict(hidden_act="gelu", num_hidden_layers=3, projection_dim=24),
    "sdxl-1": SD1 | dict(num_hidden_layers=3),
    "sdxl-2": SD1 | dict(hidden_act="gelu", projection_dim=20, architecture="CLIPTextModelWithProjection"),
    "projection-modern": SD1 | dict(projection_dim=20, architecture="CLIPTextModelWithProjection", eos_token_id=EOS),
}


def torch_encoder(name: str) -> torch.nn.Module:
    """A tiny random encoder whose norms and biases are random too, so that none of them can be forgotten."""
    options = dict(CONFIGS[name])
    architecture = options.pop("architecture")
    config = transformers.CLIPTextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        max_position_embeddings=12,
        bos_token_id=BOS,
        **options,
    )
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model


def loaded(model: torch.nn.Module, folder: Path) -> tuple[CLIPTextModel, dict]:
    """The same encoder as ours, by way of files and the loader."""
    model.save_pretrained(folder / "text_encoder")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    module = CLIPTextModel(CLIPTextConfig.from_dict(config))
    shapes = param_shapes(module, jax.ShapeDtypeStruct((1, LENGTH), jnp.int32))
    return module, load_component(folder, "text_encoder", shapes, jnp.float32)


def torch_rows(model: torch.nn.Module) -> np.ndarray:
    """Append rows to the torch encoder's table, as diffusers does for placeholder tokens; returns them."""
    model.resize_token_embeddings(VOCAB + NUM_ROWS, mean_resizing=False)
    rows = torch.randn(NUM_ROWS, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB:] = rows
    return rows.numpy()


def prompts(with_new: bool) -> np.ndarray:
    """Prompts padded with the end-of-text token (SD1) and with another (SD2), one that fills its length."""
    new = [VOCAB, VOCAB + 1, VOCAB + 2] if with_new else [4, 5, 6]
    return np.array(
        [
            [BOS, 7, new[0], 8, EOS, EOS, EOS, EOS, EOS],
            [BOS, new[1], new[2], 30, 3, EOS, 0, 0, 0],
            [BOS, 11, 12, new[2], 13, 14, 15, new[0], EOS],
            [BOS, EOS, EOS, EOS, EOS, EOS, EOS, EOS, EOS],
        ],
        np.int32,
    )


def torch_outputs(model: torch.nn.Module, ids: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        out = model(torch.from_numpy(ids).long(), output_hidden_states=True)
    projected = isinstance(model, transformers.CLIPTextModelWithProjection)
    return {
        "last_hidden_state": out.last_hidden_state.numpy(),
        "penultimate_hidden_state": out.hidden_states[-2].numpy(),
        "pooled": (out.text_embeds if projected else out.pooler_output).numpy(),
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_encoder(name, tmp_path):
    model = torch_encoder(name)
    module, params = loaded(model, tmp_path)
    ids = prompts(with_new=False)
    ours = jax.jit(module.apply)({"params": params}, ids)._asdict()
    for key, theirs in torch_outputs(model, ids).items():
        np.testing.assert_allclose(ours[key], theirs, rtol=0, atol=1e-4, err_msg=key)
        assert np.std(theirs) > 0.1


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_are_a_resized_table(name, tmp_path):
    model = torch_encoder(name)
    module, params = loaded(model, tmp_path)
    rows = torch_rows(model)
    ids = prompts(with_new=True)
    ours = jax.jit(module.apply)({"params": params}, ids, rows)._asdict()
    theirs = torch_outputs(model, ids)
    if CONFIGS[name]["eos_token_id"] == 2:
        # transformers then pools at the largest id, which is now a placeholder's; pool where the end is.
        state = torch.from_numpy(theirs["last_hidden_state"][np.arange(4), [4, 5, 8, 1]])
        projection = getattr(model, "text_projection", None)
        theirs["pooled"] = (state if projection is None else projection(state)).detach().numpy()
    for key in theirs:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("name", ["sd1", "projection-modern"])
def test_gradient_of_rows(name, tmp_path):
    model = torch_encoder(name)
    module, params = loaded(model, tmp_path)
    rows = torch_rows(model)
    ids = prompts(with_new=True)
    weights = np.random.default_rng(0).normal(size=(4, LENGTH, 32)).astype(np.float32)

    def loss(rows):
        return jnp.sum(weights * module.apply({"params": params}, ids, rows).last_hidden_state)

    table = model.get_input_embeddings().weight
    hidden = model(torch.from_numpy(ids).long()).last_hidden_state
    (torch.from_numpy(weights) * hidden).sum().backward()
    theirs = table.grad[VOCAB:].numpy()
    ours = jax.jit(jax.grad(loss))(rows)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_unused_rows_have_no_gradient(tmp_path):
    module, params = loaded(torch_encoder("sd1"), tmp_path)
    ids = np.array([[BOS, VOCAB + 1, EOS]], np.int32)
    rows = np.ones((NUM_ROWS, 32), np.float32)
    gradient = np.asarray(
        jax.jit(jax.grad(lambda rows: module.apply({"params": params}, ids, rows).last_hidden_state.sum() ** 2))(rows)
    )
    assert np.abs(gradient[1]).max() > 0
    np.testing.assert_array_equal(gradient[[0, 2]], 0)


def test_an_id_without_row_is_not_silent(tmp_path):
    module, params = loaded(torch_encoder("sd1"), tmp_path)
    ids = np.array([[BOS, 5, VOCAB + NUM_ROWS, EOS]], np.int32)
    rows = np.ones((NUM_ROWS, 32), np.float32)
    apply = jax.jit(module.apply)
    assert np.isnan(apply({"params": params}, ids, rows).pooled).any()
    assert np.isnan(apply({"params": params}, ids).pooled).any()
    with pytest.raises(ValueError, match="13 tokens, but the encoder has 12 positions"):
        module.apply({"params": params}, np.full((1, 13), 5, np.int32))


BLOCKS = {
    "self_attn": CLIPAttention,
    "mlp": CLIPMLP,
    None: CLIPEncoderLayer,
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_blocks(name, block, tmp_path):
    model = torch_encoder(name)
    module, params = loaded(model, tmp_path)
    layer, layer_params = model.encoder.layers[1], params["encoder"]["layers_1"]
    if block is not None:
        layer, layer_params = getattr(layer, block), layer_params[block]
    x = np.random.default_rng(0).normal(size=(2, LENGTH, 32)).astype(np.float32)
    causal = {} if block == "mlp" else {"causal": True}
    ours = jax.jit(BLOCKS[block](module.config, jnp.float32, **causal).apply)({"params": layer_params}, x)
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        theirs = layer(torch.from_numpy(x), **({} if block == "mlp" else {"attention_mask": mask}))
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5)


def test_embeddings_and_final_norm(tmp_path):
    model = torch_encoder("sd1")
    module, params = loaded(model, tmp_path)
    ids = prompts(with_new=False)
    shallow = CLIPTextModel(dataclasses.replace(module.config, num_hidden_layers=1))
    ours = jax.jit(shallow.apply)({"params": params}, ids).penultimate_hidden_state
    with torch.no_grad():
        theirs = model.embeddings(torch.from_numpy(ids).long())
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5)


def test_eos_positions():
    ids = np.array([[BOS, VOCAB + 2, 3, EOS, EOS], [BOS, EOS, 0, 0, VOCAB]], np.int32)
    for eos_token_id in (2, EOS):
        config = CLIPTextConfig(vocab_size=VOCAB, eos_token_id=eos_token_id)
        np.testing.assert_array_equal(eos_positions(ids, config), [3, 1])


def test_bfloat16_stays_near_float32_and_keeps_float32_gradients(tmp_path):
    module, params = loaded(torch_encoder("sd1"), tmp_path)
    half = CLIPTextModel(module.config, jnp.bfloat16)
    half_params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    ids, rows = prompts(with_new=True), np.random.default_rng(0).normal(size=(NUM_ROWS, 32)).astype(np.float32)
    exact = jax.jit(module.apply)({"params": params}, ids, rows).last_hidden_state

    def rounding(rows):
        states = half.apply({"params": half_params}, ids, rows).last_hidden_state
        return states.sum(), states

    gradient, rounded = jax.jit(jax.grad(rounding, has_aux=True))(rows)
    assert rounded.dtype == jnp.bfloat16
    error = np.sqrt(np.mean((np.asarray(rounded, np.float32) - exact) ** 2)) / np.std(exact)
    assert 0 < error < 0.02
    assert gradient.dtype == jnp.float32


def test_padding_for_cudnn_is_never_seen(tmp_path, monkeypatch):
    """Of 9 positions to 16, with XLA's attention for the kernels: outputs and gradients stay what they are."""
    monkeypatch.setattr(attention, "CUDA_LONG", 8)
    plain = jax.nn.dot_product_attention
    lengths = []

    def of_xla(query, *arrays, implementation, **options):
        lengths.append(query.shape[1])
        return plain(query, *arrays, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", of_xla)
    module, params = loaded(torch_encoder("sdxl-2"), tmp_path)
    half = CLIPTextModel(module.config, jnp.bfloat16)
    ids, rows = prompts(with_new=True), np.random.default_rng(0).normal(size=(NUM_ROWS, 32)).astype(np.float32)

    def on(platform):
        def total(rows):
            encoded = half.apply({"params": params}, ids, rows)
            return sum(each.astype(jnp.float32).sum() for each in encoded), encoded

        with compiling_for(platform):
            gradient, encoded = jax.jit(jax.grad(total, has_aux=True))(rows)
        return [np.asarray(each, np.float32) for each in (*encoded, gradient)]

    expected = on(PLAIN)
    assert not lengths
    for ours, theirs in zip(on(Platform("cuda", 9)), expected, strict=True):
        assert ours.shape == theirs.shape
        assert np.linalg.norm(ours - theirs) < 2**-6 * np.linalg.norm(theirs)
    assert set(lengths) == {16}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"model_type": "t5"}, "model_type 't5'"),
        ({"architectures": ["T5EncoderModel"]}, "T5EncoderModel"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"use_rotary": True}, "use_rotary = True"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id is \(1, 2\)"),
        ({"hidden_size": 30}, "hidden_size 30 is no multiple of num_attention_heads 4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"layer_norm_eps": "x"}, "layer_norm_eps is 'x'"),
    ],
)
def test_config_refuses_what_is_not_implemented(change, named):
    config = torch_encoder("sd1").config.to_dict() | {"architectures": ["CLIPTextModel"]}
    CLIPTextConfig.from_dict(config)
    with pytest.raises(InputError, match=named) as error:
        CLIPTextConfig.from_dict(config | change)
    assert "\n" not in str(error.value)


def test_config_of_either_generation():
    """The files of SD1.5 (transformers 4) and of transformers 5."""
    published = {
        "_name_or_path": "openai/clip-vit-large-patch14",
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "projection_dim": 768,
        "torch_dtype": "float32",
        "transformers_version": "4.22.0.dev0",
        "vocab_size": 49408,
    }
    old = CLIPTextConfig.from_dict(published)
    assert (old.hidden_size, old.num_hidden_layers, old.eos_token_id, old.with_projection) == (768, 12, 2, False)
    new = transformers.CLIPTextConfig(**(published | {"eos_token_id": 49407})).to_dict()
    new["architectures"] = ["CLIPTextModelWithProjection"]
    assert CLIPTextConfig.from_dict(new) == dataclasses.replace(old, eos_token_id=49407, with_projection=True)
