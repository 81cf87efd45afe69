"""Do masks keep a background out of a word? The dev people before one loud background, in all four pictures.

    python benchmarks/cluttered.py                          # all dev people
    python benchmarks/cluttered.py --people ana --ways masked --behind stripes
    python benchmarks/cluttered.py --set max_train_steps=240      # four times the default
    python benchmarks/cluttered.py --set num_vectors=4 "initializer_token=person on a background"
    python benchmarks/cluttered.py --table                  # the table of all results so far, with standard errors

The people are cut out of their pictures, whose backgrounds the recipe can draw again, and set before the same one. A
word is learned with ti_jax's defaults from the pictures as they were ("ordinary"), from the new ones without masks
("cluttered"), and with them ("masked"). It is measured as in benchmarks/learning.py: *asked* is the share of the
backgrounds that prompts ask for, and *identity* the share of the person that is right, as the judge sees them.
*Unasked* is the share of pictures that have the loud background where the prompt names none.

Every measurement is a line in --results and is not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from learning import CORES, IMAGES_A_PROBE, ROOT, Bench, Person, given_changes, label, people, read_results, scores
from PIL import Image, ImageDraw

import data  # isort: skip  (of the recipe: learning.py puts its folder on the path)
import world  # isort: skip

from ti_jax.evaluation.avatar_judge import Judge
from ti_jax.machine import enable_compilation_cache

FIGURES = ("asked", "unasked", "editability", "identity")
WAYS = ("ordinary", "cluttered", "masked")
# Largest distance, in any channel, of a pixel from the background that it is taken for.
NEAR = 12


def squares(side: int) -> np.ndarray:
    """Magenta and lime in squares, uint8 [side, side, 3]: no background that the model knows looks like it."""
    odd = np.add(*np.mgrid[:side, :side] // (side // 8)) % 2
    return np.where(odd[..., None], np.uint8([240, 20, 200]), np.uint8([150, 255, 40]))


def stripes(side: int) -> np.ndarray:
    """Orange stripes, uint8 [side, side, 3], which the model draws where a prompt asks for them."""
    return data.background_pixels("orange", "striped", side)


def violet(side: int) -> np.ndarray:
    """The background of the neon palette, uint8 [side, side, 3], for which captions have no word of its own."""
    return data.background_pixels(None, "plain", side, "neon")


BEHIND = {"squares": squares, "stripes": stripes, "violet": violet}


def corners(side: int) -> np.ndarray:
    """Where every picture shows its background, bool [side, side]: the top, and the sides above the shoulders."""
    area = np.zeros((side, side), bool)
    area[: side // 8] = area[: side // 2, : side // 8] = area[: side // 2, -side // 8 :] = True
    return area


def every_background(side: int) -> list[np.ndarray]:
    """All backgrounds that the recipe draws natural pictures on, uint8 [side, side, 3] each."""
    return [data.background_pixels(colour, pattern, side) for colour in world.BACKGROUNDS for pattern in world.PATTERNS]


def shows(pictures: np.ndarray, behind: str) -> list[bool]:
    """Which of the pictures uint8 [N, S, S, 3] have a background that is nearer to `behind` than to any other."""
    side = pictures.shape[1]
    area, loud = corners(side), BEHIND[behind](side)
    others = [each for each in every_background(side) if (each != loud).any()]
    distances = [np.abs(pictures - each.astype(int))[:, area].mean(axis=(1, 2)) for each in (loud, *others)]
    return [bool(nearest == 0) for nearest in np.argmin(distances, axis=0)]


def person_in(picture: np.ndarray) -> np.ndarray:
    """Which pixels of a picture uint8 [S, S, 3] are not its background, bool [S, S].

    The background is the one of the recipe's that is most like it near the upper corners; of its pixels, those that are
    connected with the border.
    """
    side = len(picture)
    distances = [np.abs(picture - each.astype(int)).max(axis=-1) for each in every_background(side)]
    best = min(distances, key=lambda distance: distance[corners(side)].mean())
    # A border all around is filled from a corner: what is left are areas that the person encloses, or is.
    area = Image.fromarray(
        np.pad(np.where(best < NEAR, 255, 0).astype(np.uint8), 1, constant_values=255)
    ).copy()  # or it is read-only
    ImageDraw.floodfill(area, (0, 0), 128)
    return np.asarray(area)[1:-1, 1:-1] != 128


def write_cluttered(person: Person, folder: Path, behind: str, masked: bool) -> None:
    """Write the person's pictures before the background `behind`, and if asked for their masks."""
    for path in sorted(person.folder.glob("*.png")):
        picture = np.asarray(Image.open(path).convert("RGB"))
        inside = person_in(picture)
        Image.fromarray(np.where(inside[..., None], picture, BEHIND[behind](len(picture)))).save(folder / path.name)
        if masked:
            Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)).save(folder / f"{path.stem}.mask.png")


