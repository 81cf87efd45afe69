"""Pictures on disk, with how they were drawn written into them, and pictures of pictures: grids and the overview."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from . import __version__
from .errors import InputError
from .files import write_atomically

# The text chunk that AUTOMATIC1111's web UI writes and reads, and model sites and picture viewers with it.
TEXT_CHUNK = "parameters"
_NEGATIVE = "Negative prompt: "
_THEIR_NAMES = {
    "num_inference_steps": "Steps",
    "scheduler": "Sampler",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model": "Model",
    "version": "Version",
}
_THEIR_SAMPLERS = {"ddim": "DDIM", "euler": "Euler", "euler_a": "Euler a", "dpm++": "DPM++ 2M"}
_SETTING = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')

# Sides of a cell in pixels: below the first a face is too small to judge, above the second a row of four is too wide.
MIN_CELL, MAX_CELL = 128, 512
_PAPER, _INK = (255, 255, 255), (32, 32, 32)


# -- files


def save_png(path: str | Path, image: Image.Image, text: Mapping[str, Any] | str) -> None:
    """Write a PNG, whole or not at all, with ``text`` in its chunk ``parameters``.

    Args:
      text: how the picture was drawn, under diffusers' names (``prompt``, ``negative_prompt``, ``num_inference_steps``,
        ``scheduler``, ``guidance_scale``, ``seed``, ``model``) and any others; written by `parameters_text`. A string
        is written as it is.

    Raises:
      InputError: the file cannot be written.
    """
    if not isinstance(text, str):
        text = parameters_text({**text, "size": f"{image.width}x{image.height}"})
    info = PngInfo()
    info.add_text(TEXT_CHUNK, text)
    encoded = io.BytesIO()  # first, so that only what the disk does is told as a fault of the disk
    image.save(encoded, format="PNG", pnginfo=info)
    write_atomically(path, encoded.getvalue())


def parameters_text(parameters: Mapping[str, Any]) -> str:
    """Settings as AUTOMATIC1111 writes them: the prompt, the negative prompt, and one line of ``Name: value``.

    Known settings get AUTOMATIC1111's names, others their own with a capital: ``step`` becomes ``Step``.
    """
    settings = {name: value for name, value in parameters.items() if name not in ("prompt", "negative_prompt")}
    settings["version"] = f"ti_jax {__version__}"
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


def read_parameters(path: str | Path) -> dict[str, Any]:
    """What `save_png`, or AUTOMATIC1111, wrote into a PNG: settings under the names that `save_png` takes.

    Numbers of steps and seeds are int, guidance is float, everything else (and what is no number there) is str. Without
    a line of settings all of the text is the ``prompt``; without the chunk the result is empty.

    Raises:
      InputError: no such file, or not a picture.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(TEXT_CHUNK, "")
    except FileNotFoundError as error:
        raise InputError(f"cannot read {path}: there is no such file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: it is not a whole PNG picture") from error
    if not text:
        return {}
    *lines, last = text.split("\n")
    settings = dict(_SETTING.findall(last))
    if len(settings) < 3 and "Version" not in settings:  # AUTOMATIC1111's rule, but for the second half
        lines, settings = [*lines, last], {}
    prompt, _, negative = "\n".join(lines).partition(_NEGATIVE)
    parameters: dict[str, Any] = {"prompt": prompt.strip(), "negative_prompt": negative.strip()}
    parameters = {name: value for name, value in parameters.items() if value}
    for their_name, value in settings.items():
        name = _our_name(their_name)
        parameters[name] = _our_value(name, _unquoted(value.strip()))
    return parameters


def _rank(name: str) -> int:
    """Known settings in AUTOMATIC1111's order, then ours, the version last."""
    order = list(_THEIR_NAMES)
    return order.index(name) + (name == "version") if name in order else len(order) - 1


def _their_name(name: str) -> str:
    return _THEIR_NAMES.get(name) or name.replace("_", " ").capitalize()


def _our_name(their_name: str) -> str:
    known = {theirs: ours for ours, theirs in _THEIR_NAMES.items()}
    return known.get(their_name) or their_name.replace(" ", "_").lower()


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:  # not written by this rule: a value that happens to begin so
        return value


