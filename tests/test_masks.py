"""Masks: which file is whose, what they weigh on the latent grid, that they follow their picture, what is refused."""

import sys
import types

import numpy as np
import pytest
from PIL import Image

from ti_jax.config import TrainConfig
from ti_jax.data.folder import load_images
from ti_jax.data.masks import MaskReader, Masks, make_mask_reader
from ti_jax.data.picture_files import picture_paths
from ti_jax.errors import InputError


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path, pixels):
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def load(folder, resolution=16, **settings):
    """As a run does: the pictures, and what it reports."""
    config, lines = TrainConfig(train_data_dir=str(folder), **settings), []
    reader = make_mask_reader(config, folder, picture_paths(folder))
    augment = config.seed if config.augment else None
    return load_images(folder, resolution, on_skip=lines.append, masks=reader, augment=augment), lines


def refusal(folder, **settings):
    with pytest.raises(InputError) as error:
        load(folder, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def half(tmp_path):
    """A picture of 16 x 16 pixels, and a mask whose left half is white."""
    save(tmp_path / "a.jpg", noise(16, 16))
    mask = np.zeros((16, 16))
    mask[:, :8] = 255
    return tmp_path, mask


@pytest.mark.parametrize("name", ["a.mask.png", "a-masklabel.png", "a.MASK.PNG", "b.mask.png"])
def test_a_mask_is_never_a_picture(half, name):
    folder, mask = half
    save(folder / name, mask)
    assert [path.name for path in picture_paths(folder)] == ["a.jpg"]
    assert load_images(folder, 16, on_skip=lambda line: None).names == ("a.jpg",)


def test_a_mask_of_no_picture_is_named(half):
    folder, mask = half
    save(folder / "b.mask.png", mask)
    pictures, lines = load(folder)
    assert pictures.masks is None
    assert lines == [
        "left out: named like masks, but of no picture: b.mask.png; give a mask the name of its picture, or a picture "
        "another name"
    ]


@pytest.mark.parametrize("name", ["a.mask.png", "a-masklabel.png", "masks/a.png", "masks/a.mask.png"])
def test_masks_are_found(half, name):
    folder, mask = half
    (folder / "masks").mkdir()
    save(folder / name, mask)
    save(folder / "whole.png", noise(16, 16, 1))
    pictures, lines = load(folder, mask_dir=str(folder / "masks") if "/" in name else None)
    assert lines == ["masks: used for 1 of 2 pictures; the others are learned from as a whole"]
    np.testing.assert_array_equal(pictures.masks[0], mask)
    assert (pictures.masks[1] == 255).all()


def test_an_alpha_channel_is_a_mask(tmp_path):
    alpha = np.arange(256).reshape(16, 16, 1)
    save(tmp_path / "a.png", np.concatenate([noise(16, 16), alpha], axis=-1))
    assert load(tmp_path)[0].masks is None, "it is only used with --alpha_mask"
    pictures, lines = load(tmp_path, alpha_mask=True)
    assert lines == ["masks: used for 1 of 1 pictures"]
    np.testing.assert_array_equal(pictures.masks[0], alpha[..., 0])


def test_an_alpha_channel_is_turned_as_its_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    alpha = np.zeros((16, 24, 1), np.uint8)
    alpha[:4] = 255
    Image.fromarray(np.concatenate([noise(16, 24), alpha], axis=-1)).save(tmp_path / "a.png", exif=exif)
    image = Image.fromarray(np.rot90(alpha[..., 0], -1))
    assert MaskReader(alpha=True).read(tmp_path / "a.png", image).tobytes() == image.tobytes()


def test_weights_are_one_on_average_over_each_picture():
    """A quarter is learned from, a half of a latent's pixels, a soft edge, everything."""
    masks = np.zeros((4, 16, 16), np.uint8)
    masks[0, :8, :8] = 255
    masks[1, :, :3] = 255
    masks[2] = 102
    masks[3] = 255
    found = Masks((16, 16), map(Masks.pack, masks)).weights(2, 0.0)
    assert found.shape == (4, 8, 8) and found.dtype == np.float32
    np.testing.assert_allclose(found.mean(axis=(1, 2)), 1, rtol=1e-6)
    np.testing.assert_allclose(found[0, :4, :4], 4, rtol=1e-6)
    assert not found[0, 4:].any() and not found[0, :, 4:].any()
    np.testing.assert_allclose(found[1, :, 1], found[1, :, 0] / 2, rtol=1e-6)
    np.testing.assert_allclose(found[2:], 1, rtol=1e-6)

    softer = Masks((16, 16), map(Masks.pack, masks)).weights(2, 0.1)
    np.testing.assert_allclose(softer[0, 0, 0], 10 * softer[0, 7, 7], rtol=1e-6)
    np.testing.assert_allclose(softer.mean(axis=(1, 2)), 1, rtol=1e-6)
    np.testing.assert_array_equal(Masks((16, 16), [None]).weights(2, 0.0), np.ones((1, 8, 8)))


def shown(pictures):
    """Which pixels of black and white pictures are white, bool [N, H, W]."""
    return np.asarray(pictures.pixels)[..., 0] > 0


@pytest.mark.parametrize("size", [(16, 40), (40, 16), (33, 50)])
@pytest.mark.parametrize("augment", [False, True])
def test_a_mask_follows_the_crop_of_its_picture(tmp_path, size, augment):
    """A picture that is white where its mask is: cropped, scaled and varied, they stay alike up to the edges."""
    height, width = size
    mask = np.zeros(size)
    mask[height // 3 :, : 2 * width // 3] = 255
    save(tmp_path / "a.png", np.stack([mask] * 3, axis=-1))
    save(tmp_path / "a.mask.png", mask)
    pictures, _ = load(tmp_path, augment=augment)
    assert len(pictures.names) == (8 if augment else 1)
    for index, white in enumerate(shown(pictures)):
        assert np.mean(white != (pictures.masks[index] > 127)) < 0.13
        assert 0.2 < white.mean() < 0.9
    if augment:
        assert len({pictures.masks[index].tobytes() for index in range(8)}) > 3, "all crops are alike"


def test_masks_are_mirrored_with_their_pictures(half, tiny_sd, tmp_path_factory):
    from test_step import Problem

    folder, mask = half
    save(folder / "a.mask.png", mask)
    save(folder / "whole.png", noise(16, 16, 1))
    problem = Problem(tiny_sd, folder, tmp_path_factory.mktemp("problem"), unmasked_weight=0.25)
    weights = np.asarray(problem.dataset.masks)
    assert weights.shape == (2, 2, 8, 8)
    np.testing.assert_allclose(weights[0, 0], [[1.6] * 4 + [0.4] * 4] * 8, rtol=1e-6)
    np.testing.assert_array_equal(weights[0, 1], weights[0, 0, :, ::-1])
    np.testing.assert_array_equal(weights[1], np.ones((2, 8, 8)))
    plain = Problem(tiny_sd, folder, tmp_path_factory.mktemp("problem"))
    assert plain.dataset.masks is not None
    (folder / "a.mask.png").unlink()
    assert Problem(tiny_sd, folder, tmp_path_factory.mktemp("problem")).dataset.masks is None


def test_twenty_steps_equal_a_pytorch_loop(tiny_sd, pictures, tmp_path, tmp_path_factory):
    """The weights of the reference are made of the mask files by PyTorch; which picture is drawn, and mirrored, is read
    off the latents."""
    import jax.numpy as jnp
    import torch
    from test_step import STEPS, Problem, draw, relative, torch_rows

    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    weights = []
    for path in sorted(pictures.iterdir()):
        Image.open(path).save(folder / path.name)
        mask = rng.integers(0, 256, (16, 16), np.uint8)
        mask[:, 9:] = 0
        save(folder / f"{path.stem}.mask.png", mask)
        pooled = torch.nn.functional.avg_pool2d(torch.tensor(mask / 255.0)[None, None], 2)
        weight = 0.1 + 0.9 * pooled
        weight = (weight / weight.mean()).float()
        weights.append((weight, weight.flip(-1)))
    problem = Problem(tiny_sd, folder, tmp_path_factory.mktemp("problem"), unmasked_weight=0.1)
    frozen = problem.frozen()._replace(params={})
    means, variances = np.split(np.asarray(problem.dataset.moments), 2, axis=-1)
    scale = problem.sd.networks.vae.config.scaling_factor
    steps = iter(range(STEPS))

    def masked(predicted, target, timesteps):
        latents = np.asarray(draw(frozen, jnp.int32(next(steps)), jnp.arange(2), 2).latents) / scale
        losses = []
        for sample, latent in enumerate(latents):
            distances = (np.square(latent - means) / np.exp(variances)).mean(axis=(2, 3, 4))
            picture, mirrored = np.unravel_index(distances.argmin(), distances.shape)
            assert np.sort(distances.ravel())[1] > 1.2 * distances.min(), "which picture is it?"
            losses.append((weights[picture][mirrored][0] * (predicted[sample] - target[sample]) ** 2).mean())
        return torch.stack(losses).mean()

    run_steps, arguments, start = problem.program(num_devices=1, batch_size=2)
    state, losses = run_steps(arguments, start, jnp.int32(STEPS))
    rows, their_losses = torch_rows(problem, tiny_sd, "epsilon", masked)
    assert relative(losses, their_losses) < 1e-5
    assert relative(state.rows["text_encoder"], rows["text_encoder"]) < 1e-5
    white = arguments.dataset._replace(masks=jnp.ones_like(arguments.dataset.masks))
    _, _, start = problem.program(num_devices=1, batch_size=2)
    state_without, _ = run_steps(arguments._replace(dataset=white), start, jnp.int32(STEPS))
    assert relative(state.rows["text_encoder"], state_without.rows["text_encoder"]) > 0.01, "the masks do nothing"


# -- what is refused


def test_a_mask_of_another_size(half):
    folder, mask = half
    save(folder / "a.mask.png", mask[:, :12])
    assert refusal(folder) == (
        f"{folder}/a.mask.png: the mask has 12 x 16 pixels and its picture a.jpg 16 x 16; make them alike"
    )


def test_a_mask_without_a_white_pixel(half):
    folder, mask = half
    save(folder / "a.mask.png", 0 * mask + 100)
    assert refusal(folder) == (
        f"{folder}/a.mask.png: not one pixel of the mask is white, so nothing would be learned from a.jpg; paint white "
        f"what is to be learned, or remove the mask to learn from the whole picture"
    )


def test_a_mask_that_is_cropped_away(tmp_path):
    save(tmp_path / "a.png", noise(16, 64))
    mask = np.zeros((16, 64))
    mask[:, :8] = 255
    save(tmp_path / "a.mask.png", mask)
    assert "nothing is white in the part of its mask that is left after cropping to 16 x 16" in refusal(tmp_path)


def test_a_mask_that_is_no_picture(half):
    folder, _ = half
    (folder / "a.mask.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    assert refusal(folder).startswith(f"{folder}/a.mask.png: broken")


def test_the_alpha_channel_of_a_jpeg(half):
    folder, _ = half
    assert refusal(folder, alpha_mask=True) == (
        f"{folder}/a.jpg: --alpha_mask: this picture has no alpha channel; save it as a PNG with transparent "
        f"surroundings, or put a mask beside it, a.mask.png"
    )


def test_a_folder_of_masks_that_is_none(half, tmp_path):
    folder, mask = half
    assert refusal(folder, mask_dir=str(folder / "x")) == (
        f"--mask_dir {folder}/x: no such folder; give the folder with the masks"
    )
    assert "has the pictures, too; move the masks" in refusal(folder, mask_dir=str(folder))
    (folder / "masks").mkdir()
    save(folder / "masks" / "b.png", mask)
    assert refusal(folder, mask_dir=str(folder / "masks")) == (
        f"--mask_dir {folder}/masks: no mask in it belongs to a picture; that of a.jpg would be a.png"
    )


def test_rembg_is_not_installed(half, monkeypatch):
    folder, _ = half
    monkeypatch.setitem(sys.modules, "rembg", None)
    assert refusal(folder, auto_mask=True) == "--auto_mask: rembg is not installed; pip install 'ti_jax[rembg]'"


def rembg_with(monkeypatch, new_session, remove=None):
    """The two functions of rembg that are used: the library, with what it needs, takes half a gigabyte."""
    module = types.ModuleType("rembg")
    module.new_session, module.remove = new_session, remove
    monkeypatch.setitem(sys.modules, "rembg", module)


def test_the_model_of_rembg_is_not_there(half, monkeypatch):
    folder, _ = half

    def offline(name):
        raise ConnectionError("Max retries exceeded with url: /danielgatis/rembg")

    rembg_with(monkeypatch, offline)
    monkeypatch.setenv("U2NET_HOME", "/models")
    assert refusal(folder, auto_mask=True) == (
        "--auto_mask: the model u2net of rembg is not here and cannot be fetched (Max retries exceeded with url: "
        "/danielgatis/rembg); go online once, or put "
        "https://github.com/danielgatis/rembg/releases/download/v0.0.0/u2net.onnx into /models"
    )


def test_pictures_without_a_mask_get_one_of_rembg(half, monkeypatch):
    folder, mask = half
    save(folder / "b.png", noise(16, 16, 1))
    save(folder / "b.mask.png", 255 - mask)
    cut = []

    def remove(picture, session, only_mask):
        assert session == "u2net" and only_mask
        cut.append(picture.size)
        return Image.fromarray(mask.astype(np.uint8))

    rembg_with(monkeypatch, lambda name: name, remove)
    pictures, lines = load(folder, auto_mask=True)
    assert lines == ["masks: used for 2 of 2 pictures"] and cut == [(16, 16)]
    np.testing.assert_array_equal(pictures.masks[0], mask)
    np.testing.assert_array_equal(pictures.masks[1], 255 - mask)
