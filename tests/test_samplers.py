import json
import sys
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ti_jax.config import ASSETS
from ti_jax.diffusion.samplers import choose_sampler, make_sampler
from ti_jax.diffusion.schedule import PREDICTION_TYPES
from ti_jax.errors import InputError

# PyTorch's own, inside the reference: numpy 2 asks tensors for an argument that they do not take.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

MINI_SD = json.loads((ASSETS / "mini-sd" / "scheduler" / "scheduler_config.json").read_text())
SD15 = {
    "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None, "clip_sample": False,
}  # fmt: skip
REFERENCE = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
}
SHAPE = (2, 4, 4, 3)


def model(xp, sample, timestep):
    """Stands in for the UNet: smooth, bounded, different at each timestep, and the same in both libraries."""
    return xp.tanh(0.7 * sample + 0.001 * timestep) * 1.3 - 0.1


class Double:
    """``torch`` as the reference sees it: where it casts a sample to float32, double precision stays.

    With zero SNR the Euler samplers subtract numbers of 4096, which in float32 would leave nothing to compare.
    """

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def their_trajectory(name, config, steps, noises):
    scheduler = REFERENCE[name].from_config(config)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else it begins at the second of two equal timesteps
        scheduler.sigmas = scheduler.sigmas.double()
    noises = torch.tensor(noises).double()
    sample = noises[0] * scheduler.init_noise_sigma
    samples = []
    module = sys.modules[REFERENCE[name].__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torch", Double())
        for timestep, noise in zip(scheduler.timesteps, noises[1:], strict=True):
            patch.setattr(module, "randn_tensor", lambda *args, noise=noise, **kwargs: noise)
            scaled = scheduler.scale_model_input(sample, timestep)
            sample = scheduler.step(model(torch, scaled, timestep.double()), timestep, sample).prev_sample
            samples.append(sample.numpy())
    return scheduler.timesteps.numpy(), samples


@jax.jit
def our_trajectory(sampler, noises):
    def step(state, inputs):
        i, noise = inputs
        scaled = sampler.scale_model_input(state.sample, i)
        state = sampler.step(state, model(jnp, scaled, sampler.timesteps[i]), i, noise)
        return state, state.sample

    return jax.lax.scan(step, sampler.start(noises[0]), (jnp.arange(sampler.num_steps), noises[1:]))[1]


def check(name, config, steps):
    noises = np.random.default_rng(0).normal(size=(steps + 1, *SHAPE)).astype(np.float32)
    with np.errstate(all="raise"):
        sampler = make_sampler(name, config, steps)
    timesteps, theirs = their_trajectory(name, config, steps, noises)
    np.testing.assert_allclose(np.asarray(sampler.timesteps), timesteps, rtol=1e-6)
    for mine, reference in zip(np.asarray(our_trajectory(sampler, jnp.asarray(noises))), theirs, strict=True):
        np.testing.assert_allclose(mine, reference, rtol=1e-5, atol=1e-5 * np.abs(reference).max())


# diffusers' ancestral sampler has no "sample".
KINDS = [(name, kind) for name in REFERENCE for kind in PREDICTION_TYPES if (name, kind) != ("euler_a", "sample")]


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize(("name", "prediction_type"), KINDS)
def test_trajectories_equal_diffusers(name, spacing, prediction_type, steps):
    check(name, {**MINI_SD, "prediction_type": prediction_type, "timestep_spacing": spacing}, steps)


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize(
    "change",
    [
        {"steps_offset": 0},
        {"set_alpha_to_one": False},
        {"set_alpha_to_one": False, "steps_offset": 0},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"clip_sample": True, "clip_sample_range": 0.8},
        {"final_sigmas_type": "sigma_min"},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"euler_at_final": True},
        {"use_karras_sigmas": True},
        {"use_karras_sigmas": True, "timestep_spacing": "trailing", "sigma_min": 0.05, "sigma_max": 12.0},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ],
    ids=str,
)
def test_options_of_the_config_are_honoured(name, change):
    for steps in (1, 6, 20):
        check(name, {**MINI_SD, **change}, steps)


@pytest.mark.parametrize("name", ["euler", "euler_a"])
def test_one_euler_step_from_zero_snr_ends_on_the_denoised_sample(name):
    config = {**MINI_SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "sample"}
    sampler = make_sampler(name, config, 1)
    noise, x0 = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    state = sampler.step(sampler.start(jnp.asarray(noise)), jnp.asarray(x0), jnp.int32(0), jnp.asarray(noise))
    np.testing.assert_allclose(np.asarray(state.sample), x0, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 7, 30])
@pytest.mark.parametrize("name", REFERENCE)
def test_published_sd15_config(name, steps):
    check(name, SD15, steps)