def _our_value(name: str, value: str) -> Any:
    if name in ("num_inference_steps", "seed") and re.fullmatch(r"\d+", value):
        return int(value)
    if name == "guidance_scale" and re.fullmatch(r"-?\d+(\.\d+)?", value):
        return float(value)
    if name == "scheduler":
        return {theirs: ours for ours, theirs in _THEIR_SAMPLERS.items()}.get(value, value)
    return value


# -- pictures of pictures


def grid(images: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None) -> Image.Image:
    """Pictures side by side, ``columns`` to a row.

    Args:
      labels: a caption under each picture; small pictures are then enlarged, so that it can be read.

    Without captions the pictures touch and keep their size, all that of the first.
    """
    if not images or columns < 1:
        raise ValueError("a grid needs a picture and a column")
    if labels is None:
        width, height = images[0].size
        sheet = Image.new("RGB", (width * columns, height * -(-len(images) // columns)), _PAPER)
        for number, image in enumerate(images):
            row, column = divmod(number, columns)
            sheet.paste(_fitted(image, width, height), (column * width, row * height))
        return sheet
    if len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} pictures")
    page = _Page(images, columns)
    for pairs in _chunks(list(zip(images, labels, strict=True)), columns):
        page.add_pictures([image for image, _ in pairs])
        page.add_captions([label for _, label in pairs])
    return page.drawn()


def overview(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """What a training run ends with: rows of pictures, each under its caption.

    Args:
      rows: (caption, pictures): first the concept's own, then what the initializer draws, then what the new word draws
        in each of several prompts. Small pictures are enlarged to a side of `MIN_CELL` or more, large ones made smaller
        to one of `MAX_CELL`.
    """
    images = [image for _, row in rows for image in row]
    if not images:
        raise ValueError("an overview needs a picture")
    page = _Page(images, max(len(row) for _, row in rows))
    for caption, row in rows:
        page.add_heading(caption)
        page.add_pictures(row)
    return page.drawn()


class _Page:
    """A white page of cells of one size, filled from top to bottom; its height is known only at the end."""

    def __init__(self, images: Sequence[Image.Image], columns: int):
        width, height = images[0].size
        scale = min(max(1.0, -(-MIN_CELL // min(width, height))), MAX_CELL / max(width, height))
        self.cell = max(1, round(width * scale)), max(1, round(height * scale))
        self.gap = max(6, self.cell[0] // 24)
        font_size = max(14, self.cell[0] // 16)
        self.font = ImageFont.load_default(font_size)
        self.line = round(1.35 * font_size)
        self.width = columns * (self.cell[0] + self.gap) + self.gap
        self.top = self.gap
        self.pictures: list[tuple[Image.Image, tuple[int, int]]] = []
        self.texts: list[tuple[str, tuple[int, int]]] = []

    def add_pictures(self, images: Sequence[Image.Image]) -> None:
        """One row of them."""
        for column, image in enumerate(images):
            self.pictures.append((_fitted(image, *self.cell), (self._left(column), self.top)))
        self.top += self.cell[1] + self.gap

    def add_captions(self, captions: Sequence[str]) -> None:
        """A caption under each picture of the row before."""
        wrapped = [list(self._wrapped(caption, self.cell[0])) for caption in captions]
        for column, lines in enumerate(wrapped):
            for number, line in enumerate(lines):
                self.texts.append((line, (self._left(column), self.top - self.gap // 2 + number * self.line)))
        self.top += max(len(lines) for lines in wrapped) * self.line

    def add_heading(self, text: str) -> None:
        """A caption as wide as the page, above what comes next and set off from what came before."""
        if self.pictures:
            self.top += self.gap
        for line in self._wrapped(text, self.width - 2 * self.gap):
            self.texts.append((line, (self.gap, self.top)))
            self.top += self.line
        self.top += self.gap // 2

    def drawn(self) -> Image.Image:
        """The page."""
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
        """Lines no wider than ``width`` pixels; a word that is wider on its own is broken."""
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
    """``image`` in RGB at that size, the sides in proportion, the rest paper."""
    image = image.convert("RGB")
    if image.size == (width, height):
        return image
    scale = min(width / image.width, height / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    cell = Image.new("RGB", (width, height), _PAPER)
    cell.paste(image.resize(size, Image.Resampling.LANCZOS), ((width - size[0]) // 2, (height - size[1]) // 2))
    return cell


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[first : first + size] for first in range(0, len(items), size))
