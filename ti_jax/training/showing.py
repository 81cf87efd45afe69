"""Pictures of a run: validation while it trains, and the overview that it ends with."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..config import TrainConfig
from ..data.images import as_uint8
from ..embeddings import Embedding
from ..interrupts import interruptible
from ..pictures import grid, overview, save_png
from ..pipeline import StableDiffusion
from .run_folder import OVERVIEW_FILE
from .setup import Concept

OVERVIEW_COLUMNS = 4


def _draw(
    config: TrainConfig,
    sd: StableDiffusion,
    concept: Concept,
    prompts: list[str],
    embedding: Embedding,
    seeds: list[int],
) -> list[Image.Image]:
    assert config.validation_inference_steps is not None and config.validation_guidance_scale is not None
    # As infer.py draws: the same prompt, seed and settings give the same picture there.
    draw = partial(
        sd.generate,
        prompts,
        embeddings=[embedding, *concept.embeddings],
        negative_prompt=config.validation_negative_prompt,
        num_inference_steps=config.validation_inference_steps,
        guidance_scale=config.validation_guidance_scale,
        scheduler=config.scheduler,
        height=config.resolution,
        width=config.resolution,
        seed=seeds,
        weighted=True,
    )
    return interruptible(draw)


def _settings(config: TrainConfig, sd: StableDiffusion) -> dict[str, Any]:
    """What a picture's file says of how it was drawn, besides its prompt and seed."""
    return {
        "negative_prompt": config.validation_negative_prompt,
        "num_inference_steps": config.validation_inference_steps,
        "scheduler": sd.scheduler_name(config.scheduler),
        "guidance_scale": config.validation_guidance_scale,
        "model": sd.name,
    }


def _seeds(config: TrainConfig, count: int) -> list[int]:
    return [(config.seed + number) % 2**32 for number in range(count)]


def validation_path(folder: Path, step: int) -> Path:
    """Where the validation pictures of a step are."""
    return folder / "samples" / f"step-{step:06d}.png"


def save_validation(
    config: TrainConfig, sd: StableDiffusion, concept: Concept, embedding: Embedding, folder: Path, step: int
) -> Image.Image:
    """Draw the validation prompt with the word as it is, into ``samples/step-N.png``; with the same seeds
    each time.
    """
    prompt = concept.validation_prompt
    assert prompt is not None, "it is drawn only if there is one"
    images = _draw(
        config,
        sd,
        concept,
        [prompt] * config.num_validation_images,
        embedding,
        _seeds(config, config.num_validation_images),
    )
    picture = grid(images, columns=min(len(images), OVERVIEW_COLUMNS))
    settings = {"prompt": prompt, "seed": config.seed, "step": step, **_settings(config, sd)}
    save_png(validation_path(folder, step), picture, settings)
    return picture


def save_overview(
    config: TrainConfig, sd: StableDiffusion, concept: Concept, embedding: Embedding, folder: Path
) -> Path:
    """The picture that shows what was learned: the concept, what the word draws before and after it was learned.

    What is drawn for it is also kept picture by picture, ``samples/overview-NN.png``.
    """
    columns = OVERVIEW_COLUMNS
    prompts = concept.overview_prompts
    before = concept.first_prompt_before_training
    drawn_prompts = [prompt for prompt in (before, *prompts) for _ in range(columns)]
    # The same seeds in every row: what differs down a column is the prompt alone.
    seeds = _seeds(config, columns) * (1 + len(prompts))
    drawn = _draw(config, sd, concept, drawn_prompts, embedding, seeds)
    shown = [Image.fromarray(pixels) for pixels in as_uint8(concept.pictures.pixels[:columns])]
    rows = [(f"the pictures of {concept.token}", shown), (f"{concept.prompts[0]}, before training", drawn[:columns])]
    rows += [(prompt, drawn[columns * (i + 1) : columns * (i + 2)]) for i, prompt in enumerate(prompts)]
    for index, (prompt, image) in enumerate(zip(drawn_prompts, drawn, strict=True)):
        settings = {"prompt": prompt, "seed": seeds[index], **_settings(config, sd)}
        save_png(folder / "samples" / f"overview-{index:02d}.png", image, settings)
    path = folder / OVERVIEW_FILE
    save_png(path, overview(rows), {"token": concept.token, "seed": config.seed})
    return path
