"""CLIP's two towers are transformers' CLIPModel, through the loader, from pixels and texts to features."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from ti_jax.errors import InputError
from ti_jax.evaluation.clip import CLIP, preprocess
from ti_jax.models.clip_layers import CLIPEncoderLayer
from ti_jax.models.clip_vision import CLIPVisionConfig

VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
)
TEXT = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=16
)


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def checkpoint(request, tmp_path_factory, tiny_sd):
    """A folder with a random CLIP, and the same in transformers; norms and biases are random too."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tiny_sd / "tokenizer")
    text = TEXT | dict(
        hidden_act=request.param, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=text, vision_config=VISION | dict(hidden_act=request.param), projection_dim=20
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim <= 1 else parameter.shape[-1] ** -0.5))
            if parameter.ndim == 1:
                parameter.add_(0.5)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model


def pictures(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 33 + index, 3), np.uint8)) for index in range(count)]


def unit(tensor):
    tensor = getattr(tensor, "pooler_output", tensor)  # transformers 5 gives an output of several
    return (tensor / tensor.norm(dim=-1, keepdim=True)).detach().numpy()


def test_image_features(checkpoint):
    folder, model = checkpoint
    clip = CLIP.from_pretrained(folder)
    images = pictures(3)
    pixels = np.stack([preprocess(image, 32, clip.mean, clip.std) for image in images]).transpose(0, 3, 1, 2)
    theirs = unit(model.get_image_features(torch.from_numpy(pixels)))
    ours = clip.image_features(images)
    assert ours.shape == (3, 20)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert np.abs(ours[0] - ours[1]).max() > 1e-3


def test_text_features(checkpoint):
    folder, model = checkpoint
    clip = CLIP.from_pretrained(folder)
    texts = ["a cat", "a photo of a cat on a very long beach " * 4]
    tokens = clip.tokenizer(texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    theirs = unit(model.get_text_features(input_ids=tokens.input_ids))
    np.testing.assert_allclose(clip.text_features(texts), theirs, rtol=0, atol=1e-5)


def test_blocks(checkpoint):
    folder, model = checkpoint
    clip = CLIP.from_pretrained(folder)
    x = np.random.default_rng(1).normal(size=(2, 17, 32)).astype(np.float32)
    layer = CLIPEncoderLayer(clip.model.vision_config, np.float32, causal=False)
    ours = jax.jit(layer.apply)({"params": clip.params["vision_model"]["encoder"]["layers_1"]}, x)
    with torch.no_grad():
        theirs = model.vision_model.encoder.layers[1](torch.from_numpy(x), attention_mask=None)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (50, 90), (300, 33), (31, 32)])
def test_preprocessing_is_that_of_transformers(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    theirs = np.asarray(processor(image, return_tensors="np").pixel_values[0]).transpose(1, 2, 0)
    ours = preprocess(image, 32, processor.image_mean, processor.image_std)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_full_size_tower_has_transformers_shapes():
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    from ti_jax.models.clip_vision import CLIPVisionTransformer
    from ti_jax.models.shapes import param_shapes

    shapes = param_shapes(CLIPVisionTransformer(config), jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 303_179_776  # openai/clip-vit-large-patch14


def test_another_folder_is_told_as_such(tmp_path):
    with pytest.raises(InputError, match=r"not the folder of a CLIP model, it has no config\.json"):
        CLIP.from_pretrained(tmp_path / "nope")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip"}, "not a CLIP model with two towers"),
        ({"vision_config": VISION | {"rope_theta": 1e4}}, "option rope_theta = 10000.0"),
        ({"vision_config": VISION | {"patch_size": 7}}, "image_size of patch_size"),
        ({"vision_config": VISION | {"hidden_act": "relu"}}, "hidden_act 'relu'"),
        ({"vision_config": VISION | {"hidden_size": 40}}, "mis-shaped"),
    ],
)
def test_what_is_refused(checkpoint, tmp_path, change, message):
    folder, _ = checkpoint
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        CLIP.from_pretrained(tmp_path)
