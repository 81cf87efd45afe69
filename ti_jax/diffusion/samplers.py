"""Samplers as per-step coefficients and pure functions, so that a whole trajectory is one ``lax.scan``.

Each is held to the diffusers scheduler of the same name, loaded ``from_config`` of the checkpoint's
``scheduler_config.json``:

=========  ===============================  =============================================
ddim       DDIMScheduler, eta 0             Song et al. 2020, arXiv 2010.02502
euler      EulerDiscreteScheduler           Karras et al. 2022, arXiv 2206.00364, algorithm 2 without churn
euler_a    EulerAncestralDiscreteScheduler  k-diffusion's sample_euler_ancestral
dpm++      DPMSolverMultistepScheduler      Lu et al. 2022, arXiv 2211.01095, DPM-Solver++(2M)
=========  ===============================  =============================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ti_jax.diffusion.schedule import PREDICTION_TYPES, alphas_cumprod
from ti_jax.errors import InputError

SAMPLERS = ("ddim", "euler", "euler_a", "dpm++")

# The scheduler class that a checkpoint names -> ours. For PNDM, which SD1 names, ours is DDIM: the same timesteps, and
# one UNet evaluation a step.
_OF_CLASS = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "ddim",
    "DDPMScheduler": "ddim",
    "LMSDiscreteScheduler": "euler",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "DPMSolverMultistepScheduler": "dpm++",
}

# Schedulers that clip the denoised sample by default. Configs of other classes lack the option because they never clip;
# their latents must not be clipped to [-1, 1]. diffusers' pipelines disable it, too.
_CLIPS_UNASKED = ("DDIMScheduler", "DDPMScheduler")

# Options that change what a scheduler does and are not implemented: the values that leave them off.
_MUST_BE_OFF: dict[str, dict[str, tuple[Any, ...]]] = {
    "ddim": {"thresholding": (False, None)},
    "euler": {
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
    },
    "euler_a": {},
    "dpm++": {
        "thresholding": (False, None),
        "algorithm_type": ("dpmsolver++", "deis"),
        "solver_order": (2,),
        "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
        "use_lu_lambdas": (False, None),
        "use_flow_sigmas": (False, None),
        "use_dynamic_shifting": (False, None),
        "lambda_min_clipped": (-math.inf, None),
        "variance_type": (None,),
    },
}


class SamplerState(NamedTuple):
    """State carried from step to step: [B, h, w, c] each, float32."""

    sample: jax.Array
    previous_x0: jax.Array  # the last step's denoised sample, which dpm++ extrapolates from


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["timesteps", "coefficients", "init_noise_sigma"],
    meta_fields=["name", "prediction_type", "clip_range"],
)
@dataclass(frozen=True)
class Sampler:
    """A sampler for a number of steps n.

    Attributes:
      timesteps: float32 [n], passed to the UNet; not integers if the spacing is "linspace".
      coefficients: float32 [n] each; their names depend on ``name``.
      init_noise_sigma: float32 scalar, the standard deviation of the sample to start from.
      clip_range: the denoised sample is clipped to plus and minus this (ddim with ``clip_sample``), or None.
    """

    timesteps: jax.Array
    coefficients: Mapping[str, jax.Array]
    init_noise_sigma: jax.Array
    name: str
    prediction_type: str
    clip_range: float | None

    @property
    def uses_noise(self) -> bool:
        """Whether a step adds fresh noise, so that `step` needs its argument ``noise``."""
        return self.name == "euler_a"

    @property
    def num_steps(self) -> int:
        """Number of steps, each one evaluation of the UNet."""
        return self.timesteps.shape[0]

    def start(self, noise: jax.Array) -> SamplerState:
        """Initial state from standard normal noise [B, h, w, c]."""
        return SamplerState(noise * self.init_noise_sigma, jnp.zeros_like(noise))

    def scale_model_input(self, sample: jax.Array, i: jax.Array) -> jax.Array:
        """The sample scaled for the UNet at step i (``scale_model_input``); Euler samplers have x0 + sigma noise."""
        if self.name in ("euler", "euler_a"):
            return sample / jnp.sqrt(jnp.square(self.coefficients["sigma"][i]) + 1.0)
        return sample

    def step(
        self, state: SamplerState, model_output: jax.Array, i: jax.Array, noise: jax.Array | None = None
    ) -> SamplerState:
        """One step, from i to i + 1, with the UNet's output float32 [B, h, w, c].

        Args:
          noise: standard normal [B, h, w, c], where ``uses_noise``.
        """
        c = {name: values[i] for name, values in self.coefficients.items()}
        sample = state.sample
        if self.name in ("euler", "euler_a"):
            # In x = x0 + sigma noise, a sample of unit variance is x / sqrt(sigma^2 + 1).
            root = jnp.sqrt(jnp.square(c["sigma"]) + 1.0)
            x0 = self._x0(sample / root, model_output, 1.0 / root, c["sigma"] / root)
            # sample + (sample - x0) / sigma (sigma_down - sigma), without the difference of large numbers.
            moved = x0 + (sample - x0) * c["share_of_noise_left"]
            if noise is not None and self.uses_noise:
                moved = moved + noise * c["sigma_up"]
            return SamplerState(moved, x0)
        x0 = self._x0(sample, model_output, c["signal"], c["noise"])
        if self.name == "ddim":
            epsilon = self._epsilon(sample, model_output, c["signal"], c["noise"])
            if self.clip_range is not None:
                x0 = jnp.clip(x0, -self.clip_range, self.clip_range)
            return SamplerState(c["next_signal"] * x0 + c["next_noise"] * epsilon, x0)
        moved = c["of_sample"] * sample + c["of_x0"] * x0 + c["of_previous_x0"] * state.previous_x0
        return SamplerState(moved, x0)

    def _x0(self, x: jax.Array, output: jax.Array, signal: jax.Array, noise: jax.Array) -> jax.Array:
        """The denoised sample, where x = signal x0 + noise epsilon with signal^2 + noise^2 = 1."""
        if self.prediction_type == "epsilon":
            return (x - noise * output) / signal
        if self.prediction_type == "v_prediction":
            return signal * x - noise * output
        return output

    def _epsilon(self, x: jax.Array, output: jax.Array, signal: jax.Array, noise: jax.Array) -> jax.Array:
        """The noise in x, likewise."""
        if self.prediction_type == "epsilon":
            return output
        if self.prediction_type == "v_prediction":
            return signal * output + noise * x
        return (x - signal * output) / noise


class SamplerChoice(NamedTuple):
    """A sampler for a checkpoint's ``scheduler_config.json``.

    Attributes:
      name: one of `SAMPLERS`.
      config: the configuration to build it from: the checkpoint's, or one that differs in the spacing of timesteps.
      note: why it is not the checkpoint's own scheduler, for the user; None if it is.
    """

    name: str
    config: Mapping[str, Any]
    note: str | None = None


def choose_sampler(config: Mapping[str, Any], fallback: str = "ddim") -> SamplerChoice:
    """The sampler that the checkpoint names, by the scheduler's class, or ``fallback`` where that is not implemented.

    Many checkpoints are saved with a scheduler that their author drew with last (UniPC, DEIS, LCM, SDE variants). It
    is independent of how the model was trained, so another one can draw with it.
    """
    class_name = config.get("_class_name", "DDIMScheduler")
    name, reason = _OF_CLASS.get(class_name), f"{class_name} is not implemented"
    if name is not None:
        fault = _not_implemented(name, config)
        if fault is None and not _starts_without_signal(name, config):
            return SamplerChoice(name, config)
        reason = f"{class_name} with {fault or 'rescale_betas_zero_snr and prediction_type epsilon'} is not implemented"
    if _not_implemented(fallback, config) is not None:
        fallback = "ddim"  # which has the fewest options
    how = f"drawing with {fallback}"
    if _starts_without_signal(fallback, config):
        # Without signal, a noise prediction has no information about the picture; "leading" avoids that timestep.
        config = {**config, "timestep_spacing": "leading"}
        how += " and timestep_spacing leading"
    return SamplerChoice(fallback, config, f"scheduler_config.json: {reason}; {how} (--scheduler chooses another)")


def _not_implemented(name: str, config: Mapping[str, Any]) -> str | None:
    """The first option of the config that sampler `name` does not implement, or None."""
    for option, off in _MUST_BE_OFF[name].items():
        if option in config and config[option] not in off:
            return f"{option} = {config[option]!r}"
    return None


def _starts_without_signal(name: str, config: Mapping[str, Any]) -> bool:
    """Whether ddim would divide by a signal of zero: the model predicts noise, and the last timestep is visited."""
    return (
        name == "ddim"
        and bool(config.get("rescale_betas_zero_snr"))
        and config.get("prediction_type", "epsilon") == "epsilon"
        and config.get("timestep_spacing", "leading") != "leading"
    )


def make_sampler(
    name: str | None, config: Mapping[str, Any], num_inference_steps: int, fallback: str = "ddim"
) -> Sampler:
    """Sampler ``name`` for a model with this ``scheduler_config.json``; None: that of `choose_sampler`.

    Raises:
      InputError: an unknown name, a number of steps that the schedule has no timesteps for, or an option of the config
        that is not implemented.
    """
    if name is None:
        name, config, _ = choose_sampler(config, fallback)
    if name not in SAMPLERS:
        raise InputError(f"scheduler {name!r} is not known; choose one of {', '.join(SAMPLERS)}")
    if (fault := _not_implemented(name, config)) is not None:
        raise InputError(
            f"scheduler_config.json: option {fault} is not implemented for {name}; choose another --scheduler"
        )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise InputError(f"scheduler_config.json: prediction_type {prediction_type!r} is not implemented")
    total = int(config.get("num_train_timesteps", 1000))
    if not 1 <= num_inference_steps <= total:
        raise InputError(f"the number of inference steps must be from 1 to {total}, not {num_inference_steps}")

    alphas = alphas_cumprod(config).astype(np.float64)
    build = {"ddim": _ddim, "euler": _euler, "euler_a": _euler, "dpm++": _dpm_solver}[name]
    timesteps, coefficients, init_noise_sigma = build(name, config, alphas, num_inference_steps)
    if name == "ddim" and prediction_type == "epsilon" and not coefficients["signal"].all():
        raise InputError(
            "scheduler_config.json: rescale_betas_zero_snr with prediction_type 'epsilon' starts ddim from a timestep "
            "without signal, where noise has no information about the picture; choose another --scheduler"
        )
    clips = name == "ddim" and config.get("clip_sample", config.get("_class_name", "DDIMScheduler") in _CLIPS_UNASKED)
    return Sampler(
        timesteps=jnp.asarray(timesteps, jnp.float32),
        coefficients={key: jnp.asarray(value, jnp.float32) for key, value in coefficients.items()},
        init_noise_sigma=jnp.float32(init_noise_sigma),
        name=name,
        prediction_type=prediction_type,
        clip_range=float(config.get("clip_sample_range", 1.0)) if clips else None,
    )


def _spaced(config: Mapping[str, Any], default: str, steps: int, *, extra: int) -> np.ndarray:
    """Timesteps [steps], from high to low, by the config's ``timestep_spacing`` (arXiv 2305.08891, table 2).

    ``extra`` is 1 for DPM-Solver, which spaces one step more and drops the last.
    """
    total, spacing = config.get("num_train_timesteps", 1000), config.get("timestep_spacing", default)
    if spacing == "linspace":
        return np.linspace(0, total - 1, steps + extra)[::-1][:steps]
    if spacing == "leading":
        timesteps = (np.arange(steps + extra) * (total // (steps + extra)))[::-1][:steps]
        timesteps = timesteps + config.get("steps_offset", 0)
        if timesteps[0] >= total:
            raise InputError(
                f"scheduler_config.json: {steps} steps with steps_offset {config['steps_offset']} go past the last of "
                f"{total} timesteps; use fewer steps"
            )
        return timesteps.astype(np.float64)
    if spacing == "trailing":
        # For some numbers of steps (61, 103, ...) rounding makes arange one longer, with -1 as the last timestep.
        return np.round(np.arange(total, 0, -total / steps))[:steps] - 1
    raise InputError(f"scheduler_config.json: timestep_spacing {spacing!r}; implemented: leading, linspace, trailing")


def _ddim(name, config, alphas, steps):
    timesteps = np.round(_spaced(config, "leading", steps, extra=0)).astype(np.int64)
    final = 1.0 if config.get("set_alpha_to_one", True) else alphas[0]
    following = timesteps - len(alphas) // steps
    now, then = alphas[timesteps], np.where(following >= 0, alphas[following], final)
    coefficients = {
        "signal": np.sqrt(now),
        "noise": np.sqrt(1.0 - now),
        "next_signal": np.sqrt(then),
        "next_noise": np.sqrt(1.0 - then),
    }
    return timesteps, coefficients, 1.0


def _all_sigmas(config: Mapping[str, Any], alphas: np.ndarray) -> np.ndarray:
    """Noise over signal at every training timestep, float64 [T]."""
    if config.get("rescale_betas_zero_snr"):
        # The last sigma would be infinite; diffusers uses the smallest float16 number as its alpha.
        alphas = np.append(alphas[:-1], 2.0**-24)
    return np.sqrt((1.0 - alphas) / alphas)


def _euler(name, config, alphas, steps):
    timesteps = _spaced(config, "linspace", steps, extra=0)
    every = _all_sigmas(config, alphas)
    sigmas = np.interp(timesteps, np.arange(len(every)), every)
    if name == "euler" and config.get("use_karras_sigmas"):
        sigmas, timesteps = _karras(config, every, sigmas[-1], sigmas[0], steps)
    sigmas = np.append(sigmas, _final_sigma(config, every) if name == "euler" else 0.0)
    now, then = sigmas[:-1], sigmas[1:]
    down, up = then, np.zeros_like(then)
    if name == "euler_a":
        # up: the fresh noise; down: the next sigma without it, sqrt(then^2 - up^2).
        down, up = then**2 / now, then * np.sqrt(1.0 - (then / now) ** 2)
    coefficients = {"sigma": now, "share_of_noise_left": down / now, "sigma_up": up}
    largest = sigmas.max()
    leading = config.get("timestep_spacing", "linspace") == "leading"
    return timesteps, coefficients, math.sqrt(largest**2 + 1.0) if leading else largest


def _karras(
    config: Mapping[str, Any], every: np.ndarray, smallest: float, largest: float, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sigmas [steps] evenly spaced in their 7th root (Karras et al. 2022, eq. 5), and the timesteps that have them."""
    smallest, largest = config.get("sigma_min") or smallest, config.get("sigma_max") or largest
    sigmas = np.linspace(largest ** (1 / 7), smallest ** (1 / 7), steps) ** 7
    return sigmas, np.interp(np.log(sigmas), np.log(every.astype(np.float32)), np.arange(len(every)))


