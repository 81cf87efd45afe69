"""The JSON files of a diffusers folder: which pipeline it is, and each component's configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ti_jax.errors import InputError

MODEL_INDEX = "model_index.json"

# Pipeline class -> its required components. Others (the safety checker) are not read.
STABLE_DIFFUSION = ("text_encoder", "tokenizer", "unet", "vae", "scheduler")
PIPELINES = {
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": (*STABLE_DIFFUSION, "text_encoder_2", "tokenizer_2"),
}


def config_name(component: str | None) -> str:
    """Path of a component's configuration inside a diffusers folder; None is the pipeline itself."""
    if component is None:
        return MODEL_INDEX
    return f"{component}/{'scheduler_config' if component == 'scheduler' else 'config'}.json"


def read_component_config(folder: Path, component: str | None) -> dict[str, Any]:
    """Configuration of one component of a diffusers folder (``scheduler``, ``unet``, ...); None: ``model_index.json``.

    Raises:
      InputError: the file is missing, cannot be read, or is not a JSON object.
    """
    return read_json(Path(folder) / config_name(component))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file at `path`; InputError if it is missing or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; a diffusers model has its configuration there") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{path}: not a JSON file ({error}); download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(content).__name__}; download it again")
    return content


def pipeline_components(index: Mapping[str, Any], where: object) -> tuple[str, ...]:
    """Names of the components to read, from the contents of a ``model_index.json``.

    Raises:
      InputError: the pipeline (named `where`) is not a text-to-image Stable Diffusion, or lacks a component.
    """
    pipeline = index.get("_class_name")
    if isinstance(pipeline, list) and len(pipeline) == 2:
        # For a pipeline with custom code, diffusers saves [module, class].
        pipeline = pipeline[1]
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise InputError(f"{where}: a {pipeline}, which ti_jax does not read; it reads {' and '.join(PIPELINES)}")
    components = PIPELINES[pipeline]
    missing = [name for name in components if not isinstance(index.get(name), list) or None in index[name]]
    if missing:
        raise InputError(f"{where}: a {pipeline} without {', '.join(missing)}; give a complete model")
    return components
