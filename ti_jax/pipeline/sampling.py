"""Prompts and rows to pictures: text encoders, the sampler's loop and the VAE in one compiled program."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ti_jax.config import VaeTiling
from ti_jax.diffusion.samplers import Sampler
from ti_jax.errors import InputError
from ti_jax.models.networks import Condition, Networks, Params, Rows
from ti_jax.pipeline.vae_tiling import choose_tile
from ti_jax.text.prompt_weights import Chunk, encode_weighted

DEFAULT_BATCH_SIZE = 4
Ids = Mapping[str, Any]  # token ids [N, L] by text encoder, or `Chunk` of ids and weights [N, K, L]


def image_seeds(seed: int | Sequence[int], count: int) -> np.ndarray:
    """Seeds uint32 [count]: ``seed``, ``seed + 1``, ... (modulo 2**32), or the given ones.

    Raises:
      InputError: a seed does not fit in 32 bits, or the number of seeds is not ``count``.
    """
    given = np.atleast_1d(np.asarray(seed, object)).tolist()
    for number in given:
        if not 0 <= number < 2**32:
            raise InputError(f"a seed must be from 0 to {2**32 - 1}, not {number}")
    if np.ndim(seed) == 0:
        return ((given[0] + np.arange(count, dtype=np.uint64)) % 2**32).astype(np.uint32)
    if len(given) != count:
        raise InputError(f"{len(given)} seeds for {count} pictures; give one each, or a single number")
    return np.asarray(given, np.uint32)


def image_keys(seeds: jax.Array) -> jax.Array:
    """A random key [B] for each picture's seed, uint32 [B]."""
    return jax.vmap(jax.random.key)(seeds)


def image_noise(keys: jax.Array, step: jax.Array | int, latent_shape: tuple[int, int, int]) -> jax.Array:
    """Standard normal noise float32 [B, h, w, c]: the initial noise for ``step`` 0, the noise of step i for i + 1.

    It depends on each picture's own key only, so that a picture does not depend on the others of its batch.
    """
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), latent_shape))(keys)


def sample_latents(
    networks: Networks,
    params: Params,
    sampler: Sampler,
    condition_2B: Condition,
    keys: jax.Array,
    guidance_scale: jax.Array | float,
    latent_shape: tuple[int, int, int],
) -> jax.Array:
    """Sample latents, scaled as the UNet sees them: float32 [B, h, w, c]. Pure, for use inside ``jax.jit``.

    Args:
      condition_2B: the B negative prompts, then the B prompts; the UNet takes them as one batch of 2B. With only B rows
        there is no guidance.
      keys: [B], from `image_keys`.
      guidance_scale: w in ``negative + w (prompt - negative)``, the classifier-free guidance of Ho & Salimans 2022
        (arXiv 2207.12598) in diffusers' convention: 1 is no guidance.

    The sampler's state is float32 whatever the UNet's dtype.
    """
    total = condition_2B.context.shape[0]
    guided = total == 2 * keys.shape[0]

    def step(state, i):
        model_input = sampler.scale_model_input(state.sample, i)
        if guided:
            model_input = jnp.concatenate([model_input, model_input])
        timesteps = jnp.full((total,), sampler.timesteps[i])
        output = networks.predict_noise(params, model_input, timesteps, condition_2B).astype(jnp.float32)
        if guided:
            negative, prompt = jnp.split(output, 2)
            output = negative + guidance_scale * (prompt - negative)
        noise = image_noise(keys, i + 1, latent_shape) if sampler.uses_noise else None
        return sampler.step(state, output, i, noise), None

    start = sampler.start(image_noise(keys, 0, latent_shape))
    return lax.scan(step, start, jnp.arange(sampler.num_steps))[0].sample


def _encode(
    networks: Networks, params: Params, ids: Ids, negative_ids: Ids | None, rows: Rows | None, guided: bool
) -> Condition:
    """The condition for `sample_latents`: of the prompts, or of the negative prompts and the prompts."""

    def encode(ids: Ids) -> Condition:
        if any(isinstance(value, Chunk) for value in ids.values()):
            return encode_weighted(networks, params, ids, rows)
        return networks.encode_text(params, ids, rows)

    if not guided:
        return encode(ids)
    if negative_ids is None:
        return jax.tree.map(lambda prompt: jnp.concatenate([jnp.zeros_like(prompt), prompt]), encode(ids))
    return encode(jax.tree.map(lambda *ids: jnp.concatenate(ids), negative_ids, ids))


