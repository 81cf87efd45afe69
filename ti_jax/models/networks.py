"""The networks of one Stable Diffusion as pure functions of a parameter tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ti_jax.errors import InputError
from ti_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from ti_jax.models.components import TEXT_ENCODERS
from ti_jax.models.shapes import param_shapes
from ti_jax.models.unet import UNet2DConditionModel, UNetConfig
from ti_jax.models.vae import AutoencoderKL, VAEConfig
from ti_jax.models.vae_tiles import decode_in_tiles
from ti_jax.ops.matmul import exact_products
from ti_jax.ops.platform import Platform, compiling_for

Params = Mapping[str, Any]
Rows = Mapping[str, Any]  # trained rows, float32 [n, D], by text encoder


class Condition(NamedTuple):
    """The UNet's conditioning: the encoded text, and for SDXL also the pooled text and the picture's sizes."""

    context: jax.Array  # [B, L, D]
    pooled: jax.Array | None = None  # [B, P]
    time_ids: jax.Array | None = None  # [B, 6]: original height, width, crop top, left, target height, width (pixels)


@dataclass(frozen=True)
class Networks:
    """The networks of one Stable Diffusion as pure functions of a parameter tree. Hashable, to be a static argument.

    ``params`` has one tree for each network: ``text_encoder``, for SDXL ``text_encoder_2``, ``unet``, ``vae``.
    """

    text_encoders: tuple[tuple[str, CLIPTextModel], ...]
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    platform: Platform | None = None
    """The platform to compile for; None: that of JAX's default device."""

    @property
    def dtype(self) -> Any:
        """The dtype of weights and activations."""
        return self.unet.dtype

    @property
    def deterministic(self) -> bool:
        """Whether results must be the same to the bit each time."""
        return self.platform is not None and self.platform.deterministic

    @property
    def latent_factor(self) -> int:
        """Pixels for each latent, along one side (8 for every published Stable Diffusion)."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def with_gradient_checkpointing(self, gradient_checkpointing: str) -> Networks:
        """The same functions, with this rematerialisation policy in the UNet; see `checkpointed`."""
        return dataclasses.replace(self, unet=self.unet.clone(gradient_checkpointing=gradient_checkpointing))

    def compiled_for(self, platform: Platform) -> Networks:
        """The same functions, with the operations that are fast on `platform`."""
        return dataclasses.replace(self, platform=platform)

    def _apply(self, module: Any, params: Any, *args: Any, **keywords: Any) -> Any:
        """Apply a module. (Typed as Any: Flax also annotates the tuple that only mutable collections return.)"""
        with compiling_for(self.platform), exact_products(module.dtype):
            return module.apply({"params": params}, *args, **keywords)

    def encode_text(
        self, params: Params, ids: Mapping[str, jax.Array], rows: Mapping[str, jax.Array] | None = None
    ) -> Condition:
        """Token ids int32 [B, L] by encoder -> `Condition`, with trained rows spliced in after the frozen table.

        One encoder (SD1, SD2): its last hidden state. Two (SDXL): the penultimate states of both, concatenated, and
        the pooled projection of the second. As diffusers' ``encode_prompt``, also with ``clip_skip``.
        """
        states, pooled = self.text_states(params, ids, rows)
        return Condition(jnp.concatenate(list(states.values()), axis=-1), pooled)

    def text_states(
        self, params: Params, ids: Mapping[str, jax.Array], rows: Mapping[str, jax.Array] | None
    ) -> tuple[dict[str, jax.Array], jax.Array | None]:
        """The states [B, L, D] of each encoder that are passed to the UNet, and pooled text [B, P] for SDXL."""
        outputs = {
            name: self._apply(module, params[name], ids[name], None if rows is None else rows[name])
            for name, module in self.text_encoders
        }
        if len(outputs) == 1:
            return {name: output.last_hidden_state for name, output in outputs.items()}, None
        states = {name: output.penultimate_hidden_state for name, output in outputs.items()}
        return states, outputs[self.text_encoders[-1][0]].pooled

    def predict_noise(
        self, params: Params, latents: jax.Array, timesteps: jax.Array, condition: Condition
    ) -> jax.Array:
        """The UNet's raw output (noise, velocity or sample: see `NoiseSchedule`): [B, h, w, c] -> [B, h, w, c]."""
        added_cond = None
        if condition.pooled is not None:
            time_ids = condition.time_ids
            if time_ids is None:
                height, width = (side * self.latent_factor for side in latents.shape[1:3])
                time_ids = jnp.broadcast_to(
                    jnp.array([height, width, 0, 0, height, width], jnp.float32), (latents.shape[0], 6)
                )
            added_cond = {"text_embeds": condition.pooled, "time_ids": time_ids}
        return self._apply(self.unet, params["unet"], latents, timesteps, condition.context, added_cond)

    def encode_image(self, params: Params, pixels: jax.Array) -> jax.Array:
        """Pixels [B, H, W, 3] in [-1, 1] -> mean and log-variance of the latents, float32 [B, h, w, 2c], unscaled."""
        return self._apply(self.vae, params["vae"], pixels, method="encode").astype(jnp.float32)

    def decode_latents(self, params: Params, latents: jax.Array, tile: int | None = None) -> jax.Array:
        """Scaled latents [B, h, w, c] -> pixels, float32 [B, H, W, 3], about [-1, 1].

        All pictures at once, or with `tile` (a side in latents) one tile after the other (`decode_in_tiles`).
        """
        config = self.vae.config

        def decode(unscaled: jax.Array) -> jax.Array:
            return self._apply(self.vae, params["vae"], unscaled, method="decode").astype(jnp.float32)

        unscaled = latents / config.scaling_factor + (config.shift_factor or 0.0)
        return decode(unscaled) if tile is None else decode_in_tiles(decode, unscaled, tile, self.latent_factor)


