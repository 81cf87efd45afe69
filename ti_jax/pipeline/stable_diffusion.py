"""`StableDiffusion`: a frozen model with its weights, tokenizers and noise schedule."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ti_jax.config import ModelSettings, VaeTiling
from ti_jax.embeddings import Embedding, check_fits
from ti_jax.errors import InputError
from ti_jax.models.networks import Condition, Networks, Params, network_shapes
from ti_jax.ops.platform import Platform
from ti_jax.pipeline import sampling
from ti_jax.pipeline.model_description import ModelDescription, OpenModel, open_model, open_model_of
from ti_jax.pipeline.vae_tiling import choose_tile
from ti_jax.text import tokens
from ti_jax.text.text_encoders import TextEncoders
from ti_jax.weights.identity import Identity

_encode_text = jax.jit(Networks.encode_text, static_argnums=0)
_predict_noise = jax.jit(Networks.predict_noise, static_argnums=0)
_decode_latents = jax.jit(Networks.decode_latents, static_argnums=0, static_argnames="tile")


@functools.cache
def _image_encoder(platform: Platform | None) -> jax.stages.Wrapped:
    """`Networks.encode_image`, jitted with the compiler's options for a platform."""
    options = None if platform is None else platform.compiler_options
    return jax.jit(Networks.encode_image, static_argnums=0, compiler_options=options)


