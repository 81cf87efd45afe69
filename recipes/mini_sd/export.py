"""Parameter trees -> a diffusers folder in half precision, which ti_jax and diffusers read alike."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import base
import numpy as np
import vae
import world
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from transformers import CLIPTokenizer

from ti_jax.weights.names import CONV2D, DENSE, FLAX_NAMES_OF_WEIGHT

Tree = Any
NUMBERED_IN_PYTORCH_TOO = ("linear_1", "linear_2")  # names, not list indices
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCALING_DIGITS = 6


def state_dict(tree: Tree, prefix: str = "") -> dict[str, np.ndarray]:
    """PyTorch's names and layouts of a tree's leaves, float16; the inverse of `ti_jax.weights.names`."""
    tensors = {}
    for path, leaf in flatten_dict(tree).items():
        words = [word if word in NUMBERED_IN_PYTORCH_TOO else re.sub(r"_(\d+)$", r".\1", word) for word in path]
        array = np.asarray(leaf, np.float32)
        if words[-1] == "kernel":
            array = array.transpose(np.argsort(CONV2D if array.ndim == 4 else DENSE))
        if words[-1] in FLAX_NAMES_OF_WEIGHT:
            words[-1] = "weight"
        tensors[prefix + ".".join(words)] = np.ascontiguousarray(array, np.float16)
    return tensors


def export(folder: Path, params: Tree, vae_params: Tree, scaling_factor: float, tokenizer: CLIPTokenizer) -> None:
    """Write the model to `folder`, which already has the tokenizer's files."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.40.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    vae_config = vae.CONFIG | {"scaling_factor": round(scaling_factor, SCALING_DIGITS)}
    _write(folder / "model_index.json", index)
    _write(folder / "scheduler" / "scheduler_config.json", base.SCHEDULER_CONFIG)
    _write(folder / "vae" / "config.json", vae_config)
    _write(folder / "unet" / "config.json", base.UNET_CONFIG)
    _write(folder / "text_encoder" / "config.json", base.text_config(len(tokenizer)))
    metadata = {"format": "pt"}
    save_file(state_dict(vae_params), folder / "vae" / WEIGHTS, metadata)
    save_file(state_dict(params["unet"]), folder / "unet" / WEIGHTS, metadata)
    text = state_dict(params["text_encoder"], "text_model.")
    save_file(text, folder / "text_encoder" / "model.safetensors", metadata)


def write_card(folder: Path, template: str, figures: dict[str, Any]) -> None:
    """The model card: `template` filled with the model's vocabulary and the `figures` of `measure.measure`."""
    words = [f"- {name.replace('_', ' ')}: {', '.join(of)}" for name, of in world.ATTRIBUTES.items()]
    names = [*world.ATTRIBUTES]
    rows = {
        "true renders": "renders",
        f"through the autoencoder ({figures['vae_psnr']:.1f} dB)": "vae",
        "drawn from full captions": "drawn",
        "true renders in a style": "styled/renders",
        f"through the autoencoder ({figures['styled/vae_psnr']:.1f} dB)": "styled/vae",
        "drawn from full captions with a style": "styled/drawn",
    }
    table = ["| share that the judge reads right | " + " | ".join(name.replace("_", " ") for name in names) + " |"]
    table += ["|---" * (1 + len(names)) + "|"]
    for label, kind in rows.items():
        shares = [f"{figures[kind][name]:.2f}" if name in figures[kind] else "" for name in names]
        table.append(f"| {label} | " + " | ".join(shares) + " |")
    text = template.replace("{count}", str(len(world.vocabulary())))
    text = text.replace("{words}", "\n".join(words)).replace("{figures}", "\n".join(table))
    (folder / "README.md").write_text(text)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")
