"""``progress.png``: how the validation pictures change over a run, on one sheet that grows with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ti_jax.data.concept import Concept
from ti_jax.images import prompt_of, save_png, sheet
from ti_jax.training.run_folder import PROGRESS_FILE
from ti_jax.training.validation import validation_paths

# More rows than fit on a screen say no more, and a PNG of thousands could not be opened.
MOST_ROWS = 24


class ProgressSheet:
    """The sheet of one concept: a column for each validation prompt, a row for each validation, the first at the top.

    It is made of the first picture in each file of ``samples``, so that a resumed run goes on with the rows that it
    finds there. A file of another prompt, of a run that was resumed with others, is left out.
    """

    def __init__(self, concept: Concept):
        self._concept = concept
        self._cells: dict[Path, Image.Image | None] = {}  # read once; None: not a picture of the prompt

    def save(self, step: int) -> Image.Image | None:
        """Write the sheet up to ``step``, atomically; None if there are no pictures.

        Raises:
          InputError: the file cannot be written.
        """
        rows = [(f"step {number}", self._row(number)) for number in thinned(self._steps(step), MOST_ROWS)]
        rows = [(label, row) for label, row in rows if any(row)]
        if not rows:
            return None
        concept = self._concept
        picture = sheet(concept.validation_prompts, rows)
        save_png(concept.folder / PROGRESS_FILE, picture, {"seed": concept.config.seed, "step": step})
        return picture

    def _steps(self, last: int) -> list[int]:
        files = self._concept.folder.glob("samples/*.png")
        names = (re.fullmatch(r"step-(\d{6,})(-\d\d)?\.png", path.name) for path in files)
        steps = {int(name[1]) for name in names if name is not None}
        return sorted(step for step in steps if step <= last)

    def _row(self, step: int) -> list[Image.Image | None]:
        paths = validation_paths(self._concept, step)
        return [self._cell(path, prompt) for path, prompt in zip(paths, self._concept.validation_prompts, strict=True)]

    def _cell(self, path: Path, prompt: str) -> Image.Image | None:
        if path not in self._cells:
            self._cells[path] = self._read(path, prompt)
        return self._cells[path]

    def _read(self, path: Path, prompt: str) -> Image.Image | None:
        try:
            with Image.open(path) as file:
                if prompt_of(file) != prompt:
                    return None
                side = self._concept.config.resolution
                assert side is not None, "the config is resolved"
                return file.convert("RGB").crop((0, 0, min(side, file.width), min(side, file.height)))
        except OSError:  # deleted or damaged by somebody else: a hole in the sheet, not the end of the run
            return None


def thinned(steps: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the steps, evenly: every one, every second, every fourth and so on, and always the last."""
    stride = 1
    while len(steps[::stride]) + ((len(steps) - 1) % stride > 0) > most:
        stride *= 2
    kept = list(steps[::stride])
    return kept if not steps or kept[-1] == steps[-1] else [*kept, steps[-1]]
