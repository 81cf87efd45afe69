"""The held-out people and style: folders of pictures to learn a word from, and their true attributes."""

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
    for who, (name, person) in enumerate(data.held_out_people(config).items()):
        dev = name in data.DEV
        number = data.DEV_PEOPLE + who if dev else data.TEST_PEOPLE + who - len(data.DEV)
        _write_pictures(pixels[np.flatnonzero(group == number)[:PICTURES]], folder / name)
        truth[name] = {"split": "dev" if dev else "test", **dict(zip(world.IDENTITY, person, strict=True))}
    style = world.HELD_OUT_STYLE
    _write_pictures(pixels[np.flatnonzero(group == data.UNSEEN_STYLE)[:PICTURES]], folder / style)
    truth[style] = {"split": "style", "style": style}
    (folder / FILE).write_text(json.dumps(truth, indent=2) + "\n")


def _write_pictures(pictures: np.ndarray, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index}.png", optimize=True)
