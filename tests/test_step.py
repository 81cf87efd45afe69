"""The training step against a PyTorch loop on the same draws, and on eight devices against one."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from jax import lax
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ti_jax.config import TrainConfig
from ti_jax.data.dataset import make_dataset
from ti_jax.diffusion.losses import Objective
from ti_jax.models.networks import Networks
from ti_jax.pipeline import StableDiffusion
from ti_jax.training import parallel
from ti_jax.training.job import prepare_concept
from ti_jax.training.optimizer import make_optimizer
from ti_jax.training.step import StepInputs, TrainState, diffusion_loss, draw_batch, make_train_step
from ti_jax.training.terms import Terms

STEPS = 20

# One for all tests, so that those of equal shapes share what is compiled.
draw = jax.jit(draw_batch, static_argnums=3)


class Problem:
    """A tiny model and a concept, ready to train."""

    def __init__(self, model, pictures, tmp_path, dtype=None, **changes):
        templates = tmp_path / "templates.txt"
        templates.write_text("a portrait of {}\na {} with red hair\n{}\n")
        settings = {
            "pretrained_model_name_or_path": str(model), "train_data_dir": str(pictures), "placeholder_token": "<new>",
            "initializer_token": "person", "templates": str(templates), "num_vectors": 2, "train_batch_size": 2,
            "learning_rate": 1e-2, "adam_beta1": 0.9, "adam_beta2": 0.999, "gradient_accumulation_steps": 1,
            "overview_prompts": ("{}",),
        }  # fmt: skip
        self.config = TrainConfig(**{**settings, **changes})
        self.sd = StableDiffusion.from_pretrained(model, dtype, clip_skip=self.config.clip_skip)
        self.concept = prepare_concept(self.config, self.sd, print)
        self.dataset = make_dataset(self.config, self.sd, [self.concept])
        self.row_mask = {name: jnp.asarray(mask) for name, mask in self.concept.row_mask.items()}
        self.accumulation = self.config.gradient_accumulation_steps
        self.optimizer, _ = make_optimizer(self.config, STEPS, 1)
        self.programs = {}

    def frozen(self):
        params = {name: tree for name, tree in self.sd.params.items() if name != "vae"}
        objective = Objective.of(self.config, self.sd.schedule)
        terms = Terms.of([self.concept], self.sd)
        return StepInputs(params, self.sd.schedule, self.dataset, self.row_mask, jax.random.key(7), objective, terms)

    def state(self):
        rows = {name: jnp.asarray(value) for name, value in self.concept.rows.items()}
        return TrainState(rows, self.optimizer.init(rows), jnp.int32(0), jnp.bool_(True))

    def step(self, batch_size, num_devices, shard_prompts=False):
        return make_train_step(
            self.sd.networks, self.optimizer, batch_size=batch_size, accumulation=self.accumulation,
            num_devices=num_devices, axis_name=parallel.AXIS, shard_prompts=shard_prompts,
        )  # fmt: skip

    def run(self, num_devices, batch_size, steps=STEPS, shard_prompts=False):
        run_steps, frozen, state = self.program(num_devices, batch_size, shard_prompts)
        state, losses = run_steps(frozen, state, jnp.int32(steps))
        return state, losses[:steps]

    def program(self, num_devices, batch_size, shard_prompts=False):
        """For up to `STEPS`, so that many tests share what is traced and compiled; with its arguments."""
        mesh = parallel.make_mesh(jax.devices()[:num_devices])
        key = self.sd.networks, num_devices, batch_size, shard_prompts
        if key not in self.programs:
            self.programs[key] = parallel.make_run_steps(self.step(batch_size, num_devices, shard_prompts), mesh, STEPS)
        return self.programs[key], *parallel.replicate((self.frozen(), self.state()), mesh)


@pytest.fixture(scope="module")
def standard(tiny_sd, pictures, tmp_path_factory):
    """The problem of the tests that change nothing about it."""
    return Problem(tiny_sd, pictures, tmp_path_factory.mktemp("standard"))


@pytest.fixture(scope="module")
def accumulating(make_tiny_sd, pictures, tmp_path_factory):
    """A problem with micro-batches of eight: on one device they are compared with PyTorch, and with eight devices.

    Small pictures: a sum over many numbers one by one, as programs that are not optimised take it, is off by 1e-6.
    A larger epsilon than AdamW's own: rows would learn the rounding of a gradient that is nearly 0.
    """
    return Problem(
        make_tiny_sd("sample"), pictures, tmp_path_factory.mktemp("accumulating"), gradient_accumulation_steps=3,
        flip_probability=0.0, train_batch_size=8, resolution=8, adam_epsilon=1e-4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def on_one(standard):
    """State and losses after `STEPS` on one device, two samples at a time."""
    return standard.run(num_devices=1, batch_size=2)


@pytest.fixture(scope="module")
def on_eight(standard):
    """State and losses after `STEPS` on eight devices, a sample each."""
    return standard.run(num_devices=8, batch_size=1)


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


class TorchTextEncoder:
    """A text encoder on PyTorch whose token table is made longer by the new rows and trained, as diffusers does."""

    def __init__(self, model, name, rows):
        kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
        self.module = kind.from_pretrained(model / name).requires_grad_(False)
        self.vocab_size = self.module.config.vocab_size
        self.module.resize_token_embeddings(self.vocab_size + len(rows), mean_resizing=False)
        self.weight = self.module.get_input_embeddings().weight.requires_grad_(True)
        with torch.no_grad():
            self.weight[self.vocab_size :] = torch.tensor(rows)
        self.original = self.weight[: self.vocab_size].detach().clone()

    def restore(self):
        with torch.no_grad():
            self.weight[: self.vocab_size] = self.original

    @property
    def rows(self):
        return self.weight[self.vocab_size :].detach().numpy().copy()


def torch_condition(encoders, batch, clip_skip=0):
    """What the UNet is told: SD's last states; SDXL's penultimate ones, pooled text and sizes."""
    ids = {name: torch.tensor(np.asarray(batch.ids[name])).long() for name in encoders}
    if len(encoders) == 1:
        module = encoders["text_encoder"].module
        if not clip_skip:
            return module(ids["text_encoder"])[0], None
        states = module(ids["text_encoder"], output_hidden_states=True).hidden_states
        return module.final_layer_norm(states[-(clip_skip + 1)]), None
    outputs = {name: encoder.module(ids[name], output_hidden_states=True) for name, encoder in encoders.items()}
    context = torch.cat([output.hidden_states[-(clip_skip + 2)] for output in outputs.values()], dim=-1)
    time_ids = torch.tensor(np.asarray(batch.time_ids))
    return context, {"text_embeds": outputs["text_encoder_2"].text_embeds, "time_ids": time_ids}


def torch_context_distance(problem, encoders):
    """The mean of 1 - cosine at the other tokens, prompt by prompt, with the class word's token for each vector."""
    distances = []
    for name, encoder in encoders.items():
        tokenizer = problem.sd.tokenizers[name]
        (class_token,) = tokenizer(problem.config.initializer_token, add_special_tokens=False).input_ids
        ids = problem.sd.tokenize(problem.concept.overview_prompts, problem.concept.words)[name]
        for row in ids.tolist():
            end = row.index(tokenizer.eos_token_id)
            others = [place for place in range(end + 1) if row[place] < encoder.vocab_size]
            assert len(others) < end + 1, "the prompt has the word"
            of_class = [number if number < encoder.vocab_size else class_token for number in row]
            output = encoder.module(torch.tensor([row, of_class]), output_hidden_states=True)
            states = output.last_hidden_state if len(encoders) == 1 else output.hidden_states[-2]
            ours, theirs = states[0, others], states[1, others].detach()
            distances.append((1 - torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)).mean())
    return torch.stack(distances).mean()


