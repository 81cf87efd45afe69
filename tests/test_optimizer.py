import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers.optimization import get_scheduler

from ti_jax.config import TrainConfig
from ti_jax.training.optimizer import (
    learning_rate_schedule,
    make_optimizer,
    per_row,
    state_with_counts,
    state_with_one_count,
)

CONFIG = TrainConfig(
    learning_rate=0.01, lr_warmup_steps=7, lr_num_cycles=3, adam_beta1=0.9, adam_beta2=0.999, adam_weight_decay=0.1
)


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


def update(optimizer, rows, state, grads, trained):
    updates, state = optimizer.update(grads, state, rows, row_mask={"text_encoder": jnp.array(trained)})
    return optax.apply_updates(rows, updates), state


def test_a_masked_row_does_not_move_to_the_bit():
    """Momentum from when it still trained, weight decay and its own gradient all leave it where it is."""
    optimizer = per_row(optax.adamw(0.1, weight_decay=0.5))
    rows = {"text_encoder": jax.random.normal(jax.random.key(0), (3, 4))}
    grads = {"text_encoder": jnp.ones((3, 4))}
    rows, state = update(optimizer, rows, optimizer.init(rows), grads, [True, True, True])
    before, state_before = rows["text_encoder"], state["text_encoder"]
    assert jnp.abs(optax.tree.get(state, "mu")[1]).min() > 0
    for _ in range(3):
        rows, state = update(optimizer, rows, state, grads, [True, False, True])
    moved = np.any(np.asarray(rows["text_encoder"] != before), axis=1)
    assert moved.tolist() == [True, False, True]
    for leaf, leaf_before in zip(jax.tree.leaves(state), jax.tree.leaves(state_before), strict=True):
        assert np.array_equal(leaf[1], leaf_before[1])
        assert not np.array_equal(leaf[0], leaf_before[0])


def test_a_row_that_was_seen_in_few_updates_is_where_those_updates_alone_bring_it():
    """Bias correction, warm-up and momentum go by the row's own count, not by the run's."""
    schedule = optax.linear_schedule(0.0, 0.1, 5)
    optimizer = per_row(optax.adamw(schedule, weight_decay=0.5))
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(2, 4)).astype(np.float32), rng.normal(size=(9, 2, 4)).astype(np.float32)
    rows = {"text_encoder": jnp.asarray(start)}
    state = optimizer.init(rows)
    for index, grad in enumerate(grads):
        rows, state = update(optimizer, rows, state, {"text_encoder": jnp.asarray(grad)}, [True, index % 3 == 0])
    alone = {"text_encoder": jnp.asarray(start[1:])}
    state_alone = optimizer.init(alone)
    for grad in grads[::3]:
        alone, state_alone = update(optimizer, alone, state_alone, {"text_encoder": jnp.asarray(grad[1:])}, [True])
    assert np.array_equal(rows["text_encoder"][1], alone["text_encoder"][0])
    assert optax.tree.get_all_with_path(state, "count")[0][1].tolist() == [9, 3]


def test_a_state_whose_rows_shared_one_count_is_read():
    """What checkpoints had when AdamW's count was the run's: every row has made all of its updates."""
    rows = {name: jax.random.normal(jax.random.key(size), (2, size)) for name, size in (("one", 4), ("two", 6))}
    adamw = optax.adamw(lambda count: 0.01 / (1 + count))
    shared = adamw.init(rows)
    optimizer = per_row(adamw)
    state, mask, now = optimizer.init(rows), jax.tree.map(lambda _: jnp.ones(2, bool), rows), rows
    for _ in range(3):
        grads = jax.tree.map(jnp.cos, now)
        updates, state = optimizer.update(grads, state, now, row_mask=mask)
        theirs, shared = adamw.update(grads, shared, now)
        for name in rows:  # XLA rounds a division by one number and one by a column of equal ones differently
            np.testing.assert_allclose(updates[name], theirs[name], rtol=1e-6)
        now = optax.apply_updates(now, updates)
    like = jax.device_get(state)
    old = {"inner": jax.device_get(shared)}
    assert jax.tree.map(np.shape, state_with_one_count(like)) == jax.tree.map(np.shape, old)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), state_with_counts(old, like), like)
