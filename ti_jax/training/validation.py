"""Pictures of a run: validation during training, and the overview at the end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from ti_jax.config import TrainConfig
from ti_jax.data.concept import CheckedConcept, Concept, public_name
from ti_jax.data.folder import as_uint8
from ti_jax.data.inputs import LogLine
from ti_jax.data.prompt_checks import check_holds
from ti_jax.embeddings import Embedding
from ti_jax.errors import InputError
from ti_jax.evaluation.evaluate import check_measure, sampler_steps
from ti_jax.images import grid, overview, save_png
from ti_jax.interrupts import interruptible
from ti_jax.pipeline import StableDiffusion
from ti_jax.pipeline.model_description import ModelDescription
from ti_jax.training.run_folder import OVERVIEW_FILE

OVERVIEW_COLUMNS = 4

# Faults of drawing and measuring: a NaN, too little device memory, a full disk.
DRAWING_FAULTS = (InputError, jax.errors.JaxRuntimeError, MemoryError)


def _draw(
    sd: StableDiffusion,
    concept: Concept,
    prompts: list[str],
    learned: Sequence[Embedding],
    seeds: list[int],
    negative_prompt: str | list[str] | None,
    compile_only: bool = False,
) -> list[Image.Image]:
    config = concept.config
    assert config.validation_inference_steps is not None and config.validation_guidance_scale is not None
    # Exactly as infer.py draws: the same prompt, seed and settings give the same picture there.
    draw = partial(
        sd.generate,
        prompts,
        embeddings=[*learned, *concept.embeddings],
        negative_prompt=negative_prompt,
        num_inference_steps=config.validation_inference_steps,
        guidance_scale=config.validation_guidance_scale,
        scheduler=config.scheduler,
        height=config.resolution,
        width=config.resolution,
        seed=seeds,
        weighted=True,
        compile_only=compile_only,
    )
    return draw() if compile_only else interruptible(draw)


def _settings(config: TrainConfig, sd: StableDiffusion, negative_prompt: str | None) -> dict[str, Any]:
    """Settings stored in a picture's file, besides its prompt and seed."""
    return {
        "negative_prompt": negative_prompt,
        "num_inference_steps": config.validation_inference_steps,
        "scheduler": sd.scheduler_name(config.scheduler),
        "guidance_scale": config.validation_guidance_scale,
        "model": public_name(sd.name),
        "clip_skip": config.clip_skip,
    }


def _seeds(config: TrainConfig, count: int) -> list[int]:
    return [(config.seed + number) % 2**32 for number in range(count)]


def validation_paths(concept: Concept, step: int) -> list[Path]:
    """Paths of the validation pictures of a step, one for each prompt."""
    prompts = len(concept.validation_prompts)
    ends = [""] if prompts == 1 else [f"-{number:02d}" for number in range(prompts)]
    return [concept.folder / "samples" / f"step-{step:06d}{end}.png" for end in ends]


def compile_pictures(sd: StableDiffusion, concept: Concept, learned: Sequence[Embedding]) -> None:
    """Compile what `save_validation`, if the run has prompts for it, and `save_overview` draw with.

    Args:
      learned: words with as many vectors as those that will be drawn with.
    """
    if concept.validation_prompts:
        prompts, seeds = _repeated(concept)
        _draw(sd, concept, prompts, learned, seeds, concept.negative_prompt, compile_only=True)
    _draw_overview(sd, concept, learned, compile_only=True)


def _repeated(concept: Concept) -> tuple[list[str], list[int]]:
    """The prompt and the seed of each validation picture."""
    count = concept.config.num_validation_images
    prompts = [prompt for prompt in concept.validation_prompts for _ in range(count)]
    return prompts, _seeds(concept.config, count) * len(concept.validation_prompts)


def _draw_overview(
    sd: StableDiffusion, concept: Concept, learned: Sequence[Embedding], compile_only: bool = False
) -> tuple[list[str], list[int], list[str | None], list[Image.Image]]:
    """The prompts, seeds, negative prompts and pictures of the overview."""
    columns, prompts = OVERVIEW_COLUMNS, concept.overview_prompts
    drawn_prompts = [prompt for prompt in (concept.first_prompt_before_training, *prompts) for _ in range(columns)]
    # The same seeds in every row, so that within a column only the prompt differs.
    seeds = _seeds(concept.config, columns) * (1 + len(prompts))
    # Before training there is no word: one of the negative prompt is not in it.
    negatives = [concept.negative_prompt_before_training] * columns + [concept.negative_prompt] * columns * len(prompts)
    given = None if concept.negative_prompt is None else [negative or "" for negative in negatives]
    return drawn_prompts, seeds, negatives, _draw(sd, concept, drawn_prompts, learned, seeds, given, compile_only)


