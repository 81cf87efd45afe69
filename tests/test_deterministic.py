"""--deterministic: no gradient is scattered, options reach the compiler, and the rows are those of a run without it."""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ti_jax.errors import InputError
from ti_jax.ops.lookup import lookup
from ti_jax.ops.platform import Platform
from ti_jax.training import parallel
from ti_jax.training.loop import train
from ti_jax.training.plan import PlanConfig, Planner, resolve_plan


class State(NamedTuple):
    """Stands for a state: all that the loop itself reads are ``ok`` and ``watch``."""

    ok: jax.Array
    watch: None = None


def rows(result):
    return result.embedding.vectors["text_encoder"]


@pytest.mark.parametrize("shape", [(), (7,), (2, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_lookup_is_a_take_with_another_gradient(shape, dtype):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(3, 4, 2)), dtype)
    indices = jnp.asarray(rng.integers(0, 3, shape), jnp.int32)
    weights = jnp.asarray(rng.normal(size=(*shape, 4, 2)), dtype)

    def loss(take):
        return lambda table: (take(table) * weights).sum().astype(jnp.float32)

    plain = loss(lambda table: jnp.take(table, indices, axis=0))
    ours = loss(lambda table: lookup(table, indices))
    assert np.array_equal(lookup(table, indices), jnp.take(table, indices, axis=0))
    wanted, got = jax.grad(plain)(table.astype(jnp.float32)), jax.grad(ours)(table)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(jnp.float32), wanted, atol=1e-6 if dtype == jnp.float32 else 3e-2)


def test_a_row_that_is_not_there_is_nan_and_has_no_gradient():
    table, indices = jnp.ones((2, 3)), jnp.array([1, 2])
    found = lookup(table, indices)
    assert np.isnan(found[1]).all() and np.array_equal(found[0], table[1])
    to_table = jax.grad(lambda table: lookup(table, indices)[0].sum())(table)
    np.testing.assert_array_equal(to_table, [[0, 0, 0], [1, 1, 1]])


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
def test_nothing_is_added_up_by_a_scatter(model, request, monkeypatch):
    folder = request.getfixturevalue(model)
    counts = {deterministic: additions(folder, deterministic, monkeypatch) for deterministic in (False, True)}
    assert counts[False] >= 1 and counts[True] == 0, counts


def additions(folder, deterministic, monkeypatch):
    """How many scatters that add the lowered training step of a model has."""
    texts = []

    def keep(lower, policy, memory):
        texts.append(lower("none").as_text())

    monkeypatch.setattr("ti_jax.training.plan.compile_fitting", keep)
    config = PlanConfig(pretrained_model_name_or_path=str(folder), train_batch_size=4, deterministic=deterministic)
    planner = Planner(resolve_plan(config), jnp.float32, jax.devices()[:1])
    assert planner.at(4) is None
    (text,) = texts
    return len(re.findall(r'"stablehlo\.scatter".*\n\s*\^bb0\(.*\n.*stablehlo\.add', text))


def test_what_the_compiler_is_told():
    assert Platform("cuda", 9, deterministic=True).compiler_options == {"xla_gpu_exclude_nondeterministic_ops": True}
    for platform in (Platform("cuda", 9), Platform("cpu", deterministic=True), Platform("tpu", deterministic=True)):
        assert platform.compiler_options is None
    mesh = parallel.make_mesh(jax.devices()[:1])

    def compiled(options):
        run_steps = parallel.make_run_steps(lambda frozen, state: (state, frozen), mesh, 1, options)
        return run_steps.lower(jnp.float32(0), State(jnp.bool_(True)), jnp.int32(1)).compile()

    assert compiled(Platform("cuda", 9, deterministic=True).compiler_options)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_of_the_future"):
        compiled({"xla_gpu_of_the_future": True})


def test_a_run_repeats_and_resumes_to_the_bit(short_run, tmp_path):
    config = dataclasses.replace(short_run, deterministic=True, num_vectors=2, checkpointing_steps=5)
    plain = train(dataclasses.replace(config, deterministic=False, output_dir=str(tmp_path / "plain")))
    once, again = (train(dataclasses.replace(config, output_dir=str(tmp_path / name))) for name in ("once", "again"))
    assert np.array_equal(rows(once), rows(again))
    np.testing.assert_allclose(rows(once), rows(plain), atol=1e-5)
    resumed = dataclasses.replace(
        config,
        output_dir=str(tmp_path / "resumed"),
        resume_from_checkpoint=str(tmp_path / "once" / "checkpoints" / "5"),
    )
    assert np.array_equal(rows(train(resumed)), rows(once))
    with pytest.raises(InputError, match=r"\(deterministic True there, False here\)"):
        train(dataclasses.replace(resumed, deterministic=False, output_dir=str(tmp_path / "other")))
