"""The pictures of docs/lora.md: what each method changes, and what each draws.

python benchmarks/lora.py --people cleo                # measures, and keeps what it draws
python benchmarks/lora_page.py --people cleo           # docs/lora.png and docs/lora.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import drawsvg
import numpy as np
from learning import ROOT, Person, people, read_results
from lora import strips_of
from PIL import Image, ImageDraw, ImageFont
from torch_lora import numbers

from ti_jax.pipeline.model_description import open_model

SIDE, MARGIN, GAP = 64, 150, 6
LIMIT = 150_000  # bytes of the sheet
# Rows of the sheet: what is said of them, and the name of the strip.
ROWS = (
    ("a person", "plain"),
    ("true description", "described"),
    ("the word", "ours"),
    ("LoRA", "lora"),
    ("LoRA, text encoder too", "lora+text"),
    ("others, model as it is", "plain-others"),
    ("others, with the LoRA", "lora-others"),
    ("others, text encoder too", "lora+text-others"),
)
BLACK, GREY, WORD, LORA, TEXT = "#222222", "#eeeeee", "#d9822b", "#3b6fb6", "#4c9a6a"


def sheet(strips: Path, chosen: Sequence[Person], columns: int = 6) -> Image.Image:
    """For each person, the training pictures and a row for each strip that there is, with what it is."""
    rows: list[tuple[str, Image.Image | None]] = []
    for person in chosen:
        own = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(person.folder.glob("*.png"))]
        rows.append(("learned from", Image.fromarray(np.concatenate(own, axis=1))))
        for said, name in ROWS:
            path = strips / f"{person.name}-{name}.png"
            if path.exists():
                rows.append((said, Image.open(path).crop((0, 0, columns * SIDE, SIDE))))
        rows.append(("", None))
    rows = rows[:-1]
    heights = [GAP * 2 if strip is None else SIDE + GAP for _, strip in rows]
    drawn = Image.new("RGB", (MARGIN + columns * SIDE, sum(heights) - GAP), "white")
    pen, top = ImageDraw.Draw(drawn), 0
    for (said, strip), height in zip(rows, heights, strict=True):
        if strip is not None:
            drawn.paste(strip, (MARGIN, top))
            pen.text((4, top + SIDE // 2), said, fill=BLACK, anchor="lm", font=ImageFont.load_default(12))
        top += height
    return drawn


def save_small(drawn: Image.Image, path: Path) -> None:
    """Save with as many colours as `LIMIT` allows."""
    for colours in (256, 128, 64, 32, 16):
        drawn.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size < LIMIT:
            return
    raise SystemExit(f"{path}: more than {LIMIT} bytes with 16 colours; take fewer people")


def figure(model: Path) -> drawsvg.Drawing:
    """The way of a prompt through the model, and what is learned where by each method, in numbers of `model`."""
    configs = {part: json.loads((model / part / "config.json").read_text()) for part in ("unet", "text_encoder")}
    counts = numbers(configs)
    row = configs["text_encoder"]["hidden_size"]
    drawn = drawsvg.Drawing(820, 250)
    drawn.append(drawsvg.Rectangle(0, 0, 820, 250, fill="white"))

    def write(text: str, x: float, y: float, colour: str = BLACK, size: int = 13) -> None:
        drawn.append(drawsvg.Text(text, size, x, y, fill=colour, text_anchor="middle", font_family="sans-serif"))

    names = ("prompt", "token table", "text encoder", "UNet", "autoencoder", "picture")
    tip = drawsvg.Marker(-0.2, -4, 8, 4, orient="auto")
    tip.append(drawsvg.Lines(0, -3, 0, 3, 7, 0, close=True, fill=BLACK))
    for number, name in enumerate(names):
        x = 70 + 136 * number
        box = name not in ("prompt", "picture")
        if box:
            drawn.append(drawsvg.Rectangle(x - 52, 40, 104, 56, rx=6, fill=GREY, stroke=BLACK))
        write(name, x, 73)
        if number:
            drawn.append(drawsvg.Line(x - 80, 68, x - 62, 68, stroke=BLACK, stroke_width=1.5, marker_end=tip))
    write("frozen, but for what is in colour", 410, 24, size=12)

    def mark(column: int, y: int, colour: str, said: str, numbers_there: int) -> None:
        x = 70 + 136 * column
        drawn.append(drawsvg.Line(x, y - 30, x, 98, stroke=colour, stroke_width=2, stroke_dasharray="3,3"))
        drawn.append(drawsvg.Rectangle(x - 62, y - 30, 124, 46, rx=6, fill="white", stroke=colour, stroke_width=2))
        write(f"{numbers_there:,} numbers", x, y - 10, colour)
        write(said, x, y + 7, colour, size=11)

    mark(1, 150, WORD, "one new row", row)
    mark(2, 150, TEXT, "all attention", counts["text_encoder"][1])
    mark(3, 150, LORA, "all attention", counts["unet"][1])
    write("a word", 206, 192, WORD)
    write("LoRA with text encoder: also this", 342, 192, TEXT, size=12)
    write("LoRA", 478, 212, LORA)
    write("read only where a prompt has the word", 206, 236, WORD, size=11)
    write("used by every prompt, whatever it says", 530, 236, LORA, size=11)
    return drawn


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="as for benchmarks/lora.py")
    parser.add_argument("--split", default="dev", help="whose pictures, as in learning.py")
    parser.add_argument("--people", nargs="+", default=["cleo"], help="those of the sheet")
    parser.add_argument("--results", type=Path, default=ROOT / ".work" / "lora.jsonl", help="as for benchmarks/lora.py")
    parser.add_argument("--to", type=Path, default=ROOT / "docs", help="folder of the pictures")
    arguments = parser.parse_args()
    lines = read_results(arguments.results)
    chosen = [person for person in people(arguments.split) if person.name in arguments.people]
    if not chosen or not lines:
        parser.error(f"nothing of {' '.join(arguments.people)} has been measured")
    with open_model(arguments.model) as model:
        figure(model.path).save_svg(arguments.to / "lora.svg")
    save_small(sheet(strips_of(arguments.results.parent / "lora", lines[-1]), chosen), arguments.to / "lora.png")


if __name__ == "__main__":
    main()
