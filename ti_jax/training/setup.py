"""From a config to what the loop needs: the model, the words, the rows, and the data on the devices."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import tokens
from ..config import TrainConfig
from ..data.images import Pictures, load_images
from ..data.latents import encode_moments
from ..data.prompts import load_templates
from ..embeddings import Embedding, check_fits
from ..embeddings.naming import load_given
from ..embeddings.warn import capital_fault
from ..errors import InputError
from ..pipeline import StableDiffusion
from ..words import same_word
from .step import Dataset, Rows


@dataclass(frozen=True)
class Concept:
    """What is to be learned, and from what.

    Attributes:
      word: the placeholder; its rows come first. words: it and the other learned words, with their numbers of vectors.
      rows: start values, float32 [n, D] for each text encoder. row_mask: bool [n], true where they train.
      others: learned words that stay as they are.
      start: the learned word that the rows start from, under a name of its own; None if they start from a token.
      prompts: the templates with the word in them. pictures: as `load_images` gives them.
      initializer: the words of the model that the rows start from, unless there is a ``start``.
    """

    word: str
    words: dict[str, int]
    rows: dict[str, np.ndarray]
    row_mask: dict[str, np.ndarray]
    others: tuple[Embedding, ...]
    start: Embedding | None
    prompts: list[str]
    pictures: Pictures
    initializer: str | None
    metadata: dict[str, str]

    def embedding(self, rows: Rows, step: int) -> Embedding:
        """The word as it is at ``step``, to be saved."""
        count = self.words[self.word]
        vectors = {name: np.asarray(value)[:count].astype(np.float32) for name, value in rows.items()}
        return Embedding(self.word, vectors, {**self.metadata, "steps": str(step)})


def prepare_concept(config: TrainConfig, sd: StableDiffusion, say: Callable[[str], None]) -> Concept:
    """Check the word, the initializer, the templates and the pictures, in the order in which they are cheap.

    Raises:
      InputError: whatever is wrong with one of them.
    """
    assert config.placeholder_token and config.train_data_dir, "the config is resolved"
    word, count = config.placeholder_token, config.num_vectors
    others = tuple(load_given(config.embeddings))
    for path, other in zip(config.embeddings, others, strict=True):
        check_fits(other, sd.embedding_dims, path)
        for remark in other.remarks:
            say(f"note: {path}: {remark}")

    rows, row_mask = {}, {}
    words, other_rows = tokens.combine(others)
    if same_word(word, words):
        raise InputError(f"placeholder {word!r} is also the word of one of --embeddings; choose another")
    words = {word: count, **words}
    fault = capital_fault(word, count)
    if fault is not None:
        say(f"warning: {fault}")
    start_word = _load_start(config, sd, words, say)
    for name, tokenizer in sd.tokenizers.items():
        tokens.check_new_word(tokenizer, word)
        if start_word is not None:
            start = start_word.vectors[name]
        else:
            assert config.initializer_token is not None, "the config is resolved"
            ids = tokens.initializer_ids(tokenizer, config.initializer_token)
            start = tokens.initial_rows(sd.token_table(name), ids, count)
        rows[name] = np.concatenate([start, other_rows[name]]) if others else start
        row_mask[name] = np.arange(len(rows[name])) < count

    templates = load_templates(config.learnable_property, config.templates)
    prompts = [template.replace("{}", word) for template in templates]
    _check_prompts(sd, prompts, words, word)
    # Also what is drawn later must fit: not after hours of training.
    sd.tokenize(prompts_to_draw(config, word), words)
    pictures = load_images(
        config.train_data_dir,
        config.resolution or sd.default_resolution,
        center_crop=config.center_crop,
        skip_bad=config.skip_bad_images,
        on_skip=say,
    )
    metadata = {
        "base_model": public_name(sd.name),
        "base_model_hash": sd.identity,
        "token": word,
        **_start_metadata(config, start_word),
        "num_vectors": str(count),
        "learnable_property": config.learnable_property,
    }
    return Concept(
        word, words, rows, row_mask, others, start_word, prompts, pictures, config.initializer_token, metadata
    )


def public_name(model: str) -> str:
    """A model's hub id, or of a local folder or file the name alone: the path is nobody else's business."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() or path.is_absolute() else model


def _load_start(
    config: TrainConfig, sd: StableDiffusion, words: Mapping[str, int], say: Callable[[str], None]
) -> Embedding | None:
    """The word of ``--initializer_embedding``, under a name that none of ``words`` has.

    Raises:
      InputError: no such file, not a word, another family, or another number of vectors.
    """
    if config.initializer_embedding is None:
        return None
    name = f"{config.placeholder_token}-start"
    while same_word(name, words):
        name += "-"
    # The file need not say a name that can be one here; "my cat.pt" has none.
    start = Embedding.load(config.initializer_embedding, token=config.placeholder_token)
    where = f"--initializer_embedding {config.initializer_embedding}"
    check_fits(start, sd.embedding_dims, where)
    if start.num_vectors != config.num_vectors:
        raise InputError(
            f"{where}: the word has {start.num_vectors} vectors and --num_vectors is {config.num_vectors}; give "
            f"--num_vectors {start.num_vectors}, or another file (ti-jax embedding prune makes a word shorter)"
        )
    if start.caveat:
        say(f"note: {where}: read as {start.caveat}")
    return Embedding(name, start.vectors, start.metadata)


