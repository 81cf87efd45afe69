"""A single-file checkpoint in the original latent-diffusion layout, read as if it were a diffusers folder."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ti_jax.errors import InputError
from ti_jax.models.clip_text import CLIPTextConfig
from ti_jax.models.unet_config import UNetConfig
from ti_jax.models.vae import VAEConfig
from ti_jax.weights import ldm_configs
from ti_jax.weights.families import UNET, VAE, Family, Shapes, identify
from ti_jax.weights.files import (
    PICKLE,
    SAFETENSORS,
    PickleFile,
    Tensors,
    container,
    load_pickle,
    open_safetensors,
    state_dict,
)
from ti_jax.weights.ldm_names import Part, inside, is_buffer, open_clip_parts, renamed, unet_modules, vae_modules

Components = Mapping[str, Mapping[str, Any]]


class Checkpoint(NamedTuple):
    """An open single-file checkpoint.

    Attributes:
      family: its model family.
      configs: by component, the contents of its ``config.json``; also ``scheduler``.
      components: by component, its tensors under the names of a diffusers folder.
      unexpected: names that belong to no component and are not known to be other data.
    """

    family: Family
    configs: Components
    components: Mapping[str, Tensors]
    unexpected: list[str]


@contextlib.contextmanager
def open_checkpoint(path: Path, prediction_type: str | None, text_only: bool = False) -> Iterator[Checkpoint]:
    """Open a ``.safetensors`` or a PyTorch checkpoint; its first bytes show which, and its tensors show the family.

    Args:
      prediction_type: what the UNet predicts, if the file does not say.
      text_only: only the text encoders are read; what the UNet predicts need not be known.

    Raises:
      InputError: a file that is broken or refused, or no checkpoint of Stable Diffusion 1.x, 2.x or XL; or what it
        predicts is not known.
    """
    with open_file(path) as file:
        family = identify(path, file.shapes)
        scheduler = None if text_only else scheduler_config(path, file, family, prediction_type)
        try:
            if scheduler is None:
                configs = text_configs(file.shapes, family)
            else:
                configs = component_configs(file.shapes, family, scheduler["prediction_type"])
                check_widths(family, configs)
            renames = component_names(file.shapes, family, configs)
        except InputError as error:
            raise InputError(f"{path}: not a {family.name} checkpoint that ti_jax reads: {error}") from error
        taken = {name for parts in renames.values() for name in parts}
        yield Checkpoint(
            family,
            configs if scheduler is None else {**configs, "scheduler": scheduler},
            {component: RenamedTensors(file, parts) for component, parts in renames.items()},
            [] if text_only else [name for name in file.shapes if name not in taken and not is_buffer(name)],
        )


class _Anything:
    """Stands in for a PyTorch Lightning class that the first checkpoints contain; its contents are not used."""


STAND_INS = ((_Anything, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),)


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[Tensors]:
    """The tensors of a single-file checkpoint: safetensors, or a pickle with or without a ``state_dict`` in it.

    Decided by the first bytes, because fine-tunes are shared under either suffix.

    Raises:
      InputError: as `ti_jax.weights.files.open_tensors`, or the file is of another kind.
    """
    try:
        kind, start = container(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if kind == SAFETENSORS:
        with open_safetensors(path) as tensors:
            yield tensors
    elif kind == PICKLE:
        content = load_pickle(path, STAND_INS)
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        yield PickleFile(path, state_dict(path, content))
    else:
        what = "an empty file" if not start else "neither a safetensors file nor a PyTorch checkpoint"
        raise InputError(f"{path}: {what}; download it again")


def text_configs(shapes: Shapes, family: Family) -> dict[str, dict[str, Any]]:
    """Configuration of each text encoder, from the tensors' shapes."""
    return {encoder.name: ldm_configs.text_encoder_config(shapes, encoder) for encoder in family.text_encoders}


def component_configs(shapes: Shapes, family: Family, prediction_type: str) -> dict[str, dict[str, Any]]:
    """Configuration of each network, from the tensors' shapes."""
    return {
        **text_configs(shapes, family),
        "unet": ldm_configs.unet_config(shapes, family, prediction_type),
        "vae": ldm_configs.vae_config(shapes, family, prediction_type),
    }


def check_widths(family: Family, configs: Components) -> None:
    """Raise InputError if the text encoders' sizes are unknown, or do not match the UNet's cross-attention."""
    width = sum(CLIPTextConfig.from_dict(configs[encoder.name]).hidden_size for encoder in family.text_encoders)
    wanted = configs["unet"]["cross_attention_dim"]
    if width != wanted:
        raise InputError(f"its UNet takes a text of width {wanted} where the text encoder gives {width}")


