"""The autoencoder: f = 8 as in Stable Diffusion, trained on all renders except those held out.

Loss: absolute and squared error, the error of the spatial differences, and the distance in a critic's features (see
`judge`), for which a mouth is more than four pixels; a small KL term keeps the latents near a normal distribution. The
face has a weight of three, nose and mouth one of five, because the parts that identify a person are small.

Then the decoder is trained further on its own with a larger weight of the critic. The latents that the base is trained
on stay the same, and noses and beards become easier to tell apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data
import jax
import jax.numpy as jnp
import numpy as np
import trainer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ti_jax.batches import in_batches
from ti_jax.data.folder import as_uint8
from ti_jax.evaluation.avatar_judge import Judge, JudgeNetwork
from ti_jax.models.shapes import param_shapes
from ti_jax.models.vae import AutoencoderKL, VAEConfig
from ti_jax.training.parallel import AXIS, make_mesh
from ti_jax.weights.load import load_component

HERE = Path(__file__).parent
CONFIG = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": data.SIDE,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
# The decoder's parts of the parameters.
DECODER = ("decoder", "post_quant_conv")
# Rows, columns of the main style's heads with hair and shoulders, and of their faces.
FIGURE = (slice(2, 64), slice(8, 56))
FACE = (slice(20, 54), slice(16, 48))
# Of all noses, beards and mouths: the smallest of what must be told apart.
FEATURES = (slice(31, 48), slice(24, 41))


@dataclass(frozen=True)
class VAETraining:
    """Hyperparameters of the autoencoder's training."""

    steps: int = 1800
    batch: int = 64
    learning_rate: float = 3e-3
    kl: float = 5e-4
    critic: float = 0.3
    answers: float = 0.006
    start: str = ""  # a model folder, relative to this one, whose autoencoder it goes on from; empty: from nothing
    seed: int = 0


@dataclass(frozen=True)
class DecoderTraining(VAETraining):
    """Hyperparameters of the decoder's further training."""

    steps: int = 1500
    batch: int = 32
    learning_rate: float = 1e-3
    critic: float = 0.6
    answers: float = 0.05
    seed: int = 1


def module(scaling_factor: float = 1.0) -> AutoencoderKL:
    """The network; `scaling_factor` is measured after training."""
    return AutoencoderKL(VAEConfig.from_dict(CONFIG | {"scaling_factor": scaling_factor}))


def shapes() -> Any:
    """The parameter tree as `jax.ShapeDtypeStruct`."""
    return param_shapes(module(), jax.ShapeDtypeStruct((1, data.SIDE, data.SIDE, 3), jnp.float32))


