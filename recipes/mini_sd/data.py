"""Pictures with exact captions: scenes -> SVG (DiceBear, in Node) -> 64 x 64 pixels (resvg) on a background.

Everything is determined by the seed. The result is a folder of arrays, which the later stages memory-map::

    scenes.jsonl   one scene a line
    pixels.npy     uint8 [N, 64, 64, 3]
    labels.npy     int8 [N, attributes], see `world.Scene.labels`
    group.npy      int16 [N]: split and person of a picture; see `Group`
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import resvg_py
import world
from PIL import Image

HERE = Path(__file__).parent
SIDE = 64

# Groups: people with a code token are 0, 1, 2, ...; others are negative.
RANDOM, VALIDATION, STYLED, UNSEEN_STYLE = -1, -2, -3, -4
DEV_PEOPLE, TEST_PEOPLE = 10_000, 20_000  # + index of the person

# The eight people for choosing settings; six of them are the demo's concepts.
DEV = {
    "ana": ("long hair", "red", "brown", "no beard", "round nose"),
    "ben": ("sideburns", "blond", "dark", "no beard", "round nose"),
    "cleo": ("pigtails", "black", "brown", "no beard", "wrinkles"),
    "dov": ("undercut bun", "black", "tan", "no beard", "round nose"),
    "eva": ("curly hair", "brown", "brown", "no beard", "round nose"),
    "finn": ("undercut bun", "orange", "brown", "no beard", "round nose"),
    "gus": ("beanie", "orange", "light", "walrus moustache", "wrinkles"),
    "hana": ("bob hair", "white", "tan", "no beard", "wrinkles"),
}


@dataclass(frozen=True)
class DataConfig:
    """Numbers of pictures."""

    seed: int = 0
    random_pictures: int = 22_000
    people: int = 512  # each with a code token
    pictures_a_person: int = 20
    styled_pictures: int = 4_000  # of each trained style besides the main one
    validation_pictures: int = 1_500
    unseen_style_pictures: int = 300
    test_people: int = 16
    pictures_a_held_out_person: int = 24


def held_out_people(config: DataConfig) -> dict[str, tuple[str | None, ...]]:
    """The 8 dev people and the test people by name; all are different."""
    rng = np.random.default_rng([config.seed, 1])
    people = dict(DEV)
    while len(people) < len(DEV) + config.test_people:
        person = world.draw_person(rng)
        if person[1] is not None and person not in people.values():
            people[f"test{len(people) - len(DEV):02d}"] = person
    return people


def draw_scenes(config: DataConfig) -> tuple[list[world.Scene], np.ndarray]:
    """All scenes and their groups. No picture outside the held-out groups shows a held-out person."""
    rng = np.random.default_rng([config.seed, 0])
    held_out = held_out_people(config)
    forbidden = set(held_out.values())
    scenes: list[world.Scene] = []
    groups: list[int] = []

    def allowed_person() -> tuple[str | None, ...]:
        while (person := world.draw_person(rng)) in forbidden:
            pass
        return person

    def add(scene: world.Scene, group: int) -> None:
        scenes.append(scene)
        groups.append(group)

    for _ in range(config.random_pictures):
        add(world.persona_scene(rng, allowed_person()), RANDOM)
    for who in range(config.people):
        person = allowed_person()
        for _ in range(config.pictures_a_person):
            add(world.persona_scene(rng, person), who)
    for style in world.TRAINED_STYLES[1:]:
        for _ in range(config.styled_pictures):
            add(world.styled_scene(rng, style), STYLED)
    for _ in range(config.validation_pictures):
        add(world.persona_scene(rng, allowed_person()), VALIDATION)
    for _ in range(config.unseen_style_pictures):
        add(world.styled_scene(rng, world.HELD_OUT_STYLE), UNSEEN_STYLE)
    for who, (name, person) in enumerate(held_out.items()):
        base = DEV_PEOPLE + who if name in DEV else TEST_PEOPLE + who - len(DEV)
        for _ in range(config.pictures_a_held_out_person):
            add(world.persona_scene(rng, person), base)
    return scenes, np.array(groups, np.int16)


def background_pixels(colour: str, pattern: str, side: int) -> np.ndarray:
    """uint8 [side, side, 3]: one colour, or stripes or dots of a lighter one, an eighth of the side apart."""
    base = np.array(world.BACKGROUNDS[colour], np.float32)
    # There is nothing lighter than white.
    second = base * 0.82 if colour == "white" else base + (255 - base) * 0.45
    rows, columns = np.indices((side, side), np.float32) * (64 / side)
    if pattern == "striped":
        mask = (columns // 8) % 2
    elif pattern == "dotted":
        mask = np.hypot(rows % 16 - 7.5, columns % 16 - 7.5) < 4
    else:
        mask = np.zeros((side, side))
    return (base + mask[..., None] * (second - base)).round().astype(np.uint8)


def rasterise(svg: str, scene: world.Scene, side: int = SIDE) -> np.ndarray:
    """uint8 [side, side, 3]: the avatar on the scene's background."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True))
    avatar = Image.open(io.BytesIO(png)).convert("RGBA")
    picture = Image.fromarray(background_pixels(scene.background, scene.pattern, side)).convert("RGBA")
    picture.alpha_composite(avatar)
    return np.asarray(picture.convert("RGB"))


def render(scenes: list[world.Scene], work: Path, side: int = SIDE) -> np.ndarray:
    """Pictures uint8 [N, side, side, 3], rendered on all cores."""
    svgs = run_node(scenes, work)
    with ProcessPoolExecutor() as pool:
        pictures = pool.map(rasterise, svgs, scenes, [side] * len(scenes), chunksize=256)
        return np.stack(list(pictures))


def run_node(scenes: list[world.Scene], work: Path) -> list[str]:
    """SVGs of the scenes, from the pinned npm packages (installed into `work` by the first call)."""
    if shutil.which("npm") is None:
        raise SystemExit("data: Node is needed to draw the avatars (apt-get install npm)")
    if not (work / "node_modules").exists():
        work.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, work / name)
        subprocess.run(["npm", "ci", "--silent", "--no-audit", "--no-fund"], cwd=work, check=True)
    shutil.copy(HERE / "render.mjs", work / "render.mjs")
    lines = "".join(
        json.dumps({"style": world.STYLES[scene.style], "options": world.avatar_options(scene)}) + "\n"
        for scene in scenes
    )
    done = subprocess.run(["node", "render.mjs"], cwd=work, input=lines, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def load_scenes(folder: Path) -> list[world.Scene]:
    """The scenes of a rendered folder."""
    return [world.Scene(**json.loads(line)) for line in (folder / "scenes.jsonl").read_text().splitlines()]


def make_data(config: DataConfig, work: Path) -> Path:
    """Render everything into ``<work>/data`` unless it exists; returns the folder."""
    folder = work / "data"
    if (folder / "pixels.npy").exists():
        return folder
    scenes, groups = draw_scenes(config)
    pixels = render(scenes, work / "node")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scenes.jsonl").write_text("".join(json.dumps(asdict(scene)) + "\n" for scene in scenes))
    np.save(folder / "labels.npy", np.array([scene.labels() for scene in scenes], np.int8))
    np.save(folder / "group.npy", groups)
    # Last: if it exists, the folder is complete.
    np.save(folder / "pixels.tmp.npy", pixels)
    (folder / "pixels.tmp.npy").rename(folder / "pixels.npy")
    return folder
