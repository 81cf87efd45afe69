"""The facade: a frozen Stable Diffusion with its weights, tokenizers and noise schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from . import prompt_weights, sampling, tokens
from .config import EvaluateConfig, InferConfig, TrainConfig, VaeTiling
from .decoding import choose_tile
from .diffusion.samplers import make_sampler
from .diffusion.schedule import NoiseSchedule
from .embeddings import Embedding, check_fits
from .errors import InputError
from .networks import Condition, Networks, Params, make_networks, network_shapes
from .ops.platform import Platform
from .weights.hub import resolve
from .weights.identity import Identity
from .weights.sources import open_source

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


@partial(jax.jit, static_argnames=("networks", "function", "tile"))
def _run(networks: Networks, function: str, params: Params, *args: Any, **tile: int | None) -> Any:
    return getattr(networks, function)(params, *args, **tile)


def _check_family(path: Path, networks: Networks) -> None:
    """Refuse what is made of Stable Diffusion's parts and is another thing: each file could be read for itself.

    Raises:
      InputError: an inpainting model under the name of another, or parts of different models.
    """
    text_encoders, unet, vae = dict(networks.text_encoders), networks.unet.config, networks.vae.config
    channels = (unet.in_channels, unet.out_channels)
    if channels != (vae.latent_channels,) * 2:
        kind = "an inpainting model" if channels == (9, 4) else "no text-to-image model, or not of one model"
        raise InputError(
            f"{path}: the UNet takes {channels[0]} channels and makes {channels[1]} where the autoencoder has "
            f"{vae.latent_channels}: {kind}; only plain text-to-image models are read"
        )
    width = sum(module.config.hidden_size for module in text_encoders.values())
    if unet.cross_attention_dim != width:
        raise InputError(
            f"{path}: the UNet reads text of width {unet.cross_attention_dim} and {' and '.join(text_encoders)} make "
            f"{width}: parts of different models"
        )
    if (unet.addition_embed_type == "text_time") != (len(text_encoders) == 2):
        raise InputError(
            f"{path}: the UNet's addition_embed_type is {unet.addition_embed_type} with {len(text_encoders)} text "
            "encoder(s): Stable Diffusion XL has text_time and two, the others neither"
        )


@dataclass(frozen=True)
class StableDiffusion:
    """A frozen Stable Diffusion with its tokenizers and noise schedule.

    Attributes:
      networks: the modules.
      params: ``{"text_encoder": tree, ["text_encoder_2": tree,] "unet": tree, "vae": tree}``, on the default device.
      tokenizers: one for each text encoder, by the encoder's name.
      schedule: betas and prediction type that the model was trained with.
      scheduler_config: the checkpoint's ``scheduler_config.json``, or what stands for it with a single file.
      zeros_for_empty_prompt: guidance without a negative prompt starts from zeros (SDXL) and not from the empty prompt.
      identity: a hash of the weights; two folders, or a folder and a file, with the same weights have the same.
      path: the folder or file that it was read from.
      name: what the user called it: a path, a hub id, or "mini-sd" for the embedded default.
    """

    networks: Networks
    params: Params
    tokenizers: Mapping[str, CLIPTokenizer]
    schedule: NoiseSchedule
    scheduler_config: Mapping[str, Any]
    zeros_for_empty_prompt: bool
    dtype: Any
    identity: str
    path: Path
    name: str

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
    ) -> StableDiffusion:
        """Read a diffusers folder, hub repository or single-file checkpoint; ``None`` is the embedded default.

        A single file is a ``.safetensors`` or ``.ckpt`` of Stable Diffusion 1.x, 2.x or XL in the original layout
        (`ti_jax.weights.single_file`).

        Args:
          dtype: of the frozen weights and activations. ``None``: `Platform.dtype`, bfloat16 on a
            TPU and on a GPU that has it, else float32.
          revision, variant: as in diffusers, for folders and repositories.
          prediction_type: ``epsilon`` or ``v_prediction``, for a single file that does not say what it predicts.
          token: for gated repositories of the hub. ``None``: HF_TOKEN, or the one that ``hf auth login`` has stored.

        Raises:
          InputError: no such model, a file that cannot be read, an option that is not implemented, or weights that do
            not match the configuration.
        """
        if dtype is None:
            dtype = Platform.of(jax.local_devices()[0]).dtype
        path = resolve(None if path_or_hub_id is None else str(path_or_hub_id), revision, variant, token)
        with open_source(path, variant, prediction_type) as source:
            networks = make_networks(source.configs, dtype)
            schedule = NoiseSchedule.from_config(source.configs["scheduler"])
            _check_family(path, networks)

            identity = Identity()
            params = source.load(network_shapes(networks), dtype, identity)
            tokenizers = {name: source.tokenizer(name) for name, _ in networks.text_encoders}
        for name, module in networks.text_encoders:
            # Ids past the table are those of learned rows; a word of the tokenizer's own there would be taken for one.
            if len(tokenizers[name]) > module.config.vocab_size:
                raise InputError(
                    f"{path}: the tokenizer has {len(tokenizers[name])} tokens where {name} has "
                    f"{module.config.vocab_size} rows; words were added to one of them only, use the original model"
                )
        return cls(
            networks=networks,
            params=params,
            tokenizers=tokenizers,
            schedule=schedule,
            scheduler_config=source.configs["scheduler"],
            zeros_for_empty_prompt=source.zeros_for_empty_prompt,
            dtype=dtype,
            identity=identity.hexdigest(),
            path=path,
            name="mini-sd" if path_or_hub_id is None else str(path_or_hub_id),
        )

    @classmethod
    def from_config(cls, config: TrainConfig | InferConfig | EvaluateConfig) -> StableDiffusion:
        """The model that a config names, in the precision that it names; arguments and errors of `from_pretrained`."""
        return cls.from_pretrained(
            config.pretrained_model_name_or_path,
            {None: None, "no": jnp.float32, "bf16": jnp.bfloat16}[config.mixed_precision],
            revision=config.revision,
            variant=config.variant,
            prediction_type=config.prediction_type,
            token=config.hub_token if isinstance(config, TrainConfig) else None,
        )

    # -- sizes

    @property
    def vocab_sizes(self) -> dict[str, int]:
        """Rows of each text encoder's frozen token table; ids from there on are trained rows."""
        return {name: module.config.vocab_size for name, module in self.networks.text_encoders}

    @property
    def embedding_dims(self) -> dict[str, int]:
        """Length of a token embedding, by text encoder."""
        return {name: module.config.hidden_size for name, module in self.networks.text_encoders}

    @property
    def default_resolution(self) -> int:
        """Side in pixels of the pictures that the model was trained on."""
        return self.networks.unet.config.sample_size * self.networks.latent_factor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape [h, w, c] of the latents of a picture of that size in pixels."""
        factor = self.networks.latent_factor
        for side in (height, width):
            if side < factor or side % factor:
                raise InputError(f"a picture's side must be a positive multiple of {factor} pixels, not {side}")
        return height // factor, width // factor, self.networks.vae.config.latent_channels

    def token_table(self, name: str) -> np.ndarray:
        """The frozen token-embedding table of one text encoder, float32 [vocab_size, D]."""
        return np.asarray(self.params[name]["embeddings"]["token_embedding"]["embedding"]).astype(np.float32)

    # -- the networks, compiled

    def tokenize(self, prompts: Sequence[str], words: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
        """Token ids int32 [B, L] for each text encoder; ``words`` are placeholders with their numbers of vectors.

        Raises:
          InputError: a prompt is longer than the text encoder reads.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        return {
            name: tokens.tokenize(
                self.tokenizers[name],
                prompts,
                words or {},
                module.config.vocab_size,
                self._max_length(name),
            )
            for name, module in self.networks.text_encoders
        }

    def _max_length(self, name: str) -> int:
        """Tokens that a text encoder reads at once, start and end among them."""
        return min(
            dict(self.networks.text_encoders)[name].config.max_position_embeddings,
            self.tokenizers[name].model_max_length,
        )

    def encode_text(self, ids: Mapping[str, Any], rows: Mapping[str, Any] | None = None) -> Condition:
        """Token ids (from `tokenize`) and trained rows float32 [n, D] by text encoder -> `Condition`."""
        arrays = {name: jnp.asarray(value) for name, value in ids.items()}
        if rows is None:
            for name, value in ids.items():
                if np.max(value) >= self.vocab_sizes[name]:
                    raise ValueError("these ids hold a new word: encode_text needs its rows too")
        return _run(self.networks, "encode_text", self.params, arrays, rows)

    def predict_noise(self, latents: Any, timesteps: Any, cond: Condition) -> jax.Array:
        """The UNet's raw output [B, h, w, c] for noisy latents [B, h, w, c] and timesteps [B]."""
        return _run(self.networks, "predict_noise", self.params, jnp.asarray(latents), jnp.asarray(timesteps), cond)

    def encode_image(self, pixels: Any) -> jax.Array:
        """Pixels [B, H, W, 3] in [-1, 1] -> mean and log-variance of the latents [B, h, w, 2c], unscaled."""
        return _run(self.networks, "encode_image", self.params, jnp.asarray(pixels))

    def decode_latents(self, latents: Any, vae_tiling: VaeTiling = "auto") -> jax.Array:
        """Scaled latents [B, h, w, c] -> pixels [B, H, W, 3] in [-1, 1]; in tiles where `vae_tiling` says so."""
        latents = jnp.asarray(latents)

        def lower(tile: int | None) -> jax.stages.Lowered:
            return _run.lower(self.networks, "decode_latents", self.params, latents, tile=tile)

        tile = choose_tile(self.networks, latents.shape[1:], len(latents), vae_tiling, lower)
        return _run(self.networks, "decode_latents", self.params, latents, tile=tile)

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
    ) -> list[Image.Image]:
        """Draw one picture for each prompt.

        Args:
          embeddings: learned words that the prompts may use.
          negative_prompt: what the pictures should keep away from: one for all, or one for each prompt.
          guidance_scale: strength of classifier-free guidance; 1 or below turns it off.
          scheduler: "ddim", "euler", "euler_a" or "dpm++"; None: the checkpoint's own.
          height, width: in pixels, multiples of 8; None: the size that the model was trained on.
          seed: picture i is drawn from ``seed + i`` alone; or one seed for each picture.
          batch_size: pictures at a time; None: `sampling.DEFAULT_BATCH_SIZE`.
          vae_tiling: "auto", "always" or "never": whether pictures are decoded in tiles (`ti_jax.decoding`).
          weighted: prompts are in AUTOMATIC1111's notation, ``(word:1.2)``, ``[word]``, ``BREAK``, and of any length
            (`ti_jax.prompt_weights`).

        Raises:
          InputError: a prompt that is too long, an embedding of another model family, or a setting out of its range.
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
        sampler = make_sampler(scheduler, self.scheduler_config, num_inference_steps)
        seeds = sampling.image_seeds(seed, len(prompts))
        pictures: dict[int, np.ndarray] = {}
        for chosen, ids, negative_ids in self._prompt_groups(prompts, negatives, words, weighted):
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
            )
            pictures |= dict(zip(chosen, pixels, strict=True))
        return [Image.fromarray(pictures[number]) for number in range(len(prompts))]

    def _prompt_groups(
        self, prompts: list[str], negatives: list[str] | None, words: Mapping[str, int], weighted: bool
    ) -> Iterator[tuple[list[int], sampling.Ids, sampling.Ids | None]]:
        """Numbers of the prompts that can be drawn together, with their ids and those of their negative prompts.

        Without weights these are all. With them they are as many groups as there are lengths, so that what is filled
        up behind a short prompt never hangs on the length of another.
        """
        if not weighted:
            yield (
                list(range(len(prompts))),
                self.tokenize(prompts, words),
                None if negatives is None else self.tokenize(negatives, words),
            )
            return
        chunks = {name: self._chunks(name, [*prompts, *(negatives or [])], words) for name in self.tokenizers}
        if prompt_weights.plain(chunks):
            ids = {name: np.stack([prompt[0].ids for prompt in each]) for name, each in chunks.items()}
            head = {name: each[: len(prompts)] for name, each in ids.items()}
            tail = {name: each[len(prompts) :] for name, each in ids.items()}
            yield list(range(len(prompts))), head, None if negatives is None else tail
            return
        counts = np.max([[len(prompt) for prompt in each] for each in chunks.values()], axis=0)
        if negatives is not None:
            counts = np.maximum(*np.split(counts, 2))
        empty = {name: self._chunks(name, [""], words)[0][0] for name in self.tokenizers}

        def stacked(numbers: list[int], count: int) -> sampling.Ids:
            return {
                name: prompt_weights.stack([each[number] for number in numbers], count, empty[name])
                for name, each in chunks.items()
            }

        for count in np.unique(counts).tolist():
            chosen = np.flatnonzero(counts == count).tolist()
            behind = [len(prompts) + number for number in chosen]
            yield chosen, stacked(chosen, count), None if negatives is None else stacked(behind, count)

    def _chunks(self, name: str, prompts: Sequence[str], words: Mapping[str, int]) -> list[list[prompt_weights.Chunk]]:
        return [
            prompt_weights.chunks(self.tokenizers[name], prompt, words, self.vocab_sizes[name], self._max_length(name))
            for prompt in prompts
        ]
