"""Accuracies by the judge for true renders, for renders through the VAE, and for pictures drawn from full captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import data
import numpy as np
import vae
import world
from judge import accuracy
from PIL import Image

from ti_jax.evaluation.avatar_judge import Judge
from ti_jax.pipeline import StableDiffusion

STEPS, GUIDANCE = 25, 3.0
SHEET = (8, 8)


def measure(folder: Path, judge: Judge, work: Path, captions: int) -> dict[str, Any]:
    """Accuracies by attribute of "renders", "vae" and "drawn", the VAE's PSNR in dB; and a sheet to look at."""
    group = np.load(work / "data" / "group.npy")
    valid = np.flatnonzero(group == data.VALIDATION)
    pixels = np.load(work / "data" / "pixels.npy", mmap_mode="r")[valid]
    labels = np.load(work / "data" / "labels.npy")[valid]
    every = data.load_scenes(work / "data")
    scenes = [every[index] for index in valid]

    sd = StableDiffusion.from_pretrained(folder)
    moments = vae.encode(sd.params["vae"], pixels)
    restored = vae.decode(sd.params["vae"], np.split(moments, 2, axis=-1)[0])
    prompts = [world.caption(scene) for scene in scenes[:captions]]
    drawn_images = sd.generate(
        prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=0, batch_size=min(32, len(prompts))
    )
    drawn = np.stack([np.asarray(image) for image in drawn_images])
    columns, rows = SHEET
    sheet = drawn[: columns * rows]
    lines = [np.concatenate(list(sheet[i : i + columns]), axis=1) for i in range(0, len(sheet) - columns + 1, columns)]
    if lines:
        Image.fromarray(np.concatenate(lines)).save(work / "drawn.png")
    return {
        "renders": accuracy(judge, pixels, labels),
        "vae": accuracy(judge, restored, labels),
        "vae_psnr": vae.peak_signal_to_noise(pixels, restored),
        "drawn": accuracy(judge, drawn, labels[:captions]),
    }
