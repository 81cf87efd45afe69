"""Terms of the loss that need the text encoders alone, against PyTorch; rows that start from an encoder's output."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import Problem, TorchTextEncoder, relative, torch_context_distance, torch_distance_to_start

from ti_jax.config import PlanConfig
from ti_jax.training.plan import Planner
from ti_jax.training.terms import added_loss, anchor_of, context_of, distance_to


@pytest.fixture(scope="module")
def problem(tiny_sdxl, pictures, tmp_path_factory):
    return Problem(
        tiny_sdxl, pictures, tmp_path_factory.mktemp("terms"), context_loss=0.7, initializer_output=True, num_vectors=3,
        overview_prompts=("a portrait of {} with red hair", "{} beside a (green:1.2) person"),
    )  # fmt: skip


def test_the_terms_and_their_gradients_are_pytorchs(problem, tiny_sdxl, monkeypatch):
    """Of SDXL, on rows that are somewhere else than at the start; weights of words in a prompt do not count."""
    terms, params = problem.frozen().terms, problem.frozen().params
    planned = Planner(PlanConfig(**vars(problem.config)), np.float32, jax.devices()[:1])._terms()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), planned) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), terms
    )
    noise = np.random.default_rng(0)
    rows = {name: np.float32(table + noise.normal(size=table.shape)) for name, table in problem.concept.rows.items()}
    encoders = {name: TorchTextEncoder(tiny_sdxl, name, table) for name, table in rows.items()}
    prompts = [prompt.replace("(green:1.2)", "green") for prompt in problem.concept.overview_prompts]
    monkeypatch.setattr(problem, "concept", dataclasses.replace(problem.concept, overview_prompts=prompts))
    expected = 0.7 * torch_context_distance(problem, encoders), torch_distance_to_start(problem, encoders)
    for which, loss in zip((terms._replace(anchor=None), terms._replace(context=None)), expected, strict=True):
        value, gradients = jax.jit(jax.value_and_grad(partial(added_loss, problem.sd.networks, params, which)))(rows)
        loss.backward()
        assert relative(value, loss.item()) < 1e-5
        for name, encoder in encoders.items():
            assert relative(gradients[name], encoder.weight.grad[encoder.vocab_size :]) < 1e-5
            encoder.weight.grad = None


def test_rows_start_from_the_encoders_output(problem, tiny_sdxl, tiny_sd, pictures, tmp_path):
    """Of each encoder after its last layer norm; a token's is repeated, and of several tokens the mean is taken."""
    alone = Problem(tiny_sd, pictures, tmp_path, initializer_token="red person", num_vectors=1, initializer_output=True)
    for each, model in ((problem, tiny_sdxl), (alone, tiny_sd)):
        for name, rows in each.concept.rows.items():
            module = TorchTextEncoder(model, name, rows).module
            ids = each.sd.tokenizers[name](each.config.initializer_token, return_tensors="pt").input_ids
            states = module(ids).last_hidden_state[0, 1:-1].detach()
            expected = states.mean(dim=0) if each is alone else states[0]
            assert relative(rows, expected.expand(len(rows), -1)) < 1e-5
    # The class is compared with by its own tokens all the same.
    for name, rows in problem.concept.class_rows.items():
        (token,) = problem.sd.tokenizers[name]("person", add_special_tokens=False).input_ids
        assert np.array_equal(rows, np.stack([problem.sd.token_table(name)[token]] * 3))
    assert alone.concept.class_rows is None and alone.frozen().terms.context is None


def test_of_several_words_each_is_held_to_its_own(problem):
    """Of two and one vectors, before a frozen row of another word."""
    one = dataclasses.replace(problem.concept, words={"<a>": 2, "<b>": 1, "<c>": 1})
    rows = {name: np.zeros((4, table.shape[1]), np.float32) for name, table in one.rows.items()}
    mask = dict.fromkeys(rows, np.array([True, True, True, False]))
    both = [
        dataclasses.replace(
            one, token=token, rows=rows, row_mask=mask, class_rows=rows, overview_prompts=[f"{token} with <c>"] * count
        )
        for token, count in (("<a>", 1), ("<b>", 2))
    ]
    anchor = anchor_of(both)
    for weights in anchor.weights.values():
        assert weights.tolist() == [0.5, 0.5, 1.0, 0.0]
    moved = {name: jnp.asarray(table).at[0, :2].set(jnp.array([3.0, 4.0])) for name, table in rows.items()}
    assert distance_to(anchor, moved) == pytest.approx(2 * 1e-5 * 2.5, rel=1e-4)
    weights = context_of(both, problem.sd).weights["text_encoder"]
    others = [[1, 0, 0, 1, 1, 1], [1, 0, 1, 1, 1], [1, 0, 1, 1, 1]]  # start, <a>, <a>, with, <c>, end
    for row, expected, share in zip(weights, others, (1.0, 0.5, 0.5), strict=True):
        expected = 0.7 / 2 * share * np.pad(expected, (0, len(row) - len(expected))) / sum(expected)
        np.testing.assert_allclose(row, expected, rtol=1e-6)
