"""A Stable Diffusion without its weights: configuration, tokenizers and noise schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ti_jax.config import ModelSettings, TrainConfig
from ti_jax.diffusion.samplers import Sampler, SamplerChoice, choose_sampler, make_sampler
from ti_jax.diffusion.schedule import NoiseSchedule
from ti_jax.errors import InputError
from ti_jax.models.components import TEXT_ENCODERS
from ti_jax.models.networks import Networks, make_networks
from ti_jax.ops.platform import Platform
from ti_jax.remote import local_copy
from ti_jax.text.text_encoders import PromptTokenizers
from ti_jax.weights.hub import resolve
from ti_jax.weights.sources import Source, open_source
from ti_jax.words import unprovided

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


@dataclass(frozen=True)
class ModelDescription:
    """A model without its weights: enough to check words, prompts and settings.

    Attributes:
      networks: the Flax modules.
      tokenizers: by text encoder.
      schedule: betas and prediction type that the model was trained with.
      scheduler_config: the checkpoint's ``scheduler_config.json``; for a single file, an equivalent one.
      zeros_for_empty_prompt: without a negative prompt the unconditional embedding is zeros (SDXL), not the empty
        prompt's.
      dtype: of weights and activations.
      path: the folder or file that it is read from.
      name: as given by the user: a path, a hub id, or "mini-sd" for the embedded default.
    """

    networks: Networks
    tokenizers: Mapping[str, CLIPTokenizer]
    schedule: NoiseSchedule
    scheduler_config: Mapping[str, Any]
    zeros_for_empty_prompt: bool
    dtype: Any
    path: Path
    name: str

    @property
    def prompt_tokenizers(self) -> PromptTokenizers:
        """The tokenizers and lengths that prompts are checked and tokenized with."""
        return PromptTokenizers(dict(self.networks.text_encoders), self.tokenizers)

    @property
    def vocab_sizes(self) -> dict[str, int]:
        """Rows of each text encoder's frozen token-embedding table; ids from there on are trained rows."""
        return self.prompt_tokenizers.vocab_sizes

    @property
    def embedding_dims(self) -> dict[str, int]:
        """Length of a token embedding, by text encoder."""
        return self.prompt_tokenizers.embedding_dims

    @property
    def default_resolution(self) -> int:
        """Side in pixels of the model's training pictures."""
        return self.networks.unet.config.sample_size * self.networks.latent_factor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (h, w, c) of the latents of a picture of ``height`` x ``width`` pixels.

        Raises:
          InputError: a side is not a positive multiple of the VAE's scale factor.
        """
        factor = self.networks.latent_factor
        for side in (height, width):
            if side < factor or side % factor:
                raise InputError(f"a picture's side must be a positive multiple of {factor} pixels, not {side}")
        return height // factor, width // factor, self.networks.vae.config.latent_channels

    def tokenize(self, prompts: Sequence[str], words: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
        """Token ids int32 [B, L] for each text encoder; ``words`` are placeholders with their numbers of vectors.

        Raises:
          InputError: a prompt is longer than the text encoder reads.
        """
        return self.prompt_tokenizers.tokenize(prompts, words)

    def unprovided(self, prompts: Sequence[str], words: Mapping[str, int]) -> list[str]:
        """Text in the prompts that looks like a learned word (``<cat>``) but is neither in ``words`` nor a token."""
        vocabularies = [tokenizer.get_vocab() for tokenizer in self.tokenizers.values()]
        found = unprovided(prompts, words)
        return [word for word in found if not any(word in vocabulary for vocabulary in vocabularies)]

    # -- the sampler

    @property
    def _fallback_sampler(self) -> str:
        return "ddim" if len(self.tokenizers) == 1 else "euler"

    def sampler_choice(self, scheduler: str | None = None) -> SamplerChoice:
        """The sampler to use; its `note` explains why, if it is not the checkpoint's own scheduler."""
        if scheduler is not None:
            return SamplerChoice(scheduler, self.scheduler_config)
        return choose_sampler(self.scheduler_config, self._fallback_sampler)

    def make_sampler(self, scheduler: str | None, num_inference_steps: int) -> Sampler:
        """The sampler "ddim", "euler", "euler_a" or "dpm++"; None: that of `sampler_choice`.

        Raises:
          InputError: as `ti_jax.diffusion.samplers.make_sampler`.
        """
        return make_sampler(scheduler, self.scheduler_config, num_inference_steps, self._fallback_sampler)

    def scheduler_name(self, scheduler: str | None) -> str:
        """The scheduler's name for a picture's metadata: the sampler asked for, or the checkpoint's own class."""
        choice = self.sampler_choice(scheduler)
        own = scheduler is None and choice.note is None
        return str(self.scheduler_config.get("_class_name", choice.name)) if own else choice.name


