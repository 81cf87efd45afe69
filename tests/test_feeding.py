"""Moments that stay on the host: the draws, and so the rows, are those of a run whose dataset is on the devices."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ti_jax
from ti_jax.data.buckets import BucketOrder
from ti_jax.data.dataset import Dataset
from ti_jax.data.latents import aligned
from ti_jax.data.sharing import share
from ti_jax.diffusion.schedule import NoiseSchedule
from ti_jax.training import feeding, loop, parallel
from ti_jax.training.compile import StepBuilder
from ti_jax.training.feeding import Feeder, placed, stays_on_host, without_moments
from ti_jax.training.step import StepInputs, draw_batch

SEED = 7


def dataset(pictures=5, entries=None, sharing=None, masks=True, views=2):
    """Random numbers in place of pictures; no model."""
    rng = np.random.default_rng(pictures)
    entries = np.arange(pictures) if entries is None else np.asarray(entries)
    return Dataset(
        moments=rng.normal(size=(pictures, views, 2, 3, 8)).astype(np.float32),
        ids={"text_encoder": jnp.arange(12).reshape(6, 2)},
        prompts_of=jnp.asarray(rng.integers(0, 6, (pictures, 3)), jnp.int32),
        entries=jnp.asarray(entries, jnp.int32),
        time_ids=jnp.asarray(rng.normal(size=(pictures, 2, 6)), jnp.float32),
        flip_probability=jnp.float32(0.5 * (views - 1)), latent_scale=jnp.float32(0.2), latent_shift=jnp.float32(0.1),
        masks=rng.random((pictures, 2, 2, 3), np.float32) if masks else None, sharing=sharing,
    )  # fmt: skip


@pytest.fixture(scope="module")
def schedule(tiny_sd):
    return NoiseSchedule.from_config(json.loads((tiny_sd / "scheduler" / "scheduler_config.json").read_text()))


def inputs(dataset, schedule):
    return StepInputs({}, schedule, dataset, {}, jax.random.key(SEED))


def builder(num_devices=1, batch_size=4, accumulation=1, longest_chunk=5):
    mesh = parallel.make_mesh(jax.devices()[:num_devices])
    return StepBuilder(None, None, mesh, batch_size, accumulation, longest_chunk)


draw = jax.jit(draw_batch, static_argnums=3)

SETS = {
    "plain": dataset(),
    "repeats and no mirror images": dataset(entries=[0, 1, 1, 1, 2, 3, 4, 4], masks=False, views=1),
    "three concepts": dataset(12, sharing=share([3, 5, 4], 2)),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(("num_devices", "accumulation"), [(1, 1), (4, 2)])
def test_the_host_draws_what_the_devices_draw(name, num_devices, accumulation, schedule):
    """Over several epochs, from any update on."""
    whole, build = SETS[name], builder(num_devices, 8 // num_devices, accumulation)
    feeder = Feeder(whole, SEED, build)
    total, micro = build.samples, build.samples // accumulation
    for turn, most in ((0, 5), (3, 5), (5, 2), (31, 5)):
        count, place, window = feeder.next(turn, most)
        assert count == min(most, 5 - turn % 5) and int(place) == turn % 5
        feeder.ahead(turn)
        for index in range(count):
            step = jnp.int32(turn + index)
            plain = draw(inputs(whole, schedule), step, jnp.arange(total), total)
            for part in range(accumulation):
                fed = jax.tree.map(lambda leaf, at=(turn % 5 + index, part): np.asarray(leaf)[at], window)
                positions = part * micro + jnp.arange(micro)
                drawn = draw(inputs(without_moments(whole), schedule), step, positions, total, None, fed)
                same = jax.tree.map(lambda one, all, at=positions: np.array_equal(one, all[at]), drawn, plain)
                assert jax.tree.all(same), same


def test_a_bucket_is_fed_at_its_own_turns(schedule):
    order = BucketOrder(SEED, [1, 9])
    for bucket, whole in enumerate((SETS["plain"], SETS["repeats and no mirror images"])):
        feeder = Feeder(whole, SEED, builder(), order, bucket)
        for step in (step for step in range(80) if order.turn(step)[0] == bucket):
            turn = order.turn(step)[1]
            _, place, window = feeder.next(turn, 1)
            feeder.ahead(turn)
            fed = jax.tree.map(lambda leaf, at=int(place): leaf[at, 0], window)
            drawn = draw(inputs(without_moments(whole), schedule), jnp.int32(step), jnp.arange(4), 4, None, fed)
            plain = draw(inputs(whole, schedule), jnp.int32(step), jnp.arange(4), 4, jnp.int32(turn))
            assert jax.tree.all(jax.tree.map(np.array_equal, drawn, plain))


def test_the_next_window_is_there_before_it_is_asked_for(monkeypatch):
    feeder, made = Feeder(SETS["plain"], SEED, builder(longest_chunk=4)), []
    window = feeder._window
    monkeypatch.setattr(feeder, "_window", lambda number: made.append(number) or window(number))
    for turn in (2, 3, 4, 6, 8, 11, 12):
        asked = list(made)
        feeder.next(turn, 1)
        assert made == asked or turn == 2, "a dispatch waits for its samples"
        feeder.ahead(turn)
        assert made[-1] == turn // 4 + 1 and len(feeder._windows) == 2
    assert made == [0, 1, 2, 3, 4]


def test_a_device_gets_its_own_samples_and_no_more_than_a_window(monkeypatch):
    build = builder(num_devices=4, batch_size=3, accumulation=2, longest_chunk=50)
    update = 3 * 2 * 4 * (2 * 3 * 8 + 2 * 3)  # bytes of a device's samples: moments and masks
    monkeypatch.setattr(feeding, "WINDOW_BYTES", 7.5 * update)
    feeder = Feeder(SETS["plain"], SEED, build)
    _, _, window = feeder.next(0, 50)
    numbers = 3 * 2 * 8  # of pictures and views
    assert feeder.nbytes == 7 * (update + numbers)
    assert window.moments.shape == (7, 2, 12, 2, 3, 8) and window.masks.shape == (7, 2, 12, 2, 3)
    assert {shard.data.shape[2] for shard in window.moments.addressable_shards} == {3}
    of_two = Feeder(SETS["plain"], SEED, build, BucketOrder(SEED, [1, 1]), 0)
    assert of_two.nbytes == 3 * (update + numbers), "buckets share the bytes"
    monkeypatch.setattr(feeding, "WINDOW_BYTES", 1)
    assert Feeder(SETS["plain"], SEED, build).nbytes == update + numbers, "an update is the least"


def test_a_set_that_takes_much_of_a_device_stays_on_the_host():
    sets = [SETS["plain"], SETS["three concepts"]]
    size = sum(each.moments.nbytes + each.masks.nbytes for each in sets)
    assert not stays_on_host(sets, None)
    assert not stays_on_host(sets, size / feeding.SHARE + 1)
    assert stays_on_host(sets, size / feeding.SHARE - 1)
    gpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))
    assert feeding.feeds(sets, gpu, 1.0) and not feeding.feeds(sets, gpu, 1e12)
    assert not feeding.feeds(sets, builder().mesh, 1.0), "a CPU's devices have the host's memory"


def test_the_devices_of_a_cpu_share_the_moments_of_the_host():
    whole = SETS["plain"]._replace(moments=aligned((4, 2, 8, 8, 8)))
    on_all = placed(whole, parallel.make_mesh()).moments
    addresses = {shard.data.unsafe_buffer_pointer() for shard in on_all.addressable_shards}
    assert len(on_all.addressable_shards) == 8 and addresses == {whole.moments.ctypes.data}


# -- whole runs


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Pictures of two shapes, one with a mask, one with a caption, some repeated; and a second concept."""
    folder, rng = tmp_path_factory.mktemp("cases"), np.random.default_rng(2)
    for name, shape in {"0": (11, 33), "1": (16, 16), "3_often/2": (16, 50), "3": (20, 20)}.items():
        path = folder / "ana" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(path)
    Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save(folder / "ana" / "1.mask.png")
    (folder / "ana" / "0.txt").write_text("{} in a hat")
    shutil.copytree(folder / "ana", folder / "ben")
    return folder


