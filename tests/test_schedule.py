import json
from pathlib import Path

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

from ti_jax.config import ASSETS
from ti_jax.diffusion.schedule import NoiseSchedule, add_noise, training_target
from ti_jax.errors import InputError

MINI_SD = json.loads((ASSETS / "mini-sd" / "scheduler" / "scheduler_config.json").read_text())
CONFIGS = {
    "mini-sd": MINI_SD,
    "defaults": {},
    "linear": {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.02, "num_train_timesteps": 100},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": np.linspace(0.01, 0.03, 50).tolist(), "num_train_timesteps": 50},
    "zero snr": {**MINI_SD, "rescale_betas_zero_snr": True},
}


def ignoring_unknown(config):
    known = DDPMScheduler().config
    return {name: value for name, value in config.items() if name in known and not name.startswith("_")}


@pytest.mark.parametrize("name", CONFIGS)
def test_alphas_equal_diffusers(name):
    config = ignoring_unknown(CONFIGS[name])
    if config.get("rescale_betas_zero_snr"):
        # diffusers' own function, given float64: in float32 it subtracts nearly equal numbers, and its small alphas
        # differ from processor to processor by a few parts in a million.
        betas = DDPMScheduler(**(config | {"rescale_betas_zero_snr": False})).betas.double()
        theirs = torch.cumprod(1.0 - rescale_zero_terminal_snr(betas), dim=0).numpy()
    else:
        theirs = DDPMScheduler(**config).alphas_cumprod.numpy()
    ours = NoiseSchedule.from_config(CONFIGS[name]).alphas_cumprod
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_noise_and_target_equal_diffusers(prediction_type):
    config = {**MINI_SD, "prediction_type": prediction_type}
    schedule, theirs = NoiseSchedule.from_config(config), DDPMScheduler(**ignoring_unknown(config))
    rng = np.random.default_rng(0)
    latents, noise = rng.normal(size=(2, 5, 4, 4, 4)).astype(np.float32)
    timesteps = np.array([0, 1, 500, 998, 999])
    tensors = torch.tensor(latents), torch.tensor(noise), torch.tensor(timesteps)
    ours = add_noise(schedule, jnp.asarray(latents), jnp.asarray(noise), jnp.asarray(timesteps))
    np.testing.assert_allclose(np.asarray(ours), theirs.add_noise(*tensors).numpy(), rtol=1e-5, atol=1e-6)
    target = training_target(schedule, jnp.asarray(latents), jnp.asarray(noise), jnp.asarray(timesteps))
    wanted = {"epsilon": noise, "sample": latents, "v_prediction": theirs.get_velocity(*tensors).numpy()}
    np.testing.assert_allclose(np.asarray(target), wanted[prediction_type], rtol=1e-5, atol=1e-6)


def test_unknown_options_are_named():
    with pytest.raises(InputError, match="beta_schedule 'sigmoid'"):
        NoiseSchedule.from_config({"beta_schedule": "sigmoid"})
    with pytest.raises(InputError, match="prediction_type 'flow'"):
        NoiseSchedule.from_config({"prediction_type": "flow"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_train_timesteps": "1000"}, "num_train_timesteps '1000'; expected a positive integer"),
        ({"num_train_timesteps": 0}, "num_train_timesteps 0; expected"),
        ({"beta_start": None}, "beta_start None and beta_end 0.02; expected numbers between 0 and 1"),
        ({"beta_schedule": "scaled_linear", "beta_end": [0.1]}, r"beta_start 0.0001 and beta_end \[0.1\]; expected"),
        ({"beta_end": 12}, "beta_end 12; expected"),
        ({"trained_betas": [0.1, "0.2"]}, "trained_betas; expected a list of numbers between 0 and 1"),
    ],
)
def test_numbers_that_cannot_be(config, message):
    with pytest.raises(InputError, match=f"^scheduler_config.json: .*{message}"):
        NoiseSchedule.from_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("edm", "EDMDPMSolverMultistepScheduler is EDM"),
        ("flow", "FlowMatchEulerDiscreteScheduler is flow matching"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "flow matching"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "is EDM"),
        ({"_class_name": "IPNDMScheduler", "num_train_timesteps": 1000}, "IPNDMScheduler has a noise schedule"),
        ({"beta_schedule": "laplace"}, "beta_schedule 'laplace'; implemented: "),
    ],
)
def test_another_kind_of_diffusion_is_refused(config, message):
    if isinstance(config, str):
        config = json.loads((Path(__file__).parent / "cases" / f"scheduler_{config}.json").read_text())
    with pytest.raises(InputError, match=message):
        NoiseSchedule.from_config(config)


@pytest.mark.parametrize("name", ["unipc", "lcm", "sde", "zsnr"])
def test_betas_of_other_schedulers_are_diffusers(name):
    config = json.loads((Path(__file__).parent / "cases" / f"scheduler_{name}.json").read_text())
    theirs = getattr(diffusers, config["_class_name"]).from_config(config).alphas_cumprod.numpy()
    ours = np.asarray(NoiseSchedule.from_config(config).alphas_cumprod)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=2e-7)


def test_a_class_of_somebodys_own_is_read_by_its_betas():
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    own = NoiseSchedule.from_config({"_class_name": "MyScheduler", **betas})
    np.testing.assert_array_equal(own.alphas_cumprod, NoiseSchedule.from_config(betas).alphas_cumprod)
