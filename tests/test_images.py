import numpy as np
import pytest
from PIL import Image, ImageFont

import ti_jax
from ti_jax.errors import InputError
from ti_jax.images import MIN_CELL, grid, overview, parameters_text, save_png

PARAMETERS = {
    "prompt": "a portrait of <cleo>, wearing a red jacket",
    "negative_prompt": "blurry: very",
    "num_inference_steps": 25,
    "scheduler": "dpm++",
    "guidance_scale": 7.5,
    "seed": 4,
    "model": 'my, "own": model',
}


def solid(color, size=(64, 64)):
    return Image.new("RGB", size, color)


# -- files


def test_parameters_are_as_automatic1111_writes_them(tmp_path):
    save_png(tmp_path / "a.png", solid("red", (64, 48)), PARAMETERS)
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and image.size == (64, 48) and image.getpixel((3, 3)) == (255, 0, 0)
        assert image.info == {
            "parameters": "a portrait of <cleo>, wearing a red jacket\n"
            "Negative prompt: blurry: very\n"
            "Steps: 25, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 4, Size: 64x48, "
            r'Model: "my, \"own\": model", '
            f"Version: ti_jax {ti_jax.__version__}"
        }


def text_of(path):
    with Image.open(path) as image:
        return image.info["parameters"]


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        (
            {"prompt": "two\nlines of ein Mädchen, 日本", "seed": 0, "num_inference_steps": 1},
            "two\nlines of ein Mädchen, 日本\nSteps: 1, Seed: 0, Size: 64x64, ",
        ),
        ({"prompt": "a", "scheduler": "euler_a", "negative_prompt": "b\nc"},
         "a\nNegative prompt: b\nc\nSampler: Euler a, Size: 64x64, "),
        ({"prompt": "Steps: 20, of a stair", "model": " spaced "},
         'Steps: 20, of a stair\nSize: 64x64, Model: " spaced ", '),
        ({"prompt": "caf\udce9", "model": "/tmp/caf\udce9/m"},  # from a command line that is not UTF-8
         "caf\\udce9\nSize: 64x64, Model: /tmp/caf\\udce9/m, "),
        ({}, "Size: 64x64, "),
    ],
    ids=["lines", "negative", "spaces", "not UTF-8", "nothing"],
)  # fmt: skip
def test_parameters_of_any_kind(tmp_path, parameters, text):
    save_png(tmp_path / "a.png", solid("red"), parameters)
    assert text_of(tmp_path / "a.png") == f"{text}Version: ti_jax {ti_jax.__version__}"
    save_png(tmp_path / "a.png", solid("red"), text)  # a text is written as it is
    assert text_of(tmp_path / "a.png") == text


def test_other_settings_stand_before_the_version():
    text = parameters_text({"prompt": "p", "step": 100, "seed": 1, "base_model": "x"})
    assert text == f"p\nSeed: 1, Step: 100, Base model: x, Version: ti_jax {ti_jax.__version__}"


def test_clip_skip_is_told_as_automatic1111_counts_it():
    text = parameters_text({"prompt": "p", "clip_skip": 1, "model": "m"})
    assert text == f"p\nModel: m, Clip skip: 2, Version: ti_jax {ti_jax.__version__}"
    assert "skip" not in parameters_text({"prompt": "p", "clip_skip": 0})


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        save_png(tmp_path / "missing" / "a.png", solid("red"), {})


def test_a_picture_that_cannot_be_encoded_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.png"
    save_png(path, solid("red"), {"prompt": "old"})
    before = path.read_bytes()
    with pytest.raises(OSError, match="cannot write mode CMYK as PNG"):
        save_png(path, Image.new("CMYK", (8, 8)), {"prompt": "new"})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


# -- pictures of pictures


def places(sheet, color):
    """Bounding box (left, top, right, bottom) of the pixels of a colour."""
    rows, columns = np.nonzero((np.asarray(sheet) == color).all(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255), (0, 255, 255)]


def test_a_grid_keeps_sizes():
    sheet = grid([solid(color, (40, 30)) for color in COLORS], columns=3)
    assert sheet.size == (120, 60)
    for number, color in enumerate(COLORS):
        left, top = number % 3 * 40, number // 3 * 30
        assert places(sheet, color) == (left, top, left + 40, top + 30)
    assert sheet.getpixel((119, 59)) == (255, 255, 255)


def test_grid_fits_pictures_of_other_sizes_in():
    sheet = grid([solid("red", (40, 40)), solid("lime", (20, 10)).convert("P")], columns=2)
    assert sheet.size == (80, 40) and places(sheet, (0, 255, 0)) == (40, 10, 80, 30)


TINTS = [(255, 140, 20 * i) for i in range(7)]  # none of them a shade of the text's


def ink(sheet):
    """Where the page is dark: the text on it."""
    return np.asarray(sheet.convert("L")) < 60


def test_overview_shows_every_row_under_its_caption():
    rows = [
        ("the pictures of <cleo>", [solid(c) for c in TINTS[:3]]),
        ("a portrait of a person", [solid(c) for c in TINTS[3:5]]),
        ("a prompt that is much too long for one line of this page, " * 3, [solid(c) for c in TINTS[5:]]),
    ]
    page = overview(rows)
    boxes = [places(page, color) for color in TINTS]
    assert all((right - left, bottom - top) == (128, 128) for left, top, right, bottom in boxes)
    tops = [top for _, top, _, _ in boxes]
    assert tops[0] == tops[1] == tops[2] < tops[3] == tops[4] < tops[5] == tops[6]
    above = [ink(page)[start:end].any(axis=1) for start, end in [(0, tops[0]), (tops[0], tops[3]), (tops[3], tops[5])]]
    heights = [int(rows_of_text.sum()) for rows_of_text in above]
    assert 8 < heights[0] < 20 and 8 < heights[1] < 20 and heights[2] > 2 * heights[0]
    margin = boxes[0][0]
    assert not ink(page)[:, page.width - margin :].any() and not ink(page)[:, :margin].any()


@pytest.mark.parametrize(("side", "cell"), [(32, 128), (64, 128), (96, 192), (256, 256), (512, 512), (1024, 512)])
def test_cells_are_neither_too_small_nor_too_large(side, cell):
    page = overview([("caption", [solid("red", (side, side))])])
    left, top, right, bottom = places(page, (255, 0, 0))
    assert (right - left, bottom - top) == (cell, cell)


def test_the_font_grows_with_the_cells():
    small, large = (overview([("caption", [solid("red", (side, side))])]) for side in (64, 512))
    heights = [ink(page).any(axis=1).sum() for page in (small, large)]
    assert heights[1] > 1.8 * heights[0]
    assert ImageFont.load_default(14).getlength("a portrait of a person on a beach") < 2 * MIN_CELL


@pytest.mark.parametrize("make", [lambda: grid([], 2), lambda: overview([("a", [])]), lambda: grid([solid("red")], 0)])
def test_nothing_to_show_is_a_fault(make):
    with pytest.raises(ValueError, match="needs a picture"):
        make()
