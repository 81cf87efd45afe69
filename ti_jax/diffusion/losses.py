"""What training minimises: the UNet's error at each latent, and how samples are weighted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from ti_jax.diffusion.schedule import NoiseSchedule
from ti_jax.errors import InputError

if TYPE_CHECKING:
    from ti_jax.config import TrainConfig


@jax.tree_util.register_static
@dataclass(frozen=True)
class Objective:
    """Settings of the loss, compiled into the step; those by default are Textual Inversion's (2208.01618, eq. 2).

    Attributes:
      loss: "l2" or "huber". huber_c: see `huber`.
      snr_gamma: see `min_snr_weights`; None: all timesteps weigh the same.
      noise_offset: see `offset_noise`.
      timestep_range: the first timestep that is drawn, and the one after the last; None: all.
    """

    loss: str = "l2"
    huber_c: float = 0.1
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    timestep_range: tuple[int, int] | None = None

    @classmethod
    def of(cls, config: TrainConfig, schedule: NoiseSchedule) -> Objective:
        """A config's, for a model with this schedule.

        Raises:
          InputError: ``timestep_range`` ends after the model's last timestep.
        """
        count = schedule.alphas_cumprod.shape[0]
        bounds = None
        if config.timestep_range is not None:
            low, high = config.timestep_range
            if high > count:
                raise InputError(
                    f"--timestep_range {low} {high}: the model has {count} timesteps, so HIGH is at most {count}"
                )
            bounds = None if (low, high) == (0, count) else (low, high)
        huber_c = cls.huber_c if config.huber_c is None else config.huber_c
        return cls(config.loss, huber_c, config.snr_gamma, config.noise_offset, bounds)


def squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """``(prediction - target)^2``, elementwise in float32."""
    return jnp.square(prediction.astype(jnp.float32) - target)


def huber(prediction: jax.Array, target: jax.Array, c: float) -> jax.Array:
    """The pseudo-Huber loss ``2c (sqrt(d^2 + c^2) - c)`` of ``d = prediction - target``, elementwise in float32.

    Near ``d^2`` for errors far below ``c``, and ``2c |d|`` far above, so that few large errors count for less. It is
    kohya's ``--loss_type huber`` with ``--huber_schedule constant`` (Khrapov 2024, arXiv 2403.16728).
    """
    difference = prediction.astype(jnp.float32) - target
    # The same number as in the docstring, without subtracting nearly equal ones.
    return 2 * c * jnp.square(difference) / (jnp.sqrt(jnp.square(difference) + c * c) + c)


def elementwise(objective: Objective, prediction: jax.Array, target: jax.Array) -> jax.Array:
    """The objective's loss at each latent: [B, h, w, c] twice -> float32 [B, h, w, c]."""
    if objective.loss == "huber":
        return huber(prediction, target, objective.huber_c)
    return squared_error(prediction, target)


def min_snr_weights(schedule: NoiseSchedule, timesteps: jax.Array, gamma: float) -> jax.Array:
    """Weight of each sample's loss, float32 [B], for timesteps int32 [B] (Hang et al. 2023, arXiv 2303.09556, eq. 5).

    ``min(SNR, gamma)`` for a UNet that predicts the sample; divided by ``SNR`` if it predicts the noise, and by
    ``SNR + 1`` if the velocity. Held to diffusers' ``compute_snr``, except where that is not finite: at pure noise, in
    which schedules of zero terminal SNR end, the weight of a noise prediction is 1, its limit.
    """
    signal = schedule.alphas_cumprod[timesteps]
    snr = signal / (1.0 - signal)
    if schedule.prediction_type == "epsilon":
        return jnp.minimum(1.0, gamma / snr)
    if schedule.prediction_type == "v_prediction":
        return jnp.minimum(snr, gamma) / (snr + 1.0)
    return jnp.minimum(snr, gamma)


def mean_over_samples(losses: jax.Array, weights: jax.Array | None) -> jax.Array:
    """The mean of elementwise losses [B, h, w, c]; with ``weights`` [B], of each sample's mean times its weight."""
    if weights is None:
        return jnp.mean(losses)
    return jnp.mean(weights * jnp.mean(losses, axis=(1, 2, 3)))


def offset_noise(key: jax.Array, noise: jax.Array, strength: float) -> jax.Array:
    """Noise [h, w, c] with a normal number times ``strength`` added to each channel as a whole; 0: the noise itself.

    The UNet then also learns to change the mean of a picture, so that dark and bright ones become possible
    (https://www.crosslabs.org/blog/diffusion-with-offset-noise). diffusers' ``--noise_offset``.
    """
    if strength == 0.0:
        return noise
    return noise + strength * jax.random.normal(key, noise.shape[-1:])
