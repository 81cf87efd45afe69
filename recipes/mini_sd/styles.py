"""Styles: how a portrait is drawn, whoever is in it.

A style is a combination of one value of each of four attributes: palette, outline, frame and light. Each palette but
the natural one draws everybody with the same colours, so that shapes stay visible and nobody's own colours are.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Palette:
    """Colours as hexadecimal numbers.

    `pattern` is that of the background's stripes and dots. Of the avatars' own colours `line` replaces the dark ones
    (eyes, glasses) and `accent` the others (lips, hats).
    """

    background: str
    pattern: str
    skin: str
    hair: str
    clothes: str
    accent: str
    line: str


PALETTES: dict[str, Palette | None] = {
    "natural": None,
    "sepia": Palette("e9d8b4", "d3bc8f", "c39a68", "4f3320", "8c6540", "a9794c", "2e1c10"),
    "blueprint": Palette("2f6fc4", "5a93dc", "b9d9f5", "123c86", "7fb2e8", "dcecfb", "0c2250"),
    "sunset": Palette("ffb347", "ffcc7a", "f0713f", "4b1a5e", "b8326b", "ffd9a0", "2c0f3a"),
    "pastel": Palette("f6efdf", "cfe4ec", "f8d3c4", "b9a7dd", "a9dcc4", "f0a8b8", "7a6a94"),
    "neon": Palette("3a1a86", "5b2fbd", "35e0e6", "ff3fc4", "a6f53c", "fff04a", "1c0848"),
}
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "palette": tuple(PALETTES),
    "outline": ("no outline", "outlined"),
    "frame": ("no frame", "framed", "round", "vignette"),
    "light": ("flat", "left lit", "right lit"),
}
# The first value of each is not mentioned in captions: it is how people are drawn if no style is asked for.
NATURAL = tuple(values[0] for values in ATTRIBUTES.values())

# Held out of all training in this combination: for choosing settings, and for the final figures. Each value is in as
# many of the twelve as any other of its attribute, and no two have the same palette with the same frame or light.
DEV = {
    "amber": ("blueprint", "outlined", "framed", "flat"),
    "basalt": ("sunset", "no outline", "vignette", "left lit"),
    "coral": ("natural", "outlined", "no frame", "right lit"),
    "dusk": ("sepia", "no outline", "round", "flat"),
}
TEST = {
    "style00": ("sunset", "outlined", "framed", "flat"),
    "style01": ("sepia", "no outline", "no frame", "left lit"),
    "style02": ("natural", "no outline", "framed", "left lit"),
    "style03": ("pastel", "outlined", "vignette", "right lit"),
    "style04": ("natural", "outlined", "vignette", "flat"),
    "style05": ("sepia", "no outline", "round", "right lit"),
    "style06": ("pastel", "outlined", "round", "flat"),
    "style07": ("blueprint", "no outline", "vignette", "flat"),
    "style08": ("sunset", "no outline", "round", "right lit"),
    "style09": ("blueprint", "no outline", "no frame", "left lit"),
    "style10": ("neon", "outlined", "framed", "left lit"),
    "style11": ("neon", "outlined", "no frame", "right lit"),
}

# The avatars' own colours that are not replaced by `accent` in a palette: white and black for highlights and shadows.
OWN = ("fff", "fffefd", "000")
OWN_LINE = "1b0640"
INK = "1e1a28"
INK_WIDTH = 1.5  # pixels of 64, half of it outside the shape


def words(style: tuple[str, ...]) -> list[str]:
    """What captions call the style: the values that differ from the natural style's."""
    return [value for value, usual in zip(style, NATURAL, strict=True) if value != usual]


def every_style() -> list[tuple[str, ...]]:
    """All combinations but the natural one."""
    return [style for style in itertools.product(*ATTRIBUTES.values()) if style != NATURAL]


def rgb(colour: str) -> tuple[int, int, int]:
    """The three numbers of a hexadecimal colour."""
    red, green, blue = bytes.fromhex(colour)
    return red, green, blue


def restyle(svg: str, palette: str, outline: str, parts: tuple[str, ...]) -> str:
    """The avatar's SVG with the palette's colours, and lines around the shapes with one of the colours `parts`."""
    colours = PALETTES[palette]
    if colours:

        def recoloured(found: re.Match[str]) -> str:
            colour = found[1].lower()
            new = colours.line if colour == OWN_LINE else colour if colour in (*OWN, *parts) else colours.accent
            return f'"#{new}"'

        svg = re.sub('"#([0-9a-fA-F]+)"', recoloured, svg)
    if outline != "no outline":
        ink = colours.line if colours else INK
        for colour in parts:
            line = f'fill="#{colour}" stroke="#{ink}" stroke-width="{INK_WIDTH}" stroke-linejoin="round"'
            svg = svg.replace(f'fill="#{colour}"', line)
    return svg


def light_and_frame(picture: np.ndarray, light: str, frame: str) -> np.ndarray:
    """uint8 [side, side, 3] with a shadow on the side opposite to the light, and a frame."""
    side = len(picture)
    y, x = (np.indices((side, side)) + 0.5) / side  # in [0, 1]
    gain = np.ones((side, side))
    if light != "flat":
        across = x if light == "left lit" else 1 - x
        gain *= 1 - 0.75 * smooth((across - 0.4) / 0.55)
    if frame == "vignette":
        gain *= 1 - 0.85 * smooth((np.hypot(x - 0.5, y - 0.5) - 0.36) / 0.28)
    drawn = picture * gain[..., None]
    if frame == "framed":  # a white border with a dark line inside it
        inside = np.maximum(abs(x - 0.5), abs(y - 0.5)) * 64
        drawn[inside > 27] = rgb(INK)
        drawn[inside > 28] = (250, 250, 250)
    if frame == "round":
        # Over a pixel's width, so that the circle's edge is smooth.
        outside = np.clip((np.hypot(x - 0.5, y - 0.5) - 0.48) * side, 0, 1)[..., None]
        drawn = drawn * (1 - outside) + np.array(rgb(INK)) * outside
    return drawn.round().astype(np.uint8)


def smooth(t: np.ndarray) -> np.ndarray:
    """From 0 to 1 without corners, for `t` from 0 to 1."""
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)
