"""``--early_stop``: its rule, its samples, and runs that end by it: resumed, of several words, on several devices."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ti_jax
from ti_jax.config import TrainConfig, resolve
from ti_jax.data.dataset import Dataset
from ti_jax.diffusion.losses import Objective
from ti_jax.diffusion.schedule import NoiseSchedule
from ti_jax.errors import InputError
from ti_jax.training import loop
from ti_jax.training.early_stop import fixed_samples
from ti_jax.training.plateau import IN_WINDOW, no_watch, observe
from ti_jax.training.step import StepInputs

# -- the rule


def ends(losses, threshold, rows=(0,)):
    """The step at which each of the concepts ends whose losses are the columns, and the last watch."""
    watch = no_watch(len(rows), losses.shape[1])
    for step, row in enumerate(losses.astype(np.float32)):
        watch, _ = observe(watch, jnp.asarray(row), jnp.int32(step), threshold, jnp.asarray(rows))
    return watch.stopped.tolist(), watch


def test_a_concept_ends_where_its_window_varies_little_beside_all_that_was():
    falls = np.exp(-np.arange(40) / 5) + 0.2
    late = np.exp(-np.maximum(np.arange(40) - 12, 0) / 2.0) + 0.2  # nothing at all happens for a while
    constant, straight = np.full(40, 0.3), 1.0 - np.arange(40) / 50
    losses = np.stack([falls, late, constant, straight], axis=1)

    def by_hand(losses, threshold):
        for step in range(IN_WINDOW, len(losses)):
            of_all = np.var(losses[: step + 1])
            if of_all > 1e-12 and np.var(losses[step + 1 - IN_WINDOW : step + 1]) < threshold * of_all:
                return step
        return -1

    for threshold in (0.15, 0.005):
        expected = [by_hand(column, threshold) for column in losses.T]
        assert ends(losses, threshold, rows=(0, 1, 2, 3))[0] == expected
        assert expected[1] > 15 and expected[2] == -1
    assert expected[0] > by_hand(falls, 0.15) > IN_WINDOW and expected[3] == -1 < by_hand(straight, 0.15)


def test_what_has_ended_stays_as_it_is_and_its_rows_are_halted():
    losses = np.stack([[4, 1, 1, 1, 1, 9, 1, 5, 5.0], [4, 3, 2, 1, 1, 1, 1, 1, 1.0]], axis=1)
    rows = (0, 0, 1, -1)  # the first concept has two rows, and one is not trained
    steps, watch = ends(losses[:5], 0.01, rows)
    assert steps == [4, -1] and watch.halted.tolist() == [True, True, False, False] and not watch.ended
    steps, later = ends(losses, 0.01, rows)
    assert steps == [4, 6] and later.halted.tolist() == [True, True, True, False] and later.ended
    for name in ("recent", "seen", "mean", "squares"):
        assert np.array_equal(getattr(later, name)[0], getattr(watch, name)[0]), name


def test_a_loss_that_is_no_number_ends_nothing():
    losses = np.array([4, 1, np.nan, 1, 1, 1, 1, 1, 1.0])[:, None]
    assert ends(losses, 0.15)[0] == [-1]


# -- settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"early_stop_window": 40}, "--early_stop_window 40: does nothing without --early_stop"),
        ({"early_stop_threshold": 0.1}, "--early_stop_threshold 0.1: does nothing without --early_stop"),
        ({"early_stop": True, "early_stop_threshold": 0.0}, "--early_stop_threshold 0.0: must be above 0"),
        ({"early_stop": True, "early_stop_window": 0}, "--early_stop_window 0: must be 1 or more"),
    ],
)
def test_settings_that_cannot_be(given, message):
    with pytest.raises(InputError, match=message):
        resolve(TrainConfig(**given))


def test_window_and_threshold_suit_the_model(short_run):
    def resolved(config):
        config = resolve(config)
        return config.early_stop_window, config.early_stop_threshold

    assert resolved(TrainConfig()) == (None, None)
    assert resolved(TrainConfig(early_stop=True)) == (40, 0.005)
    assert resolved(replace(short_run, early_stop=True)) == (310, 0.15)
    assert resolved(replace(short_run, early_stop=True, early_stop_window=7)) == (7, 0.15)


# -- runs


def train(config, devices=1):
    return ti_jax.train(config, devices=jax.devices()[:devices])


def records(result):
    return [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]


def figures(result, name):
    """What was logged under a name, by step."""
    return {record["step"]: record[name] for record in records(result) if name in record}


def rows(result):
    return [embedding.vectors["text_encoder"] for embedding in result.embeddings]


@pytest.fixture(scope="module")
def ended(make_short_run, tmp_path_factory):
    """The config of a run that ends as soon as a run may, its result, and that of a run without the flag."""
    config = replace(
        make_short_run(tmp_path_factory.mktemp("run")), resolution=8, train_batch_size=8, save_steps=4, num_vectors=2
    )  # fmt: skip
    plain = train(replace(config, max_train_steps=6, output_dir=f"{config.output_dir}-plain"))
    config = replace(config, early_stop=True, early_stop_window=4, early_stop_threshold=1e9)
    return config, train(config), plain


def test_a_run_ends_with_the_rows_of_that_step_and_says_so(ended, capsys):
    config, result, plain = ended
    copy = ti_jax.Embedding.load(plain.output_dir / "learned_embeds-steps-4.safetensors")
    assert np.array_equal(rows(result)[0], copy.vectors["text_encoder"])
    assert np.array_equal(result.losses, plain.losses[:4])
    assert result.early_stops == {"<new>": 4} and plain.early_stops == {} and not result.interrupted
    kept = ti_jax.Embedding.load(result.output_dir / "learned_embeds.safetensors")
    assert kept.metadata["steps"] == "4" and (result.output_dir / "overview.png").exists()
    assert list(figures(result, "early_stop/loss")) == [0, 1, 2, 3, 4]
    assert figures(result, "early_stop/stopped") == {4: 1.0}
    losses = np.array(list(figures(result, "early_stop/loss").values()))
    np.testing.assert_allclose(figures(result, "early_stop/variance")[4], losses[1:].var() / losses.var(), rtol=1e-3)
    assert not figures(plain, "early_stop/loss")

    again = train(replace(config, resume_from_checkpoint="latest"))
    told = capsys.readouterr().err
    assert np.array_equal(rows(again)[0], rows(result)[0]) and again.early_stops == {"<new>": 4}
    assert len(again.losses) == 0 and "<new> after 4 steps" in told
    assert "--early_stop looks at the loss on fixed samples every 1 steps" in told


def test_what_is_dispatched_before_the_end_is_read_does_nothing(ended):
    """As on a GPU or TPU, where the next updates are on the device before the host reads what the last ones saw."""
    config, result, _ = ended
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_reads_first", lambda job: False)
        other = train(replace(config, output_dir=f"{config.output_dir}-ahead"))
    assert other.early_stops == {"<new>": 4} and np.array_equal(other.losses, result.losses)
    assert np.array_equal(rows(other)[0], rows(result)[0])
    assert [path.name for path in (other.output_dir / "checkpoints").iterdir()] == ["4"]


def test_a_checkpoint_of_a_run_without_it_is_refused(ended):
    config, _, plain = ended
    config = replace(config, output_dir=str(plain.output_dir), resume_from_checkpoint="latest")
    with pytest.raises(InputError, match="early_stop False there, True here"):
        train(config)


def test_eight_devices_see_what_one_sees(ended):
    config, result, _ = ended
    on_eight = train(replace(config, train_batch_size=1, output_dir=f"{config.output_dir}-8"), devices=8)
    assert on_eight.early_stops == {"<new>": 4}
    of_one, of_eight = (np.array(list(figures(each, "early_stop/loss").values())) for each in (result, on_eight))
    np.testing.assert_allclose(of_eight, of_one, rtol=1e-5)
    np.testing.assert_allclose(rows(on_eight)[0], rows(result)[0], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def family(make_short_run, tmp_path_factory):
    """The config of a run of two words that never ends before its last step, and its result."""
    folder = tmp_path_factory.mktemp("family")
    rng = np.random.default_rng(3)
    for name, count in (("ana", 3), ("ben", 2)):
        (folder / "words" / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "words" / name / f"{number}.png")
    config = replace(
        make_short_run(folder), train_data_dir=None, placeholder_token=None, concepts=str(folder / "words"),
        resolution=8, concepts_per_batch=1, train_batch_size=2, save_steps=2, early_stop=True, early_stop_window=4,
        early_stop_threshold=1e-12,
    )  # fmt: skip
    return config, train(config)


def test_each_word_ends_by_itself_also_in_a_resumed_run(family, tmp_path):
    config, whole = family
    assert whole.early_stops == {}
    # A word has an update every second step, and so is looked at. A threshold between the two that are seen first ends
    # the one word there, and the other later or not at all.
    variances = {name: figures(whole, f"{name}/early_stop/variance") for name in ("ana", "ben")}
    assert list(variances["ana"]) == [8, 10, 12]
    first, other = sorted(variances, key=lambda name: variances[name][8])
    threshold = (variances[first][8] * variances[other][8]) ** 0.5
    expected = {f"<{first}>": 8}
    later = [step for step, value in variances[other].items() if value < threshold]
    expected |= {f"<{other}>": later[0]} if later else {}

    config = replace(config, early_stop_threshold=threshold, output_dir=str(tmp_path / "out"))
    result = train(config)
    assert result.early_stops == expected
    for embedding in result.embeddings:
        step = expected.get(embedding.token, 12)
        folder = embedding.token.strip("<>")
        of_whole = ti_jax.Embedding.load(whole.output_dir / folder / f"learned_embeds-steps-{step}.safetensors")
        assert np.array_equal(embedding.vectors["text_encoder"], of_whole.vectors["text_encoder"])
        assert embedding.metadata["steps"] == str(step)

    config = replace(config, output_dir=str(tmp_path / "resumed"))
    train(replace(config, max_train_steps=5))
    second = train(replace(config, max_train_steps=9, resume_from_checkpoint="latest"))
    assert second.early_stops == {f"<{first}>": 8}
    resumed = train(replace(config, resume_from_checkpoint="latest"))
    assert resumed.early_stops == expected
    assert all(map(np.array_equal, rows(resumed), rows(result)))


# -- the samples


def dataset(**changes):
    """Three pictures of one prompt or two, of which the second is in no entry; the moments say which picture it is."""
    numbers = np.arange(3.0, dtype=np.float32)[:, None, None, None, None] + 1
    mean = np.broadcast_to(numbers * np.array([1, -1], np.float32)[:, None, None, None], (3, 2, 2, 2, 4))
    return Dataset(
        moments=np.concatenate([mean, np.full_like(mean, -60)], axis=-1),
        ids={"text_encoder": jnp.arange(8).reshape(4, 2)},
        prompts_of=jnp.array([[0, 1], [2, 2], [3, -1]]),
        prompt_counts=jnp.array([2, 2, 1]),
        entries=jnp.array([0, 2]),
        time_ids=jnp.zeros((3, 2, 6)),
        flip_probability=jnp.float32(0.5),
        latent_scale=jnp.float32(2.0),
        latent_shift=jnp.float32(0.5),
    )._replace(**changes)


def samples(seed=0, objective=None, **changes):
    schedule = NoiseSchedule(jnp.linspace(0.99, 0.01, 1000), "epsilon")
    frozen = StepInputs({}, schedule, dataset(**changes), {}, jax.random.key(0), objective or Objective())
    return fixed_samples(frozen, np.array([0, 2]), [seed])


def test_samples_are_the_concepts_own_and_spread_over_the_schedule():
    batch = samples()
    assert batch.timesteps.tolist() == [62, 187, 312, 437, 562, 687, 812, 937]
    np.testing.assert_allclose(batch.latents, np.broadcast_to(batch.latents[:, :1, :1, :1], (8, 2, 2, 4)), atol=1e-5)
    shown = batch.latents[:, 0, 0, 0] / 2 + 0.5
    pictures, sides = np.abs(shown).round().astype(int).tolist(), np.sign(shown).tolist()
    assert sorted(pictures) == [1] * 4 + [3] * 4 and set(sides) == {1, -1}
    for picture, prompt in zip(pictures, batch.prompts, strict=True):
        assert prompt in ((0, 1) if picture == 1 else (3,))
    assert np.array_equal(batch.ids["text_encoder"], np.arange(8).reshape(4, 2)[batch.prompts])
    assert abs(batch.noise.std() - 1) < 0.2 and batch.noise.dtype == batch.latents.dtype == np.float32
    assert all(map(np.array_equal, jax.tree.leaves(batch), jax.tree.leaves(samples())))
    assert not np.array_equal(batch.noise, samples(seed=1).noise)


def test_samples_follow_the_settings():
    assert (samples(flip_probability=jnp.float32(0)).latents > 0).all()
    batch = samples(objective=Objective(timestep_range=(500, 516), noise_offset=3.0))
    assert batch.timesteps.tolist() == [501, 503, 505, 507, 509, 511, 513, 515]
    assert np.abs(batch.noise.mean(axis=(1, 2))).mean() > 1
    masks = np.arange(24, dtype=np.float32).reshape(3, 2, 2, 2)
    assert {mask[0, 0] for mask in samples(masks=masks).masks} <= {0, 4, 16, 20}