def figures_of(line: Mapping[str, Any], truth: Mapping[str, str], judge: Judge, behind: str) -> dict[str, float]:
    """The `FIGURES` of a line of the results; `behind` is the loud background of which *unasked* speaks."""
    found = scores(line, truth, judge)
    silent = [
        shown
        for number, shown in enumerate(line["shows"][behind])
        if "background" not in dict(judge.config.probes[number // IMAGES_A_PROBE].expects)
    ]
    values = found["editability/background"], float(np.mean(silent)), found["editability"], found["identity"]
    return dict(zip(FIGURES, values, strict=True))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", nargs="+", default=None, help="only these of the dev people")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="what to measure")
    parser.add_argument("--behind", choices=tuple(BEHIND), default="violet", help="the background of all four pictures")
    parser.add_argument("--results", type=Path, default=ROOT / ".work" / "cluttered.jsonl", help="where lines are kept")
    parser.add_argument("--table", action="store_true", help="measure nothing; print the table")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings other than the defaults")
    arguments = parser.parse_args()
    changes = given_changes(arguments.set)
    enable_compilation_cache()
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    everyone = people("dev")
    bench = Bench(arguments.results.parent / "cluttered-strips", everyone)
    bench.strips.mkdir(exist_ok=True)
    lines = read_results(arguments.results)
    done = [(line["person"], line["way"], line["behind"], line["changes"]) for line in lines]
    for person in [] if arguments.table else everyone:
        for way in arguments.ways:
            behind = arguments.behind if way != "ordinary" else ""
            if (person.name, way, behind, changes) in done or person.name not in (arguments.people or [person.name]):
                continue
            with TemporaryDirectory() as folder:
                shown = person
                if way != "ordinary":
                    write_cluttered(person, Path(folder), behind, way == "masked")
                    # Of another name: the bench keeps words by name.
                    shown = replace(person, name=f"{person.name}-{way}-{behind}", folder=Path(folder))
                drawn, figures = bench.pictures("ours", shown, 0, changes)
            Image.fromarray(np.concatenate(list(drawn[::4]), axis=1)).save(
                bench.strips / f"{person.name}-{way}{behind}.png"
            )
            readings = bench.judge.read(drawn)
            line = {
                "person": person.name,
                "way": way,
                "behind": behind,
                "changes": changes,
                "method": "ours",
                "cores": CORES,
                **figures,
                "shows": {name: shows(drawn, name) for name in BEHIND},
                "readings": readings,
            }
            lines.append(line)
            with arguments.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            found = figures_of(line, person.truth, bench.judge, arguments.behind)
            print(f"{person.name} {way} {behind}: " + ", ".join(f"{n} {v:.2f}" for n, v in found.items()), flush=True)
    truth = {person.name: person.truth for person in everyone}
    print(f"\n| pictures | before | settings | people | {' | '.join(FIGURES)} |\n{'|---' * (4 + len(FIGURES))}|")
    groups: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for line in lines:
        found = figures_of(line, truth[line["person"]], bench.judge, line["behind"] or arguments.behind)
        groups.setdefault((line["way"], line["behind"], label(line)), []).append(found)
    for names, group in groups.items():
        means = (_mean([each[name] for each in group]) for name in FIGURES)
        print(f"| {' | '.join(names)} | {len(group)} | {' | '.join(means)} |")


def _mean(values: list[float]) -> str:
    """The mean and, of several, its standard error."""
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{error}"


if __name__ == "__main__":
    main()
