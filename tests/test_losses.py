"""The loss and its settings: each held to its published form, and the whole step to a PyTorch loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from test_step import Problem, draw, relative, torch_rows

from ti_jax.config import TrainConfig, resolve
from ti_jax.diffusion.losses import Objective, huber, mean_over_samples, min_snr_weights, offset_noise
from ti_jax.diffusion.schedule import NoiseSchedule
from ti_jax.errors import InputError
from ti_jax.training.step import draw_batch

KINDS = ("epsilon", "v_prediction", "sample")
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def schedules(kind, **changes):
    config = {**SD, "prediction_type": kind, **changes}
    return NoiseSchedule.from_config(config), DDPMScheduler(**config)


def torch_weights(scheduler, timesteps, gamma):
    """As in diffusers' train_text_to_image.py; "sample" by the paper."""
    snr = compute_snr(scheduler, timesteps)
    least = snr.clamp(max=gamma)
    kinds = {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}
    return kinds[scheduler.config.prediction_type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_those_of_diffusers_scripts(kind, gamma):
    ours, theirs = schedules(kind)
    timesteps = torch.arange(1000)
    expected = torch_weights(theirs, timesteps, gamma)
    weights = min_snr_weights(ours, jnp.asarray(timesteps.numpy()), gamma)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, expected.numpy(), rtol=2e-5)


@pytest.mark.parametrize(("kind", "at_pure_noise"), [("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)])
def test_a_schedule_that_ends_in_pure_noise_gives_numbers(kind, at_pure_noise):
    ours, _ = schedules(kind, rescale_betas_zero_snr=True)
    assert ours.alphas_cumprod[-1] == 0
    weights = min_snr_weights(ours, jnp.arange(1000), 5.0)
    assert np.isfinite(weights).all() and weights[-1] == at_pure_noise


def test_huber_is_the_published_formula():
    rng = np.random.default_rng(0)
    prediction, target = rng.normal(size=(2, 3, 4, 4, 2)) * np.array([1e-3, 1e-1, 10])[:, None, None, None]
    for c in (0.001, 0.1, 2.0):
        expected = 2 * c * (np.sqrt((prediction - target) ** 2 + c**2) - c)
        ours = huber(jnp.asarray(prediction, jnp.float32), jnp.asarray(target, jnp.float32), c)
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-9)
    few_large = jnp.array([0.01, 100.0])
    small, large = huber(few_large, jnp.zeros(2), 0.1)
    assert small == pytest.approx(0.01**2, rel=0.01) and large == pytest.approx(2 * 0.1 * 100, rel=0.01)


def test_a_samples_loss_counts_by_its_weight():
    losses = jnp.arange(24.0).reshape(2, 3, 2, 2)
    assert mean_over_samples(losses, None) == jnp.mean(losses)
    assert mean_over_samples(losses, jnp.array([0.0, 1.0])) == pytest.approx(float(jnp.mean(losses[1])) / 2)
    assert mean_over_samples(losses, jnp.ones(2)) == pytest.approx(float(jnp.mean(losses)))


def test_offset_noise_shifts_whole_channels():
    noise = jax.random.normal(jax.random.key(0), (8, 8, 4))
    assert offset_noise(jax.random.key(1), noise, 0.0) is noise
    shift = offset_noise(jax.random.key(1), noise, 0.5) - noise
    np.testing.assert_allclose(shift, jnp.broadcast_to(shift[0, 0], shift.shape), atol=1e-6)
    draws = jax.vmap(lambda key: offset_noise(key, noise, 0.5)[0, 0] - noise[0, 0])(
        jax.random.split(jax.random.key(2), 999)
    )
    assert np.std(draws) == pytest.approx(0.5, rel=0.05) and abs(np.corrcoef(draws.T)[0, 1]) < 0.1


def test_the_objective_of_a_config():
    schedule, _ = schedules("epsilon")
    assert Objective.of(resolve(TrainConfig()), schedule) == Objective()
    config = TrainConfig(loss="huber", huber_c=0.2, snr_gamma=5.0, noise_offset=0.1, timestep_range=(0, 500))
    assert Objective.of(resolve(config), schedule) == Objective("huber", 0.2, 5.0, 0.1, (0, 500))
    assert Objective.of(TrainConfig(timestep_range=(0, 1000)), schedule) == Objective()
    with pytest.raises(InputError, match="--timestep_range 5 1001: the model has 1000 timesteps"):
        Objective.of(TrainConfig(timestep_range=(5, 1001)), schedule)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("epsilon", {"snr_gamma": 1.0, "noise_offset": 0.3}),
        (
            "v_prediction",
            {
                "loss": "huber", "huber_c": 0.5, "snr_gamma": 1.0, "timestep_range": (200, 700),
                "gradient_accumulation_steps": 2,
            },
        ),
    ],
)  # fmt: skip
def test_twenty_steps_equal_a_pytorch_loop(make_tiny_sd, pictures, tmp_path, kind, changes):
    model = make_tiny_sd(kind)
    scheduler = DDPMScheduler.from_pretrained(model / "scheduler")

    def loss_of(predicted, target, timesteps):
        error = (predicted - target) ** 2
        if changes.get("loss") == "huber":
            c = changes["huber_c"]
            error = 2 * c * (torch.sqrt(error + c**2) - c)
        loss = error.mean(dim=(1, 2, 3))
        if "snr_gamma" in changes:
            loss = loss * torch_weights(scheduler, timesteps, changes["snr_gamma"])
        if "timestep_range" in changes:
            low, high = changes["timestep_range"]
            assert low <= timesteps.min() and timesteps.max() < high
        return loss.mean()

    problem = Problem(model, pictures, tmp_path, **changes)
    state, losses = problem.run(num_devices=1, batch_size=2)
    rows, their_losses = torch_rows(problem, model, kind, loss_of)
    assert relative(losses, their_losses) < 1e-5
    assert relative(state.rows["text_encoder"], rows["text_encoder"]) < 1e-5
    assert relative(state.rows["text_encoder"], problem.concept.rows["text_encoder"]) > 0.01, "nothing was learned"