def test_karras_with_the_cosine_schedule():
    check("dpm++", {**MINI_SD, "beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}, 20)


def test_a_config_of_a_class_that_never_clips_does_not_make_ddim_clip():
    silent = {name: value for name, value in SD15.items() if name != "clip_sample"}
    assert make_sampler("ddim", silent, 5).clip_range is None
    assert make_sampler("ddim", {**silent, "_class_name": "DDIMScheduler"}, 5).clip_range == 1.0
    assert make_sampler("ddim", {**SD15, "clip_sample": True, "clip_sample_range": 2.0}, 5).clip_range == 2.0


def test_trailing_never_goes_past_the_first_timestep():
    # diffusers' arange gives 62 here, and -1 as the last.
    sampler = make_sampler("ddim", {**MINI_SD, "timestep_spacing": "trailing"}, 61)
    assert sampler.num_steps == 61 and float(sampler.timesteps[-1]) == 15.0


def test_samplers_of_equal_length_share_a_program():
    before = our_trajectory._cache_size()
    for spacing in ("leading", "trailing", "linspace"):
        check("ddim", {**MINI_SD, "timestep_spacing": spacing}, 3)
    assert our_trajectory._cache_size() == before + 1


def test_the_checkpoints_own_sampler():
    assert choose_sampler(SD15) == ("ddim", SD15, None) and choose_sampler(MINI_SD) == ("ddim", MINI_SD, None)
    assert choose_sampler({"_class_name": "EulerDiscreteScheduler"})[::2] == ("euler", None)
    assert make_sampler(None, {**MINI_SD, "_class_name": "DPMSolverMultistepScheduler"}, 5).name == "dpm++"


def case(name):
    return json.loads((Path(__file__).parent / "cases" / f"scheduler_{name}.json").read_text())


@pytest.mark.parametrize("fallback", ["ddim", "euler"])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("unipc", "UniPCMultistepScheduler is not implemented"),
        ("lcm", "LCMScheduler is not implemented"),
        ("sde", "DPMSolverMultistepScheduler with algorithm_type = 'sde-dpmsolver++' is not implemented"),
    ],
)
def test_a_scheduler_that_is_not_implemented_has_another_draw(name, says, fallback):
    config = case(name)
    chosen = choose_sampler(config, fallback)
    assert chosen[:2] == (fallback, config)
    assert chosen.note == f"scheduler_config.json: {says}; drawing with {fallback} (--scheduler chooses another)"
    drawn = make_sampler(None, config, 5, fallback)
    asked = make_sampler(fallback, config, 5)
    for ours, theirs in zip(jax.tree.leaves(drawn), jax.tree.leaves(asked), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    check(fallback, {**config, "clip_sample": False}, 5)  # as diffusers' pipelines have it


def test_zero_snr_and_noise_prediction_draw_from_timesteps_with_signal():
    config = case("zsnr")
    chosen = choose_sampler(config)
    assert chosen.name == "ddim" and "timestep_spacing leading" in chosen.note
    sampler = make_sampler(None, config, 5)
    assert sampler.timesteps.tolist() == [800, 600, 400, 200, 0] and np.isfinite(sampler.coefficients["signal"]).all()
    check("ddim", chosen.config, 5)
    assert choose_sampler({**config, "prediction_type": "v_prediction"}).note is None


def test_a_fallback_whose_options_are_not_implemented_is_not_taken():
    chosen = choose_sampler({**case("unipc"), "use_exponential_sigmas": True}, "euler")
    assert chosen.name == "ddim" and "drawing with ddim" in chosen.note


@pytest.mark.parametrize(
    ("name", "change", "steps", "message"),
    [
        ("heun", {}, 5, "scheduler 'heun' is not known"),
        ("ddim", {}, 0, "from 1 to 1000, not 0"),
        ("ddim", {}, 1001, "from 1 to 1000, not 1001"),
        ("ddim", {}, 1000, "go past the last of 1000"),
        ("ddim", {"thresholding": True}, 5, "thresholding = True"),
        (
            "ddim",
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "epsilon"},
            5,
            "without signal",
        ),
        ("euler", {"use_beta_sigmas": True}, 5, "use_beta_sigmas = True"),
        ("dpm++", {"use_lu_lambdas": True}, 5, "use_lu_lambdas = True"),
        ("dpm++", {"solver_order": 3}, 5, "solver_order = 3"),
        ("dpm++", {"timestep_spacing": "linspace"}, 1000, "visit a timestep twice"),
        ("dpm++", {"final_sigmas_type": "huge"}, 5, "final_sigmas_type 'huge'"),
        ("euler", {"prediction_type": "flow"}, 5, "prediction_type 'flow'"),
        ("dpm++", {"algorithm_type": "sde-dpmsolver++"}, 5, "algorithm_type"),
        ("euler", {"timestep_spacing": "random"}, 5, "timestep_spacing 'random'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name, change, steps, message):
    with pytest.raises(InputError, match=message):
        make_sampler(name, {**MINI_SD, **change}, steps)
