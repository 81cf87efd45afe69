"""A small classifier of a picture's attributes: the subject's, such as hair, and its surroundings'.

It comes with a model whose training pictures are fully labelled, such as the embedded one, in the folder ``judge`` of
the diffusers folder: ``config.json`` and ``model.safetensors``. It was trained only on rendered pictures like the
model's training set, never on pictures drawn by a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save

from ti_jax.batches import in_batches
from ti_jax.errors import InputError
from ti_jax.files import ensure_writable_folder, write_together
from ti_jax.models.layers import Conv2d, GroupNorm
from ti_jax.ops.matmul import exact_products

Tree = Mapping[str, Any]

FOLDER = "judge"
BATCH = 64


@dataclass(frozen=True)
class Probe:
    """A prompt to draw a word with (``{}`` is its place), and what else must be in the picture.

    ``expects`` has pairs of an attribute's name and its value.
    """

    prompt: str
    expects: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class JudgeConfig:
    """A judge's configuration.

    Attributes:
      attributes: name and possible values (words) of each attribute.
      identity: names of the attributes that belong to the subject; the others describe its surroundings.
      style: names of the attributes that belong to the style, if the model has styles.
      probes: prompts in the model's vocabulary that a learned word for somebody is tested with.
      style_probes: the same for a word for a style.
      patch: side in pixels of a patch, one position of the first level.
      channels: of each level; each level after the first halves the resolution.
      hidden: width of the last hidden layer.
      side: height and width of a picture in pixels.
    """

    attributes: tuple[tuple[str, tuple[str, ...]], ...]
    identity: tuple[str, ...]
    probes: tuple[Probe, ...] = ()
    patch: int = 4
    channels: tuple[int, ...] = (64, 96, 128)
    hidden: int = 256
    side: int = 64
    style: tuple[str, ...] = ()
    style_probes: tuple[Probe, ...] = ()

    def concept(self, learnable_property: str) -> tuple[tuple[str, ...], tuple[Probe, ...]]:
        """What a word for an "object" or a "style" is, and what it is tested with.

        A judge of a world without styles takes every word for somebody.
        """
        is_style = learnable_property == "style" and self.style
        return (self.style, self.style_probes) if is_style else (self.identity, self.probes)

    @property
    def words(self) -> dict[str, tuple[str, ...]]:
        """The possible values of each attribute."""
        return dict(self.attributes)


class JudgeNetwork(nn.Module):
    """Pictures [B, side, side, 3] in [-1, 1] -> logits of all attributes [B, words], and each layer's features.

    The last of the features are [B, hidden].
    """

    config: JudgeConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Classify pictures."""
        batch, height, width, _ = pixels.shape
        patch = self.config.patch
        patches = pixels.reshape(batch, height // patch, patch, width // patch, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        hidden = patches.reshape(batch, height // patch, width // patch, 3 * patch**2)
        hidden = nn.silu(nn.Dense(self.config.channels[0], name="patches")(hidden))
        features = []
        for level, channels in enumerate(self.config.channels):
            if level:
                hidden = Conv2d(channels, stride=2, name=f"down_{level}")(hidden)
            hidden = GroupNorm(8, 1e-5, silu=True, name=f"norm_{level}")(hidden)
            hidden = hidden + nn.silu(Conv2d(channels, name=f"conv_{level}")(hidden))
            features.append(hidden)
        hidden = nn.silu(nn.Dense(self.config.hidden, name="hidden")(hidden.reshape(hidden.shape[0], -1)))
        features.append(hidden)
        return nn.Dense(sum(len(words) for _, words in self.config.attributes), name="answer")(hidden), features


def split_logits(config: JudgeConfig, logits: jax.Array) -> dict[str, jax.Array]:
    """Split the logits of all attributes [..., words] by attribute."""
    sizes = [len(words) for _, words in config.attributes]
    parts = jnp.split(logits, list(np.cumsum(sizes)[:-1]), axis=-1)
    return dict(zip((name for name, _ in config.attributes), parts, strict=True))


@partial(jax.jit, static_argnums=0)
def _read(config: JudgeConfig, params: Tree, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Probabilities of each attribute's words, side by side [B, words], and the last hidden layer's features."""
    # Flax's type of the result includes a tuple that is returned only with mutable collections.
    with exact_products(jnp.float32):
        answer: Any = JudgeNetwork(config).apply({"params": params}, pixels)
    parts = [jax.nn.softmax(part) for part in split_logits(config, answer[0]).values()]
    return jnp.concatenate(parts, axis=-1), answer[1][-1]


@dataclass(frozen=True)
class Judge:
    """A judge with its weights."""

    config: JudgeConfig
    params: Tree

    def probabilities(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 pictures [N, side, side, 3] -> float32 [N, words] for each attribute.

        Raises:
          InputError: pictures of another size.
        """
        words = self.config.words
        parts = np.split(self._run(pixels)[0], np.cumsum([len(each) for each in words.values()])[:-1], axis=-1)
        return dict(zip(words, parts, strict=True))

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 pictures [N, side, side, 3] -> unit vectors float32 [N, hidden], close for similar pictures."""
        features = self._run(pixels)[1]
        return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)

    def _run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        side = self.config.side
        if pixels.ndim != 4 or pixels.shape[1:] != (side, side, 3) or pixels.dtype != np.uint8 or not len(pixels):
            raise InputError(
                f"the judge reads uint8 pictures [N, {side}, {side}, 3], at least one, not {pixels.dtype} "
                f"{list(pixels.shape)}"
            )
        return in_batches(
            lambda batch: _read(self.config, self.params, (batch / 127.5 - 1.0).astype(np.float32)), pixels, BATCH
        )

    def read(self, pixels: np.ndarray) -> list[dict[str, str]]:
        """uint8 pictures [N, side, side, 3] -> the likeliest word of each attribute, for each picture."""
        best = {name: part.argmax(-1) for name, part in self.probabilities(pixels).items()}
        words = self.config.words
        return [{name: words[name][best[name][index]] for name in words} for index in range(len(pixels))]

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into `folder`."""
        config = {
            "attributes": {name: list(words) for name, words in self.config.attributes},
            "identity": list(self.config.identity),
            "probes": _as_json(self.config.probes),
            "patch": self.config.patch,
            "channels": list(self.config.channels),
            "hidden": self.config.hidden,
            "side": self.config.side,
        }
        if self.config.style:
            config |= {"style": list(self.config.style), "style_probes": _as_json(self.config.style_probes)}
        leaves = flatten_dict(self.params, sep=".")
        weights = {name: np.asarray(leaf, np.float16) for name, leaf in leaves.items()}
        ensure_writable_folder(folder)
        write_together(
            {
                folder / "config.json": (json.dumps(config, indent=2) + "\n").encode(),
                folder / "model.safetensors": save(weights),
            }
        )

    @classmethod
    def load(cls, model_folder: Path) -> Judge:
        """Load the judge that comes with the diffusers folder `model_folder`.

        Raises:
          InputError: there is none, or it is broken.
        """
        folder = Path(model_folder) / FOLDER
        try:
            values = json.loads((folder / "config.json").read_text())
            leaves = load_file(folder / "model.safetensors")
            values["attributes"] = tuple((name, tuple(words)) for name, words in values["attributes"].items())
            for name in ("probes", "style_probes"):
                values[name] = tuple(
                    Probe(probe["prompt"], tuple(probe["expects"].items())) for probe in values.get(name, ())
                )
            for name in ("identity", "style", "channels"):
                values[name] = tuple(values.get(name, ()))
            config = JudgeConfig(**values)
        except FileNotFoundError as error:
            raise InputError(
                f"{model_folder}: no judge comes with this model (no {folder / 'config.json'}), so that the attributes "
                "of its pictures cannot be scored"
            ) from error
        except Exception as error:
            raise InputError(f"{folder}: the judge cannot be read: {error}") from error
        shapes = flatten_dict(judge_shapes(config), sep=".")
        if {name: leaf.shape for name, leaf in leaves.items()} != {name: leaf.shape for name, leaf in shapes.items()}:
            raise InputError(f"{folder}: the weights do not match config.json")
        # Converted by NumPy: JAX compiles a program for each shape.
        exact = {name: jnp.asarray(leaf.astype(np.float32)) for name, leaf in leaves.items()}
        return cls(config, unflatten_dict(exact, sep="."))


def _as_json(probes: tuple[Probe, ...]) -> list[dict[str, Any]]:
    return [{"prompt": probe.prompt, "expects": dict(probe.expects)} for probe in probes]


def judge_shapes(config: JudgeConfig) -> Tree:
    """The parameter tree of a judge as `jax.ShapeDtypeStruct`."""
    pixels = jax.ShapeDtypeStruct((1, config.side, config.side, 3), jnp.float32)
    return jax.eval_shape(JudgeNetwork(config).init, jax.random.key(0), pixels)["params"]