def torch_distance_to_start(problem, encoders):
    """As in the code of CrossInit."""
    start = problem.concept.rows
    return 1e-5 * sum(
        torch.nn.functional.pairwise_distance(encoder.weight[encoder.vocab_size :], torch.tensor(start[name])).mean()
        for name, encoder in encoders.items()
    )


def adamw(encoders, config):
    return torch.optim.AdamW(
        [encoder.weight for encoder in encoders.values()], lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon, weight_decay=config.adam_weight_decay,
    )  # fmt: skip


def mean_squared_error(predicted, target, timesteps):
    return torch.nn.functional.mse_loss(predicted, target)


def torch_rows(problem, model, prediction_type, loss_of=mean_squared_error, make_optimizer=adamw):
    """The rows after each step of what diffusers' scripts do, on the draws of our loop."""
    unet = UNet2DConditionModel.from_pretrained(model / "unet").requires_grad_(False)
    scheduler = DDPMScheduler.from_pretrained(model / "scheduler")
    encoders = {name: TorchTextEncoder(model, name, rows) for name, rows in problem.concept.rows.items()}
    config = problem.config
    optimizer = make_optimizer(encoders, config)
    losses = []
    size = config.train_batch_size
    frozen = problem.frozen()._replace(params={})
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for micro in range(problem.accumulation):
            positions = jnp.arange(micro * size, (micro + 1) * size)
            batch = draw(frozen, jnp.int32(step), positions, size * problem.accumulation)
            latents, noise = (
                torch.tensor(np.asarray(value)).permute(0, 3, 1, 2) for value in (batch.latents, batch.noise)
            )
            timesteps = torch.tensor(np.asarray(batch.timesteps)).long()
            noisy = scheduler.add_noise(latents, noise, timesteps)
            context, added = torch_condition(encoders, batch, config.clip_skip)
            target = {
                "epsilon": noise,
                "sample": latents,
                "v_prediction": scheduler.get_velocity(latents, noise, timesteps),
            }[prediction_type]
            predicted = unet(noisy, timesteps, context, added_cond_kwargs=added).sample
            if problem.dataset.negative is not None:
                word = {name: np.repeat(ids, size, axis=0) for name, ids in problem.dataset.negative.ids.items()}
                context, added = torch_condition(encoders, batch._replace(ids=word))
                unwanted = unet(noisy, timesteps, context, added_cond_kwargs=added).sample
                predicted = unwanted + config.negative_guidance_scale * (predicted.detach() - unwanted)
            loss = loss_of(predicted, target, timesteps)
            if config.context_loss:
                loss = loss + config.context_loss * torch_context_distance(problem, encoders)
            if config.initializer_output:
                loss = loss + torch_distance_to_start(problem, encoders)
            (loss / problem.accumulation).backward()
            total += loss.item() / problem.accumulation
        optimizer.step()
        for encoder in encoders.values():
            encoder.restore()
        losses.append(total)
    return {name: encoder.rows for name, encoder in encoders.items()}, losses


