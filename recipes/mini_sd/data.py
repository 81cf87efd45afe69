"""Pictures with exact captions: scenes -> SVG (DiceBear, in Node) -> 64 x 64 pixels (resvg) on a background.

Everything is determined by the seed. The result is a folder of arrays, which the later stages memory-map::

    scenes.jsonl   one scene a line
    pixels.npy     uint8 [N, 64, 64, 3]
    labels.npy     int8 [N, attributes], see `world.Scene.labels`
    group.npy      int16 [N]: split and person of a picture; see below
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
import styles
import world
from PIL import Image

HERE = Path(__file__).parent
PEOPLE = HERE / "people.json"
SIDE = 64

# Groups: people with a code token are 0, 1, 2, ...; others are negative.
RANDOM, VALIDATION, STYLED_VALIDATION = -1, -2, -3
# What no model is trained on, + index of the person or style.
HELD_OUT = DEV_PEOPLE = 10_000
TEST_PEOPLE, DEV_STYLES, TEST_STYLES = 20_000, 30_000, 31_000


@dataclass(frozen=True)
class DataConfig:
    """Numbers of pictures."""

    seed: int = 0
    random_pictures: int = 16_000
    people: int = 512  # each with a code token
    pictures_a_person: int = 20
    styled_pictures_a_person: int = 8
    styled_pictures: int = 14_000
    validation_pictures: int = 1_500
    styled_validation_pictures: int = 1_000
    test_people: int = 16
    test_styles: int = 12
    pictures_a_held_out_style: int = 24


def held_out_scenes(config: DataConfig) -> dict[str, list[world.Scene]]:
    """The 8 dev people and the test people by name; all are different. With them four scenes of each.

    They are in a file, not drawn from the seed, so that all versions of this world have the same ones.
    """
    everyone = {
        name: [world.Scene(**scene) for scene in scenes] for name, scenes in json.loads(PEOPLE.read_text()).items()
    }
    names = [name for name in everyone if not name.startswith("test")]
    return {name: everyone[name] for name in [*names, *(f"test{who:02d}" for who in range(config.test_people))]}


def held_out_styles(config: DataConfig) -> dict[str, tuple[str, ...]]:
    """The 4 dev styles and the test styles by name."""
    return styles.DEV | dict(list(styles.TEST.items())[: config.test_styles])


def held_out_groups(config: DataConfig) -> dict[str, int]:
    """The group of each person and style that is held out, by name."""
    splits = {DEV_PEOPLE: [], TEST_PEOPLE: [], DEV_STYLES: [], TEST_STYLES: []}
    for name in held_out_scenes(config):
        splits[TEST_PEOPLE if name.startswith("test") else DEV_PEOPLE].append(name)
    for name in held_out_styles(config):
        splits[DEV_STYLES if name in styles.DEV else TEST_STYLES].append(name)
    return {name: first + index for first, names in splits.items() for index, name in enumerate(names)}


def trained_styles(config: DataConfig) -> list[tuple[str, ...]]:
    """All styles but the natural one and those held out."""
    held_out = set(held_out_styles(config).values())
    return [style for style in styles.every_style() if style not in held_out]


def draw_scenes(config: DataConfig) -> tuple[list[world.Scene], np.ndarray]:
    """All scenes and their groups. No picture outside the held-out groups shows a held-out person or style."""
    rng = np.random.default_rng([config.seed, 0])
    held_out = held_out_scenes(config)
    forbidden = {scene.person for own in held_out.values() for scene in own}
    trained = trained_styles(config)
    scenes: list[world.Scene] = []
    groups: list[int] = []

    def allowed_person() -> tuple[str | None, ...]:
        while world.visible(person := world.draw_person(rng)) in forbidden:
            pass
        return person

    def style() -> tuple[str, ...]:
        return trained[int(rng.integers(len(trained)))]

    def add(scene: world.Scene, group: int) -> None:
        scenes.append(scene)
        groups.append(group)

    for _ in range(config.random_pictures):
        add(world.draw_scene(rng, allowed_person()), RANDOM)
    for who in range(config.people):
        person = allowed_person()
        for _ in range(config.pictures_a_person):
            add(world.draw_scene(rng, person), who)
        for _ in range(config.styled_pictures_a_person):
            add(world.draw_scene(rng, person, style()), who)
    for _ in range(config.styled_pictures):
        add(world.draw_scene(rng, allowed_person(), style()), RANDOM)
    for _ in range(config.validation_pictures):
        add(world.draw_scene(rng, allowed_person()), VALIDATION)
    for _ in range(config.styled_validation_pictures):
        add(world.draw_scene(rng, allowed_person(), style()), STYLED_VALIDATION)
    unseen = held_out_styles(config)
    for name, group in held_out_groups(config).items():
        if name in unseen:
            for _ in range(config.pictures_a_held_out_style):
                add(world.draw_scene(rng, allowed_person(), unseen[name]), group)
        else:
            for scene in held_out[name]:
                add(scene, group)
    return scenes, np.array(groups, np.int16)


def trained(groups: np.ndarray) -> np.ndarray:
    """Indices of the pictures that models are trained on."""
    return np.flatnonzero((groups < HELD_OUT) & (groups != VALIDATION) & (groups != STYLED_VALIDATION))


def background_pixels(colour: str | None, pattern: str, side: int, palette: str = "natural") -> np.ndarray:
    """uint8 [side, side, 3]: one colour, or stripes or dots of another one, an eighth of the side apart.

    Both are the palette's, unless it is the natural one.
    """
    if (own := styles.PALETTES[palette]) is not None:
        base, second = (np.array(styles.rgb(each), np.float32) for each in (own.background, own.pattern))
    else:
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
    """uint8 [side, side, 3]: the avatar on the scene's background, in its style."""
    svg = styles.restyle(svg, scene.palette, scene.outline, world.part_colours(scene))
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True))
    avatar = Image.open(io.BytesIO(png)).convert("RGBA")
    behind = background_pixels(scene.background, scene.pattern, side, scene.palette)
    picture = Image.fromarray(behind).convert("RGBA")
    picture.alpha_composite(avatar)
    return styles.light_and_frame(np.asarray(picture.convert("RGB")), scene.light, scene.frame)


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
        json.dumps({"style": "personas", "options": world.avatar_options(scene)}) + "\n" for scene in scenes
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