def split(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moments [..., 2c] -> mean and standard deviation, [..., c] each."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.exp(0.5 * logvar)


def training_pictures(work: Path) -> np.ndarray:
    """Indices of the pictures to train the autoencoder on: all except those held out."""
    group = np.load(work / "data" / "group.npy")
    return data.trained(group)


def drawing_loss(
    config: VAETraining, critic: Judge, critic_params: Any, pictures: jax.Array, drawn: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Reconstruction loss between drawn and true pictures [B, S, S, 3], and its parts."""
    weight = np.ones((data.SIDE, data.SIDE, 1), np.float32)
    weight[FIGURE] = 2.0
    weight[FACE] = 3.0
    weight[FEATURES] = 5.0
    weight /= weight.mean()
    error = drawn - pictures
    absolute = jnp.mean(weight * jnp.abs(error))
    squared = jnp.mean(weight * jnp.square(error))
    edges = sum(
        jnp.mean(jnp.abs(difference))
        for difference in (error[:, 1:] - error[:, :-1], error[:, :, 1:] - error[:, :, :-1])
    )
    count = len(pictures)
    network = JudgeNetwork(critic.config)
    both, levels = network.apply({"params": critic_params}, jnp.concatenate([pictures, drawn]))
    features = sum(jnp.mean(jnp.abs(level[count:] - level[:count])) for level in levels)
    answers = jnp.mean(jnp.square(both[count:] - both[:count]))
    value = absolute + squared + 2 * edges + config.critic * features + config.answers * answers
    parts = {"absolute": absolute, "mse": jnp.mean(jnp.square(error)), "features": features, "answers": answers}
    return value, parts


def train_vae(config: VAETraining, critic: Judge, folder: Path, work: Path) -> Any:
    """Train or resume; returns the parameters."""
    pixels = np.load(work / "data" / "pixels.npy", mmap_mode="r")[training_pictures(work)]
    network = module()
    batch = trainer.share(config.batch)

    def loss(params, arrays, key):
        draw, sample = jax.random.split(key)
        index = jax.random.randint(draw, (batch,), 0, arrays["pixels"].shape[0])
        pictures = arrays["pixels"][index].astype(jnp.float32) / 127.5 - 1.0
        mean, deviation = split(network.apply({"params": params}, pictures, method="encode"))
        latents = mean + deviation * jax.random.normal(sample, mean.shape)
        drawn = network.apply({"params": params}, latents, method="decode")
        value, parts = drawing_loss(config, critic, arrays["critic"], pictures, drawn)
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.square(deviation) - 1 - 2 * jnp.log(deviation))
        return value + config.kl * kl, parts | {"kl": kl}

    def init(key):
        if config.start:
            return load_component(HERE / config.start, "vae", shapes(), np.float32)
        return network.init(key, jnp.zeros((1, data.SIDE, data.SIDE, 3)))["params"]

    return trainer.fit(
        folder=folder, init=init, loss=loss, data={"pixels": pixels, "critic": critic.params},
        optimizer=trainer.adamw(trainer.schedule(config.learning_rate, config.steps, 100)),
        steps=config.steps, seed=config.seed, decay=0.995,
    )  # fmt: skip


def train_decoder(config: DecoderTraining, params: Any, moments: np.ndarray, critic: Judge, folder: Path, work: Path):
    """Train only the decoder of `params` further, on the `moments` of all pictures; returns all parameters."""
    chosen = training_pictures(work)
    pixels = np.load(work / "data" / "pixels.npy", mmap_mode="r")[chosen]
    network = module()
    batch = trainer.share(config.batch)
    untrained = {name: part for name, part in params.items() if name in DECODER}

    def loss(decoder, arrays, key):
        draw, sample = jax.random.split(key)
        index = jax.random.randint(draw, (batch,), 0, arrays["pixels"].shape[0])
        pictures = arrays["pixels"][index].astype(jnp.float32) / 127.5 - 1.0
        mean, deviation = split(arrays["moments"][index])
        latents = mean + deviation * jax.random.normal(sample, mean.shape)
        drawn = network.apply({"params": decoder}, latents, method="decode")
        return drawing_loss(config, critic, arrays["critic"], pictures, drawn)

    trained = trainer.fit(
        folder=folder, init=lambda key: untrained, loss=loss,
        data={"pixels": pixels, "moments": moments[chosen], "critic": critic.params},
        optimizer=trainer.adamw(trainer.schedule(config.learning_rate, config.steps, 100)),
        steps=config.steps, seed=config.seed, decay=0.995,
    )  # fmt: skip
    return {**params, **trained}


def encode(params: Any, pixels: np.ndarray, batch: int = 64) -> np.ndarray:
    """uint8 pictures [N, S, S, 3] -> moments float32 [N, h, w, 2c], unscaled; batches are sharded over devices."""
    network, by_picture = module(), NamedSharding(make_mesh(), P(AXIS))
    run = jax.jit(lambda params, x: network.apply({"params": params}, x / 127.5 - 1.0, method="encode"))
    return in_batches(lambda part: run(params, jax.device_put(part.astype(np.float32), by_picture)), pixels, batch)


def decode(params: Any, latents: np.ndarray, batch: int = 64) -> np.ndarray:
    """Unscaled latents [N, h, w, c] -> uint8 pictures [N, S, S, 3]; batches are sharded over devices."""
    network, by_picture = module(), NamedSharding(make_mesh(), P(AXIS))
    run = jax.jit(lambda params, x: network.apply({"params": params}, x, method="decode"))
    drawn = in_batches(lambda part: run(params, jax.device_put(part, by_picture)), latents, batch)
    return as_uint8(np.clip(drawn, -1.0, 1.0))


def peak_signal_to_noise(one: np.ndarray, other: np.ndarray) -> float:
    """PSNR of uint8 pictures in dB, over all of them together."""
    mse = np.mean(np.square(one.astype(np.float32) - other.astype(np.float32)))
    return float(10 * np.log10(255.0**2 / mse))