@pytest.mark.parametrize(
    ("prediction_type", "changes"),
    [
        ("epsilon", {}),
        ("v_prediction", {"adam_weight_decay": 1e-2}),
        ("sample", {"gradient_accumulation_steps": 3}),
        ("epsilon", {"learn_negative": True, "negative_class": "a person", "negative_guidance_scale": 0.5}),
    ],
)
def test_twenty_steps_equal_a_pytorch_loop(
    standard, accumulating, make_tiny_sd, pictures, tmp_path, prediction_type, changes
):
    model = make_tiny_sd(prediction_type)
    if prediction_type == "sample":
        problem = accumulating
    else:
        problem = (
            standard if prediction_type == "epsilon" and not changes else Problem(model, pictures, tmp_path, **changes)
        )
    before = jax.tree.map(np.array, problem.frozen().params)
    state, losses = problem.run(num_devices=1, batch_size=problem.config.train_batch_size)
    rows, their_losses = torch_rows(problem, model, prediction_type)
    assert relative(losses, their_losses) < 1e-5
    assert relative(state.rows["text_encoder"], rows["text_encoder"]) < 1e-5
    assert relative(state.rows["text_encoder"], problem.concept.rows["text_encoder"]) > 0.01, "nothing was learned"

    after = jax.tree.map(np.array, problem.frozen().params)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    row_count = problem.concept.rows["text_encoder"].size
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.float32)
    assert moments == 2 * row_count and all(leaf.size <= row_count for leaf in jax.tree.leaves(state.opt_state))