def save_validation(
    sd: StableDiffusion, concept: Concept, learned: Sequence[Embedding], step: int
) -> list[Image.Image]:
    """Draw the validation prompts with the current words, with the same seeds every time and for every prompt.

    Args:
      learned: the words of all concepts of the run.

    Returns:
      A grid of pictures for each prompt, as they are saved: ``samples/step-N.png``, or ``step-N-00.png`` and so on.
    """
    prompts, config = concept.validation_prompts, concept.config
    count = config.num_validation_images
    repeated, seeds = _repeated(concept)
    negative = concept.negative_prompt
    images = _draw(sd, concept, repeated, learned, seeds, negative)
    by_prompt = [images[first : first + count] for first in range(0, len(images), count)]
    grids = [grid(pictures, min(count, OVERVIEW_COLUMNS)) for pictures in by_prompt]
    for path, prompt, picture in zip(validation_paths(concept, step), prompts, grids, strict=True):
        settings = {"prompt": prompt, "seed": config.seed, "step": step, **_settings(config, sd, negative)}
        save_png(path, picture, settings)
    return grids


def save_overview(sd: StableDiffusion, concept: Concept, learned: Sequence[Embedding]) -> Path:
    """Save the overview: the concept's pictures, and pictures drawn before and after training.

    Each drawn picture is also saved by itself, as ``samples/overview-NN.png``.

    Args:
      learned: the words of all concepts of the run.
    """
    columns, config, folder = OVERVIEW_COLUMNS, concept.config, concept.folder
    prompts = concept.overview_prompts
    drawn_prompts, seeds, negatives, drawn = _draw_overview(sd, concept, learned)
    shown = [Image.fromarray(pixels) for pixels in as_uint8(concept.pictures.pixels[:columns])]
    first = concept.in_prompts(concept.first_prompt)
    rows = [(f"the pictures of {concept.token}", shown), (f"{first}, before training", drawn[:columns])]
    rows += [(prompt, drawn[columns * (i + 1) : columns * (i + 2)]) for i, prompt in enumerate(prompts)]
    for index, (prompt, negative, image) in enumerate(zip(drawn_prompts, negatives, drawn, strict=True)):
        settings = {"prompt": prompt, "seed": seeds[index], **_settings(config, sd, negative)}
        save_png(folder / "samples" / f"overview-{index:02d}.png", image, settings)
    path = folder / OVERVIEW_FILE
    save_png(path, overview(rows), {"token": concept.token, "seed": config.seed})
    return path


def check_pictures_to_draw(model: ModelDescription, concept: CheckedConcept, log: LogLine) -> None:
    """Check everything that is drawn and scored later, so that no fault shows only after hours of training.

    Raises:
      InputError: a fault in the sampler, its number of steps or a prompt, or neither CLIP nor a judge to score with.
    """
    config = concept.config
    assert config.validation_inference_steps is not None, "the config is resolved"
    if (note := model.sampler_choice(config.scheduler).note) is not None:
        log(f"note: {note}")
    try:
        model.make_sampler(config.scheduler, config.validation_inference_steps)
    except InputError as error:
        raise InputError(f"--validation_inference_steps {config.validation_inference_steps}: {error}") from error
    if config.evaluate or config.keep_best is not None:
        model.make_sampler(config.scheduler, sampler_steps(config))
        check_measure(model, config.evaluation_clip)
    words = {**concept.words, **{word.token: word.num_vectors for word in concept.embeddings}}
    prompts = [*concept.overview_prompts, *concept.validation_prompts]
    negative = concept.negative_prompt or ""
    holding = prompts if concept.negative_class is None else [negative]
    check_holds(model, holding, words, concept.token, weighted=True)
    prompts += [concept.first_prompt_before_training, negative]
    for _ in model.prompt_tokenizers.groups(prompts, None, words, weighted=True):
        pass
    for word in model.unprovided([*concept.prompts, *prompts], words):
        log(f"warning: {word} in a prompt is plain text: no file of --embeddings has this word")
