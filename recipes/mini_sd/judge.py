"""The judge (classifies attributes of pictures, for the evaluation) and the critic (its features train the VAE).

Two separate networks of the same kind, so that the judge has no influence on what it judges. Both are trained on true
renders, some of them shifted, blurred, noisy or with another brightness.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import trainer
import world

from ti_jax.evaluation.avatar_judge import Judge, JudgeConfig, JudgeNetwork, Probe, split_logits


@dataclass(frozen=True)
class JudgeTraining:
    """Hyperparameters of a judge's training."""

    steps: int = 4000
    batch: int = 64
    learning_rate: float = 2e-3
    seed: int = 0
    channels: tuple[int, ...] = (64, 96, 128)
    hidden: int = 256


# The attributes of a picture of this world.
NAMES = JudgeConfig(tuple(world.ATTRIBUTES.items()), world.IDENTITY)


def as_probes(probes: tuple[tuple[str, dict[str, str]], ...]) -> tuple[Probe, ...]:
    """Probes of `world` in the judge's form."""
    return tuple(Probe(prompt, tuple(expects.items())) for prompt, expects in probes)


def augment(pixels: jax.Array, key: jax.Array) -> jax.Array:
    """Augment pictures [B, S, S, 3] in [-1, 1] with small changes that keep their labels."""
    blur, shift, noise, bright = jax.random.split(key, 4)
    batch, side = pixels.shape[:2]
    weights = jnp.array([1, 2, 1, 2, 4, 2, 1, 2, 1]) / 16
    for once in jax.random.split(blur):
        padded = jnp.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        taps = [padded[:, i : i + side, j : j + side] for i in range(3) for j in range(3)]
        blurred = sum(weight * tap for weight, tap in zip(weights, taps, strict=True))
        amount = jax.random.uniform(once, (batch, 1, 1, 1)) * jax.random.bernoulli(once, 0.6, (batch, 1, 1, 1))
        pixels = pixels + amount * (blurred - pixels)
    by_row = jax.random.randint(shift, (2,), -1, 2)  # one shift for the batch: a roll of whole pictures is cheap
    pixels = jnp.roll(pixels, by_row, axis=(1, 2))
    spread = 0.08 * jax.random.uniform(bright, (batch, 1, 1, 1))
    pixels = pixels + spread * jax.random.normal(noise, pixels.shape)
    return pixels + 0.05 * jax.random.normal(bright, (batch, 1, 1, 3))


def cross_entropies(config: JudgeConfig, logits: jax.Array, labels: jax.Array) -> Iterator[tuple[jax.Array, jax.Array]]:
    """For each attribute the cross-entropy [B] and a mask [B]; both are 0 where the label is -1."""
    for index, part in enumerate(split_logits(config, logits).values()):
        label = labels[:, index].astype(jnp.int32)
        asked = label >= 0
        yield optax.softmax_cross_entropy_with_integer_labels(part, jnp.maximum(label, 0)) * asked, asked


def answer_loss(config: JudgeConfig, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy, averaged per attribute over the pictures with a label, then over attributes."""
    losses = [jnp.sum(each) / jnp.maximum(jnp.sum(asked), 1) for each, asked in cross_entropies(config, logits, labels)]
    return sum(losses) / len(losses)


def accuracy(judge: Judge, pixels: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy of each attribute over the pictures with a label."""
    result = {}
    for index, (name, part) in enumerate(judge.probabilities(pixels).items()):
        asked = labels[:, index] >= 0
        if asked.any():
            result[name] = float(np.mean(part.argmax(-1)[asked] == labels[asked, index]))
    return result


def train_judge(config: JudgeTraining, folder: Path, work: Path) -> Judge:
    """Train on all renders except the validation sets and held-out people and styles."""
    judge_config = replace(
        NAMES,
        probes=as_probes(world.PROBES),
        style=world.STYLE,
        style_probes=as_probes(world.STYLE_PROBES),
        channels=config.channels,
        hidden=config.hidden,
        side=data.SIDE,
    )
    group = np.load(work / "data" / "group.npy")
    chosen = data.trained(group)
    pixels = np.load(work / "data" / "pixels.npy", mmap_mode="r")[chosen]
    labels = np.load(work / "data" / "labels.npy")[chosen]
    network = JudgeNetwork(judge_config)
    batch = trainer.share(config.batch)

    def loss(params, arrays, key):
        draw, change = jax.random.split(key)
        index = jax.random.randint(draw, (batch,), 0, arrays["pixels"].shape[0])
        pictures = augment(arrays["pixels"][index].astype(jnp.float32) / 127.5 - 1.0, change)
        logits, _ = network.apply({"params": params}, pictures)
        return answer_loss(judge_config, logits, arrays["labels"][index]), {}

    def init(key):
        return network.init(key, jnp.zeros((1, data.SIDE, data.SIDE, 3)))["params"]

    optimizer = trainer.adamw(trainer.schedule(config.learning_rate, config.steps, 100), weight_decay=0.02)
    params = trainer.fit(
        folder=folder, init=init, loss=loss, data={"pixels": pixels, "labels": labels}, optimizer=optimizer,
        steps=config.steps, seed=config.seed, report_every=200,
    )  # fmt: skip
    judge = Judge(judge_config, params)
    for kind, which in (("natural", data.VALIDATION), ("styled", data.STYLED_VALIDATION)):
        valid = np.flatnonzero(group == which)
        every = np.load(work / "data" / "pixels.npy", mmap_mode="r")
        figures = accuracy(judge, every[valid], np.load(work / "data" / "labels.npy")[valid])
        print(folder.name, kind, {name: round(value, 4) for name, value in figures.items()}, flush=True)
    return judge