@pytest.fixture(scope="module")
def wide_pictures(tmp_path_factory):
    """Pictures of other sizes than the crop, so that SDXL is told something: 24 x 37 and 33 x 20."""
    folder = tmp_path_factory.mktemp("wide")
    rng = np.random.default_rng(1)
    for index, shape in enumerate(((24, 37, 3), (33, 20, 3), (16, 16, 3))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "gradient_accumulation_steps": 2, "flip_probability": 0.0, "learn_negative": True,
            "negative_class": "a person", "negative_guidance_scale": 3.0,
        },
    ],
)  # fmt: skip
def test_twenty_steps_of_sdxl_equal_a_pytorch_loop(tiny_sdxl, wide_pictures, tmp_path, changes):
    problem = Problem(tiny_sdxl, wide_pictures, tmp_path, **changes)
    state, losses = problem.run(num_devices=1, batch_size=2)
    rows, their_losses = torch_rows(problem, tiny_sdxl, "epsilon")
    assert relative(losses, their_losses) < 1e-5
    for name in ("text_encoder", "text_encoder_2"):
        assert relative(state.rows[name], rows[name]) < 1e-5
        assert relative(state.rows[name], problem.concept.rows[name]) > 0.01, "nothing was learned"


def test_sdxl_is_told_sizes_and_crops(tiny_sdxl, wide_pictures, tmp_path):
    """A picture of 24 x 37 is cut by 6 pixels on the left and 7 on the right, before it is scaled to 16."""
    told = np.asarray(Problem(tiny_sdxl, wide_pictures, tmp_path).dataset.time_ids)
    assert told[0].tolist() == [[24, 37, 0, 4, 16, 16], [24, 37, 0, 5, 16, 16]]
    assert told[1].tolist() == [[33, 20, 5, 0, 16, 16]] * 2
    assert told[2].tolist() == [[16, 16, 0, 0, 16, 16]] * 2


def test_gradient_checkpointing_changes_nothing(standard, on_one, monkeypatch):
    """Also "full" is held to plain gradients in test_unet."""
    plain, losses = on_one
    networks = standard.sd.networks.with_gradient_checkpointing("policy")
    monkeypatch.setattr(standard, "sd", dataclasses.replace(standard.sd, networks=networks))
    again, losses_again = standard.run(num_devices=1, batch_size=2)
    assert relative(again.rows["text_encoder"], plain.rows["text_encoder"]) < 1e-6
    assert relative(losses_again, losses) < 1e-6


# Of one accumulation, see also the mapping's equality to pmap and the prompts that are encoded once, below.
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_eight_devices_end_with_the_rows_of_one(accumulating, tiny_sd, pictures, tmp_path, accumulation):
    problem = (
        accumulating if accumulation == 3 else Problem(tiny_sd, pictures, tmp_path, resolution=8, adam_epsilon=1e-4)
    )
    one, losses_of_one = problem.run(num_devices=1, batch_size=8)
    eight, losses_of_eight = problem.run(num_devices=8, batch_size=1)
    assert relative(eight.rows["text_encoder"], one.rows["text_encoder"]) < 1e-6
    assert relative(losses_of_eight, losses_of_one) < 1e-6