def test_timesteps_of_a_range_are_spread_over_it(tiny_sd, pictures, tmp_path):
    frozen = Problem(tiny_sd, pictures, tmp_path, timestep_range=(100, 900)).frozen()
    draw = jax.jit(jax.vmap(lambda step: draw_batch(frozen, step, jnp.arange(8), 8).timesteps))
    timesteps = np.asarray(draw(jnp.arange(3000)))
    assert timesteps.min() == 100 and timesteps.max() == 899
    gaps = np.diff(np.sort(timesteps, axis=1), axis=1)
    assert gaps.min() == gaps.max() == 100


def test_a_plain_run_draws_what_it_did(tiny_sd, pictures, tmp_path):
    """And an offset changes the noise alone."""
    frozen = Problem(tiny_sd, pictures, tmp_path).frozen()._replace(params={})
    plain = draw(frozen, jnp.int32(3), jnp.arange(4), 4)
    shifted = draw(frozen._replace(objective=Objective(noise_offset=0.5)), jnp.int32(3), jnp.arange(4), 4)
    for name in plain._fields:
        same = jax.tree.map(np.array_equal, getattr(plain, name), getattr(shifted, name))
        assert jax.tree.all(same) == (name != "noise")
    _, sample_key, timestep_key = jax.random.split(frozen.key, 3)
    for position in range(4):
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(sample_key, 3), position), 4)
        assert np.array_equal(plain.noise[position], jax.random.normal(keys[3], plain.noise.shape[1:]))
    first = jax.random.randint(jax.random.fold_in(timestep_key, 3), (), 0, 1000)
    assert np.array_equal(plain.timesteps, (first + jnp.arange(4) * 1000 // 4) % 1000)
    shift = shifted.noise - plain.noise
    np.testing.assert_allclose(shift, jnp.broadcast_to(shift[:, :1, :1], shift.shape), atol=1e-6)
