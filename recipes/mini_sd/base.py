"""Train the UNet and the text encoder jointly from scratch on latents and exact captions (v-prediction).

Some captions have a code token instead of the person's description, or of the style's, or of both. A code has one row,
which is trained like any weight and not exported. So the model learns that one vector can represent a whole person
or a whole style, which is what textual inversion needs.

In addition to the noise prediction, linear heads on the UNet's inner features classify what is in the picture (like the
loss of representation alignment, arXiv 2410.06940, with true labels instead of another network's features). So the UNet
uses the text early; with the squared error alone it learns small shapes last. The heads are dropped, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data
import jax
import jax.numpy as jnp
import judge
import numpy as np
import optax
import styles
import tokenizer as bpe
import trainer
import vae
import world
from transformers import CLIPTokenizer

from ti_jax.diffusion.schedule import NoiseSchedule, add_noise, training_target
from ti_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from ti_jax.models.unet import UNet2DConditionModel, UNetConfig
from ti_jax.weights.load import load_component

HERE = Path(__file__).parent
WIDTH = 192
UNET_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 4,
    "block_out_channels": [96, 192, 224],
    "cross_attention_dim": WIDTH,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
SCHEDULER_CONFIG = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


@dataclass(frozen=True)
class BaseTraining:
    """Hyperparameters of the UNet's and text encoder's training."""

    steps: int = 6000
    batch: int = 64
    draws: int = 2  # of noise and timestep per picture of the batch; the caption is encoded once
    learning_rate: float = 1e-3
    naming: float = 0.1  # weight of the heads' cross-entropy, mean over the attributes
    empty_captions: float = 0.1
    embedding_noise: float = 0.008  # standard deviation; a token's row has about five times that
    dtype: str = "float32"  # of activations; weights and updates are always float32
    start: str = ""  # a model folder, relative to this one, whose UNet and text encoder it goes on from
    codes_rate: float = 1.0  # the codes' learning rate, times that of everything else
    seed: int = 0


def text_config(vocab_size: int) -> dict[str, Any]:
    """``config.json`` of the text encoder."""
    return {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "hidden_act": "quick_gelu",
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": bpe.MAX_LENGTH,
        "model_type": "clip_text_model",
        "num_attention_heads": 6,
        "num_hidden_layers": 4,
        "pad_token_id": vocab_size - 1,
        "projection_dim": WIDTH,
        "vocab_size": vocab_size,
    }


MEDIA = ("portrait", "drawing", "picture")
VARIANTS = 7


def caption_variants(scene: world.Scene, person: str | None, style: str | None, rng: np.random.Generator) -> list[str]:
    """Seven captions of a picture, from complete to short.

    Args:
      scene: what is in it.
      person: a code for who it is, which some captions have in place of the looks. style: a code for the style, which
        some captions have in place of its words.
      rng: chooses what the shorter captions say.
    """

    def say(share: float, *, coded: bool = False, styled: bool = False, looks: bool = True) -> str:
        """A caption with this share of the attributes, with the codes or without, and maybe without the looks."""
        return world.caption(
            scene,
            subject=person if coded and person else "a person",
            identity=looks and not (coded and person),
            keep=None if share == 1 else {name for name in world.ATTRIBUTES if rng.random() < share},
            style=style if styled else None,
            medium=world.pick(rng, MEDIA),
        )

    if style is None:
        full = [world.caption(scene), say(1), say(1), say(0.75)]
        if person is None:
            return [*full, say(0.5), say(0.3), say(0.3, looks=False)]
        return [*full, say(1, coded=True), say(0.6, coded=True), say(0.2, coded=True)]
    if person is None:
        # The last of each row is the form in which a style is learned: a style, and hardly a word about the person.
        worded = [say(1), say(0.75), say(0.5), say(0.3, looks=False)]
        return [*worded, say(1, styled=True), say(0.5, styled=True), say(0.2, styled=True, looks=False)]
    both = [say(share, coded=True, styled=True) for share in (1, 0.6, 0.2)]
    return [say(1), say(1, coded=True), say(0.4, coded=True), say(0.75, styled=True), *both]


def make_captions(scenes: list[world.Scene], groups: np.ndarray, tokenizer: CLIPTokenizer, seed: int) -> np.ndarray:
    """Token ids int16 [N, VARIANTS, L]. Codes lie behind the table: those of all people, then those of all styles.

    The code of person r is ``len(tokenizer) + r``.
    """
    rng = np.random.default_rng([seed, 2])
    people = int(groups.max()) + 1
    numbers = {style: people + number for number, style in enumerate(styles.every_style())}
    # Replace every code while the text is tokenized; no caption has these two words.
    stand_ins = {"person": "in", "style": "the"}
    texts, codes = [], []
    for scene, group in zip(scenes, groups, strict=True):
        known, styled = 0 <= group < data.HELD_OUT, scene.style in numbers
        person, style = stand_ins["person"] if known else None, stand_ins["style"] if styled else None
        texts += caption_variants(scene, person, style, rng)
        codes.append((group, numbers.get(scene.style, 0)))
    ids = np.array(bpe.encode(tokenizer, texts), np.int16).reshape(len(scenes), VARIANTS, -1)
    for stand_in, column in zip(stand_ins.values(), np.array(codes).T, strict=True):
        own = (len(tokenizer) + column).astype(np.int16)[:, None, None]
        ids = np.where(ids == tokenizer(stand_in).input_ids[1], own, ids)
    return ids


def latent_weight(moments: np.ndarray, scaling_factor: float) -> np.ndarray:
    """Weight of the squared error for each latent element, float32 [h, w, c], mean 1.

    Larger where the latents vary little, as at eyes and mouths, which a background's colour would outweigh. The optimal
    prediction is the same for any such weights.
    """
    mean = moments[..., : moments.shape[-1] // 2] * scaling_factor
    weight = np.clip(1.0 / mean.std(axis=0), 0.5, 2.5)
    height, width = weight.shape[:2]
    weight[height // 4 : height * 7 // 8, width // 4 : width * 3 // 4] *= 1.5
    return (weight / weight.mean()).astype(np.float32)


NAMED_BLOCKS = ("mid_block", "up_blocks_1")


def inner_feature(intermediate: Any) -> jax.Array:
    """A block's output at its own size [B, h, w, c]: that of the second was doubled by an upsampler."""
    (feature,) = intermediate["__call__"]
    step = max(1, feature.shape[1] // 4)
    return feature[:, ::step, ::step].astype(jnp.float32)


def naming_loss(heads: Any, features: dict[str, jax.Array], labels: jax.Array) -> jax.Array:
    """Cross-entropy of the `heads` on inner features [B, h, w, c] with labels [B, attributes], -1 for none."""
    losses = []
    for name, feature in features.items():
        logits = feature.reshape(feature.shape[0], -1) @ heads[name]["kernel"] + heads[name]["bias"]
        losses += [jnp.mean(each) for each, _ in judge.cross_entropies(judge.NAMES, logits, labels)]
    return sum(losses) / len(losses)


def init_heads() -> Any:
    """Initial heads, with equal probability for every class."""
    channels, names = UNET_CONFIG["block_out_channels"], sum(len(words) for words in world.ATTRIBUTES.values())
    side = UNET_CONFIG["sample_size"]
    sizes = {"mid_block": channels[2] * (side // 4) ** 2, "up_blocks_1": channels[1] * (side // 2) ** 2}
    return {name: {"kernel": jnp.zeros((size, names)), "bias": jnp.zeros(names)} for name, size in sizes.items()}


def start_from(folder: Path, tree: Any, text: Any, tokenizer: CLIPTokenizer) -> tuple[Any, Any]:
    """The UNet and the text encoder of the model in `folder`, in the shapes of `tree` and `text`.

    Rows of the table are found by their tokens; a token that the vocabulary did not have keeps its initial row.
    """
    unet = load_component(folder, "unet", tree, np.float32)
    table = np.array(text["embeddings"]["token_embedding"]["embedding"])
    old_vocabulary = CLIPTokenizer.from_pretrained(folder / "tokenizer").get_vocab()
    old = jax.tree.map(lambda leaf: leaf, text)
    old["embeddings"]["token_embedding"]["embedding"] = jax.ShapeDtypeStruct((len(old_vocabulary), WIDTH), np.float32)
    loaded = load_component(folder, "text_encoder", old, np.float32)
    vocabulary = tokenizer.get_vocab()
    known = sorted(vocabulary.keys() & old_vocabulary.keys())
    before = np.asarray(loaded["embeddings"]["token_embedding"]["embedding"])
    table[[vocabulary[token] for token in known]] = before[[old_vocabulary[token] for token in known]]
    loaded["embeddings"]["token_embedding"]["embedding"] = jnp.asarray(table)
    return unet, loaded


def train_base(
    config: BaseTraining,
    tokenizer: CLIPTokenizer,
    moments: np.ndarray,
    scaling_factor: float,
    folder: Path,
    work: Path,
) -> Any:
    """Train or resume; returns the averaged ``{"unet": tree, "text_encoder": tree, "codes": [N, D]}``.

    Args:
      config: hyperparameters.
      tokenizer: of the captions.
      moments: float32 [N, h, w, 2c] of all pictures of the data folder, unscaled.
      scaling_factor: scales latents to a standard deviation of 1.
      folder: for checkpoints.
      work: folder that contains ``data``.
    """
    groups = np.load(work / "data" / "group.npy")
    scenes = data.load_scenes(work / "data")
    chosen = data.trained(groups)
    ids = make_captions([scenes[index] for index in chosen], groups[chosen], tokenizer, config.seed)
    codes_wanted = int(groups[chosen].max()) + 1 + len(styles.every_style())
    dtype = jnp.dtype(config.dtype)
    unet = UNet2DConditionModel(UNetConfig.from_dict(UNET_CONFIG), dtype)
    text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(text_config(len(tokenizer))), dtype)
    pictures = trainer.share(config.batch, config.draws)
    batch = pictures * config.draws
    arrays = {
        "moments": moments[chosen],
        "ids": ids,
        "labels": np.load(work / "data" / "labels.npy")[chosen],
        "empty": np.array(bpe.encode(tokenizer, [""])[0], np.int16),
        "schedule": NoiseSchedule.from_config(SCHEDULER_CONFIG),
        "weight": latent_weight(moments[chosen], scaling_factor),
    }

    def loss(params, arrays, key):
        names = ("picture", "variant", "empty", "latent", "timestep", "noise", "rows", "table")
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        index = jax.random.randint(keys["picture"], (pictures,), 0, len(chosen))
        variant = jax.random.randint(keys["variant"], (pictures,), 0, VARIANTS)
        tokens = arrays["ids"][index, variant].astype(jnp.int32)
        without = jax.random.bernoulli(keys["empty"], config.empty_captions, (pictures, 1))
        tokens = jnp.where(without, arrays["empty"].astype(jnp.int32), tokens)

        def shaken(table, key):
            return table + config.embedding_noise * jax.random.normal(key, table.shape)

        text = dict(params["text_encoder"])
        table = text["embeddings"]["token_embedding"]["embedding"]
        text["embeddings"] = text["embeddings"] | {"token_embedding": {"embedding": shaken(table, keys["table"])}}
        rows = shaken(params["codes"], keys["rows"])
        context = text_encoder.apply({"params": text}, tokens, rows).last_hidden_state

        context, index = jnp.repeat(context, config.draws, axis=0), jnp.repeat(index, config.draws)
        mean, deviation = vae.split(arrays["moments"][index])
        latents = mean + deviation * jax.random.normal(keys["latent"], mean.shape)
        latents = latents * scaling_factor
        noise = jax.random.normal(keys["noise"], latents.shape)
        schedule = arrays["schedule"]
        timesteps = jax.random.randint(keys["timestep"], (batch,), 0, len(schedule.alphas_cumprod))
        noisy = add_noise(schedule, latents, noise, timesteps)
        predicted, kept = unet.apply(
            {"params": params["unet"]}, noisy, timesteps, context,
            capture_intermediates=lambda module, _: module.name in NAMED_BLOCKS, mutable="intermediates",
        )  # fmt: skip
        error = jnp.square(predicted.astype(jnp.float32) - training_target(schedule, latents, noise, timesteps))
        features = {name: inner_feature(kept["intermediates"][name]) for name in NAMED_BLOCKS}
        naming = naming_loss(params["heads"], features, arrays["labels"][index])
        value = jnp.mean(arrays["weight"] * error) + config.naming * naming
        return value, {"mse": jnp.mean(error), "naming": naming}

    def init(key):
        keys = jax.random.split(key, 5)
        side = UNET_CONFIG["sample_size"]
        sample, context = jnp.zeros((1, side, side, 4)), jnp.zeros((1, bpe.MAX_LENGTH, WIDTH))
        tree = unet.init(keys[0], sample, jnp.zeros((1,), jnp.int32), context)["params"]
        tree["conv_out"]["kernel"] = jnp.zeros_like(tree["conv_out"]["kernel"])
        text = text_encoder.init(keys[1], jnp.zeros((1, bpe.MAX_LENGTH), jnp.int32))["params"]
        for name, key, deviation in (("token_embedding", keys[2], 0.04), ("position_embedding", keys[3], 0.02)):
            table = text["embeddings"][name]["embedding"]
            text["embeddings"][name]["embedding"] = deviation * jax.random.normal(key, table.shape)
        if config.start:
            tree, text = start_from(HERE / config.start, tree, text, tokenizer)
        codes = 0.04 * jax.random.normal(keys[4], (codes_wanted, WIDTH))
        return {"unet": tree, "text_encoder": text, "codes": codes, "heads": init_heads()}

    adamw = trainer.adamw(trainer.schedule(config.learning_rate, config.steps, 300), weight_decay=0.01)
    only_codes = {"unet": False, "text_encoder": False, "codes": True, "heads": False}
    params = trainer.fit(
        folder=folder, init=init, loss=loss, data=arrays,
        optimizer=optax.chain(adamw, optax.masked(optax.scale(config.codes_rate), only_codes)),
        steps=config.steps, seed=config.seed, decay=0.999,
    )  # fmt: skip
    return {name: params[name] for name in ("unet", "text_encoder", "codes")}
