"""Pictures of prompts with a learned word, beside those without it and those of another state of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ti_jax.config import ModelSettings, TrainConfig
from ti_jax.config.defaults import EMBEDDED_CLASS
from ti_jax.embeddings import Embedding
from ti_jax.errors import InputError
from ti_jax.images import overview
from ti_jax.ui.processes import python
from ti_jax.words import contains_word, fill, without_word

IDLE = 300.0  # seconds after which the model is dropped from memory
MOST_PICTURES, MOST_PROMPTS = 4, 6


class Drawer:
    """A process that draws as ``ti-jax infer`` does. It has the model only while somebody tries words."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._using = threading.Lock()
        self._idle: threading.Timer | None = None

    def draw(self, request: dict[str, Any]) -> tuple[list[Path], list[str]]:
        """Draw the pictures of some fields of an `InferConfig`.

        Returns:
          The files, and notes and warnings.

        Raises:
          InputError: the message of ``ti-jax infer``.
        """
        with self._using:
            self._rest()
            if self._process is None or self._process.poll() is not None:
                # A run beside it needs its part of a GPU's memory.
                environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
                self._process = subprocess.Popen(
                    [*python(), "ti_jax.cli.drawer"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    text=True, encoding="utf-8", env=environment,
                )  # fmt: skip
            assert self._process.stdin is not None and self._process.stdout is not None
            try:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except BrokenPipeError:
                line = ""
            self._idle = threading.Timer(IDLE, self.close)
            self._idle.daemon = True
            self._idle.start()
        if not line:
            raise InputError("the process that draws has ended before it was through; was it out of memory?")
        answer = json.loads(line)
        if "error" in answer:
            raise InputError(answer["error"])
        return list(map(Path, answer["paths"])), answer["notes"]

    def close(self) -> None:
        """End the process after what it draws, and free the device for a run."""
        with self._using:
            self._rest()
            if self._process is not None:
                with contextlib.suppress(BrokenPipeError), self._process:
                    self._process.kill()
                self._process = None

    def _rest(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None


@dataclass(frozen=True)
class Wanted:
    """What to draw.

    Attributes:
      prompts: each with the word or {}. words: files of the word's states by what they are called.
      without: what stands in the word's place in a row without it; None: no such row.
    """

    prompts: tuple[str, ...]
    words: dict[str, Path]
    without: str | None = None
    pictures: int = 4
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None


def compare(drawer: Drawer, config: TrainConfig, wanted: Wanted) -> tuple[Image.Image, list[str]]:
    """Draw all prompts with the same seeds in rows that differ by the word alone.

    Args:
      config: of the run, whose model draws.

    Returns:
      The rows, and notes.

    Raises:
      InputError: a prompt without the word, or what ``ti-jax infer`` refuses.
    """
    embeddings = {label: Embedding.load(path) for label, path in wanted.words.items()}
    token, count = next((each.token, each.num_vectors) for each in embeddings.values())
    prompts = [fill(prompt.strip(), token) for prompt in wanted.prompts if prompt.strip()]
    if not prompts:
        raise InputError(f"no prompt: say what to draw, with {token} in it")
    if len(prompts) > MOST_PROMPTS:
        raise InputError(f"{len(prompts)} prompts: at most {MOST_PROMPTS} at once; use ti-jax infer for more")
    for prompt in prompts:
        if not contains_word(prompt, token):
            raise InputError(f"{prompt!r}: the word {token} is not in it; write it, or {{}} in its place")
    if not 1 <= wanted.pictures <= MOST_PICTURES:
        raise InputError(f"{wanted.pictures} pictures of each prompt: must be from 1 to {MOST_PICTURES}")
    model = {field.name: getattr(config, field.name) for field in dataclasses.fields(ModelSettings)}
    common = {
        "negative_prompt": wanted.negative_prompt or None, "num_images": wanted.pictures, "seed": wanted.seed,
        "num_inference_steps": wanted.steps, "guidance_scale": wanted.guidance, "height": config.resolution,
        "width": config.resolution, "scheduler": config.scheduler, **model,
    }  # fmt: skip
    variants: list[tuple[str, Sequence[str], list[Path]]] = []
    if wanted.without is not None:
        instead = [without_word(prompt, token, count, wanted.without) for prompt in prompts]
        variants.append(("without the word", instead, []))
    variants += [(label, prompts, [path]) for label, path in wanted.words.items()]
    rows: dict[int, list[tuple[str, list[Image.Image]]]] = {number: [] for number in range(len(prompts))}
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ti_jax-") as folder:
        for label, texts, files in variants:
            request = {"prompt": list(texts), "embedding": list(map(str, files)), "output": f"{folder}/out.png"}
            paths, said = drawer.draw(common | request)
            notes += said
            pictures = [_read(path) for path in paths[: len(texts) * wanted.pictures]]
            for number, text in enumerate(texts):
                own = pictures[number * wanted.pictures : (number + 1) * wanted.pictures]
                rows[number].append((f"{text}   -   {label}", own))
    return overview([row for number in rows for row in rows[number]]), list(dict.fromkeys(notes))


def class_of(config: TrainConfig) -> str:
    """What stands for the word where it is left out."""
    if config.negative_class is not None:
        return config.negative_class
    if config.pretrained_model_name_or_path is None:
        return EMBEDDED_CLASS
    return config.initializer_token or "thing"


def _read(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return file.convert("RGB")