def make_networks(configs: Mapping[str, Mapping[str, Any]], dtype: Any, clip_skip: int = 0) -> Networks:
    """The modules of a model, from the contents of its components' ``config.json`` files.

    Args:
      configs: by component.
      dtype: of weights and activations.
      clip_skip: last layers of the text encoders to leave out, counted as diffusers does: for SDXL, whose UNet is
        always given the penultimate states, before those.

    Raises:
      InputError: an option or value that is not implemented, or fewer layers than are to be left out.
    """
    text_configs = {name: CLIPTextConfig.from_dict(configs[name]) for name in TEXT_ENCODERS if name in configs}
    for name, config in text_configs.items():
        most = config.num_hidden_layers - 1
        if clip_skip > most:
            raise InputError(
                f"--clip_skip {clip_skip}: {name} of this model has {config.num_hidden_layers} layers, of which at "
                f"most {most} can be left out"
            )
    return Networks(
        text_encoders=tuple((name, CLIPTextModel(config, dtype, clip_skip)) for name, config in text_configs.items()),
        unet=UNet2DConditionModel(UNetConfig.from_dict(configs["unet"]), dtype),
        vae=AutoencoderKL(VAEConfig.from_dict(configs["vae"]), dtype),
    )


def network_shapes(networks: Networks) -> dict[str, Any]:
    """The parameter trees of the modules as `jax.ShapeDtypeStruct`; nothing is allocated."""
    unet, vae = networks.unet, networks.vae
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    shapes = {name: param_shapes(module, ids) for name, module in networks.text_encoders}
    side = 2 ** len(unet.config.block_out_channels)
    sample = jax.ShapeDtypeStruct((1, side, side, unet.config.in_channels), jnp.float32)
    context = jax.ShapeDtypeStruct((1, 4, unet.config.cross_attention_dim), jnp.float32)
    added_cond = None
    if unet.config.addition_embed_type == "text_time":
        width, per_number = unet.config.projection_class_embeddings_input_dim, unet.config.addition_time_embed_dim
        assert width is not None and per_number is not None, "text_time has both: UNetConfig checks it"
        pooled_width = width - 6 * per_number
        added_cond = {
            "text_embeds": jax.ShapeDtypeStruct((1, pooled_width), jnp.float32),
            "time_ids": jax.ShapeDtypeStruct((1, 6), jnp.float32),
        }
    timesteps = jax.ShapeDtypeStruct((1,), jnp.int32)
    shapes["unet"] = param_shapes(unet, sample, timesteps, context, added_cond)
    pixels = jax.ShapeDtypeStruct((1, 32, 32, vae.config.in_channels), jnp.float32)
    shapes["vae"] = param_shapes(vae, pixels)
    return shapes
