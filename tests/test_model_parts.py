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
    with pytest.raises(InputError, match=r"the UNet takes 9 channels and makes 4 where .* an inpainting model"):
        StableDiffusion.from_pretrained(folder)


def test_a_refiner(tiny_sdxl, change):
    folder = change(tiny_sdxl, "model_index.json", lambda index: index.update(text_encoder=[None, None]))
    with pytest.raises(InputError, match=r"no text_encoder; an SDXL refiner .* give the base model"):
        StableDiffusion.from_pretrained(folder)


def test_a_text_encoder_of_another_width(tiny_sd, change):
    folder = change(tiny_sd, "unet/config.json", lambda config: config.update(cross_attention_dim=48))
    with pytest.raises(InputError, match="reads text of width 48 and text_encoder make 32: parts of different models"):
        StableDiffusion.from_pretrained(folder)


def test_an_xl_unet_without_the_second_text_encoder(tiny_sdxl, change):
    def alone(index):
        index.update(text_encoder_2=[None, None])

    folder = change(tiny_sdxl, "model_index.json", alone)
    unet = json.loads((folder / "unet" / "config.json").read_text())
    unet["cross_attention_dim"] = 32
    (folder / "unet" / "config.json").write_text(json.dumps(unet))
    with pytest.raises(InputError, match=r"addition_embed_type is text_time with 1 text encoder\(s\)"):
        StableDiffusion.from_pretrained(folder)
