"""Several words learned in one program: against PyTorch, on eight devices, resumed, and what a run leaves."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from test_step import TorchTextEncoder, draw, relative, torch_condition

import ti_jax
from ti_jax.config import TrainConfig, concept_configs, resolve
from ti_jax.data.dataset import make_dataset
from ti_jax.pipeline import StableDiffusion
from ti_jax.training import parallel
from ti_jax.training.job import prepare_concepts
from ti_jax.training.optimizer import make_optimizer
from ti_jax.training.plan import crossing_bytes
from ti_jax.training.step import StepInputs, TrainState, make_train_step

STEPS, BATCH = 20, 8


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A file of three concepts; the templates of the first two have each other's word."""
    folder = tmp_path_factory.mktemp("family")
    rng = np.random.default_rng(2)
    for name, count in (("ana", 3), ("ben", 2), ("cleo", 2)):
        (folder / name).mkdir()
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / name / f"{number}.png")
    (folder / "ana.txt").write_text("a portrait of {}\n{} beside <ben>\n{}\n")
    (folder / "ben.txt").write_text("a drawing of {}\n<ana> beside {}\n")
    file = folder / "family.yaml"
    file.write_text(
        "- train_data_dir: ana\n  num_vectors: 2\n  templates: ana.txt\n"
        "- train_data_dir: ben\n  initializer_token: red\n  templates: ben.txt\n"
        "- train_data_dir: cleo\n"
    )
    return file


@pytest.fixture(scope="module")
def config(tiny_sd, family):
    templates = family.parent / "all.txt"
    templates.write_text("a portrait of {}\n")
    # Small pictures: a sum over many numbers one by one, as programs that are not optimised take it, is off by 1e-6.
    return TrainConfig(
        pretrained_model_name_or_path=str(tiny_sd), concepts=str(family), initializer_token="person",
        templates=str(templates), overview_prompts=("a portrait of {}",), learning_rate=1e-2, train_batch_size=BATCH,
        max_train_steps=STEPS, adam_weight_decay=1e-2, lr_scheduler="constant_with_warmup", lr_warmup_steps=4,
        validation_inference_steps=1, resolution=8,
    )  # fmt: skip


class Problem:
    """The tiny model and the three concepts, ready to train."""

    def __init__(self, config):
        self.config = resolve(config)
        self.sd = StableDiffusion.from_pretrained(config.pretrained_model_name_or_path)
        self.concepts = prepare_concepts(concept_configs(self.config), self.sd, print)
        self.optimizer, self.schedule = make_optimizer(self.config, STEPS, 1)
        self.datasets = {number: make_dataset(self.config, self.sd, self.concepts, number) for number in (1, 2)}

    def frozen(self, in_batch):
        params = {name: tree for name, tree in self.sd.params.items() if name != "vae"}
        masks = {name: jnp.asarray(mask) for name, mask in self.concepts[0].row_mask.items()}
        return StepInputs(params, self.sd.schedule, self.datasets[in_batch], masks, jax.random.key(7))

    def state(self):
        rows = {name: jnp.asarray(value) for name, value in self.concepts[0].rows.items()}
        return TrainState(rows, self.optimizer.init(rows), jnp.int32(0), jnp.bool_(True))

    def program(self, num_devices):
        step = make_train_step(
            self.sd.networks, self.optimizer, batch_size=BATCH // num_devices, accumulation=1, num_devices=num_devices,
            axis_name=parallel.AXIS,
        )  # fmt: skip
        mesh = parallel.make_mesh(jax.devices()[:num_devices])
        run_steps = parallel.make_run_steps(step, mesh, STEPS)

        def run(in_batch):
            return run_steps(*parallel.replicate((self.frozen(in_batch), self.state()), mesh), jnp.int32(STEPS))

        run.lower = lambda: run_steps.lower(*parallel.replicate((self.frozen(1), self.state()), mesh), jnp.int32(STEPS))
        return run


@pytest.fixture(scope="module")
def problem(config):
    return Problem(config)


@pytest.fixture(scope="module")
def on_one(problem):
    """``on_one(in_batch)``: state and losses on one device."""
    return problem.program(1)


def torch_rows(problem, model, in_batch):
    """As many AdamW optimizers as rows, each fed with the mean over the samples whose prompt has its row.

    PyTorch leaves out a parameter without a gradient, and counts the steps of each by itself.
    """
    unet = UNet2DConditionModel.from_pretrained(Path(model) / "unet").requires_grad_(False)
    scheduler = DDPMScheduler.from_pretrained(Path(model) / "scheduler")
    start = problem.concepts[0].rows["text_encoder"]
    encoder = TorchTextEncoder(Path(model), "text_encoder", start)
    rows = [torch.nn.Parameter(torch.tensor(row)) for row in start]
    config = problem.config
    optimizers = [torch.optim.AdamW([row], weight_decay=config.adam_weight_decay) for row in rows]
    updates = [0] * len(rows)
    frozen = problem.frozen(in_batch)._replace(params={})
    losses = []
    for step in range(STEPS):
        batch = draw(frozen, jnp.int32(step), jnp.arange(BATCH), BATCH)
        latents, noise = (torch.tensor(np.asarray(x)).permute(0, 3, 1, 2) for x in (batch.latents, batch.noise))
        timesteps = torch.tensor(np.asarray(batch.timesteps)).long()
        context, _ = torch_condition({"text_encoder": encoder}, batch)
        predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, context).sample
        each = (predicted - noise).square().mean(dim=(1, 2, 3))
        losses.append(each.mean().item())
        ids = np.asarray(batch.ids["text_encoder"])
        for number, (row, optimizer) in enumerate(zip(rows, optimizers, strict=True)):
            has = torch.tensor((ids == encoder.vocab_size + number).any(axis=1))
            row.grad = None
            if has.any():
                (gradient,) = torch.autograd.grad(each.sum() / has.sum(), encoder.weight, retain_graph=True)
                row.grad = gradient[encoder.vocab_size + number].clone()
                optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, updates[number] / 4)
                updates[number] += 1
            optimizer.step()
        with torch.no_grad():
            encoder.weight[encoder.vocab_size :] = torch.stack(list(rows))
    return encoder.rows, losses, updates


