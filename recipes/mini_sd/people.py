"""The held-out people and styles: folders of pictures to learn a word from, and their true attributes."""

from __future__ import annotations

import json
from pathlib import Path

import data
import numpy as np
import world
from PIL import Image

PICTURES = 4
FILE = "people.json"


def write_people(config: data.DataConfig, work: Path, folder: Path) -> None:
    """Write ``<folder>/<name>/0.png`` ... of each, and ``people.json``: name -> split and identity or style."""
    group = np.load(work / "data" / "group.npy")
    pixels = np.load(work / "data" / "pixels.npy", mmap_mode="r")
    truth = {}

    def write(name: str, number: int, split: str, facts: dict[str, str | None]) -> None:
        _write_pictures(pixels[np.flatnonzero(group == number)[:PICTURES]], folder / name)
        truth[name] = {"split": split, **facts}

    for name, number in data.held_out_groups(config).items():
        if number >= data.DEV_STYLES:
            style = data.held_out_styles(config)[name]
            split = "dev-style" if number < data.TEST_STYLES else "test-style"
            write(name, number, split, dict(zip(world.STYLE, style, strict=True)))
        else:
            person = data.held_out_scenes(config)[name][0].person
            split = "dev" if number < data.TEST_PEOPLE else "test"
            write(name, number, split, dict(zip(world.IDENTITY, person, strict=True)))
    (folder / FILE).write_text(json.dumps(truth, indent=2) + "\n")


def _write_pictures(pictures: np.ndarray, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index}.png", optimize=True)
