"""A learned word in any format that ti_jax writes, and what to do with the file."""

from __future__ import annotations

from pathlib import Path

from ti_jax.config import TrainConfig
from ti_jax.config.concepts import slug
from ti_jax.embeddings import Embedding
from ti_jax.embeddings.formats import FORMATS, WRITTEN
from ti_jax.embeddings.warn import word_warnings
from ti_jax.errors import InputError
from ti_jax.training.run_folder import EMBEDDING_FILE
from ti_jax.training.uses import Use, base_of, example_prompt, uses

SUFFIXES = {form.name: (form.suffixes or (".safetensors",))[0] for form in FORMATS if form.name in WRITTEN}


def save_as(word: Path, format_name: str, folder: Path) -> tuple[list[Path], list[str]]:
    """Write a word in a format under a name of its own.

    Args:
      word: its file in a run's folder. folder: for the new files, which must be empty.

    Returns:
      The files (two of an SDXL word for diffusers), and warnings about the word's name.

    Raises:
      InputError: no such format, or a word that it cannot hold.
    """
    if format_name not in SUFFIXES:
        raise InputError(f"format {format_name!r}: must be one of {', '.join(SUFFIXES)}")
    embedding = Embedding.load(word)
    # diffusers finds the second half of a word by the first one's name.
    name = EMBEDDING_FILE if len(embedding.vectors) > 1 and format_name == "diffusers" else None
    embedding.save(folder / (name or f"{slug(embedding.token)}{SUFFIXES[format_name]}"), format_name)
    return sorted(folder.iterdir()), word_warnings(embedding)


def how_to_use(word: Path, config: TrainConfig) -> list[Use]:
    """How each program takes the word that a run has saved."""
    embedding = Embedding.load(word)
    base = base_of(config, str(embedding.metadata.get("base_model", "the model")))
    return uses(embedding, example_prompt(config), f"path/to/{word.parent.name}", base)