def _final_sigma(config: Mapping[str, Any], every: np.ndarray) -> float:
    kind = config.get("final_sigmas_type", "zero")
    if kind not in ("zero", "sigma_min"):
        raise InputError(f"scheduler_config.json: final_sigmas_type {kind!r}; implemented: zero, sigma_min")
    return 0.0 if kind == "zero" else float(every[0])


def _dpm_solver(name, config, alphas, steps):
    timesteps = np.round(_spaced(config, "linspace", steps, extra=1))
    every = _all_sigmas(config, alphas)
    sigmas = np.interp(timesteps, np.arange(len(every)), every)
    if config.get("use_karras_sigmas"):
        sigmas, timesteps = _karras(config, every, every[0], every[-1], steps)
        cosine = config.get("beta_schedule") == "squaredcos_cap_v2"
        timesteps = np.trunc(timesteps) if cosine else np.round(timesteps)
    final = _final_sigma(config, every)
    sigmas = np.append(sigmas, final)
    if not (np.diff(sigmas[:-1]) < 0).all():
        raise InputError(f"{steps} steps of dpm++ would visit a timestep twice; use fewer steps or another --scheduler")
    signal = 1.0 / np.sqrt(sigmas**2 + 1.0)
    noise = sigmas * signal
    with np.errstate(divide="ignore"):
        log_snr = np.log(signal) - np.log(noise)  # lambda in the paper; infinite where no noise is left
    h = np.diff(log_snr)
    of_x0 = -signal[1:] * np.expm1(-h)
    # Second order from the second step on, with the previous denoised sample; first order for the last step if it goes
    # to a sigma of zero or if there are few steps.
    second = np.arange(steps) > 0
    if final == 0.0 or config.get("euler_at_final", False) or (config.get("lower_order_final", True) and steps < 15):
        second[-1] = False
    half = np.zeros(steps)
    half[second] = 0.5 * of_x0[second] * h[second] / h[np.flatnonzero(second) - 1]
    coefficients = {
        "signal": signal[:-1],
        "noise": noise[:-1],
        "of_sample": noise[1:] / noise[:-1],
        "of_x0": of_x0 + half,
        "of_previous_x0": -half,
    }
    return timesteps, coefficients, 1.0