@pytest.mark.parametrize(
    ("num_devices", "batch_size", "shard_prompts", "encoded"),
    [(2, 4, False, 3), (2, 4, True, 2), pytest.param(4, 2, True, 1, marks=pytest.mark.slow)],
)
def test_fewer_prompts_than_samples_are_encoded_once(
    standard, on_eight, monkeypatch, num_devices, batch_size, shard_prompts, encoded
):
    """Three prompts: over two cores, one of them has a place to spare. The rows are those of prompts one by one."""
    each, losses_of_each = on_eight
    counts = set()
    encode_text = Networks.encode_text

    def counting(networks, params, ids, rows):
        counts.add(ids["text_encoder"].shape[0])
        return encode_text(networks, params, ids, rows)

    monkeypatch.setattr(Networks, "encode_text", counting)
    once, losses = standard.run(num_devices, batch_size, shard_prompts=shard_prompts)
    assert counts == {encoded}
    assert relative(once.rows["text_encoder"], each.rows["text_encoder"]) < 1e-6
    assert relative(losses, losses_of_each) < 1e-6


@pytest.mark.slow
def test_sdxl_encodes_fewer_prompts_than_samples_once(tiny_sdxl, wide_pictures, tmp_path):
    problem = Problem(tiny_sdxl, wide_pictures, tmp_path)
    each, _ = problem.run(num_devices=8, batch_size=1)
    once, _ = problem.run(num_devices=2, batch_size=4, shard_prompts=True)
    for name in ("text_encoder", "text_encoder_2"):
        assert relative(once.rows[name], each.rows[name]) < 1e-6


def test_our_mapping_equals_pmap(standard):
    """The textbook form: a local gradient on each device, averaged by hand, under jax.pmap."""
    ours, losses = standard.run(num_devices=8, batch_size=1, steps=5)

    def step(frozen, state):
        batch = draw_batch(frozen, state.step, lax.axis_index("batch")[None], 8)
        loss, grads = jax.value_and_grad(lambda rows: diffusion_loss(standard.sd.networks, frozen, rows, batch))(
            state.rows
        )
        loss, grads = lax.pmean((loss, grads), "batch")
        updates, opt_state = standard.optimizer.update(grads, state.opt_state, state.rows, row_mask=frozen.row_mask)
        return TrainState(optax.apply_updates(state.rows, updates), opt_state, state.step + 1, state.ok), loss

    mapped = jax.pmap(step, axis_name="batch", in_axes=(None, 0))
    state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (8, *leaf.shape)), standard.state())
    for index in range(5):
        state, loss = mapped(standard.frozen(), state)
        assert relative(losses[index], loss[0]) < 1e-6
    for device in range(8):
        assert relative(ours.rows["text_encoder"], state.rows["text_encoder"][device]) < 1e-6


def test_only_rows_and_scalars_cross_between_devices(standard):
    run_steps, frozen, state = standard.program(num_devices=8, batch_size=1)
    program = run_steps.lower(frozen, state, jnp.int32(4)).compile().as_text()
    names = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
    crossing = re.findall(rf"= (.*?) (?:{names})(?:-start)?\(", program)
    assert crossing, "eight devices that share a batch must talk"
    rows = standard.concept.rows["text_encoder"].size
    for result in crossing:
        sizes = [
            np.prod([int(n) for n in shape.split(",") if n], dtype=int)
            for shape in re.findall(r"\w\[([\d,]*)\]", result)
        ]
        assert sizes and max(sizes) <= rows, result


def test_a_non_finite_loss_stops_before_it_reaches_the_rows(standard):
    run_steps, frozen, state = standard.program(num_devices=1, batch_size=2)
    good, _ = run_steps(frozen, state, jnp.int32(3))
    kept = np.asarray(good.rows["text_encoder"])
    spoilt = frozen._replace(dataset=frozen.dataset._replace(moments=frozen.dataset.moments * jnp.nan))
    stopped, losses = run_steps(spoilt, good, jnp.int32(10))
    assert not stopped.ok and stopped.step == 3
    assert np.array_equal(stopped.rows["text_encoder"], kept)
    assert np.isnan(losses[0])