@dataclass(frozen=True)
class OpenModel(ModelDescription):
    """A model whose files are open, so that ``StableDiffusion.load`` can read its weights."""

    source: Source


@contextlib.contextmanager
def open_model(
    path_or_hub_id: str | Path | None = None,
    dtype: Any = None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    token: str | None = None,
    vae: str | Path | None = None,
    clip_skip: int = 0,
) -> Iterator[OpenModel]:
    """Open a model (downloading it first if it is on the hub) and read everything but its weights.

    Arguments and errors are those of ``StableDiffusion.from_pretrained``.
    """
    if dtype is None:
        dtype = Platform.of(jax.local_devices()[0]).dtype
    path = resolve(None if path_or_hub_id is None else str(path_or_hub_id), revision, variant, token)
    with open_source(path, variant, prediction_type, vae=None if vae is None else local_copy(vae)) as source:
        networks = make_networks(source.configs, dtype, clip_skip)
        check_family(path, networks)
        model = OpenModel(
            networks=networks,
            tokenizers={name: source.tokenizer(name) for name, _ in networks.text_encoders},
            schedule=NoiseSchedule.from_config(source.configs["scheduler"]),
            scheduler_config=source.configs["scheduler"],
            zeros_for_empty_prompt=source.zeros_for_empty_prompt,
            dtype=dtype,
            path=path,
            name="mini-sd" if path_or_hub_id is None else str(path_or_hub_id),
            source=source,
        )
        for name, size in model.vocab_sizes.items():
            # Ids past the table belong to learned rows, so that the tokenizer must have no tokens of its own there.
            if len(model.tokenizers[name]) > size:
                raise InputError(
                    f"{path}: the tokenizer has {len(model.tokenizers[name])} tokens, but {name} has {size} rows: "
                    f"tokens were added to one of them only; use the original model"
                )
        yield model


def open_model_of(
    config: ModelSettings,
) -> contextlib.AbstractContextManager[OpenModel]:
    """`open_model` for the model and the precision of a config."""
    return open_model(
        config.pretrained_model_name_or_path,
        {None: None, "no": jnp.float32, "bf16": jnp.bfloat16}[config.mixed_precision],
        revision=config.revision,
        variant=config.variant,
        prediction_type=config.prediction_type,
        token=config.hub_token if isinstance(config, TrainConfig) else None,
        vae=config.vae,
        clip_skip=config.clip_skip,
    )


def check_family(model: str | Path, networks: Networks) -> None:
    """Refuse other models that are built from Stable Diffusion's parts, each of which could be read by itself.

    Raises:
      InputError: an inpainting model, or parts of different models.
    """
    text_encoders, unet, vae = dict(networks.text_encoders), networks.unet.config, networks.vae.config
    channels = (unet.in_channels, unet.out_channels)
    if channels != (vae.latent_channels,) * 2:
        kind = "an inpainting model" if channels == (9, 4) else "no text-to-image model, or parts of different ones"
        raise InputError(
            f"{model}: the UNet has {channels[0]} input and {channels[1]} output channels, but the autoencoder has "
            f"{vae.latent_channels}: {kind}; only plain text-to-image models are supported"
        )
    width = sum(module.config.hidden_size for module in text_encoders.values())
    if unet.cross_attention_dim != width:
        raise InputError(
            f"{model}: the UNet's cross_attention_dim is {unet.cross_attention_dim}, but {' and '.join(text_encoders)} "
            f"add up to {width}: parts of different models"
        )
    if (unet.addition_embed_type == "text_time") != (len(text_encoders) == 2):
        raise InputError(
            f"{model}: the UNet's addition_embed_type is {unet.addition_embed_type} with {len(text_encoders)} text "
            "encoder(s): Stable Diffusion XL has text_time and two, the others neither"
        )
    if len(text_encoders) == 2:
        assert unet.projection_class_embeddings_input_dim is not None and unet.addition_time_embed_dim is not None
        pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
        second = text_encoders[TEXT_ENCODERS[1]].config
        given = second.projection_dim if second.with_projection else second.hidden_size
        if pooled != given:
            raise InputError(
                f"{model}: the UNet's projection_class_embeddings_input_dim is "
                f"{unet.projection_class_embeddings_input_dim}, which with 6 times addition_time_embed_dim "
                f"{unet.addition_time_embed_dim} leaves {pooled} for the pooled text, which {TEXT_ENCODERS[1]} gives "
                f"{given} numbers of: parts of different models"
            )
