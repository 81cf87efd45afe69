"""Do masks keep a background out of a word? The dev people before one loud background, in all four pictures.

    python benchmarks/cluttered.py                          # all dev people
    python benchmarks/cluttered.py --people ana --ways masked
    python benchmarks/cluttered.py --table                  # the table of all results so far

The people are cut out of their pictures, whose backgrounds the recipe can draw again, and set before the same one. A
word is learned with ti_jax's defaults from the pictures as they were ("ordinary"), from the new ones without masks
("cluttered"), and with them ("masked"). It is measured as in benchmarks/learning.py: *background* is the share of the
backgrounds that prompts ask for, and *identity* the share of the person that is right, as the judge sees them.

Every measurement is a line in --results and is not repeated.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from learning import CORES, ROOT, Bench, Person, people, read_results, scores
from PIL import Image, ImageDraw

import data  # isort: skip  (of the recipe: learning.py puts its folder on the path)
import world  # isort: skip

from ti_jax.machine import enable_compilation_cache

WAYS = ("ordinary", "cluttered", "masked")
# Largest distance, in any channel, of a pixel from the background that it is taken for.
NEAR = 12


def loud(side: int) -> np.ndarray:
    """Magenta and lime in squares, uint8 [side, side, 3]: no background that the model knows looks like it."""
    squares = np.add(*np.mgrid[:side, :side] // (side // 8)) % 2
    return np.where(squares[..., None], np.uint8([240, 20, 200]), np.uint8([150, 255, 40]))


def person_in(picture: np.ndarray) -> np.ndarray:
    """Which pixels of a picture uint8 [S, S, 3] are not its background, bool [S, S].

    The background is the one of the recipe's that is most like it near the upper corners; of its pixels, those that are
    connected with the border.
    """
    side = len(picture)
    corners = np.zeros((side, side), bool)
    corners[: side // 8] = corners[: side // 2, : side // 8] = corners[: side // 2, -side // 8 :] = True
    drawn = [
        data.background_pixels(colour, pattern, side).astype(int)
        for colour in world.BACKGROUNDS
        for pattern in world.PATTERNS
    ]
    distances = [np.abs(picture - each).max(axis=-1) for each in drawn]
    best = min(distances, key=lambda distance: distance[corners].mean())
    # A border all around is filled from a corner: what is left are areas that the person encloses, or is.
    area = Image.fromarray(
        np.pad(np.where(best < NEAR, 255, 0).astype(np.uint8), 1, constant_values=255)
    ).copy()  # or it is read-only
    ImageDraw.floodfill(area, (0, 0), 128)
    return np.asarray(area)[1:-1, 1:-1] != 128


def write_cluttered(person: Person, folder: Path, masked: bool) -> None:
    """Write the person's pictures before the loud background, and if asked for their masks."""
    for path in sorted(person.folder.glob("*.png")):
        picture = np.asarray(Image.open(path).convert("RGB"))
        inside = person_in(picture)
        Image.fromarray(np.where(inside[..., None], picture, loud(len(picture)))).save(folder / path.name)
        if masked:
            Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)).save(folder / f"{path.stem}.mask.png")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", nargs="+", default=None, help="only these of the dev people")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="what to measure")
    parser.add_argument("--results", type=Path, default=ROOT / ".work" / "cluttered.jsonl", help="where lines are kept")
    parser.add_argument("--table", action="store_true", help="measure nothing; print the table")
    arguments = parser.parse_args()
    enable_compilation_cache()
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    everyone = people("dev")
    bench = Bench(arguments.results.parent / "cluttered-strips", everyone)
    bench.strips.mkdir(exist_ok=True)
    lines = read_results(arguments.results)
    done = {(line["person"], line["way"]) for line in lines}
    for person in [] if arguments.table else everyone:
        for way in arguments.ways:
            if (person.name, way) in done or person.name not in (arguments.people or [person.name]):
                continue
            with TemporaryDirectory() as folder:
                shown = person
                if way != "ordinary":
                    write_cluttered(person, Path(folder), way == "masked")
                    shown = replace(person, folder=Path(folder))
                drawn, figures = bench.pictures("ours", shown, 0, {})
            Image.fromarray(np.concatenate(list(drawn[::4]), axis=1)).save(bench.strips / f"{person.name}-{way}.png")
            readings = bench.judge.read(drawn)
            line = {
                "person": person.name,
                "way": way,
                "method": "ours",
                "cores": CORES,
                **figures,
                "readings": readings,
            }
            lines.append(line)
            with arguments.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            found = scores(line, person.truth, bench.judge)
            print(f"{person.name} {way}: background {found['editability/background']:.2f}, identity "
                  f"{found['identity']:.2f}", flush=True)  # fmt: skip
    truth = {person.name: person.truth for person in everyone}
    print("\n| pictures | people | background | editability | identity |\n|---|---|---|---|---|")
    for way in WAYS:
        found = [scores(line, truth[line["person"]], bench.judge) for line in lines if line["way"] == way]
        if found:
            names = ("editability/background", "editability", "identity")
            print(
                f"| {way} | {len(found)} | "
                + " | ".join(f"{np.mean([each[n] for each in found]):.2f}" for n in names)
                + " |"
            )


if __name__ == "__main__":
    main()
