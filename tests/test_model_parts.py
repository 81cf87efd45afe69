"""Folders whose parts can each be read, and which are no Stable Diffusion together."""

import json
import shutil

import pytest

from ti_jax.errors import InputError
from ti_jax.pipeline import StableDiffusion


@pytest.fixture
def change(tmp_path):
    """``change(folder, file, function)``: a copy of the folder whose JSON file the function has changed."""

    def copy(folder, file, function):
        copied = shutil.copytree(folder, tmp_path / "model")
        values = json.loads((copied / file).read_text())
        function(values)
        (copied / file).write_text(json.dumps(values))
        return copied

    return copy


def test_an_inpainting_model(tiny_sd, change):
    folder = change(tiny_sd, "unet/config.json", lambda config: config.update(in_channels=9))
    with pytest.raises(InputError, match=r"the UNet has 9 input and 4 output channels, but .* an inpainting model"):
        StableDiffusion.from_pretrained(folder)


def test_a_text_encoder_of_another_width(tiny_sd, change):
    folder = change(tiny_sd, "unet/config.json", lambda config: config.update(cross_attention_dim=48))
    with pytest.raises(
        InputError, match="cross_attention_dim is 48, but text_encoder add up to 32: parts of different models"
    ):
        StableDiffusion.from_pretrained(folder)


def test_an_xl_text_encoder_of_another_width(tiny_sdxl, change):
    folder = change(tiny_sdxl, "text_encoder_2/config.json", lambda config: config.update(projection_dim=32))
    with pytest.raises(InputError, match="leaves 24 for the pooled text, which text_encoder_2 gives 32 numbers of"):
        StableDiffusion.from_pretrained(folder)


def test_a_unet_that_is_not_told_what_xl_tells(tiny_sdxl, change):
    nothing = dict.fromkeys(
        ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"), None
    )
    folder = change(tiny_sdxl, "unet/config.json", lambda config: config.update(nothing))
    with pytest.raises(InputError, match=r"addition_embed_type is None with 2 text encoder\(s\)"):
        StableDiffusion.from_pretrained(folder)