@dataclass(frozen=True)
class StableDiffusion(ModelDescription):
    """A frozen Stable Diffusion with its tokenizers and noise schedule.

    Attributes:
      params: ``{"text_encoder": tree, ["text_encoder_2": tree,] "unet": tree, "vae": tree}``, on the default device.
      identity: a hash of the weights; the same weights have the same hash, in a folder or a single file.
    """

    params: Params
    identity: str

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path | None = None,
        dtype: Any = None,
        *,
        revision: str | None = None,
        variant: str | None = None,
        prediction_type: str | None = None,
        token: str | None = None,
        vae: str | Path | None = None,
        clip_skip: int = 0,
    ) -> StableDiffusion:
        """Read a diffusers folder, hub repository or single-file checkpoint; ``None`` is the embedded default.

        A single file is a ``.safetensors`` or ``.ckpt`` of Stable Diffusion 1.x, 2.x or XL in the original layout
        (`ti_jax.weights.single_file`).

        Args:
          dtype: of the frozen weights and activations. ``None``: `Platform.dtype`, bfloat16 on a TPU and on a GPU that
            supports it, else float32.
          revision, variant: as in diffusers, for folders and repositories.
          prediction_type: ``epsilon`` or ``v_prediction``, for a single file that does not specify it.
          token: for gated repositories of the hub. ``None``: HF_TOKEN, or the token stored by ``hf auth login``.
          vae: folder of another autoencoder in diffusers' layout, instead of the model's own.
          clip_skip: last layers of the text encoders to leave out, as in diffusers.

        Raises:
          InputError: no such model, an unreadable file, an option that is not implemented, or weights that do not match
            the configuration.
        """
        with open_model(
            path_or_hub_id,
            dtype,
            revision=revision,
            variant=variant,
            prediction_type=prediction_type,
            token=token,
            vae=vae,
            clip_skip=clip_skip,
        ) as model:
            return cls.load(model)

    @classmethod
    def from_config(cls, config: ModelSettings) -> StableDiffusion:
        """The model of a config, in its precision; errors as `from_pretrained`."""
        with open_model_of(config) as model:
            return cls.load(model)

    @classmethod
    def load(cls, model: OpenModel) -> StableDiffusion:
        """Read the weights of an open model.

        Raises:
          InputError: missing or broken files, or weights that do not match the configuration.
        """
        identity = Identity()
        params = model.source.load(network_shapes(model.networks), model.dtype, identity)
        described = {field.name: getattr(model, field.name) for field in dataclasses.fields(ModelDescription)}
        return cls(**described, params=params, identity=identity.hexdigest())

    @property
    def clip_skip(self) -> int:
        """Last layers of the text encoders that are left out."""
        return self.networks.text_encoders[0][1].clip_skip

    @property
    def text(self) -> TextEncoders:
        """The text encoders with their weights."""
        modules = dict(self.networks.text_encoders)
        return TextEncoders(modules, self.tokenizers, {name: self.params[name] for name in modules}, self.name)

    def token_table(self, name: str) -> np.ndarray:
        """The frozen token-embedding table of one text encoder, float32 [vocab_size, D]."""
        return self.text.token_table(name)

    # -- the networks, compiled

    def encode_text(self, ids: Mapping[str, Any], rows: Mapping[str, Any] | None = None) -> Condition:
        """Token ids (from `tokenize`) and trained rows float32 [n, D] by text encoder -> `Condition`."""
        arrays = {name: jnp.asarray(value) for name, value in ids.items()}
        if rows is None:
            for name, value in ids.items():
                if np.max(value) >= self.vocab_sizes[name]:
                    raise ValueError("these ids contain a new word: encode_text needs its rows too")
        return _encode_text(self.networks, self.params, arrays, rows)

    def predict_noise(self, latents: Any, timesteps: Any, cond: Condition) -> jax.Array:
        """The UNet's raw output [B, h, w, c] for noisy latents [B, h, w, c] and timesteps [B]."""
        return _predict_noise(self.networks, self.params, jnp.asarray(latents), jnp.asarray(timesteps), cond)

    def encode_image(self, pixels: Any) -> jax.Array:
        """Pixels [B, H, W, 3] in [-1, 1] -> mean and log-variance of the latents [B, h, w, 2c], unscaled."""
        return _image_encoder(self.networks.platform)(self.networks, self.params, jnp.asarray(pixels))

    def decode_latents(self, latents: Any, vae_tiling: VaeTiling = "auto") -> jax.Array:
        """Scaled latents [B, h, w, c] -> pixels [B, H, W, 3] in [-1, 1]; `vae_tiling`: see `generate`."""
        latents = jnp.asarray(latents)

        def lower(tile: int | None) -> jax.stages.Lowered:
            return _decode_latents.lower(self.networks, self.params, latents, tile=tile)

        tile = choose_tile(self.networks, latents.shape[1:], len(latents), vae_tiling, lower)
        return _decode_latents(self.networks, self.params, latents, tile=tile)

    def generate(
        self,
        prompts: Sequence[str],
        embeddings: Sequence[Embedding] = (),
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.5,
        scheduler: str | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int | None = None,
        vae_tiling: VaeTiling = "auto",
        weighted: bool = False,
        compile_only: bool = False,
    ) -> list[Image.Image]:
        """Draw one picture for each prompt.

        Args:
          embeddings: learned words that the prompts may use.
          negative_prompt: one for all pictures, or one for each prompt.
          guidance_scale: of classifier-free guidance; 1 or below turns it off.
          scheduler: "ddim", "euler", "euler_a" or "dpm++"; None: the checkpoint's own, or "ddim" (SDXL: "euler") if
            that is not implemented.
          height, width: in pixels, multiples of 8; None: the size that the model was trained on.
          seed: picture i is drawn with ``seed + i``, independently of the others; or one seed for each picture.
          batch_size: pictures per batch; None: `sampling.DEFAULT_BATCH_SIZE`.
          vae_tiling: "auto", "always" or "never": whether the VAE decodes in tiles (`ti_jax.pipeline.vae_tiling`).
          weighted: parse prompts in AUTOMATIC1111's notation, ``(word:1.2)``, ``[word]``, ``BREAK``, and allow any
            length (`ti_jax.text.prompt_weights`).
          compile_only: only compile what a later call with prompts, words and settings of the same kinds needs, and
            return no pictures.

        Raises:
          InputError: a prompt that is too long, an embedding of another model family, or a setting out of range.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            return []
        for embedding in embeddings:
            check_fits(embedding, self.embedding_dims, embedding.token)
        words, rows = tokens.combine(embeddings)
        negatives = None
        if negative_prompt is not None or not self.zeros_for_empty_prompt:
            negative = negative_prompt or ""
            negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
            if len(negatives) != len(prompts):
                raise InputError(
                    f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each"
                )
        height, width = height or self.default_resolution, width or self.default_resolution
        sampler = self.make_sampler(scheduler, num_inference_steps)
        seeds = sampling.image_seeds(seed, len(prompts))
        pictures: dict[int, np.ndarray] = {}
        for chosen, ids, negative_ids in self.prompt_tokenizers.groups(prompts, negatives, words, weighted):
            pixels = sampling.draw(
                self.networks,
                self.params,
                sampler,
                ids,
                negative_ids,
                rows or None,
                latent_shape=self.latent_shape(height, width),
                guidance_scale=guidance_scale,
                seed=seeds[chosen].tolist(),
                batch_size=batch_size or sampling.DEFAULT_BATCH_SIZE,
                vae_tiling=vae_tiling,
                compile_only=compile_only,
            )
            if compile_only:
                continue
            pictures |= dict(zip(chosen, pixels, strict=True))
        return [Image.fromarray(pixels) for _, pixels in sorted(pictures.items())]
