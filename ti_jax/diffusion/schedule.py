"""The noise schedule that a model was trained with: betas, noisy latents, and the training target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ti_jax.errors import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@partial(jax.tree_util.register_dataclass, data_fields=["alphas_cumprod"], meta_fields=["prediction_type"])
@dataclass(frozen=True)
class NoiseSchedule:
    """A discrete diffusion over T timesteps (Ho et al. 2020, arXiv 2006.11239).

    Attributes:
      alphas_cumprod: float32 [T], the signal's share of the variance at each timestep.
      prediction_type: what the UNet predicts: "epsilon", "v_prediction" or "sample".
    """

    alphas_cumprod: jax.Array
    prediction_type: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """From the contents of ``scheduler_config.json``.

        Raises:
          InputError: another kind of diffusion (EDM, flow matching), or a beta schedule or prediction type that is not
            implemented.
        """
        _refuse_other_diffusions(config)
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            known = ", ".join(PREDICTION_TYPES)
            raise InputError(f"scheduler_config.json: prediction_type {prediction_type!r}; implemented: {known}")
        return cls(jnp.asarray(alphas_cumprod(config)), prediction_type)


# diffusers' schedulers whose configuration describes a discrete diffusion by its betas. Any other class is accepted if
# its configuration has betas.
_DISCRETE = (
    "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep",
    "DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete",
    "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD",
    "UniPCMultistep",
)  # fmt: skip


def _refuse_other_diffusions(config: Mapping[str, Any]) -> None:
    """Raise InputError for a scheduler without a beta schedule: training would use the wrong noise."""
    name = str(config.get("_class_name", "DDIMScheduler"))
    kind = None
    if "Flow" in name or config.get("use_flow_sigmas"):
        kind = "is flow matching"
    elif "EDM" in name or "sigma_data" in config or config.get("timestep_type", "discrete") != "discrete":
        kind = "is EDM (continuous noise levels)"
    elif name.removesuffix("Scheduler") not in _DISCRETE and not config.keys() & {"beta_schedule", "trained_betas"}:
        kind = "has a noise schedule that is not known"
    if kind is not None:
        raise InputError(
            f"scheduler_config.json: {name} {kind}; ti_jax trains and draws with models of a discrete beta schedule "
            "(Stable Diffusion 1.x, 2.x and XL)"
        )


def alphas_cumprod(config: Mapping[str, Any]) -> np.ndarray:
    """``alphas_cumprod`` float32 [T] of a ``scheduler_config.json``, held to diffusers' schedulers.

    Betas are float32 and the cumulative product is accumulated in float64, as PyTorch does.

    Raises:
      InputError: a beta schedule that is not implemented, or whose numbers cannot be.
    """
    steps = config.get("num_train_timesteps", 1000)
    kind = config.get("beta_schedule", "linear")
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    given = config.get("trained_betas")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InputError(f"scheduler_config.json: num_train_timesteps {steps!r}; expected a positive integer")
    if given is not None:
        if not isinstance(given, list) or not given or not all(map(_is_beta, given)):
            raise InputError("scheduler_config.json: trained_betas; expected a list of numbers between 0 and 1")
        betas = np.asarray(given, np.float32)
    elif kind in ("linear", "scaled_linear") and not (_is_beta(start) and _is_beta(end)):
        raise InputError(
            f"scheduler_config.json: beta_start {start!r} and beta_end {end!r}; expected numbers between 0 and 1"
        )
    elif kind == "linear":
        betas = _linspace(start, end, steps)
    elif kind == "scaled_linear":
        betas = _linspace(start**0.5, end**0.5, steps) ** 2
    elif kind == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17

        def alpha_bar(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = np.array(
            [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)], np.float32
        )
    else:
        raise InputError(
            f"scheduler_config.json: beta_schedule {kind!r}; implemented: linear, scaled_linear, squaredcos_cap_v2"
        )
    if config.get("rescale_betas_zero_snr"):
        betas = _rescale_zero_terminal_snr(betas)
    return _cumulative(betas)


def _is_beta(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < 1


def _linspace(start: float, end: float, steps: int) -> np.ndarray:
    """``torch.linspace`` in float32: computed from both ends, each number rounded once."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(max(steps - 1, 1)))
    i = np.arange(steps)
    return np.where(i < steps // 2, first + step * i, last - step * (steps - 1 - i)).astype(np.float32)


def _cumulative(betas: np.ndarray) -> np.ndarray:
    return np.cumprod(1.0 - betas, dtype=np.float64).astype(np.float32)


def _rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale betas so that the last timestep is pure noise (Lin et al. 2023, arXiv 2305.08891, algorithm 1).

    In float64, because nearly equal numbers are subtracted: in float32 the small alphas at the end would be rounding
    errors, which differ between processors.
    """
    roots = np.sqrt(np.cumprod(1.0 - betas.astype(np.float64)))
    first, last = roots[0].copy(), roots[-1].copy()
    roots = (roots - last) * (first / (first - last))
    bars = roots**2
    return 1.0 - np.concatenate([bars[:1], bars[1:] / bars[:-1]])


def _signal_and_noise(schedule: NoiseSchedule, timesteps: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
    """Square roots of signal and noise variance at [B] timesteps, shaped to multiply [B, ...] of ``ndim`` axes."""
    alphas = schedule.alphas_cumprod[timesteps].reshape(timesteps.shape + (1,) * (ndim - 1))
    return jnp.sqrt(alphas), jnp.sqrt(1.0 - alphas)


def add_noise(schedule: NoiseSchedule, latents: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
    """Noisy latents ``sqrt(a) x + sqrt(1 - a) noise``: [B, h, w, c] and int32 [B] -> [B, h, w, c]."""
    signal, sigma = _signal_and_noise(schedule, timesteps, latents.ndim)
    return signal * latents + sigma * noise


def training_target(schedule: NoiseSchedule, latents: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
    """The UNet's target for these noisy latents, [B, h, w, c], by the schedule's ``prediction_type``.

    Velocity is ``sqrt(a) noise - sqrt(1 - a) x`` (Salimans & Ho 2022, arXiv 2202.00512).
    """
    if schedule.prediction_type == "epsilon":
        return noise
    if schedule.prediction_type == "sample":
        return latents
    signal, sigma = _signal_and_noise(schedule, timesteps, latents.ndim)
    return signal * noise - sigma * latents
