"""``infer.py``: from an `InferConfig` to picture files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ti_jax.config import InferConfig
from ti_jax.data.concept import public_name
from ti_jax.embeddings import Embedding, check_fits
from ti_jax.embeddings.naming import load_given, with_stored_name
from ti_jax.errors import InputError
from ti_jax.files import writable_folder
from ti_jax.images import grid, save_png
from ti_jax.machine import explaining_out_of_memory
from ti_jax.pipeline import StableDiffusion
from ti_jax.pipeline.model_description import ModelDescription, OpenModel, open_model_of
from ti_jax.text.embedded_words import note_unknown
from ti_jax.text.tokens import combine
from ti_jax.words import find_words

GRID_COLUMNS = 4


@explaining_out_of_memory(
    "give a smaller --batch_size, a smaller --height and --width or --vae_tiling always, or end other programs that "
    "use the device"
)
def draw(config: InferConfig, load: Callable[[OpenModel], StableDiffusion] = StableDiffusion.load) -> list[Path]:
    """Draw the pictures of a resolved config.

    Args:
      load: reads the weights, or has them already.

    Returns:
      The files written: ``config.output``, or for several pictures those of `output_paths`.

    Raises:
      InputError: the output cannot be written, or something is wrong with an embedding, the model or a prompt. What can
        be checked without the model's weights is checked before they are loaded.
    """
    output = Path(config.output)
    if output.is_dir():
        raise InputError(f"--output {output}: a folder; give the name of a .png file in it")
    with writable_folder(output.parent):
        return _draw(config, output, load)


def _draw(config: InferConfig, output: Path, load: Callable[[OpenModel], StableDiffusion]) -> list[Path]:
    embeddings = load_given(config.embedding)
    for file, embedding in zip(config.embedding, embeddings, strict=True):
        config, note = _with_stored_name(config, embedding)
        if note is not None:
            print(f"note: {file}: {note}", file=sys.stderr)
        words = {embedding.token: embedding.num_vectors}
        if not any(find_words(prompt, words) for prompt in _all_prompts(config)):
            print(f"warning: no prompt has the word {embedding.token} of {file} in it", file=sys.stderr)
        for remark in embedding.remarks:
            print(f"note: {file}: {remark}", file=sys.stderr)

    own = config.pretrained_model_name_or_path is None
    if own and (note := note_unknown(_all_prompts(config), "a prompt")) is not None:
        print(note, file=sys.stderr)
    assert config.num_inference_steps is not None and config.guidance_scale is not None, "the config is resolved"
    with open_model_of(config) as model:
        for file, embedding in zip(config.embedding, embeddings, strict=True):
            check_fits(embedding, model.embedding_dims, file)
        _check_request(config, model, embeddings)
        sd = load(model)
    prompts = [prompt for prompt in config.prompt for _ in range(config.num_images)]
    images = sd.generate(
        prompts,
        embeddings=embeddings,
        negative_prompt=config.negative_prompt,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        scheduler=config.scheduler,
        height=config.height,
        width=config.width,
        seed=config.seed,
        batch_size=config.batch_size,
        vae_tiling=config.vae_tiling,
        weighted=not config.plain_prompts,
    )

    settings = {
        "negative_prompt": config.negative_prompt,
        "num_inference_steps": config.num_inference_steps,
        "scheduler": sd.scheduler_name(config.scheduler),
        "guidance_scale": config.guidance_scale,
        "model": public_name(sd.name),
        "clip_skip": config.clip_skip,
    }
    paths, grid_path = output_paths(output, len(images))
    for number, (path, prompt, image) in enumerate(zip(paths, prompts, images, strict=True)):
        # With this seed the picture can be drawn again on its own.
        save_png(path, image, {"prompt": prompt, "seed": (config.seed + number) % 2**32, **settings})
    if grid_path is None:
        return paths
    columns = config.num_images if config.num_images > 1 else min(len(images), GRID_COLUMNS)
    save_png(grid_path, grid(images, columns), {"prompt": "\n".join(config.prompt), "seed": config.seed, **settings})
    return [*paths, grid_path]


def _with_stored_name(config: InferConfig, embedding: Embedding) -> tuple[InferConfig, str | None]:
    """Replace the embedding's stored name by its word in all prompts of the config; see `with_stored_name`."""
    negative = [] if config.negative_prompt is None else [config.negative_prompt]
    prompts, note = with_stored_name(embedding, [*config.prompt, *negative])
    count = len(config.prompt)
    return replace(config, prompt=tuple(prompts[:count]), negative_prompt=prompts[count] if negative else None), note


def _all_prompts(config: InferConfig) -> list[str]:
    return [*config.prompt, *([config.negative_prompt] if config.negative_prompt is not None else [])]


def _check_request(config: InferConfig, model: ModelDescription, embeddings: list[Embedding]) -> None:
    """Check sampler, sizes and prompts before the weights are read; warn about likely mistakes."""
    assert config.num_inference_steps is not None, "the config is resolved"
    if (note := model.sampler_choice(config.scheduler).note) is not None:
        print(f"note: {note}", file=sys.stderr)
    model.make_sampler(config.scheduler, config.num_inference_steps)
    model.latent_shape(config.height or model.default_resolution, config.width or model.default_resolution)
    words, _ = combine(embeddings)
    for _ in model.prompt_tokenizers.groups(_all_prompts(config), None, words, not config.plain_prompts):
        pass
    for word in model.unprovided(_all_prompts(config), words):
        print(f"warning: {word} in a prompt is plain text: no --embedding has this word", file=sys.stderr)


def output_paths(output: Path, count: int) -> tuple[list[Path], Path | None]:
    """Files for ``count`` pictures and for their grid: ``out.png``, or ``out-0.png``, ... and ``out-grid.png``."""
    if count == 1:
        return [output], None
    digits = len(str(count - 1))
    numbered = [output.with_name(f"{output.stem}-{number:0{digits}d}{output.suffix}") for number in range(count)]
    return numbered, output.with_name(f"{output.stem}-grid{output.suffix}")