def test_draws_do_not_depend_on_the_batch(standard):
    frozen = standard.frozen()
    together = draw(frozen, jnp.int32(5), jnp.arange(8), 8)
    alone = draw(frozen, jnp.int32(5), jnp.array([6]), 8)
    for whole, part in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        assert np.array_equal(whole[6:7], part)
    later = draw(frozen, jnp.int32(6), jnp.arange(8), 8)
    noises = np.concatenate([together.noise, later.noise]).reshape(16, -1)
    assert np.abs(np.corrcoef(noises) - np.eye(16)).max() < 0.4, "samples share their noise"


def test_pictures_come_in_shuffled_rounds(tiny_sd, pictures, tmp_path):
    """Every three draws in a row show each of the three pictures once, in an order that changes."""
    frozen = Problem(tiny_sd, pictures, tmp_path, flip_probability=0.0).frozen()
    marked = jnp.arange(3.0)[:, None, None, None, None] * jnp.ones_like(frozen.dataset.moments)
    marked = marked.at[..., 4:].set(-60.0)  # no variance
    frozen = frozen._replace(dataset=frozen.dataset._replace(moments=marked, latent_scale=jnp.float32(1)))
    drawn = [draw(frozen, jnp.int32(step), jnp.arange(2), 2).latents[:, 0, 0, 0] for step in range(30)]
    rounds = np.round(np.concatenate(drawn)).astype(int).reshape(20, 3)
    assert all(sorted(one) == [0, 1, 2] for one in rounds.tolist())
    assert len({tuple(one) for one in rounds.tolist()}) > 3