def component_names(shapes: Shapes, family: Family, configs: Components) -> dict[str, dict[str, list[Part]]]:
    """By component of `configs`: name in the file -> tensors of a diffusers folder in it; empty if it is not used.

    Names that are missing here belong to no component.
    """
    parts: dict[str, dict[str, list[Part]]] = {}
    for encoder in family.text_encoders:
        found: dict[str, list[Part]] = {}
        unused: list[str] = []
        if encoder.layers_unused:
            # The layers after the last one that is used, and the projection.
            last = configs[encoder.name]["num_hidden_layers"]
            unused = ["text_projection", f"transformer.resblocks.{last}."]
        for name, rest in inside(shapes, encoder.prefix):
            if is_buffer(name):
                continue
            if any(rest == word or (word.endswith(".") and rest.startswith(word)) for word in unused):
                found[name] = []
            elif encoder.layout == "transformers":
                found[name] = [Part(rest)]
            elif of_name := open_clip_parts(rest):
                found[name] = of_name
        parts[encoder.name] = found
    if "unet" not in configs:
        return parts
    for component, prefix, modules in (
        ("unet", UNET, unet_modules(UNetConfig.from_dict(configs["unet"]))),
        ("vae", VAE, vae_modules(VAEConfig.from_dict(configs["vae"]))),
    ):
        news = ((name, renamed(rest, modules)) for name, rest in inside(shapes, prefix))
        parts[component] = {name: [Part(new)] for name, new in news if new is not None}
    return parts


def scheduler_config(path: Path, file: Tensors, family: Family, prediction_type: str | None) -> dict[str, Any]:
    """``scheduler_config.json`` of the family, with what this model predicts.

    In this order: a marker among the tensors (SDXL fine-tunes have an empty tensor ``v_pred``, and ``ztsnr`` for zero
    terminal SNR); `prediction_type`; the header (``modelspec.prediction_type`` of kohya's programs,
    ``modelspec.predict_key`` of ComfyUI); the family's default.

    Raises:
      InputError: `prediction_type` contradicts the marker; or nothing says what the model predicts.
    """
    if "v_pred" in file.shapes:
        if prediction_type not in (None, "v_prediction"):
            raise InputError(
                f"{path}: says that it predicts v (it has a tensor v_pred), against --prediction_type "
                f"{prediction_type}; leave that out"
            )
        prediction_type = "v_prediction"
    said = file.metadata.get("modelspec.prediction_type") or file.metadata.get("modelspec.predict_key")
    of_header = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}.get(said or "")
    prediction_type = prediction_type or of_header or family.prediction_type
    if prediction_type is None:
        raise InputError(
            f"{path}: a {family.name} checkpoint, which does not say what it predicts; add --prediction_type "
            "v_prediction (models of 768 pixels) or --prediction_type epsilon (of 512 pixels)"
        )
    config = {**family.scheduler, "prediction_type": prediction_type}
    if "ztsnr" in file.shapes:
        # Sampling must start at the last timestep, which is pure noise (arXiv 2305.08891).
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


class RenamedTensors(Tensors):
    """Tensors of a file under other names; some are a part of a tensor in the file.

    A tensor with several parts is read once, and kept until all its parts have been read.
    """

    def __init__(self, file: Tensors, parts: Mapping[str, list[Part]]) -> None:
        self._file = file
        self._sources: dict[str, tuple[str, Part]] = {}
        self.shapes, self.dtypes = {}, {}
        for name, parts_of_name in parts.items():
            for part in parts_of_name:
                self._sources[part.name] = (name, part)
                self.shapes[part.name] = _shape_of(part, file.shapes[name])
                self.dtypes[part.name] = file.dtypes[name]
        self._left = Counter(name for name, _ in self._sources.values())
        self._kept: dict[str, np.ndarray] = {}

    def label(self, name: str) -> str:
        """The tensor's name in the file."""
        return self._sources[name][0]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own."""
        source, part = self._sources[name]
        whole = self._kept.pop(source) if source in self._kept else self._file.read(source)
        self._left[source] -= 1
        if self._left[source]:
            self._kept[source] = whole
        if part.third is not None:
            rows = len(whole) // 3
            # A copy: a view would keep the whole tensor in memory.
            return whole[part.third * rows : (part.third + 1) * rows].copy()
        return whole.T if part.transposed else whole


def _shape_of(part: Part, shape: tuple[int, ...]) -> tuple[int, ...]:
    if part.third is not None and shape and shape[0] % 3 == 0:
        return (shape[0] // 3, *shape[1:])
    return shape[::-1] if part.transposed else shape
