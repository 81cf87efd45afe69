import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers.optimization import get_scheduler

from ti_jax.config import TrainConfig
from ti_jax.training.optimizer import learning_rate_schedule, make_optimizer, mask_rows

CONFIG = TrainConfig(learning_rate=0.01, lr_warmup_steps=7, lr_num_cycles=3, adam_weight_decay=0.1)


@pytest.mark.parametrize(
    "kind", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_schedules_equal_diffusers(kind):
    total = 40
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=7, num_training_steps=total, num_cycles=3)
    ours = learning_rate_schedule(dataclasses.replace(CONFIG, lr_scheduler=kind), 0.01, total)
    for step in range(total + 3):
        np.testing.assert_allclose(float(ours(jnp.int32(step))), theirs.get_last_lr()[0], rtol=2e-6, atol=1e-9)
        optimizer.step()
        theirs.step()


def test_adamw_equals_torch():
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(3, 5)).astype(np.float32), rng.normal(size=(30, 3, 5)).astype(np.float32)
    parameter = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.999), weight_decay=0.1, eps=1e-8)
    ours, _ = make_optimizer(CONFIG, 30, 1)
    rows, mask = {"text_encoder": jnp.asarray(start)}, {"text_encoder": jnp.ones(3, bool)}
    state = ours.init(rows)
    for grad in grads:
        parameter.grad = torch.tensor(grad)
        theirs.step()
        updates, state = ours.update({"text_encoder": jnp.asarray(grad)}, state, rows, row_mask=mask)
        rows = optax.apply_updates(rows, updates)
    np.testing.assert_allclose(np.asarray(rows["text_encoder"]), parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_scale_lr_multiplies_the_rate():
    _, schedule = make_optimizer(dataclasses.replace(CONFIG, scale_lr=True), 30, 12)
    assert float(schedule(jnp.int32(3))) == pytest.approx(0.12)


def test_a_masked_row_does_not_move_to_the_bit():
    """Momentum from when it still trained, weight decay and its own gradient all leave it where it is."""
    optimizer = mask_rows(optax.adamw(0.1, weight_decay=0.5))
    rows = {"text_encoder": jax.random.normal(jax.random.key(0), (3, 4))}
    state = optimizer.init(rows)
    grads = {"text_encoder": jnp.ones((3, 4))}
    everything, without_1 = ({"text_encoder": jnp.array(mask)} for mask in ([True, True, True], [True, False, True]))

    updates, state = optimizer.update(grads, state, rows, row_mask=everything)
    rows = optax.apply_updates(rows, updates)
    before, moments_before = rows["text_encoder"], optax.tree_utils.tree_get(state, "mu")["text_encoder"]
    assert jnp.abs(moments_before[1]).min() > 0
    for _ in range(3):
        updates, state = optimizer.update(grads, state, rows, row_mask=without_1)
        rows = optax.apply_updates(rows, updates)
    moved = np.any(np.asarray(rows["text_encoder"] != before), axis=1)
    assert moved.tolist() == [True, False, True]
    moments = optax.tree_utils.tree_get(state, "mu")["text_encoder"]
    assert np.array_equal(moments[1], moments_before[1])
    assert not np.array_equal(moments[0], moments_before[0])
