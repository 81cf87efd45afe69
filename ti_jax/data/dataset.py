"""The training data as arrays on the device: VAE moments, token ids, sizes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ti_jax.config import TrainConfig
from ti_jax.data.buckets import shape_name
from ti_jax.data.concept import Concept
from ti_jax.data.latents import encode_moments
from ti_jax.data.masks import Masks
from ti_jax.data.moments_cache import MomentsCache
from ti_jax.data.pictures import Bucket, Pictures
from ti_jax.data.sharing import Sharing, share, weight
from ti_jax.errors import listed
from ti_jax.pipeline import StableDiffusion


class Dataset(NamedTuple):
    """The training data, or those of one bucket: all pictures have one size.

    Replicated on every device, where a concept is a handful of pictures. Moments and masks of thousands of pictures
    stay on the host, as NumPy arrays; a program then takes a dataset without them, see `ti_jax.training.feeding`.
    """

    # float32 [N, 2, h, w, 2c]: VAE mean and log-variance of each picture and of its mirror image
    moments: jax.Array | np.ndarray | None
    ids: Mapping[str, jax.Array]  # int32 [P, L] for each text encoder: the table of prompts, tokenized
    prompts_of: jax.Array  # int32 [N, K]: each picture's equally likely prompts, indices into the table
    entries: jax.Array  # int32 [M]: the pictures that an epoch shows; a repeated one is in it several times
    time_ids: jax.Array  # float32 [N, 2, 6]: SDXL's size and crop conditioning of each picture and its mirror image
    flip_probability: jax.Array  # float32 scalar
    latent_scale: jax.Array  # float32 scalar: the VAE's scaling_factor
    latent_shift: jax.Array  # float32 scalar: the VAE's shift_factor, usually 0
    # float32 [N, 2, h, w]: weight of the loss at each latent of a picture and of its mirror image, 1 on average over a
    # picture; None: all weigh the same
    masks: jax.Array | np.ndarray | None = None
    # int32 [N]: how many prompts each picture has, where not all have K; -1 follows them
    prompt_counts: jax.Array | None = None
    sharing: Sharing | None = None  # of a run with several concepts
    negative: Negative | None = None  # of a run that learns a word for the negative prompt

    @property
    def latents(self) -> tuple[int, ...]:
        """Height, width and channels of the moments, the mean's and the log-variance's."""
        assert self.moments is not None, "their shape is asked for"
        return self.moments.shape[-3:]


class Negative(NamedTuple):
    """The unconditional side of classifier-free guidance in the loss; the dataset's prompts are the other side."""

    ids: Mapping[str, jax.Array]  # int32 [1, L] for each text encoder: the word alone
    guidance_scale: jax.Array  # float32 scalar


def make_datasets(
    config: TrainConfig,
    sd: StableDiffusion,
    concepts: Sequence[Concept],
    in_batch: int = 1,
    cache: MomentsCache | None = None,
) -> tuple[Dataset, ...]:
    """Encode the pictures of a run's concepts with the VAE, and tokenize the prompts.

    Args:
      in_batch: number of concepts in a batch. cache: of moments; None: all pictures are encoded.

    Returns:
      A dataset for each bucket, all with the same prompts; without buckets, one. Moments and masks are on the host.
    """
    vae = sd.networks.vae.config
    prompts = [concept.in_prompts(prompt) for concept in concepts for prompt in concept.prompts]
    ids = jax.tree.map(jnp.asarray, sd.tokenize(prompts, concepts[0].words))
    prompts_of = joined([(len(each.prompts), each.prompts_of) for each in concepts])
    entries = joined([(len(each.pictures.pixels), each.entries[:, None]) for each in concepts])[:, 0]
    shown = [len(each.entries) for each in concepts]
    concept_of = np.repeat(np.arange(len(concepts)), shown)
    counts = (prompts_of >= 0).sum(axis=1, dtype=np.int32)
    negative = None
    if config.learn_negative:
        (concept,) = concepts
        negative_ids = jax.tree.map(jnp.asarray, sd.tokenize([concept.token], concept.words))
        negative = Negative(negative_ids, jnp.float32(config.negative_guidance_scale))

    def dataset(parts: Sequence[Bucket]) -> Dataset:
        sets = [part.pictures for part in parts]
        indices = np.concatenate([part.indices for part in parts])
        # The place of each picture of the run in this dataset; -1: it is in another one.
        places = np.full(len(prompts_of), -1, np.int32)
        places[indices] = np.arange(len(indices))
        own = places[entries]
        sizes = np.bincount(concept_of[own >= 0], minlength=len(concepts)).tolist()
        return Dataset(
            moments=encode_moments(sd, [pictures.pixels for pictures in sets], config.flip_probability > 0, cache),
            ids=ids,
            prompts_of=jnp.asarray(prompts_of[indices]),
            prompt_counts=None if (counts == prompts_of.shape[1]).all() else jnp.asarray(counts[indices]),
            entries=jnp.asarray(own[own >= 0]),
            time_ids=jnp.asarray(np.concatenate([time_ids(pictures) for pictures in sets])),
            flip_probability=jnp.float32(config.flip_probability),
            latent_scale=jnp.float32(vae.scaling_factor),
            latent_shift=jnp.float32(vae.shift_factor or 0.0),
            masks=mask_weights(config, sd, sets),
            sharing=share(sizes, in_batch, shown) if len(concepts) > 1 else None,
            negative=negative,
        )

    return tuple(map(dataset, _by_shape([concept.pictures for concept in concepts])))