def train(config):
    return ti_jax.train(config, devices=jax.devices()[:2])


def rows(result):
    return np.concatenate([each.vectors["text_encoder"] for each in result.embeddings])


def test_a_fed_run_goes_on_as_the_same(short_run, cases, tmp_path, monkeypatch, capsys):
    """Two words, buckets, masks, captions, repeats and mirror images, on two devices.

    From a checkpoint in the middle of a window, of a run that was not fed.
    """
    config = replace(
        short_run, train_data_dir=None, placeholder_token=None, concepts=str(cases), recursive=True,
        gradient_accumulation_steps=2, train_batch_size=1, max_train_steps=8, checkpointing_steps=4,
        unmasked_weight=0.2, resolution=16, aspect_ratio_buckets=True, bucket_step=8, max_aspect_ratio=3.0,
    )  # fmt: skip
    whole = train(config)
    assert "stay in the host's memory" not in capsys.readouterr().err
    monkeypatch.setattr(loop, "feeds", lambda datasets, mesh, free: True)
    from_there = str(whole.output_dir / "checkpoints" / "4")
    result = train(replace(config, resume_from_checkpoint=from_there, output_dir=str(tmp_path / "fed")))
    told = capsys.readouterr().err
    assert told.count("GB of moments stay in the host's memory; it sends those of the next updates to the devices") == 1
    assert np.array_equal(result.losses, whole.losses[4:]) and len(result.losses) == 4
    assert np.array_equal(rows(result), rows(whole))
