"""PNG files with their generation settings as metadata, grids of pictures, and the overview."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ti_jax import __version__
from ti_jax.files import write_atomically

# The text chunk that AUTOMATIC1111's web UI writes, and that model sites and picture viewers read.
TEXT_CHUNK = "parameters"
_NEGATIVE = "Negative prompt: "
_THEIR_NAMES = {
    "num_inference_steps": "Steps",
    "scheduler": "Sampler",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model": "Model",
    "clip_skip": "Clip skip",
    "version": "Version",
}
_THEIR_SAMPLERS = {"ddim": "DDIM", "euler": "Euler", "euler_a": "Euler a", "dpm++": "DPM++ 2M"}

# Sides of a cell in pixels: any smaller, a face cannot be judged; any larger, a row of four is too wide.
MIN_CELL, MAX_CELL = 128, 512
MAX_SHEET_CELL = 256  # of a table of many rows
_PAPER, _INK = (255, 255, 255), (32, 32, 32)


# -- files


def save_png(path: str | Path, image: Image.Image, text: Mapping[str, Any] | str) -> None:
    """Write a PNG atomically, with ``text`` in its chunk ``parameters``.

    Args:
      text: generation settings under diffusers' names (``prompt``, ``negative_prompt``, ``num_inference_steps``,
        ``scheduler``, ``guidance_scale``, ``seed``, ``model``) and any others, formatted by `parameters_text`; a string
        is written as is.

    Raises:
      InputError: the file cannot be written.
    """
    if not isinstance(text, str):
        text = parameters_text({**text, "size": f"{image.width}x{image.height}"})
    info = PngInfo()
    # PNG text is UTF-8. Bytes of a prompt or path from the command line that are not UTF-8 are escaped as \udcXX.
    info.add_text(TEXT_CHUNK, text.encode("utf-8", "backslashreplace").decode())
    encoded = io.BytesIO()  # encode first, so that only disk errors are reported as such
    image.save(encoded, format="PNG", pnginfo=info)
    write_atomically(path, encoded.getvalue())


def parameters_text(parameters: Mapping[str, Any]) -> str:
    """Settings in AUTOMATIC1111's format: the prompt, the negative prompt, and one line of ``Name: value``.

    Known settings get AUTOMATIC1111's names, others are capitalised: ``step`` becomes ``Step``. ``clip_skip`` is
    counted as diffusers does.
    """
    settings = {name: value for name, value in parameters.items() if name not in ("prompt", "negative_prompt")}
    settings["version"] = f"ti_jax {__version__}"
    if skipped := settings.pop("clip_skip", 0):
        settings["clip_skip"] = skipped + 1  # AUTOMATIC1111 calls it 1 to leave no layer out
    line = []
    for name in sorted(settings, key=lambda name: _rank(name)):
        value = str(settings[name])
        if name == "scheduler":
            value = _THEIR_SAMPLERS.get(value, value)
        if re.search(r'[,:\n"]', value) or value != value.strip():
            value = json.dumps(value, ensure_ascii=False)
        line.append(f"{_their_name(name)}: {value}")
    lines = [str(parameters["prompt"])] if parameters.get("prompt") else []
    if parameters.get("negative_prompt"):
        lines.append(f"{_NEGATIVE}{parameters['negative_prompt']}")
    return "\n".join([*lines, ", ".join(line)])


def _rank(name: str) -> int:
    """Sort key: known settings in AUTOMATIC1111's order, then ours, the version last."""
    order = list(_THEIR_NAMES)
    return order.index(name) + (name == "version") if name in order else len(order) - 1


def _their_name(name: str) -> str:
    return _THEIR_NAMES.get(name) or name.replace("_", " ").capitalize()


def prompt_of(image: Image.Image) -> str | None:
    """The prompt in a picture that `save_png` has written; None without one."""
    text = image.info.get(TEXT_CHUNK)
    return re.split(rf"\n(?={_NEGATIVE}|[^\n]*\Z)", text)[0] if isinstance(text, str) else None