# A module-level jit, so that programs are cached: only another network, kind of sampler, number of steps or shape
# recompiles. Weights, rows, prompts, seeds and guidance are arguments.
@partial(jax.jit, static_argnames=("networks", "latent_shape", "guided", "tile"))
def _draw_batch(
    networks: Networks,
    params: Params,
    sampler: Sampler,
    ids: Ids,
    negative_ids: Ids | None,
    rows: Rows | None,
    seeds: jax.Array,
    guidance_scale: jax.Array,
    *,
    latent_shape: tuple[int, int, int],
    guided: bool,
    tile: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Pixels uint8 [B, H, W, 3], and whether each picture is finite, bool [B]."""
    condition = _encode(networks, params, ids, negative_ids, rows, guided)
    latents = sample_latents(networks, params, sampler, condition, image_keys(seeds), guidance_scale, latent_shape)
    pixels = networks.decode_latents(params, latents, tile)
    finite = jnp.isfinite(pixels).all(axis=(1, 2, 3))
    # Rounds as diffusers' VaeImageProcessor.
    levels = jnp.round(jnp.clip(pixels / 2 + 0.5, 0.0, 1.0) * 255.0)
    return jnp.where(finite[:, None, None, None], levels, 0.0).astype(jnp.uint8), finite


# What one thread compiles ahead, another that is to draw with it waits for.
_compiling = threading.Lock()


def draw(
    networks: Networks,
    params: Params,
    sampler: Sampler,
    ids: Ids,
    negative_ids: Ids | None = None,
    rows: Rows | None = None,
    *,
    latent_shape: tuple[int, int, int],
    guidance_scale: float = 7.5,
    seed: int | Sequence[int] = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    vae_tiling: VaeTiling = "auto",
    compile_only: bool = False,
) -> np.ndarray:
    """Pictures of N prompts, uint8 [N, H, W, 3]. Held to diffusers' ``StableDiffusionPipeline``.

    Args:
      ids: token ids int32 [N, L] for each text encoder, or weighted chunks [N, K, L].
      negative_ids: of the negative prompts; None: the unconditional embeddings are zeros, as in SDXL's pipeline without
        a negative prompt.
      rows: trained rows float32 [n, D] for each text encoder, for ids past the frozen table.
      latent_shape: (h, w, c).
      guidance_scale: at 1 or below there is no guidance, and the UNet sees half the batch.
      seed: one for each picture, or a number: then picture i has ``seed + i``. A picture depends on its own seed and
        prompt alone, so that any one of a call can be drawn again by itself.
      batch_size: pictures in one dispatch. The last batch is filled up, so that one program draws any number.
      vae_tiling: whether the VAE decodes in tiles (`choose_tile`).
      compile_only: compile the program that would draw them, for a later call with the same shapes, and draw nothing.

    Raises:
      InputError: a seed out of range, a batch size below 1, an unknown `vae_tiling`, or a picture with non-finite
        values.
    """
    if batch_size < 1:
        raise InputError(f"the batch size must be 1 or more, not {batch_size}")
    count = len(jax.tree.leaves(ids)[0])
    batch_size = min(batch_size, count)
    seeds = image_seeds(seed, count)
    guided = guidance_scale > 1.0

    def arguments(first: int) -> tuple[Any, ...]:
        chosen = np.minimum(np.arange(first, first + batch_size), count - 1)
        negative = _take(negative_ids, chosen) if guided else None
        scale = jnp.float32(guidance_scale)
        return networks, params, sampler, _take(ids, chosen), negative, rows, seeds[chosen], scale

    def lower(tile: int | None) -> jax.stages.Lowered:
        return _draw_batch.lower(*arguments(0), latent_shape=latent_shape, guided=guided, tile=tile)

    with _compiling:
        tile = choose_tile(networks, latent_shape, batch_size, vae_tiling, lower)
        if compile_only:
            lower(tile).compile()
            return np.empty((0, 0, 0, 3), np.uint8)
    drawn = [
        _draw_batch(*arguments(first), latent_shape=latent_shape, guided=guided, tile=tile)
        for first in range(0, count, batch_size)
    ]
    # The host waits only now, after every batch has been dispatched.
    pictures = np.concatenate([np.asarray(pixels) for pixels, _ in drawn])[:count]
    finite = np.concatenate([np.asarray(flags) for _, flags in drawn])[:count]
    if not finite.all():
        raise InputError(
            f"picture {int(np.flatnonzero(~finite)[0]) + 1} of {count} came out as NaN: a learned word or the weights "
            "contain NaN, or the model overflows in this precision (try float32)"
        )
    return pictures


def _take(tree: Any, chosen: np.ndarray) -> Any:
    return jax.tree.map(lambda array: np.asarray(array)[chosen], tree)
