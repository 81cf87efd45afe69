"""Training in aspect-ratio buckets: the rows of a PyTorch loop on the same draws, on several devices, and resumed."""

import collections
import dataclasses
import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from test_step import Problem, TorchTextEncoder, draw, relative, torch_condition

import ti_jax
from ti_jax.data.buckets import BucketOrder
from ti_jax.data.dataset import make_datasets, weights_of
from ti_jax.training import parallel
from ti_jax.training.compile import StepBuilder
from ti_jax.training.job import prepare_concept, prepare_concepts
from ti_jax.training.step import draw_batch

STEPS = 20
BUCKETS = {"aspect_ratio_buckets": True, "bucket_step": 8, "max_aspect_ratio": 3.0, "resolution": 16}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Three pictures that are about three times as wide as high, and two squares: for buckets of 24 x 8 and 16 x 16."""
    folder = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(2)
    for index, shape in enumerate([(11, 33), (16, 16), (16, 50), (20, 20), (9, 27)]):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(folder / f"{index}.png")
    return folder


class Buckets(Problem):
    """A tiny model and a concept whose pictures have two shapes."""

    def __init__(self, model, pictures, tmp_path, **changes):
        # `Problem` makes the one dataset of a run without buckets.
        super().__init__(model, pictures, tmp_path, resolution=16, **changes)
        self.config = replace(self.config, **BUCKETS)
        self.concept = prepare_concept(self.config, self.sd, print)
        self.datasets = make_datasets(self.config, self.sd, [self.concept])
        self.order = BucketOrder(7, weights_of(self.datasets))

    def train(self, num_devices, batch_size, steps=STEPS):
        """The last state and all losses, from dispatches of at most three updates."""
        mesh = parallel.make_mesh(jax.devices()[:num_devices])
        frozen = [parallel.replicate(self.frozen()._replace(dataset=each), mesh) for each in self.datasets]
        state = parallel.replicate(self.state(), mesh)
        programs = self.programs.get((num_devices, batch_size))
        if programs is None:
            builder = StepBuilder(
                self.sd.networks, self.optimizer, mesh, batch_size, self.accumulation, longest_chunk=3
            )
            programs = [builder.lower(each, state, "none", turns=True).compile() for each in frozen]
            self.programs[num_devices, batch_size] = programs
        now, losses, used = 0, [], set()
        while now < steps:
            bucket, turn, count = self.order.next(now, min(3, steps - now))
            numbers = parallel.replicate((np.int32(count), np.int32(turn)), mesh)
            state, chunk = programs[bucket](frozen[bucket], state, *numbers)
            losses += np.asarray(chunk)[:count].tolist()
            now, used = now + count, used | {bucket}
        assert len(used) == len(self.datasets), "every bucket had its turn"
        return state, losses


def torch_rows(problem, model, weights_of=None):
    """The rows of a PyTorch loop on the draws of ours, each step with the pictures of its bucket.

    Args:
      weights_of: weights of the squared errors [B, 1, h, w], of a bucket's dataset and a batch's latents, unscaled.
    """
    scale = problem.sd.networks.vae.config.scaling_factor
    unet = UNet2DConditionModel.from_pretrained(model / "unet").requires_grad_(False)
    scheduler = DDPMScheduler.from_pretrained(model / "scheduler")
    encoders = {name: TorchTextEncoder(model, name, rows) for name, rows in problem.concept.rows.items()}
    weights = [encoder.weight for encoder in encoders.values()]
    optimizer = torch.optim.AdamW(weights, lr=problem.config.learning_rate, weight_decay=0.0)
    losses, shapes = [], set()
    size = problem.config.train_batch_size
    for step in range(STEPS):
        bucket, turn = problem.order.turn(step)
        frozen = problem.frozen()._replace(dataset=problem.datasets[bucket], params={})
        batch = draw(frozen, jnp.int32(step), jnp.arange(size), size, jnp.int32(turn))
        latents, noise = (torch.tensor(np.asarray(each)).permute(0, 3, 1, 2) for each in (batch.latents, batch.noise))
        shapes.add(tuple(latents.shape[2:]))
        timesteps = torch.tensor(np.asarray(batch.timesteps)).long()
        context, added = torch_condition(encoders, batch)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        optimizer.zero_grad()
        errors = (unet(noisy, timesteps, context, added_cond_kwargs=added).sample - noise) ** 2
        if weights_of is not None:
            errors = errors * weights_of(frozen.dataset, np.asarray(batch.latents) / scale)
        loss = errors.mean()
        loss.backward()
        optimizer.step()
        for encoder in encoders.values():
            encoder.restore()
        losses.append(loss.item())
    assert shapes == {(8, 8), (4, 12)}
    return {name: encoder.rows for name, encoder in encoders.items()}, losses


@pytest.fixture(scope="module")
def of_four(tiny_sd, shapes, tmp_path_factory):
    """A problem of four samples at a time: on one device they are compared with PyTorch, and with four devices."""
    return Buckets(tiny_sd, shapes, tmp_path_factory.mktemp("of_four"), train_batch_size=4)


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl"])
def test_twenty_steps_with_two_buckets_equal_a_pytorch_loop(family, of_four, shapes, tmp_path, request):
    model = request.getfixturevalue(family)
    problem = of_four if family == "tiny_sd" else Buckets(model, shapes, tmp_path)
    assert [each.moments.shape[1:4] for each in problem.datasets] == [(2, 8, 8), (2, 4, 12)]
    assert np.asarray(problem.datasets[1].time_ids)[0, 0].tolist() == [11, 33, 0, 0, 8, 24], "SDXL's sizes"
    state, losses = problem.train(num_devices=1, batch_size=problem.config.train_batch_size)
    rows, their_losses = torch_rows(problem, model)
    assert relative(losses, their_losses) < 1e-5
    for name, value in rows.items():
        assert relative(state.rows[name], value) < 1e-5
        assert relative(state.rows[name], problem.concept.rows[name]) > 0.01, "nothing was learned"


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """Two lying and two square pictures, twice as large as their buckets; three of them have masks in squares of two
    pixels, by their names."""
    folder = tmp_path_factory.mktemp("masked")
    rng = np.random.default_rng(4)
    masks = {}
    for index, (height, width) in enumerate([(16, 48), (32, 32), (32, 32), (16, 48)]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{index}.png")
        mask = np.full((height, width), 255, np.uint8)
        if index != 2:
            mask = np.kron(rng.integers(0, 256, (height // 2, width // 2), np.uint8), np.ones((2, 2), np.uint8))
            mask[: height // 2] = 0
            Image.fromarray(mask).save(folder / f"{index}.mask.png")
        masks[f"{index}.png"] = mask
    return folder, masks


def test_masks_weigh_each_bucket_on_its_own_grid_as_in_pytorch(masked, tiny_sd, tmp_path):
    """The weights are made of the masks by PyTorch; which picture is drawn, and mirrored, is read off the latents."""
    folder, masks = masked
    problem = Buckets(tiny_sd, folder, tmp_path, unmasked_weight=0.1)
    names = [
        problem.concept.pictures.names[index] for each in problem.concept.pictures.buckets for index in each.indices
    ]
    assert names == ["1.png", "2.png", "0.png", "3.png"]
    weights = []
    for name in names:
        pooled = torch.nn.functional.avg_pool2d(torch.tensor(masks[name] / 255.0)[None, None], 4)
        weight = 0.1 + 0.9 * pooled
        weights.append((weight / weight.mean()).float())
    assert [tuple(each.shape[2:]) for each in weights] == [(8, 8)] * 2 + [(4, 12)] * 2

    def weights_of(dataset, latents):
        means, variances = np.split(np.asarray(dataset.moments), 2, axis=-1)
        found = []
        for latent in latents:
            distances = (np.square(latent - means) / np.exp(variances)).mean(axis=(2, 3, 4))
            picture, mirrored = np.unravel_index(distances.argmin(), distances.shape)
            assert np.sort(distances.ravel())[1] > 1.2 * distances.min(), "which picture is it?"
            weight = weights[picture + (0 if latents.shape[1:3] == (8, 8) else 2)]
            found.append(weight.flip(-1) if mirrored else weight)
        return torch.cat(found)

    state, losses = problem.train(num_devices=1, batch_size=2)
    rows, their_losses = torch_rows(problem, tiny_sd, weights_of)
    assert relative(losses, their_losses) < 1e-5
    assert relative(state.rows["text_encoder"], rows["text_encoder"]) < 1e-5


def test_four_devices_end_with_the_rows_of_one(of_four):
    """Of eight the batch would be large: a sum over many numbers one by one, without optimisations, is off by 1e-6."""
    one, losses_of_one = of_four.train(num_devices=1, batch_size=4, steps=7)
    four, losses_of_four = of_four.train(num_devices=4, batch_size=1, steps=7)
    assert relative(four.rows["text_encoder"], one.rows["text_encoder"]) < 1e-6
    assert relative(losses_of_four, losses_of_one) < 1e-6


# -- whole runs


@pytest.fixture
def config(short_run, shapes):
    return replace(short_run, train_data_dir=str(shapes), train_batch_size=2, **BUCKETS)


def train(config):
    return ti_jax.train(config, devices=jax.devices()[:1])


def rows(result):
    return result.embedding.vectors["text_encoder"]


def test_a_resumed_run_is_the_same_to_the_bit(config, tmp_path, capsys):
    """Also where a batch has more samples than a bucket has pictures, which is told."""
    config = replace(config, train_batch_size=3)
    whole = train(replace(config, output_dir=str(tmp_path / "whole")))
    told = capsys.readouterr().err
    assert (
        "note: buckets with fewer pictures than a batch of 3: 16 x 16 has 2; a batch of these shows a picture several "
        "times, though over the run all are seen equally often; a larger --bucket_step makes fewer buckets, a smaller "
        "--train_batch_size smaller batches"
    ) in told
    assert "pictures in buckets: 2 of 16 x 16, 3 of 24 x 8 pixels" in told
    assert told.count(" s to compile") == 3
    assert "bucket of 24 x 8 pixels: 60.0% of the updates; its training step took" in told
    first = train(replace(config, max_train_steps=7, checkpointing_steps=7))
    second = train(replace(config, resume_from_checkpoint="latest"))
    assert np.array_equal(rows(second), rows(whole))
    assert np.array_equal(np.concatenate([first.losses, second.losses]), whole.losses)
    records = [json.loads(line) for line in (second.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert sum(len(record.get("losses", [])) for record in records) == 12
    with Image.open(whole.output_dir / "samples" / "overview-00.png") as picture:
        assert picture.size == (16, 16), "what is drawn keeps the square"
    for change, message in [
        (
            {"aspect_ratio_buckets": False, "bucket_step": None, "max_aspect_ratio": None},
            "aspect_ratio_buckets True there, False here",
        ),
        ({"max_aspect_ratio": 3.5}, "max_aspect_ratio 3.0 there, 3.5 here"),
    ]:
        with pytest.raises(ti_jax.InputError, match=message):
            train(replace(config, **change, resume_from_checkpoint="latest"))


def test_every_bucket_shows_its_pictures_equally_often(tiny_sd, shapes, tmp_path):
    problem = Buckets(tiny_sd, shapes, tmp_path)
    draw = jax.jit(lambda frozen, step, turn: draw_batch(frozen, step, jnp.arange(2), 2, turn).time_ids)
    seen = collections.Counter()
    for step in range(30):
        bucket, turn = problem.order.turn(step)
        frozen = problem.frozen()._replace(dataset=problem.datasets[bucket])
        seen.update(tuple(size) for size in np.asarray(draw(frozen, step, turn))[:, :2].astype(int).tolist())
    assert len(seen) == 5 and sum(seen.values()) == 60
    assert all(abs(count - 12) <= 2 for count in seen.values())


def test_each_picture_keeps_its_caption_and_its_repeats(tiny_sd, shapes, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(shapes, folder / "3_often")
    (folder / "3_often" / "0.png").rename(folder / "0.png")
    for name in ("0", "3_often/1", "3_often/2"):
        (folder / f"{name}.txt").write_text(f"{{}} number {name[-1]}")
    problem = Buckets(tiny_sd, folder, tmp_path, recursive=True)
    heights = {11: 0, 16: 1, 20: 3, 9: 4}  # of the original pictures; two have 16
    for dataset in problem.datasets:
        shown = np.asarray(dataset.entries).tolist()
        for picture, (height, width, *_) in enumerate(np.asarray(dataset.time_ids)[:, 0].astype(int).tolist()):
            number = 2 if width == 50 else heights[height]
            assert shown.count(picture) == (1 if number == 0 else 3)
            prompts = {
                problem.concept.prompts[prompt]
                for prompt in np.asarray(dataset.prompts_of)[picture].tolist()
                if prompt >= 0
            }
            assert (prompts == {f"<new> number {number}"}) == (number < 3)
    assert weights_of(problem.datasets) == [6, 7]


def test_words_in_one_run_have_as_many_samples_though_their_pictures_have_other_shapes(tiny_sd, shapes, tmp_path):
    """The first word's pictures are three lying and two square, the second's two lying and one upright."""
    rng = np.random.default_rng(3)
    (tmp_path / "ben").mkdir()
    for index, shape in enumerate([(10, 30), (8, 24), (30, 10)]):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(tmp_path / "ben" / f"{index}.png")
    problem = Buckets(tiny_sd, shapes, tmp_path)
    config = replace(problem.config, resolution=16, templates=None)
    configs = [
        replace(config, placeholder_token="<ana>"),
        replace(config, placeholder_token="<ben>", train_data_dir=str(tmp_path / "ben")),
    ]
    concepts = prepare_concepts(configs, problem.sd, print)
    datasets = make_datasets(config, problem.sd, concepts, in_batch=2)
    assert [each.moments.shape[2:4] for each in datasets] == [(8, 8), (4, 12), (12, 4)]
    assert [each.sharing.size.tolist() for each in datasets] == [[2, 0], [3, 2], [0, 1]]
    order, first_of_ben = BucketOrder(7, weights_of(datasets)), len(concepts[0].prompts)
    draw = jax.jit(lambda frozen, step, turn: draw_batch(frozen, step, jnp.arange(4), 4, turn).prompts)
    words = collections.Counter()
    for step in range(60):
        bucket, turn = order.turn(step)
        frozen = problem.frozen()._replace(dataset=datasets[bucket])
        words.update((np.asarray(draw(frozen, step, turn)) >= first_of_ben).tolist())
    assert sum(words.values()) == 240 and abs(words[True] - 120) <= 8


def test_words_in_buckets_are_resumed_to_the_bit(config, shapes, masked, tmp_path):
    """A whole run of two words; the pictures of the second have masks, too."""
    shutil.copytree(shapes, tmp_path / "family" / "ana")
    shutil.copytree(masked[0], tmp_path / "family" / "ben")
    config = replace(
        config, concepts=str(tmp_path / "family"), train_data_dir=None, placeholder_token=None, max_train_steps=6,
        checkpointing_steps=3, overview_prompts=("{}",), validation_inference_steps=1,
    )  # fmt: skip
    whole = train(replace(config, output_dir=str(tmp_path / "whole")))
    assert [each.token for each in whole.embeddings] == ["<ana>", "<ben>"]
    shutil.copytree(whole.output_dir, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "6")
    again = train(replace(config, output_dir=str(tmp_path / "again"), resume_from_checkpoint="latest"))
    assert np.array_equal(again.losses, whole.losses[3:])
    for ours, theirs in zip(again.embeddings, whole.embeddings, strict=True):
        assert np.array_equal(ours.vectors["text_encoder"], theirs.vectors["text_encoder"])
    assert (whole.output_dir / "ben" / "learned_embeds.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bucket_step": 12}, "--bucket_step 12: must be from 8 to 8192 pixels and divisible by 8"),
        ({"max_aspect_ratio": 0.5}, "--max_aspect_ratio 0.5: must be 1 or more and finite"),
        ({"aspect_ratio_buckets": False}, "--bucket_step 8: does nothing without --aspect_ratio_buckets; give both or"),
        ({"bucket_step": 64}, "no bucket but the square has sides that are multiples of --bucket_step 64"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_the_weights_are_read(config, change, message, monkeypatch):
    monkeypatch.setattr(ti_jax.StableDiffusion, "load", lambda model: pytest.fail("the weights were read"))
    with pytest.raises(ti_jax.InputError, match=message) as error:
        train(dataclasses.replace(config, **change))
    assert "\n" not in str(error.value)
