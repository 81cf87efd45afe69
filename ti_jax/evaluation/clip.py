"""CLIP embeddings of pictures and texts, from any CLIP checkpoint in transformers' layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ti_jax.batches import in_batches
from ti_jax.errors import InputError
from ti_jax.models.clip_text import CLIPTextConfig
from ti_jax.models.clip_vision import CLIPModel, CLIPVisionConfig
from ti_jax.models.shapes import param_shapes
from ti_jax.ops.matmul import exact_products
from ti_jax.weights.config_files import read_json
from ti_jax.weights.load import load_component
from ti_jax.weights.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BATCH = 16
# OpenAI's values, for a checkpoint without a preprocessor_config.json.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@partial(jax.jit, static_argnums=(0, 1))
def _run(model: CLIPModel, method: str, params: Any, inputs: Any) -> Any:
    with exact_products(model.dtype):
        return model.apply({"params": params}, inputs, method=method)


def read_clip_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a CLIP model with both towers; InputError if the folder is not one."""
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: not the folder of a CLIP model, it has no config.json (to get one: hf download "
            "openai/clip-vit-large-patch14 --local-dir clip)"
        )
    config = read_json(folder / "config.json")
    if config.get("model_type") != "clip" or not all(
        isinstance(config.get(name), dict) for name in ("text_config", "vision_config")
    ):
        raise InputError(f"{folder}: not a CLIP model with two towers (model_type {config.get('model_type')!r})")
    return config


@dataclass(frozen=True)
class CLIP:
    """A CLIP model with its weights, its tokenizer, and the mean and standard deviation to normalise pictures with."""

    model: CLIPModel
    params: Any
    tokenizer: CLIPTokenizer
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_pretrained(cls, folder: Path) -> CLIP:
        """Read a folder such as that of ``openai/clip-vit-large-patch14``, float32.

        Raises:
          InputError: no such model, an option that is not implemented, or weights that do not match.
        """
        folder = Path(folder)
        config = read_clip_config(folder)
        width = config.get("projection_dim", 512)
        # A tower's own "architectures" names the class that it was once saved with.
        text = {**config["text_config"], "architectures": ["CLIPTextModel"]}
        vision = {**config["vision_config"], "architectures": None}
        model = CLIPModel(
            CLIPTextConfig.from_dict(_without(text, "model_type")),
            CLIPVisionConfig.from_dict(_without(vision, "model_type")),
            width,
        )
        side = model.vision_config.image_size
        shapes = param_shapes(
            model,
            jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),
            jax.ShapeDtypeStruct((1, model.text_config.max_position_embeddings), jnp.int32),
        )
        params = load_component(folder, "clip", shapes, jnp.float32, subfolder="")
        preprocessor = folder / "preprocessor_config.json"
        values = read_json(preprocessor) if preprocessor.exists() else {}
        mean, std = values.get("image_mean", IMAGE_MEAN), values.get("image_std", IMAGE_STD)
        return cls(model, params, load_tokenizer(folder, ""), tuple(mean), tuple(std))

    def image_features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Pictures of any size, at least one -> unit vectors float32 [N, projection_dim]."""
        side = self.model.vision_config.image_size
        pixels = [preprocess(image, side, self.mean, self.std) for image in images]
        return self._in_batches("image_features", np.stack(pixels))

    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Texts, at least one, truncated to the model's positions -> unit vectors float32 [N, projection_dim]."""
        length = self.model.text_config.max_position_embeddings
        ids = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=length).input_ids
        return self._in_batches("text_features", np.array(ids, np.int32))

    def _in_batches(self, method: str, inputs: np.ndarray) -> np.ndarray:
        return in_batches(lambda batch: _run(self.model, method, self.params, batch), inputs, BATCH)


def preprocess(image: Image.Image, side: int, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Resize the shorter edge to `side` (bicubic), crop the centre, normalise: float32 [side, side, 3].

    Held to transformers' ``CLIPImageProcessor``.
    """
    width, height = image.size
    shorter = min(width, height)
    image = image.convert("RGB").resize((side * width // shorter, side * height // shorter), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255.0
    return (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def _without(config: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != name}