@pytest.mark.parametrize("in_batch", [1, 2])
def test_twenty_steps_equal_a_pytorch_loop(problem, on_one, tiny_sd, in_batch):
    """Two words in one caption; a row that a batch has not seen keeps its value, moments and count."""
    state, losses = on_one(in_batch)
    rows, their_losses, updates = torch_rows(problem, tiny_sd, in_batch)
    assert relative(losses, their_losses) < 1e-5
    start = problem.concepts[0].rows["text_encoder"]
    for number, (ours, theirs) in enumerate(zip(state.rows["text_encoder"], rows, strict=True)):
        assert relative(ours, theirs) < 1e-5 and relative(ours, start[number]) > 0.01
    counts = [leaf.tolist() for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 1]
    assert counts and all(count == updates for count in counts)
    thirds = [(step * in_batch + np.arange(in_batch)) % 3 for step in range(STEPS)]
    assert updates[3] == sum(2 in concepts for concepts in thirds) < STEPS, "the last is in no other's captions"


def test_eight_devices_end_with_the_rows_of_one(problem, on_one):
    one, losses_of_one = on_one(2)
    on_eight = problem.program(8)
    eight, losses_of_eight = on_eight(2)
    assert relative(eight.rows["text_encoder"], one.rows["text_encoder"]) < 1e-6
    assert relative(losses_of_eight, losses_of_one) < 1e-6
    # Rows of 32 numbers, of each its number of samples, and the loss.
    assert crossing_bytes(on_eight.lower().compile().as_text()) == {"all-reduce": 4 * (4 * 32 + 4 + 1)}


# -- whole runs


def train(config):
    return ti_jax.train(config, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run from its first step to its last, with everything that it can leave."""
    changes = {"save_steps": 6, "validation_steps": 6, "num_validation_images": 1, "logging_steps": 3}
    out = str(tmp_path_factory.mktemp("whole"))
    return train(replace(config, max_train_steps=12, validation_prompt=("a drawing of {}",), output_dir=out, **changes))


def vectors(result):
    return [embedding.vectors["text_encoder"] for embedding in result.embeddings]


def test_what_a_run_leaves(whole):
    assert [embedding.token for embedding in whole.embeddings] == ["<ana>", "<ben>", "<cleo>"]
    assert [len(each) for each in vectors(whole)] == [2, 1, 1] and whole.embedding is whole.embeddings[0]
    for embedding, name in zip(whole.embeddings, ("ana", "ben", "cleo"), strict=True):
        folder = whole.output_dir / name
        kept = ti_jax.Embedding.load(folder / "learned_embeds.safetensors")
        assert kept.token == embedding.token and kept.metadata["token"] == embedding.token
        assert np.array_equal(kept.vectors["text_encoder"], embedding.vectors["text_encoder"])
        assert kept.metadata["initializer_token"] == ("red" if name == "ben" else "person")
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert names - {"progress.png", ".ti_jax-lock"} == {
            "learned_embeds.safetensors", "learned_embeds-steps-6.safetensors", "learned_embeds-steps-12.safetensors",
            "overview.png", "report.html", "samples/step-000006.png", "samples/step-000012.png",
            *(f"samples/overview-{number:02d}.png" for number in range(8)),
        }  # fmt: skip
    assert sorted(path.name for path in (whole.output_dir / "checkpoints").iterdir()) == ["12"]
    records = [json.loads(line) for line in (whole.output_dir / "metrics.jsonl").read_text().splitlines()]
    figures = {name for record in records for name in record}
    assert {"ana/text_encoder/row_1/distance", "ben/text_encoder/row_0/norm"} <= figures
    report = (whole.output_dir / "report.html").read_text()
    assert all(f'href="{name}/report.html"' in report for name in ("ana", "ben", "cleo"))
    own = (whole.output_dir / "ana" / "report.html").read_text()
    assert "&lt;ana&gt;" in own and "row 1" in own and "&lt;ben&gt;" not in own


def test_a_resumed_run_is_the_same_to_the_bit(config, whole, tmp_path):
    config = replace(config, logging_steps=3, output_dir=str(tmp_path))
    first = train(replace(config, max_train_steps=7, checkpointing_steps=7))  # in the middle of a round of concepts
    second = train(replace(config, max_train_steps=12, resume_from_checkpoint="latest"))
    assert all(map(np.array_equal, vectors(second), vectors(whole)))
    assert np.array_equal(np.concatenate([first.losses, second.losses]), whole.losses)
    with pytest.raises(ti_jax.InputError, match="concepts_per_batch None there, 1 here"):
        train(replace(config, concepts_per_batch=1, resume_from_checkpoint="latest"))
