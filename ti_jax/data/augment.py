"""Light augmentation: further views of a picture, with another crop and other brightness, contrast and colour."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

# Views of each picture, the plain one included. They are encoded once, before the first step.
VIEWS = 8
# A crop keeps at least this share of the plain one's sides: the concept stays in sight, and its size hardly changes.
SMALLEST = 0.85
# Brightness, contrast and colour change by at most this share. Hues stay: a red jacket is learned as a red jacket.
JITTER = 0.1


class Variation(NamedTuple):
    """How a view differs from the plain picture.

    Attributes:
      scale: the crop's sides as a share of the plain one's. down, right: its place in the room that this leaves, in
        [0, 1]. brightness, contrast, colour: factors.
    """

    scale: float = 1.0
    down: float = 0.5
    right: float = 0.5
    brightness: float = 1.0
    contrast: float = 1.0
    colour: float = 1.0

    def box(self, plain: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """The crop within a plain one: left, top, right and bottom in whole pixels of the picture."""
        left, top, right, bottom = plain
        width, height = max(1, round(self.scale * (right - left))), max(1, round(self.scale * (bottom - top)))
        left += round(self.right * (right - left - width))
        top += round(self.down * (bottom - top - height))
        return left, top, left + width, top + height

    def jittered(self, image: Image.Image) -> Image.Image:
        """The picture with the view's brightness, contrast and colour."""
        for enhance, factor in (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.colour),
        ):
            image = enhance(image).enhance(factor) if factor != 1.0 else image
        return image


PLAIN = Variation()


def variations(seed: int, name: str) -> list[Variation]:
    """The views of a picture, the plain one first: they depend on the seed and the picture's name alone."""
    # The legacy generator: its numbers are the same in every version of NumPy.
    random = np.random.RandomState(np.frombuffer(f"{seed} {name}".encode("utf-8", "surrogateescape"), np.uint8))
    drawn = random.random_sample((VIEWS - 1, len(Variation._fields)))
    return [
        PLAIN,
        *(
            Variation(1 - (1 - SMALLEST) * scale, down, right, *(1 + JITTER * (2 * each - 1) for each in colours))
            for scale, down, right, *colours in drawn.tolist()
        ),
    ]
