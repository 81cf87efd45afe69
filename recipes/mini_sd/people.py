"""The people whom no training shows, as folders of pictures to learn a word from, and what is true of them."""

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
    """Write ``<folder>/<name>/0.png`` ... of each person, and ``people.json``: name -> split and identity in words."""
    group = np.load(work / "data" / "group.npy")
    pixels = np.load(work / "data" / "pixels.npy", mmap_mode="r")
    truth = {}
    for who, (name, person) in enumerate(data.held_out_people(config).items()):
        dev = name in data.DEV
        number = data.DEV_PEOPLE + who if dev else data.TEST_PEOPLE + who - len(data.DEV)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(np.flatnonzero(group == number)[:PICTURES]):
            Image.fromarray(pixels[picture]).save(folder / name / f"{index}.png", optimize=True)
        truth[name] = {"split": "dev" if dev else "test", **dict(zip(world.IDENTITY, person, strict=True))}
    (folder / FILE).write_text(json.dumps(truth, indent=2) + "\n")