# -- grids


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures side by side without gaps, ``columns`` per row, all at the size of the first."""
    if not images or columns < 1:
        raise ValueError("a grid needs a picture and a column")
    width, height = images[0].size
    sheet = Image.new("RGB", (width * columns, height * -(-len(images) // columns)), _PAPER)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        sheet.paste(_fitted(image, width, height), (column * width, row * height))
    return sheet


def overview(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """The overview of a training run: rows of pictures, each below its caption.

    Args:
      rows: (caption, pictures): the concept's own, then those drawn with the initializer, then those drawn with the new
        word, for each of several prompts. Small pictures are enlarged to a side of at least `MIN_CELL`, large ones
        reduced to at most `MAX_CELL`.
    """
    images = [image for _, row in rows for image in row]
    if not images:
        raise ValueError("an overview needs a picture")
    page = _Page(images, max(len(row) for _, row in rows))
    for caption, row in rows:
        page.add_heading(caption)
        page.add_pictures(row)
    return page.drawn()


def sheet(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image | None]]]) -> Image.Image:
    """A table of pictures: a heading above each column, a label above each row.

    Args:
      columns: headings. rows: (label, a picture for each column, or None where there is none). Cells are as large as
        the first picture, between `MIN_CELL` and `MAX_SHEET_CELL` pixels.
    """
    images = [image for _, row in rows for image in row if image is not None]
    page = _Page(images, len(columns), MAX_SHEET_CELL)
    page.add_headings(columns)
    for label, row in rows:
        page.add_heading(label)
        page.add_pictures(row)
    return page.drawn()


class _Page:
    """A white page of equal cells, filled from top to bottom; its height is known only at the end."""

    def __init__(self, images: Sequence[Image.Image], columns: int, largest: int = MAX_CELL):
        width, height = images[0].size
        scale = min(max(1.0, -(-MIN_CELL // min(width, height))), largest / max(width, height))
        self.cell = max(1, round(width * scale)), max(1, round(height * scale))
        self.gap = max(6, self.cell[0] // 24)
        font_size = max(14, self.cell[0] // 16)
        self.font = ImageFont.load_default(font_size)
        self.line = round(1.35 * font_size)
        self.width = columns * (self.cell[0] + self.gap) + self.gap
        self.top = self.gap
        self.pictures: list[tuple[Image.Image, tuple[int, int]]] = []
        self.texts: list[tuple[str, tuple[int, int]]] = []

    def add_pictures(self, images: Sequence[Image.Image | None]) -> None:
        """Add one row of pictures; None leaves its cell empty."""
        for column, image in enumerate(images):
            if image is not None:
                self.pictures.append((_fitted(image, *self.cell), (self._left(column), self.top)))
        self.top += self.cell[1] + self.gap

    def add_heading(self, text: str) -> None:
        """Add a caption, wrapped to the page's width, above the next row."""
        if self.pictures:
            self.top += self.gap
        for line in self._wrapped(text, self.width - 2 * self.gap):
            self.texts.append((line, (self.gap, self.top)))
            self.top += self.line
        self.top += self.gap // 2

    def add_headings(self, texts: Sequence[str]) -> None:
        """Add a caption above each column, wrapped to its width."""
        lines = [list(self._wrapped(text, self.cell[0])) for text in texts]
        for column, wrapped in enumerate(lines):
            for number, line in enumerate(wrapped):
                self.texts.append((line, (self._left(column), self.top + number * self.line)))
        self.top += max(map(len, lines)) * self.line

    def drawn(self) -> Image.Image:
        """Render the page."""
        page = Image.new("RGB", (self.width, self.top), _PAPER)
        draw = ImageDraw.Draw(page)
        for image, place in self.pictures:
            page.paste(image, place)
        for text, place in self.texts:
            draw.text(place, text, fill=_INK, font=self.font)
        return page

    def _left(self, column: int) -> int:
        return self.gap + column * (self.cell[0] + self.gap)

    def _wrapped(self, text: str, width: int) -> Iterator[str]:
        """Split a text into lines of at most ``width`` pixels; longer words are broken."""
        line = ""
        for word in text.split():
            longer = f"{line} {word}".strip()
            if self.font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                yield line
            line = word
            while self.font.getlength(line) > width and len(line) > 1:
                end = next(i for i in range(len(line) - 1, 0, -1) if i == 1 or self.font.getlength(line[:i]) <= width)
                yield line[:end]
                line = line[end:]
        yield line


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """``image`` in RGB, resized to fit that size with its aspect ratio kept, and padded with white."""
    image = image.convert("RGB")
    if image.size == (width, height):
        return image
    scale = min(width / image.width, height / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    cell = Image.new("RGB", (width, height), _PAPER)
    cell.paste(image.resize(size, Image.Resampling.LANCZOS), ((width - size[0]) // 2, (height - size[1]) // 2))
    return cell
