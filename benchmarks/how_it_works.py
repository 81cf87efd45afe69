"""The figures of docs/how-it-works.md, from words learned on the embedded model.

    python benchmarks/how_it_works.py                  # nine words, then docs/how-it-works/*; about four minutes
    python benchmarks/how_it_works.py --steps 10       # the same in small

Learned are the words of the six people of the package, Cleo's once more from another seed, and from two of her four
pictures each. A word that is learned is kept in --work and not learned again.

    map.svg       the words of the vocabulary and the new ones, on the two axes along which they differ most
    cosine.svg    the cosine of each new word with what it becomes, along its training
    length.svg    its norm
    words.png     one of each person's pictures, and the same prompt from the same noise with each word

The cosines between the words of one person and of different people are printed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pygal
from PIL import Image
from pygal.style import Style

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes" / "mini_sd")]

import world  # noqa: E402

from ti_jax import Embedding, StableDiffusion, TrainConfig, train  # noqa: E402
from ti_jax.config import resolve  # noqa: E402
from ti_jax.config.defaults import ASSETS  # noqa: E402
from ti_jax.embeddings.inspect import Vocabulary  # noqa: E402
from ti_jax.machine import enable_compilation_cache  # noqa: E402
from ti_jax.training.curves import COLOURS, draw  # noqa: E402
from ti_jax.training.run_folder import copy_name  # noqa: E402

PEOPLE = ("ana", "ben", "cleo", "dov", "eva", "finn")
ENCODER = "text_encoder"
PROMPT = "a portrait of {} wearing a red jacket on a turquoise background"
SIDE = 128  # of a picture in words.png
COPIES = 10  # updates between two kept copies of a row
GREY = "#808080"  # to be read on white and on black
# A row along its training: by step, float32 [D].
Track = Mapping[int, np.ndarray]


def pictures(work: Path, person: str, which: slice) -> Path:
    """A folder with these of the person's pictures."""
    folder = work / f"{person}-{which.start}-{which.stop}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for picture in sorted((ASSETS / "concepts" / person).glob("*.png"))[which]:
        shutil.copy(picture, folder)
    return folder


def learn(work: Path, name: str, person: str, steps: int | None, *, which: slice = slice(0, 4), seed: int = 0) -> Track:
    """The row along its training, which is done unless its result is there."""
    config = TrainConfig(
        train_data_dir=str(pictures(work / "pictures", person, which)), placeholder_token=f"<{person}>", seed=seed,
        output_dir=str(work / name), max_train_steps=steps, save_steps=COPIES, report_to="none",
    )  # fmt: skip
    last = resolve(config).max_train_steps
    if not (work / name / "learned_embeds.safetensors").exists():
        train(config)
    files = {step: work / name / copy_name(step) for step in range(COPIES, last, COPIES)}
    files[last] = work / name / "learned_embeds.safetensors"
    return {step: Embedding.load(path).vectors[ENCODER][0] for step, path in files.items()}


def start_row(vocabulary: Vocabulary) -> np.ndarray:
    """Where every word starts from by default: the mean of the rows of the initializer's words, float32 [D]."""
    words = str(resolve(TrainConfig()).initializer_token).split()
    return np.mean([vocabulary.table[vocabulary.words.index(word)] for word in words], axis=0)


def known_words(vocabulary: Vocabulary) -> Vocabulary:
    """Those that captions have; the tokenizer has letters and syllables, too."""
    chosen = [number for number, word in enumerate(vocabulary.words) if word in world.vocabulary()]
    return replace(vocabulary, words=[vocabulary.words[number] for number in chosen], table=vocabulary.table[chosen])


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Of two rows [D]."""
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def fixed_colours(svg: str) -> str:
    """An SVG for a page of its own, where the report's CSS variables are unknown."""
    return svg.replace("var(--ink)", GREY).replace("var(--line)", f"{GREY}44")


