"""``string_to_param``: AUTOMATIC1111's ``.pt`` and image card, and the ``.pt`` of the paper's code.

Held to AUTOMATIC1111's ``create_embedding_from_data`` and ``Embedding.save``. AUTOMATIC1111 uses the file's name as the
word (for a card, ``name``), diffusers uses ``name``. The key in ``string_to_param`` is ``*`` in every file that
AUTOMATIC1111 writes. The paper's code has no ``name`` and may have several words, each under its own key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ti_jax.embeddings.containers import PICKLE_SUFFIXES, PICTURES, Content, pickle_bytes
from ti_jax.embeddings.embedding import Embedding
from ti_jax.embeddings.families import describe
from ti_jax.embeddings.image_card import card_png
from ti_jax.embeddings.naming import chosen, named
from ti_jax.embeddings.vectors import encoder_of, vectors_of
from ti_jax.errors import InputError

_KEY = "*"
_ID_OF_KEY = 265  # of "*" in CLIP's vocabulary

# AUTOMATIC1111's entry -> our metadata entry.
_METADATA = {"step": "steps", "sd_checkpoint": "sd_checkpoint", "sd_checkpoint_name": "base_model"}

CARD_SIDE = 512  # pixels
SMALLEST = 14  # font size


def read_card(content: Content, token: str | None) -> Embedding | None:
    """The word of an image card; None if it is another kind of file."""
    return read(content, token) if content.container in PICTURES else None


def read(content: Content, token: str | None) -> Embedding | None:
    """The word in a file, or the one named ``token`` if it has several; None if it is not this format."""
    parameters = content.data.get("string_to_param") if isinstance(content.data, dict) else None
    if not isinstance(parameters, dict):
        return None
    if not parameters:
        raise InputError("its string_to_param is empty: there is no word in it")
    key = chosen(parameters, token)
    stored = content.data.get("name")
    stored = stored if isinstance(stored, str) and stored else None
    if content.container in PICTURES:
        name = stored or content.path.stem
    else:
        # AUTOMATIC1111, Forge, ComfyUI, kohya and invoke use the file's name; the paper's code uses the key.
        name = str(key) if stored is None and key != _KEY else content.path.stem
    vectors = vectors_of(parameters[key], str(key))
    metadata = {
        ours: str(content.data[theirs])
        for theirs, ours in _METADATA.items()
        if isinstance(content.data.get(theirs), (str, int, float))
    }
    return named(content, token, name, {encoder_of(vectors): vectors}, metadata, stored)


def write(embedding: Embedding, path: Path) -> dict[Path, bytes]:
    """The ``.pt`` file of a word for SD1.x or SD2.x."""
    if path.suffix not in PICKLE_SUFFIXES:
        raise InputError(f"{path}: a word in AUTOMATIC1111's format is a .pt file")
    return {path: pickle_bytes(path, _data(embedding, path))}


def write_card(embedding: Embedding, path: Path, picture: Image.Image | None = None) -> dict[Path, bytes]:
    """The image card, a ``.png``, of a word for SD1.x or SD2.x.

    Args:
      picture: the picture of the card. None: the word, its number of vectors and its family on a plain background.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: an image card is a .png file")
    return {path: card_png(picture or _plain_picture(embedding), _data(embedding, path))}


def _data(embedding: Embedding, path: Path) -> dict[str, Any]:
    if list(embedding.vectors) != ["text_encoder"]:
        raise InputError(
            f"{path}: AUTOMATIC1111's own formats have one text encoder, and {embedding.token!r} is for "
            f"{describe(embedding.dims, embedding.metadata)}; save it with format 'comfyui', which it reads too"
        )
    steps = embedding.metadata.get("steps", "")
    return {
        "string_to_token": {_KEY: _ID_OF_KEY},
        "string_to_param": {_KEY: embedding.vectors["text_encoder"]},
        "name": embedding.token,
        "step": int(steps) if steps.isdecimal() else None,
        "sd_checkpoint": embedding.metadata.get("sd_checkpoint"),
        "sd_checkpoint_name": embedding.metadata.get("base_model"),
    }


def _plain_picture(embedding: Embedding) -> Image.Image:
    picture = Image.new("RGB", (CARD_SIDE, CARD_SIDE), (40, 44, 52))
    draw = ImageDraw.Draw(picture)
    vectors = f"{embedding.num_vectors} vector{'s' if embedding.num_vectors > 1 else ''}"
    about = f"{vectors} for {describe(embedding.dims, embedding.metadata)}"
    middle = CARD_SIDE // 2
    for text, height, largest in ((drawable(embedding.token), middle - 20, 64), (about, middle + 40, 18)):
        lines, font = fitted(text, CARD_SIDE - 32, largest)
        spacing = 1.3 * font.size
        top = height - spacing * (len(lines) - 1) * (1 if text != about else 0)
        for number, line in enumerate(lines):
            draw.text((middle, top + number * spacing), line, fill=(235, 235, 235), font=font, anchor="mm")
    return picture


def drawable(text: str) -> str:
    """The text with each character that Pillow's font lacks replaced by its code point, as ``[U+30AB]``."""
    font = _font(SMALLEST)
    box = bytes(font.getmask("\U0010ffff"))  # the glyph of an unknown character

    def known(character: str) -> bool:
        mask = font.getmask(character)
        return bool(mask.size[0]) and bytes(mask) != box

    return "".join(c if (c.isascii() and c.isprintable()) or known(c) else f"[U+{ord(c):04X}]" for c in text)


def fitted(text: str, width: int, largest: int) -> tuple[list[str], ImageFont.FreeTypeFont]:
    """Lines and font with which a text fits: a smaller font first, then up to 12 lines, then cut off."""
    for size in range(largest, SMALLEST - 1, -2):
        font = _font(size)
        if font.getlength(text) <= width:
            return [text], font
    lines = [""]
    for character in text:
        if font.getlength(lines[-1] + character) > width:
            lines.append("")
        lines[-1] += character
    return (lines if len(lines) <= 12 else [*lines[:11], lines[11][:-3] + "..."]), font


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow comes with FreeType"
    return font