def make_dataset(
    config: TrainConfig,
    sd: StableDiffusion,
    concepts: Sequence[Concept],
    in_batch: int = 1,
    cache: MomentsCache | None = None,
) -> Dataset:
    """As `make_datasets`, for a run without buckets, and with everything on the default device."""
    (dataset,) = make_datasets(config, sd, concepts, in_batch, cache)
    return jax.tree.map(jnp.asarray, dataset)


def _by_shape(sets: Sequence[Pictures]) -> list[list[Bucket]]:
    """The pictures of each shape, from all concepts; the index of a picture counts those of earlier concepts, too."""
    found: dict[tuple[int, ...], list[Bucket]] = {}
    start = 0
    for pictures in sets:
        count = len(pictures.pixels)
        for bucket in pictures.buckets or (Bucket(np.arange(count), pictures),):
            shape = bucket.pictures.pixels.shape[1:]
            found.setdefault(shape, []).append(Bucket(bucket.indices + start, bucket.pictures))
        start += count
    return list(found.values())


def weights_of(datasets: Sequence[Dataset]) -> list[float]:
    """How often each dataset is used, in proportion: every picture is then seen equally often, or every concept has as
    many samples as any other.
    """
    sizes = [np.asarray(each.sharing.size) for each in datasets if each.sharing is not None]
    if not sizes:
        return [float(len(each.entries)) for each in datasets]
    whole = np.sum(sizes, axis=0).tolist()
    return [weight(each.tolist(), whole) for each in sizes]


def small_buckets(datasets: Sequence[Dataset], latent_factor: int, batch: int) -> str | None:
    """A note on the buckets with fewer pictures than a batch; None if there are none, or no buckets.

    Not an error: buckets take turns in proportion to their pictures, so that each of these is seen as often as others.

    Args:
      latent_factor: pixels of a latent's side. batch: samples in a batch, over all devices.
    """
    small = [(len(each.time_ids), *each.latents) for each in datasets if len(each.time_ids) < batch]
    if len(datasets) == 1 or not small:
        return None
    told = [
        f"{shape_name((rows * latent_factor, columns * latent_factor))} has {count}"
        for count, rows, columns, _ in small
    ]
    return (
        f"note: buckets with fewer pictures than a batch of {batch}: {listed(told)}; a batch of these shows a picture "
        f"several times, though over the run all are seen equally often; a larger --bucket_step makes fewer buckets, a "
        f"smaller --train_batch_size smaller batches"
    )


def mask_weights(config: TrainConfig, sd: StableDiffusion, sets: Sequence[Pictures]) -> np.ndarray | None:
    """Weights of the loss for pictures of one size, float32 [N, 2, h, w], see `Dataset`; None if none has a mask."""
    if all(pictures.masks is None for pictures in sets):
        return None
    masks = [pictures.masks or Masks(pictures.pixels.shape[1:3], [None] * len(pictures.names)) for pictures in sets]
    weights = np.concatenate([each.weights(sd.networks.latent_factor, config.unmasked_weight) for each in masks])
    return np.stack([weights, weights[:, :, ::-1]], axis=1)


def digest_of_masks(sets: Sequence[Pictures]) -> str | None:
    """A hash of the masks of all pictures; None if none has one."""
    if all(pictures.masks is None for pictures in sets):
        return None
    return " ".join("none" if pictures.masks is None else pictures.masks.digest for pictures in sets)


def joined(tables: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
    """Tables of indices int32 [n, k], each into a list of its own, as one table into the lists one after the other.

    Args:
      tables: the length of each list, with the table. Rows may be filled up with -1, and those of the joined table are.
    """
    width = max(table.shape[1] for _, table in tables)
    found, start = [], 0
    for length, table in tables:
        rows = np.full((len(table), width), -1, np.int32)
        rows[:, : table.shape[1]] = np.where(table < 0, -1, table + start)
        found.append(rows)
        start += length
    return np.concatenate(found)


def hash_of_what_is_shown(concepts: Sequence[Concept]) -> str | None:
    """A hash of which picture has which prompts and how often an epoch shows it, 16 hexadecimal digits; None if each is
    shown once, with all prompts of its concept.
    """
    usual = all(
        np.array_equal(concept.prompts_of, [range(len(concept.prompts))] * len(concept.prompts_of))
        and np.array_equal(concept.entries, range(len(concept.prompts_of)))
        for concept in concepts
    )
    tables = [[concept.prompts_of.tolist(), concept.entries.tolist()] for concept in concepts]
    return None if usual else hashlib.sha256(json.dumps(tables).encode()).hexdigest()[:16]


def time_ids(pictures: Pictures) -> np.ndarray:
    """SDXL's micro-conditioning (arXiv 2307.01952, section 2.2) of each picture and its mirror image, [N, 2, 6].

    float32; original height and width, the crop's top and left offset in the scaled picture, and the crop's height and
    width.
    """
    sizes, offsets, target = pictures.original_sizes, pictures.crop_offsets, pictures.pixels.shape[1:3]
    # If the overhang is odd, one pixel more is cut on the right than on the left; mirrored, on the left.
    boxes = pictures.crop_boxes
    right = np.round((sizes[:, 1] - boxes[:, 2]) * target[1] / (boxes[:, 2] - boxes[:, 0])).astype(offsets.dtype)
    mirrored = np.stack([offsets[:, 0], right], axis=1)
    targets = np.full((len(sizes), 2), target)
    both = [np.concatenate([sizes, cut, targets], axis=1) for cut in (offsets, mirrored)]
    return np.stack(both, axis=1).astype(np.float32)
