"""An open model: one interface to a diffusers folder and a single-file checkpoint."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax.traverse_util import flatten_dict

from ti_jax.errors import InputError
from ti_jax.models.components import TEXT_ENCODERS
from ti_jax.weights.config_files import pipeline_components, read_component_config, read_json
from ti_jax.weights.identity import Identity
from ti_jax.weights.load import FAULTS, Tree, load_component, plan, read_tree, refuse_faults
from ti_jax.weights.single_file import Checkpoint, open_checkpoint
from ti_jax.weights.tokenizers import clip_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


class Source(abc.ABC):
    """An open model.

    Attributes:
      path: of the folder or file.
      configs: contents of ``config.json`` by component, and of ``scheduler_config.json`` as ``scheduler``.
      zeros_for_empty_prompt: ``force_zeros_for_empty_prompt`` of ``model_index.json``.
    """

    path: Path
    configs: Mapping[str, Mapping[str, Any]]
    zeros_for_empty_prompt: bool

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the text encoders that it has."""
        return tuple(name for name in TEXT_ENCODERS if name in self.configs)

    @abc.abstractmethod
    def load(self, shapes: Mapping[str, Tree], dtype: Any, identity: Identity) -> dict[str, Tree]:
        """Parameter tree of each component on the default device, with leaves of `dtype`.

        Args:
          shapes: by component, from `ti_jax.models.shapes.param_shapes`.
          identity: each tensor is added to it.

        Raises:
          InputError: files that are missing or broken; or names, shapes or dtypes that differ from the modules'.
        """

    @abc.abstractmethod
    def tokenizer(self, text_encoder: str) -> CLIPTokenizer:
        """The tokenizer of one text encoder; InputError if it is missing or broken."""


class _Folder(Source):
    def __init__(self, path: Path, variant: str | None) -> None:
        index = read_component_config(path, None)
        self.path, self._variant = path, variant
        text_encoders = [name for name in TEXT_ENCODERS if name in pipeline_components(index, path)]
        components = (*text_encoders, "unet", "vae", "scheduler")
        self.configs = {name: read_component_config(path, name) for name in components}
        self.zeros_for_empty_prompt = bool(index.get("force_zeros_for_empty_prompt", False))

    def load(self, shapes: Mapping[str, Tree], dtype: Any, identity: Identity) -> dict[str, Tree]:
        """One component after the other."""
        return {
            name: load_component(self.path, name, tree, dtype, self._variant, identity) for name, tree in shapes.items()
        }

    def tokenizer(self, text_encoder: str) -> CLIPTokenizer:
        """From the files in its folder."""
        return load_tokenizer(self.path, text_encoder.replace("text_encoder", "tokenizer"))


class _SingleFile(Source):
    def __init__(self, path: Path, checkpoint: Checkpoint) -> None:
        self.path, self._checkpoint = path, checkpoint
        self.configs = checkpoint.configs
        self.zeros_for_empty_prompt = checkpoint.family.zeros_for_empty_prompt

    def load(self, shapes: Mapping[str, Tree], dtype: Any, identity: Identity) -> dict[str, Tree]:
        """All components are checked before any is read: a file that lacks a tensor of the VAE is refused at once."""
        faults: dict[str, list[str]] = {kind: [] for kind in FAULTS}
        faults["unexpected"] += self._checkpoint.unexpected
        placed, targets = {}, {name: flatten_dict(tree) for name, tree in shapes.items()}
        for name in shapes:
            placed[name], of_component = plan([self._checkpoint.components[name]], name, targets[name])
            of_component["missing"] = [f"{name}/{path}" for path in of_component["missing"]]
            for kind, names in of_component.items():
                faults[kind] += dict.fromkeys(names)  # only once for a tensor with three parts
        refuse_faults(faults, f"{self.path}: tensors that are not those of a {self._checkpoint.family.name} checkpoint")
        return {name: read_tree(placed[name], name, targets[name], dtype, identity) for name in shapes}

    def tokenizer(self, text_encoder: str) -> CLIPTokenizer:
        """CLIP's own tokenizer, since the file has none."""
        pad_tokens = {encoder.name: encoder.pad_token for encoder in self._checkpoint.family.text_encoders}
        return clip_tokenizer(pad_tokens[text_encoder])


class _WithVae(Source):
    """A model whose autoencoder comes from another folder (``--vae``)."""

    def __init__(self, source: Source, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            inside = " (its folder vae has)" if (folder / "vae" / "config.json").is_file() else ""
            raise InputError(
                f"--vae {folder}: not an autoencoder in diffusers' layout, which is a folder with config.json and "
                f"weights{inside}; give such a folder"
            )
        config = read_json(folder / "config.json")
        if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise InputError(f"--vae {folder}: a {config['_class_name']}; only AutoencoderKL is implemented")
        own, other = (each.get("scaling_factor", 0.18215) for each in (source.configs["vae"], config))
        if own != other:
            raise InputError(
                f"--vae {folder}: its latents are scaled by {other} and the model's by {own}: it is for another family "
                "of models"
            )
        self._source, self._folder = source, folder
        self.path, self.zeros_for_empty_prompt = source.path, source.zeros_for_empty_prompt
        self.configs = {**source.configs, "vae": config}

    def load(self, shapes: Mapping[str, Tree], dtype: Any, identity: Identity) -> dict[str, Tree]:
        """The autoencoder from its folder, all else from the model."""
        rest = {name: tree for name, tree in shapes.items() if name != "vae"}
        vae = load_component(self._folder, "vae", shapes["vae"], dtype, None, identity, subfolder="")
        return {**self._source.load(rest, dtype, identity), "vae": vae}

    def tokenizer(self, text_encoder: str) -> CLIPTokenizer:
        """The model's."""
        return self._source.tokenizer(text_encoder)


@contextlib.contextmanager
def open_source(
    path: Path,
    variant: str | None = None,
    prediction_type: str | None = None,
    text_only: bool = False,
    vae: Path | None = None,
) -> Iterator[Source]:
    """Open the diffusers folder or the single-file checkpoint at `path` (see `ti_jax.weights.hub.resolve`).

    Args:
      variant: of a folder's weight files, e.g. ``fp16``.
      prediction_type: ``epsilon`` or ``v_prediction``: what the UNet predicts, if the model does not say.
      text_only: only the text encoders are read; what the UNet predicts need not be known.
      vae: folder of an autoencoder that replaces the model's own.

    Raises:
      InputError: it cannot be read, is another kind of model, or says another prediction type.
    """
    if path.is_file():
        with open_checkpoint(path, prediction_type, text_only) as checkpoint:
            single_file = _SingleFile(path, checkpoint)
            yield single_file if vae is None else _WithVae(single_file, vae)
        return
    folder = _Folder(path, variant)
    said = folder.configs["scheduler"].get("prediction_type", "epsilon")
    if prediction_type not in (None, said):
        raise InputError(
            f"--prediction_type {prediction_type}: {path} says {said} in its scheduler/scheduler_config.json; leave "
            "the flag out, or correct that file"
        )
    yield folder if vae is None else _WithVae(folder, vae)