def _start_metadata(config: TrainConfig, start: Embedding | None) -> dict[str, str]:
    """What a learned word says of where it started; a file is told by its name and the hash of its numbers."""
    if start is None:
        return {"initializer_token": str(config.initializer_token)}
    digest = hashlib.sha256(b"".join(vectors.tobytes() for vectors in start.vectors.values()))
    return {
        "initializer_embedding": Path(str(config.initializer_embedding)).name,
        "initializer_embedding_hash": digest.hexdigest()[:16],
    }


def prompts_to_draw(config: TrainConfig, word: str) -> list[str]:
    """The overview prompts, and the validation prompt if there is one, with the word in them."""
    assert config.overview_prompts is not None, "the config is resolved"
    drawn = [*config.overview_prompts, *([config.validation_prompt] if config.validation_prompt is not None else [])]
    return [prompt.replace("{}", word) for prompt in drawn]


def _check_prompts(sd: StableDiffusion, prompts: list[str], words: dict[str, int], word: str) -> None:
    """Every prompt must hold all rows of the word, or nothing is learned from it and nobody is told."""
    for name, ids in sd.tokenize(prompts, words).items():
        new_ids = sd.vocab_sizes[name] + np.arange(words[word])
        for prompt, row in zip(prompts, ids, strict=True):
            if not np.isin(new_ids, row).all():
                raise InputError(
                    f"prompt {prompt!r} does not hold the new word {word!r} once it is cut into tokens; set it apart "
                    f"with spaces, or choose a word with its own brackets like <{word.strip('<>')}>"
                )


def make_dataset(config: TrainConfig, sd: StableDiffusion, concept: Concept) -> Dataset:
    """Moments and token ids for the device."""
    vae = sd.networks.vae.config
    return Dataset(
        moments=encode_moments(sd, concept.pictures.pixels, with_mirrored=config.flip_probability > 0),
        ids=jax.tree.map(jnp.asarray, sd.tokenize(concept.prompts, concept.words)),
        time_ids=jnp.asarray(time_ids(concept.pictures)),
        flip_probability=jnp.float32(config.flip_probability),
        latent_scale=jnp.float32(vae.scaling_factor),
        latent_shift=jnp.float32(vae.shift_factor or 0.0),
    )


def time_ids(pictures: Pictures) -> np.ndarray:
    """What SDXL is told of a picture (2307.01952, section 2.2): float32 [N, 2, 6], of each one and its mirror image.

    Original height and width, what the crop cut at the top and left of the scaled picture, and the crop's own size.
    """
    resolution = pictures.pixels.shape[1]
    sizes, offsets = pictures.original_sizes, pictures.crop_offsets
    # Of an odd overhang the right loses a pixel more than the left; in the mirror it is the left.
    overhang = np.maximum(sizes[:, 1] - sizes[:, 0], 0)
    right = np.round((overhang - overhang // 2) * resolution / sizes.min(axis=1)).astype(offsets.dtype)
    mirrored = np.stack([offsets[:, 0], right], axis=1)
    target = np.full((len(sizes), 2), resolution)
    both = [np.concatenate([sizes, cut, target], axis=1) for cut in (offsets, mirrored)]
    return np.stack(both, axis=1).astype(np.float32)


def usual_norms(sd: StableDiffusion) -> dict[str, float]:
    """The median norm of the frozen token embeddings, for each text encoder."""
    return {name: float(np.median(np.linalg.norm(sd.token_table(name), axis=-1))) for name in sd.tokenizers}


def row_figures(concept: Concept, rows: Rows, usual_norms: Mapping[str, float]) -> list[dict[str, Any]]:
    """How far each row of the word has moved, for each text encoder, against the vocabulary's usual length.

    Returns:
      ``encoder``, ``row``, ``distance`` from its start (Euclidean), ``cosine`` to its start, ``norm``, and
      ``usual_norm``, from ``usual_norms``.
    """
    figures = []
    for name, value in rows.items():
        for row, (now, start) in enumerate(
            zip(np.asarray(value)[: concept.words[concept.word]], concept.rows[name], strict=False)
        ):
            norm, start_norm = float(np.linalg.norm(now)), float(np.linalg.norm(start))
            figures.append(
                {
                    "encoder": name,
                    "row": row,
                    "distance": float(np.linalg.norm(now - start)),
                    "cosine": float(now @ start / max(norm * start_norm, 1e-12)),
                    "norm": norm,
                    "usual_norm": usual_norms[name],
                }
            )
    return figures