def map_of(vocabulary: Vocabulary, tracks: Mapping[str, Track], start: np.ndarray) -> str:
    """SVG: all words on the first two principal components of the vocabulary with the new words, and each one's way."""
    ends = {name: track[max(track)] for name, track in tracks.items()}
    everything = np.concatenate([vocabulary.table, np.stack(list(ends.values()))])
    middle = everything.mean(axis=0)
    _, _, axes = np.linalg.svd(everything - middle, full_matrices=False)

    def place(row: np.ndarray) -> tuple[float, float]:
        x, y = (row - middle) @ axes[:2].T
        return float(x), float(y)

    style = Style(
        background="transparent", plot_background="transparent", foreground=GREY, foreground_strong=GREY,
        foreground_subtle=f"{GREY}44", guide_stroke_color=f"{GREY}22", major_guide_stroke_color=f"{GREY}22",
        value_colors=(GREY, *COLOURS[: len(tracks)]),
        value_label_font_size=11, label_font_size=12, legend_font_size=14, transition="0s", opacity="1",
        colors=(GREY, *COLOURS[: len(tracks)]), font_family="sans-serif",
    )  # fmt: skip
    chart = pygal.XY(
        style=style, width=1000, height=700, js=[], print_labels=True, show_x_labels=False, show_y_labels=False,
        dots_size=2, legend_at_bottom=True, legend_at_bottom_columns=7, disable_xml_declaration=True,
    )  # fmt: skip
    words = [{"value": place(row), "label": word} for word, row in zip(vocabulary.words, vocabulary.table, strict=True)]
    chart.add("the vocabulary", words, stroke=False)
    for name, track in tracks.items():
        way = [place(row) for row in (start, *track.values())]
        chart.add(f"<{name}>", [*way[:-1], {"value": way[-1], "label": f"<{name}>", "node": {"r": 7}}], dots_size=1.5)
    return chart.render(is_unicode=True)


def sheet(sd: StableDiffusion, words: Mapping[str, Embedding]) -> Image.Image:
    """One of each person's pictures above the same prompt, from the same noise, with each word."""
    given = [Image.open(sorted((ASSETS / "concepts" / name).glob("*.png"))[0]).convert("RGB") for name in words]
    prompts = [PROMPT.format(f"<{name}>") for name in words]
    drawn = sd.generate(prompts, list(words.values()), guidance_scale=3.0, seed=[1] * len(words))
    whole = Image.new("RGB", (SIDE * len(words), 2 * SIDE + 8), "white")
    for row, line in enumerate((given, drawn)):
        for column, picture in enumerate(line):
            large = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            whole.paste(large, (column * SIDE, row * (SIDE + 8)))
    return whole


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=None, help="updates of each word; left out: the model's default")
    parser.add_argument("--work", type=Path, default=ROOT / ".work" / "how-it-works", help="where words are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "how-it-works", help="where the figures go")
    arguments = parser.parse_args()
    enable_compilation_cache()

    tracks = {name: learn(arguments.work, name, name, arguments.steps) for name in PEOPLE}
    again = {
        "another seed": learn(arguments.work, "cleo-seed1", "cleo", arguments.steps, seed=1),
        "pictures 1 and 2": learn(arguments.work, "cleo-first", "cleo", arguments.steps, which=slice(0, 2)),
        "pictures 3 and 4": learn(arguments.work, "cleo-second", "cleo", arguments.steps, which=slice(2, 4)),
    }
    sd = StableDiffusion.from_pretrained()
    vocabulary = known_words(sd.text.vocabulary(ENCODER))
    start = start_row(vocabulary)
    ends = {name: track[max(track)] for name, track in tracks.items()}
    whole = {f"<{name}>": {0: start, **track} for name, track in tracks.items()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "map.svg").write_text(map_of(vocabulary, tracks, start))
    for file, of in (
        ("cosine.svg", cosine),
        ("length.svg", lambda row, end: float(np.linalg.norm(row))),
    ):
        curves = {
            name: [(float(step), of(row, track[max(track)])) for step, row in track.items()]
            for name, track in whole.items()
        }
        (arguments.out / file).write_text(fixed_colours(draw(curves).svg))
    words = {name: Embedding(f"<{name}>", {ENCODER: row[None]}) for name, row in ends.items()}
    small = sheet(sd, words).quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
    small.save(arguments.out / "words.png", optimize=True)

    for name, track in again.items():
        print(f"cleo, {name}: cosine {cosine(ends['cleo'], track[max(track)]):.2f} with the word of all four")
    print(f"pictures 1 and 2 with 3 and 4: {cosine(*(list(again[key].values())[-1] for key in list(again)[1:])):.2f}")
    others = [cosine(ends[one], ends[other]) for one in PEOPLE for other in PEOPLE if one < other]
    print(f"two people: mean {np.mean(others):.2f}, from {min(others):.2f} to {max(others):.2f}")
    print(f"norms: {', '.join(f'{name} {np.linalg.norm(row):.2f}' for name, row in ends.items())}; ", end="")
    print(f"of the vocabulary's words: {np.median(vocabulary.lengths):.2f}; of the start: {np.linalg.norm(start):.2f}")


if __name__ == "__main__":
    main()