@pytest.mark.parametrize("size", [1, 8])
def test_an_updates_timesteps_are_spread_over_the_schedule(standard, size):
    """One from each eighth, in a circle; over many updates none more likely than another."""
    frozen = standard.frozen()
    count = len(frozen.schedule.alphas_cumprod)
    draw = jax.jit(jax.vmap(lambda step: draw_batch(frozen, step, jnp.arange(size), size).timesteps))
    timesteps = np.asarray(draw(jnp.arange(4000 // size)))
    assert timesteps.min() >= 0 and timesteps.max() < count
    gaps = np.diff(np.sort(timesteps, axis=1), axis=1, append=timesteps.min(axis=1, keepdims=True) + count)
    assert np.abs(gaps - count / size).max() <= 1
    # Each position sees the whole schedule, so that no picture that stands there is learned at one noise alone.
    tenths = np.stack([np.histogram(each, bins=10, range=(0, count))[0] for each in timesteps.T])
    expected = len(timesteps) / 10
    assert np.abs(tenths - expected).max() < 5 * expected**0.5


@partial(jax.jit, static_argnums=0)
def _loss_and_gradients(networks, frozen, rows, batch):
    return jax.value_and_grad(lambda rows: diffusion_loss(networks, frozen, rows, batch))(rows)


def loss_and_gradients(problem, batch):
    """As the step takes them, the rows' gradients by text encoder."""
    loss, gradients = _loss_and_gradients(problem.sd.networks, problem.frozen(), problem.state().rows, batch)
    assert loss.dtype == jnp.float32 and all(each.dtype == jnp.float32 for each in gradients.values())
    return float(loss), {name: np.asarray(each) for name, each in gradients.items()}


def torch_loss_and_gradients(problem, model, dtype):
    """PyTorch's as a function of a batch, all in ``dtype``: networks, activations, and the rows, in the table."""
    unet = UNet2DConditionModel.from_pretrained(model / "unet").requires_grad_(False).to(dtype)
    scheduler = DDPMScheduler.from_pretrained(model / "scheduler")
    encoders = {name: TorchTextEncoder(model, name, rows) for name, rows in problem.concept.rows.items()}
    for encoder in encoders.values():
        encoder.module.to(dtype)
        encoder.weight = encoder.module.get_input_embeddings().weight

    def of_batch(batch):
        for encoder in encoders.values():
            encoder.weight.grad = None
        latents, noise = (torch.tensor(np.asarray(x)).permute(0, 3, 1, 2) for x in (batch.latents, batch.noise))
        timesteps = torch.tensor(np.asarray(batch.timesteps)).long()
        noisy = scheduler.add_noise(latents, noise, timesteps)
        context, added = torch_condition(encoders, batch)
        predicted = unet(noisy.to(dtype), timesteps, context, added_cond_kwargs=added).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), noise)
        loss.backward()
        return loss.item(), {
            name: encoder.weight.grad[encoder.vocab_size :].float().numpy() for name, encoder in encoders.items()
        }

    return of_batch


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_bfloat16_gradients_are_as_near_to_float32_as_pytorchs(family, tiny_sd, make_tiny_sdxl, pictures, tmp_path):
    """The precision of every accelerator, through text encoders, UNet and loss, on the draws of eight updates.

    Exact is PyTorch's float32, to which ours is held above. How far bfloat16 is off hangs on the weights, which are
    random here: PyTorch's gradients differ from that by 1% to 7%, and its loss by up to 0.14%.
    """
    model = tiny_sd if family == "sd" else make_tiny_sdxl(2)
    exact, half = (Problem(model, pictures, tmp_path, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    in_float32, in_bfloat16 = (torch_loss_and_gradients(exact, model, each) for each in (torch.float32, torch.bfloat16))
    errors, their_errors = [], []
    for step in range(8):
        batch = draw(exact.frozen(), jnp.int32(step), jnp.arange(4), 4)
        loss, gradients = in_float32(batch)
        low_loss, low_gradients = loss_and_gradients(half, batch)
        their_loss, their_gradients = in_bfloat16(batch)
        assert max(abs(low_loss - loss), abs(their_loss - loss)) < 2e-3 * loss
        for name, gradient in gradients.items():
            low, theirs = low_gradients[name], their_gradients[name]
            length = np.linalg.norm(gradient)
            errors.append(np.linalg.norm(low - gradient) / length)
            their_errors.append(np.linalg.norm(theirs - gradient) / length)
    assert max(errors) < 1.3 * max(their_errors)
    assert np.mean(errors) < 1.25 * np.mean(their_errors)


def test_steps_in_bfloat16(standard, tiny_sd, pictures, tmp_path):
    """The rows go the same way; they and their moments stay float32, so that small updates are not lost."""
    half = Problem(tiny_sd, pictures, tmp_path, jnp.bfloat16)
    (state, losses), (low_state, low_losses) = (problem.run(1, 2, steps=8) for problem in (standard, half))
    leaves = jax.tree.leaves((low_state.rows, low_state.opt_state))
    floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype.name for leaf in floats} == {"float32"} and bool(low_state.ok)
    assert relative(low_losses, losses) < 3e-3
    start = standard.concept.rows["text_encoder"]
    moved, low_moved = (np.asarray(each.rows["text_encoder"]) - start for each in (state, low_state))
    assert np.vdot(moved, low_moved) > 0.995 * np.linalg.norm(moved) * np.linalg.norm(low_moved)


@pytest.mark.parametrize("batch", [8, 24])
def test_with_many_entries_a_batch_shares_the_orders_of_its_epochs(standard, batch, monkeypatch):
    """The draws are those of sorting for each sample, also where an epoch ends within the batch."""
    entries = jnp.arange(29, dtype=jnp.int32) % 3
    frozen = standard.frozen()
    frozen = frozen._replace(dataset=frozen.dataset._replace(entries=entries))

    def draws():
        draw = jax.jit(jax.vmap(lambda step: draw_batch(frozen, step, jnp.arange(batch), batch)))
        return draw(jnp.arange(12))

    each = draws()
    monkeypatch.setattr("ti_jax.training.step.MANY_ENTRIES", 29)
    assert jax.tree.all(jax.tree.map(np.array_equal, draws(), each))
