"""Accuracies by the judge: true renders, renders through the VAE, and pictures drawn from captions and codes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import data
import numpy as np
import styles
import vae
import world
from judge import accuracy
from PIL import Image

from ti_jax import Embedding
from ti_jax.evaluation.avatar_judge import Judge
from ti_jax.pipeline import StableDiffusion

STEPS, GUIDANCE = 25, 3.0
SHEET = (8, 8)
# The share of each style attribute that must be right in pictures of trained styles, from words and from codes.
GATE = 0.95
# Validation sets, by the prefix of their figures.
HELD_BACK = {"": data.VALIDATION, "styled/": data.STYLED_VALIDATION}


def measure(folder: Path, judge: Judge, codes: np.ndarray, work: Path, captions: int) -> dict[str, Any]:
    """Accuracies by attribute; and sheets to look at.

    Args:
      folder: the model.
      judge: reads the pictures.
      codes: rows of people and styles, float32 [N, D], in the order of `base.make_captions`.
      work: folder with ``data``.
      captions: how many pictures are drawn of each kind.

    Returns:
      "renders", "vae" and "drawn" of natural pictures that are held back, "vae_psnr" in dB; the same four of styled
      ones, ``styled/renders`` and so on; ``styled/held_out``, drawn from the words of styles that are held out;
      ``codes/people``, ``codes/styles`` and ``codes/both``, drawn with codes that were trained; and ``gate``, whether
      styles are drawn as they should be.
    """
    group = np.load(work / "data" / "group.npy")
    labels = np.load(work / "data" / "labels.npy")
    scenes = data.load_scenes(work / "data")
    sd = StableDiffusion.from_pretrained(folder)
    figures = measure_autoencoder(sd.params["vae"], judge, work)

    def draw(kind: str, chosen: np.ndarray, prompts: list[str], *embeddings: Embedding) -> None:
        drawn_images = sd.generate(
            prompts, embeddings, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=0,
            batch_size=min(32, len(prompts)),
        )  # fmt: skip
        drawn = np.stack([np.asarray(image) for image in drawn_images])
        save_sheet(drawn, work / f"{kind.replace('/', '-')}.png")
        figures[kind] = accuracy(judge, drawn, labels[chosen])

    for kind, which in HELD_BACK.items():
        chosen = np.flatnonzero(group == which)[:captions]
        draw(f"{kind}drawn", chosen, [world.caption(scenes[index]) for index in chosen])

    rng = np.random.default_rng(0)
    people = int(group[data.trained(group)].max()) + 1
    numbers = {style: people + number for number, style in enumerate(styles.every_style())}

    def some(where: np.ndarray) -> np.ndarray:
        return np.sort(rng.permutation(np.flatnonzero(where))[:captions])

    def person(index: int) -> str:
        return f"<person{group[index]}>"

    def style(index: int) -> str:
        return f"<style{numbers[scenes[index].style]}>"

    def rows(words: list[str]) -> list[Embedding]:
        return [Embedding(word, {"text_encoder": codes[[int(re.sub(r"\D", "", word))]]}) for word in sorted({*words})]

    styled = np.array([scene.style in numbers for scene in scenes])
    held_out = some(group >= data.DEV_STYLES)
    draw("styled/held_out", held_out, [world.caption(scenes[index]) for index in held_out])
    known = (group >= 0) & (group < data.HELD_OUT)
    chosen = some(known & ~styled)
    prompts = [world.caption(scenes[index], subject=person(index), identity=False) for index in chosen]
    draw("codes/people", chosen, prompts, *rows([person(index) for index in chosen]))
    chosen = np.flatnonzero(group == data.STYLED_VALIDATION)[:captions]
    prompts = [world.caption(scenes[index], style=style(index)) for index in chosen]
    draw("codes/styles", chosen, prompts, *rows([style(index) for index in chosen]))
    chosen = some(known & styled)
    prompts = [world.caption(scenes[i], subject=person(i), identity=False, style=style(i)) for i in chosen]
    draw("codes/both", chosen, prompts, *rows([word for index in chosen for word in (person(index), style(index))]))
    figures["gate"] = passes(figures)
    return figures


def measure_autoencoder(params: Any, judge: Judge, work: Path) -> dict[str, Any]:
    """The figures of `measure` that the base has no part in; and sheets of pictures beside what comes back."""
    group = np.load(work / "data" / "group.npy")
    pixels = np.load(work / "data" / "pixels.npy", mmap_mode="r")
    labels = np.load(work / "data" / "labels.npy")
    figures: dict[str, Any] = {}
    for kind, which in HELD_BACK.items():
        chosen = np.flatnonzero(group == which)
        restored = vae.decode(params, np.split(vae.encode(params, pixels[chosen]), 2, axis=-1)[0])
        figures[f"{kind}renders"] = accuracy(judge, pixels[chosen], labels[chosen])
        figures[f"{kind}vae"] = accuracy(judge, restored, labels[chosen])
        figures[f"{kind}vae_psnr"] = vae.peak_signal_to_noise(pixels[chosen], restored)
        both = np.stack([pixels[chosen], restored], axis=1).reshape(-1, *restored.shape[1:])
        save_sheet(both, work / f"{kind.replace('/', '-')}vae.png")
    return figures


def passes(figures: Mapping[str, Any]) -> bool:
    """Whether trained styles are drawn from their words and from their codes, each attribute."""
    return all(figures[kind][name] >= GATE for kind in ("styled/drawn", "codes/styles") for name in world.STYLE)


def save_sheet(drawn: np.ndarray, path: Path) -> None:
    """The first pictures of [N, S, S, 3] in rows."""
    columns, rows = SHEET
    sheet = drawn[: columns * rows]
    lines = [np.concatenate(list(sheet[i : i + columns]), axis=1) for i in range(0, len(sheet) - columns + 1, columns)]
    if lines:
        Image.fromarray(np.concatenate(lines)).save(path)
