"""progress.png: a column for each validation prompt, a row for each validation, the same after a resume."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ti_jax.config import TrainConfig
from ti_jax.images import MAX_SHEET_CELL, prompt_of, save_png, sheet
from ti_jax.training.progress import MOST_ROWS, ProgressSheet, thinned
from ti_jax.training.validation import validation_paths

SIDE = 8
PROMPTS = ["a red <x>", "a drawing of <x>\non two lines"]


def concept_of(folder, prompts=PROMPTS):
    """What the sheet reads of a `Concept`."""
    return SimpleNamespace(config=TrainConfig(resolution=SIDE, seed=3), folder=folder, validation_prompts=prompts)


def colour(step, column):
    return (10 * step % 256, 100 * column + 50, 7 * step % 256)


def draw(folder, step, prompts=PROMPTS):
    """Leave the files of a validation of two pictures: one in the sheet's colour, one black."""
    paths = validation_paths(concept_of(folder, prompts), step)
    for column, (path, prompt) in enumerate(zip(paths, prompts, strict=True)):
        picture = Image.new("RGB", (2 * SIDE, SIDE))
        picture.paste(colour(step, column), (0, 0, SIDE, SIDE))
        save_png(path, picture, {"prompt": prompt, "negative_prompt": "blurry", "seed": 3, "step": step})


def cells(image, columns):
    """Colours of the sheet's cells by row: large single-coloured areas, left to right."""
    pixels, rows = np.asarray(image.convert("RGB")), []
    cell = 128  # `SIDE` enlarged to the least
    gap = (pixels.shape[1] - columns * cell) // (columns + 1)
    centres = [gap + column * (cell + gap) + cell // 2 for column in range(columns)]
    white, top = (255, 255, 255), 0
    while top + cell <= len(pixels):
        window = [pixels[top : top + cell, centre] for centre in centres]
        flat = [tuple(map(int, part[0])) if (part == part[0]).all() else white for part in window]
        if any(found != white for found in flat):
            rows.append(flat)
            top += cell
        else:
            top += 1
    return rows


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "samples").mkdir()
    return tmp_path


def test_prompts_go_across_and_steps_down(folder):
    grown = ProgressSheet(concept_of(folder))
    assert grown.save(0) is None and not (folder / "progress.png").exists()
    for step in (1, 2, 3):
        draw(folder, step)
        grown.save(step)
        with Image.open(folder / "progress.png") as image:
            assert cells(image, 2) == [[colour(row, column) for column in (0, 1)] for row in range(1, step + 1)]
            assert "Seed: 3" in image.text["parameters"]


def test_a_resumed_run_goes_on_with_the_rows_before_it(folder):
    """Later steps, that the run was stopped after, are drawn again before they are shown."""
    whole = ProgressSheet(concept_of(folder))
    for step in (1, 2, 3, 4):
        draw(folder, step)
        whole.save(step)
    uninterrupted = (folder / "progress.png").read_bytes()
    resumed = ProgressSheet(concept_of(folder))
    resumed.save(2)
    with Image.open(folder / "progress.png") as image:
        assert len(cells(image, 2)) == 2
    for step in (3, 4):
        draw(folder, step)
        resumed.save(step)
    assert (folder / "progress.png").read_bytes() == uninterrupted


def test_pictures_of_other_prompts_and_broken_ones_are_left_out(folder):
    draw(folder, 1, ["a blue <x>", PROMPTS[1]])
    draw(folder, 2)
    first, second = validation_paths(concept_of(folder), 2)
    first.write_bytes(second.read_bytes()[:60])
    draw(folder, 3)
    ProgressSheet(concept_of(folder)).save(3)
    white = (255, 255, 255)
    with Image.open(folder / "progress.png") as image:
        assert cells(image, 2) == [[white, colour(1, 1)], [white, colour(2, 1)], [colour(3, 0), colour(3, 1)]]


def test_one_prompt_has_the_file_without_a_number(folder):
    assert validation_paths(concept_of(folder, PROMPTS[:1]), 7) == [folder / "samples" / "step-000007.png"]
    draw(folder, 7, PROMPTS[:1])
    image = ProgressSheet(concept_of(folder, PROMPTS[:1])).save(7)
    assert cells(image, 1) == [[colour(7, 0)]]


@pytest.mark.parametrize("most", [2, 3, 24])
def test_a_long_run_has_few_rows_with_its_first_and_last(most):
    for count in range(1, 200):
        steps = list(range(10, 10 * count + 1, 10))
        kept = thinned(steps, most)
        assert len(kept) <= most and kept[0] == 10 and kept[-1] == steps[-1]
        assert kept == sorted(set(kept)) and set(kept) <= set(steps)
        assert count > most or kept == steps
        assert len(kept) >= min(count, most) / 2
        gaps = np.diff(kept[:-1])
        assert (gaps == gaps[:1]).all()
    assert thinned([], most) == []


def test_the_sheet_of_a_long_run_stays_small(folder):
    large = Image.new("RGB", (1024, 1024), (9, 9, 9))
    image = sheet(["a"] * 3, [(f"step {row}", [large, None, large]) for row in range(MOST_ROWS)])
    assert image.width < 4 * MAX_SHEET_CELL and image.height < 1.3 * MOST_ROWS * MAX_SHEET_CELL


@pytest.mark.parametrize("prompt", ["a <x>", "two\nlines", "ends in: a, Steps: 3", "x\nNegative: y"])
@pytest.mark.parametrize("negative", [None, "blurry\nugly"])
def test_a_pictures_file_tells_its_prompt(tmp_path, prompt, negative):
    save_png(tmp_path / "a.png", Image.new("RGB", (4, 4)), {"prompt": prompt, "negative_prompt": negative, "seed": 1})
    with Image.open(tmp_path / "a.png") as image:
        assert prompt_of(image) == prompt
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as image:
        assert prompt_of(image) is None
