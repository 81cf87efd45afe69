"""The optimizers of a row against their PyTorch packages, alone and in a run; resuming; the rows that are shown."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import prodigyopt
import pytest
import schedulefree
import torch
from diffusers.training_utils import EMAModel
from test_step import STEPS, Problem, relative, torch_rows

import ti_jax
from ti_jax.config import TrainConfig, resolve
from ti_jax.training.checkpoint import Checkpoints
from ti_jax.training.job import prepare_concept
from ti_jax.training.loop import train
from ti_jax.training.optimizer import make_optimizer, shown_rows


class EachRow:
    """PyTorch optimizers, one for each row of each text encoder's new ones, as an optimizer of the encoders.

    Attributes:
      shown: the rows to be saved, by text encoder.
    """

    def __init__(self, encoders, config):
        self.encoders, self.config = encoders, config
        self.parameters = {
            name: [torch.nn.Parameter(torch.tensor(row)) for row in encoder.rows] for name, encoder in encoders.items()
        }
        every = [each for rows in self.parameters.values() for each in rows]
        self.optimizers = [torch_optimizer(each, config) for each in every]
        self.averages = [EMAModel([each], decay=config.ema_decay or 0.0) for each in every]

    def zero_grad(self):
        for encoder in self.encoders.values():
            encoder.weight.grad = None

    def step(self):
        for name, encoder in self.encoders.items():
            for row, parameter in enumerate(self.parameters[name]):
                parameter.grad = encoder.weight.grad[encoder.vocab_size + row].clone()
                if (most := self.config.max_grad_norm) is not None:
                    parameter.grad *= min(1.0, most / parameter.grad.norm())
        every = [each for rows in self.parameters.values() for each in rows]
        for parameter, optimizer, average in zip(every, self.optimizers, self.averages, strict=True):
            optimizer.step()
            average.step([parameter])
        with torch.no_grad():
            for name, encoder in self.encoders.items():
                encoder.weight[encoder.vocab_size :] = torch.stack(self.parameters[name])

    @property
    def shown(self):
        if self.config.optimizer == "schedule_free":
            for optimizer in self.optimizers:
                optimizer.eval()
        elif self.config.ema_decay is not None:
            averages = iter(self.averages)
            return {
                name: np.stack([next(averages).shadow_params[0].numpy() for _ in rows])
                for name, rows in self.parameters.items()
            }
        return {name: np.stack([each.detach().numpy() for each in rows]) for name, rows in self.parameters.items()}


def torch_optimizer(parameter, config):
    optimizer = free_optimizer(parameter, config)
    return optimizer if config.kept_norm == "free" else OfOneNorm(parameter, optimizer)


class OfOneNorm:
    """An optimizer after which its parameter, of schedule-free the average and what is averaged, has its first norm."""

    def __init__(self, parameter, optimizer):
        self.parameter, self.optimizer, self.norm = parameter, optimizer, parameter.detach().norm()
        self.eval = getattr(optimizer, "eval", None)

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        if self.eval is None:
            self.parameter.mul_(self.norm / self.parameter.norm())
            return
        self.optimizer.eval()
        for each in (self.parameter, self.optimizer.state[self.parameter]["z"]):
            each.mul_(self.norm / each.norm())
        self.optimizer.train()


class Directional:
    """The update of Directional Textual Inversion, before the parameter is set to its norm again."""

    def __init__(self, parameter, rate):
        self.parameter, self.rate = parameter, rate
        self.start = torch.nn.functional.normalize(parameter.detach(), dim=0)

    @torch.no_grad()
    def step(self):
        m, v = self.parameter.norm(), torch.nn.functional.normalize(self.parameter, dim=0)
        gradient = m * self.parameter.grad - 1e-4 * self.start
        along = gradient - v * (v @ gradient)
        self.parameter.copy_(m * (v - self.rate * along / (along.norm() + 1e-8)))


def free_optimizer(parameter, config):
    options = {
        "lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }  # fmt: skip
    if config.optimizer == "dti":
        return Directional(parameter, config.learning_rate)
    if config.optimizer == "prodigy":
        return prodigyopt.Prodigy([parameter], use_bias_correction=True, **options)
    if config.optimizer == "schedule_free":
        optimizer = schedulefree.AdamWScheduleFree([parameter], foreach=False, **options)
        optimizer.train()
        return optimizer
    if isinstance(config.learning_rate, str):
        optimizer = torch.optim.AdamW([parameter], **{**options, "lr": 1.0})
        rates = [1e-2] * 5 + [3e-3] * 7 + [1e-3] * 99
        return Stepped(optimizer, rates)
    return torch.optim.AdamW([parameter], **options)


class Stepped:
    """An optimizer with a list of learning rates."""

    def __init__(self, optimizer, rates):
        self.optimizer, self.rates = optimizer, iter(rates)

    def step(self):
        self.optimizer.param_groups[0]["lr"] = next(self.rates)
        self.optimizer.step()


# What a run is made of; and what else is held to PyTorch on given gradients alone.
CASES = {
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0, "adam_weight_decay": 0.01},
    "schedule_free": {"optimizer": "schedule_free", "adam_weight_decay": 0.01, "row_norm": 0.7},
    "dti": {
        "optimizer": "dti", "context_loss": 0.5, "initializer_output": True,
        "overview_prompts": ("a portrait of {} with red hair", "{} with glasses"),
    },
    "adamw": {"max_grad_norm": 0.01, "ema_decay": 0.8, "learning_rate": "1e-2:5, 3e-3:12, 1e-3"},
}  # fmt: skip

GIVEN = CASES | {
    "free schedule_free": {"optimizer": "schedule_free", "adam_weight_decay": 0.01},
    "adamw of one norm": CASES["adamw"] | {"row_norm": "initial"},
    "prodigy of one norm": CASES["prodigy"] | {"row_norm": "initial"},
}


@pytest.mark.parametrize("name", GIVEN)
def test_equals_pytorch_on_given_gradients(name):
    """Three rows fall towards a place, with noise; their gradients are of very different sizes.

    In float64: Prodigy's first estimates are of how far a row has moved by 1e-6 at a time, of which float32 keeps a
    digit, here and in PyTorch.
    """
    config = TrainConfig(**{"learning_rate": 1e-2, "adam_beta1": 0.9, "adam_beta2": 0.999, **GIVEN[name]})
    rng = np.random.default_rng(0)
    start, place = rng.normal(size=(2, 3, 6))
    noise, sizes = rng.normal(size=(60, 3, 6)), np.array([[1], [1e-3], [30]])
    optimizer, _ = make_optimizer(config, 60, 1)

    @jax.jit
    def step(rows, state, noise):
        grads = jax.tree.map(lambda table: sizes * (table - place + noise), rows)
        updates, state = optimizer.update(grads, state, rows, row_mask={"text_encoder": jnp.ones(3, bool)})
        return optax.apply_updates(rows, updates), state

    with jax.enable_x64(True):
        rows = {"text_encoder": jnp.asarray(start)}
        state = optimizer.init(rows)
        for each in noise:
            rows, state = step(rows, state, jnp.asarray(each))
        table, shown = rows["text_encoder"], shown_rows(rows, state)["text_encoder"]
    for row in range(3):
        parameter = torch.nn.Parameter(torch.tensor(start[row]))
        theirs, average = torch_optimizer(parameter, config), EMAModel([parameter], decay=config.ema_decay or 0.0)
        for each in noise[:, row]:
            parameter.grad = torch.tensor(sizes[row] * (parameter.detach().numpy() - place[row] + each))
            if config.max_grad_norm is not None:
                parameter.grad *= min(1.0, config.max_grad_norm / parameter.grad.norm())
            theirs.step()
            average.step([parameter])
        assert relative(table[row], parameter.detach()) < 1e-6
        if config.optimizer == "schedule_free":
            theirs.eval()
        expected = parameter.detach() if config.ema_decay is None else average.shadow_params[0]
        if config.kept_norm != "free":
            norm = np.linalg.norm(start[row])
            expected = expected * (norm / expected.norm())
            assert np.linalg.norm(shown[row]) == pytest.approx(norm)
        assert relative(shown[row], expected) < 1e-6
        assert (relative(shown[row], table[row]) > 1e-4) == (config.optimizer not in ("prodigy", "dti"))


@pytest.fixture(scope="module", params=CASES)
def run(request, tiny_sd, pictures, tmp_path_factory):
    """A problem with one of the optimizers, its compiled program, and the state and losses after `STEPS`."""
    # As many samples as eight devices have, so that they are compared with the same program.
    problem = Problem(tiny_sd, pictures, tmp_path_factory.mktemp("run"), train_batch_size=8, **CASES[request.param])
    run_steps, frozen, start = problem.program(num_devices=1, batch_size=8)
    start = jax.device_get(start)

    def steps(state, count):
        return run_steps(frozen, jax.device_put(state), jnp.int32(count))

    return problem, steps, start, *steps(start, STEPS)


def test_twenty_steps_equal_a_pytorch_loop(run, tiny_sd):
    problem, _, _, state, losses = run
    made = []

    def each_row(encoders, config):
        made.append(EachRow(encoders, config))
        return made[0]

    rows, their_losses = torch_rows(problem, tiny_sd, "epsilon", make_optimizer=each_row)
    assert relative(losses[:STEPS], their_losses) < 1e-5
    assert relative(state.rows["text_encoder"], rows["text_encoder"]) < 1e-5
    assert relative(state.shown_rows["text_encoder"], made[0].shown["text_encoder"]) < 1e-5
    moved = relative(state.rows["text_encoder"], problem.concept.rows["text_encoder"])
    assert moved > (1e-4 if problem.config.optimizer == "prodigy" else 0.01), "nothing was learned"


def test_eight_devices_end_with_the_rows_of_one(run):
    problem, steps, start, *_ = run
    one, _ = steps(start, 10)
    eight, _ = problem.run(num_devices=8, batch_size=1, steps=10)
    for ours, theirs in [(one.rows, eight.rows), (one.shown_rows, eight.shown_rows)]:
        assert relative(ours["text_encoder"], theirs["text_encoder"]) < 1e-6


def test_resuming_is_exact(run, tmp_path):
    """From a checkpoint on disk, in the middle, with the averages."""
    _, steps, start, state, losses = run
    middle, first = steps(start, 8)
    checkpoints = Checkpoints(tmp_path / "checkpoints", None)
    checkpoints.identity = {"gradient_checkpointing": "none", "counts": "by row"}
    checkpoints.save(middle)
    checkpoints.close()
    again, rest = steps(checkpoints.restore("latest", start), STEPS - 8)
    assert np.array_equal(np.concatenate([first[:8], rest[: STEPS - 8]]), losses[:STEPS])
    for resumed, whole in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert np.array_equal(resumed, whole)
    assert np.array_equal(again.shown_rows["text_encoder"], state.shown_rows["text_encoder"])


@pytest.mark.parametrize(("row_norm", "wanted"), [("vocabulary", None), (0.25, 0.25), ("initial", None)])
def test_rows_start_with_their_norm(tiny_sdxl, pictures, row_norm, wanted):
    """Of SDXL, each encoder's own vocabulary; the direction is the initializer's."""
    config = TrainConfig(
        pretrained_model_name_or_path=str(tiny_sdxl), train_data_dir=str(pictures), placeholder_token="<new>",
        initializer_token="red person", num_vectors=3, row_norm=row_norm,
    )  # fmt: skip
    sd = _model(tiny_sdxl)
    rows = prepare_concept(resolve(config), sd, print).rows
    free = prepare_concept(resolve(dataclasses.replace(config, row_norm="free")), sd, print).rows
    for name, table in rows.items():
        assert table.dtype == np.float32
        norms = np.linalg.norm(free[name], axis=1)
        usual = np.mean([np.linalg.norm(row) for row in sd.token_table(name).astype(np.float64)])
        expected = norms if row_norm == "initial" else wanted or usual
        np.testing.assert_allclose(table, free[name] * (expected / norms * np.ones(3))[:, None], rtol=1e-5)


@functools.cache
def _model(folder):
    return ti_jax.StableDiffusion.from_pretrained(folder)


def test_a_row_of_zeros_cannot_have_a_norm(tiny_sd, pictures, tmp_path):
    start = {"text_encoder": np.stack([np.ones(32), np.zeros(32)]).astype(np.float32)}
    ti_jax.Embedding("<old>", start).save(tmp_path / "old.safetensors")
    config = TrainConfig(
        pretrained_model_name_or_path=str(tiny_sd), train_data_dir=str(pictures), placeholder_token="<new>",
        initializer_embedding=str(tmp_path / "old.safetensors"), num_vectors=2, row_norm="vocabulary",
    )  # fmt: skip
    with pytest.raises(ti_jax.InputError, match=r"^<new>: a row starts from zeros in the text_encoder, which no"):
        prepare_concept(resolve(config), _model(tiny_sd), print)


@pytest.mark.parametrize("name", ["prodigy", "dti"])
def test_a_row_without_a_gradient_yet_waits(name):
    """Prodigy divides by the sum of its gradients; the direction would go back to where it started."""
    config = TrainConfig(learning_rate=1.0, adam_beta1=0.9, adam_beta2=0.999, optimizer=name)
    optimizer, _ = make_optimizer(config, 9, 1)
    rows, mask = {"text_encoder": jnp.ones((1, 4))}, {"text_encoder": jnp.array([True])}
    state = optimizer.init(rows)
    nothing, something = ({"text_encoder": value * jnp.arange(1.0, 5.0)[None]} for value in (0.0, 0.1))
    updates, waiting = optimizer.update(nothing, state, rows, row_mask=mask)
    assert jax.tree.all(jax.tree.map(np.array_equal, (updates, waiting), (nothing, state)))
    updates, _ = optimizer.update(something, waiting, rows, row_mask=mask)
    assert np.isfinite(updates["text_encoder"]).all() and (updates["text_encoder"] != 0).all()


@pytest.mark.heavy
@pytest.mark.parametrize("changes", [{"optimizer": "schedule_free"}, {"ema_decay": 0.9, "row_norm": 0.5}])
def test_what_is_saved_is_the_average(short_run, changes):
    result = train(resolve(dataclasses.replace(short_run, max_train_steps=3, **changes)))
    word = ti_jax.Embedding.load(result.output_dir / "learned_embeds.safetensors").vectors["text_encoder"]
    assert np.array_equal(word, result.embedding.vectors["text_encoder"])
    with ocp.CheckpointManager((result.output_dir / "checkpoints").absolute()) as manager:
        saved = manager.restore(3, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    rows, state = saved["rows"]["text_encoder"], saved["opt_state"]["text_encoder"]
    if "ema_decay" in changes:
        average = state["average"] * 0.5 / np.linalg.norm(state["average"], axis=1, keepdims=True)
    else:
        b1 = state["b1"][:, None]
        average = (rows - (1 - b1) * state["z"]) / b1
    np.testing.assert_allclose(word, average[: len(word)], rtol=1e-6, atol=1e-8)
    assert relative(word, rows[: len(word)]) > 1e-4
