"""Sets that memory cannot hold are read again when needed; moments on disk; further views of a picture."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ti_jax.data import folder as folders
from ti_jax.data.augment import JITTER, PLAIN, SMALLEST, VIEWS, variations
from ti_jax.data.folder import load_images
from ti_jax.data.latents import ENCODE_BATCH, encode_moments
from ti_jax.data.moments_cache import MomentsCache
from ti_jax.data.on_demand import OnDemand, digest_of_all, digests_of


@pytest.fixture
def mixed(tmp_path):
    """Seven pictures of other sizes than they are learned at."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(7):
        height, width = rng.integers(16, 40, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{index}.png")
    return folder


class Encoder:
    """In the place of a model: a picture's mean in patches of 8 x 8 pixels, and how many pictures came each time."""

    identity, dtype = "an encoder", np.float32
    networks = SimpleNamespace(platform=None)

    def __init__(self):
        self.seen = 0

    def encode_image(self, pixels):
        self.seen += len(pixels)
        count, height, width, _ = pixels.shape
        assert count <= ENCODE_BATCH
        return pixels.reshape(count, height // 8, 8, width // 8, 8, 3).mean(axis=(2, 4))


@pytest.mark.parametrize("augment", [None, 3])
@pytest.mark.parametrize("shapes", [(), ((24, 24), (16, 32), (32, 16))])
def test_a_large_set_is_the_same_to_the_bit(mixed, monkeypatch, augment, shapes):
    kept = load_images(mixed, 24, on_skip=lambda line: None, augment=augment, shapes=shapes)
    monkeypatch.setattr(folders, "IN_MEMORY", 0)
    large = load_images(mixed, 24, on_skip=lambda line: None, augment=augment, shapes=shapes)
    pairs = [(kept, large)] + [(a.pictures, b.pictures) for a, b in zip(kept.buckets, large.buckets, strict=True)]
    for ours, theirs in pairs:
        assert isinstance(theirs.pixels, OnDemand) and theirs.pixels.shape == ours.pixels.shape
        np.testing.assert_array_equal(np.asarray(theirs.pixels), ours.pixels)
        np.testing.assert_array_equal(theirs.pixels[:2], ours.pixels[:2])
        assert digests_of(theirs.pixels) == digests_of(ours.pixels)
        for name in ("names", "original_sizes", "crop_offsets", "crop_boxes", "views"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        moments = [encode_moments(Encoder(), [each.pixels], with_mirrored=True) for each in (ours, theirs)]
        np.testing.assert_array_equal(*moments)


def test_a_large_set_is_told_from_another(mixed, monkeypatch):
    monkeypatch.setattr(folders, "IN_MEMORY", 0)
    first = digest_of_all([load_images(mixed, 24).pixels])
    assert digest_of_all([load_images(mixed, 24).pixels]) == first
    with Image.open(mixed / "3.png") as image:
        changed = np.array(image)
    changed[8, 8] ^= 1
    Image.fromarray(changed).save(mixed / "3.png")
    assert digest_of_all([load_images(mixed, 24).pixels]) != first


def test_several_sets_are_encoded_as_one(mixed):
    pixels = load_images(mixed, 24).pixels
    whole = encode_moments(Encoder(), [pixels], with_mirrored=True)
    np.testing.assert_array_equal(encode_moments(Encoder(), [pixels[:3], pixels[3:]], with_mirrored=True), whole)


# -- moments on disk


@pytest.fixture
def cache(tmp_path):
    (tmp_path / "cache").mkdir()
    return MomentsCache(tmp_path / "cache")


def encoded(pixels, cache, with_mirrored=True, **changes):
    """Moments, and how many pictures and mirror images the encoder got."""
    encoder = Encoder()
    for name, value in changes.items():
        setattr(encoder, name, value)
    return encode_moments(encoder, [pixels], with_mirrored, cache), encoder.seen


def test_a_second_run_encodes_nothing(mixed, cache):
    pixels = load_images(mixed, 24).pixels
    first, seen = encoded(pixels, cache)
    again, seen_again = encoded(pixels, cache)
    assert (seen, seen_again) == (16, 0) and len(list(cache.folder.iterdir())) == 7
    np.testing.assert_array_equal(again, first)
    assert again.dtype == np.float32 and first.shape == (7, 2, 3, 3, 3)


def test_only_new_pictures_are_encoded(mixed, cache):
    pixels = load_images(mixed, 24).pixels
    encoded(pixels[1:6], cache)
    together, seen = encoded(pixels, cache)
    assert seen == 4
    np.testing.assert_array_equal(together, encoded(pixels, None)[0])


DETERMINISTIC = SimpleNamespace(platform=SimpleNamespace(compiler_options=(("an_option", True),)))


@pytest.mark.parametrize(
    "changes", [{"identity": "another"}, {"dtype": np.float16}, {"with_mirrored": False}, {"networks": DETERMINISTIC}]
)
def test_moments_of_another_model_are_not_taken(mixed, cache, changes):
    pixels = load_images(mixed, 24).pixels
    encoded(pixels, cache)
    assert encoded(pixels, cache, **changes)[1] > 0


def test_moments_of_another_shape_are_not_taken(cache):
    white = np.ones((1, 16, 64, 3), np.float32)
    encoded(white, cache)
    assert encoded(white.reshape(1, 64, 16, 3), cache)[1] > 0


@pytest.mark.parametrize(
    "spoil", [lambda content: content[:-9], lambda content: b"", lambda content: bytes(len(content))]
)
def test_damaged_moments_are_computed_again(mixed, cache, spoil):
    pixels = load_images(mixed, 24).pixels
    first, _ = encoded(pixels, cache)
    file = next(cache.folder.iterdir())
    file.write_bytes(spoil(file.read_bytes()))
    again, seen = encoded(pixels, cache)
    assert seen == 4
    np.testing.assert_array_equal(again, first)
    assert encoded(pixels, cache)[1] == 0


def test_without_a_place_for_them_moments_are_computed(mixed, tmp_path):
    pixels = load_images(mixed, 24).pixels
    assert encoded(pixels, MomentsCache(tmp_path / "gone"))[1] == 16
    assert not (tmp_path / "gone").exists()


# -- further views


def test_views_of_a_picture():
    first, again, other, another_seed = variations(0, "a"), variations(0, "a"), variations(0, "b"), variations(1, "a")
    assert first == again and first[0] == other[0] == PLAIN and len(first) == VIEWS
    assert len({*first[1:], *other[1:], *another_seed[1:]}) == 3 * (VIEWS - 1)
    for view in [*first, *other]:
        assert SMALLEST <= view.scale <= 1 and all(0 <= place <= 1 for place in (view.down, view.right))
        assert all(abs(factor - 1) <= JITTER for factor in (view.brightness, view.contrast, view.colour))
        left, top, right, bottom = view.box((10, 20, 110, 220))
        assert left >= 10 and top >= 20 and right <= 110 and bottom <= 220
        assert right - left == round(100 * view.scale) and bottom - top == round(200 * view.scale)


def test_the_plain_views_come_first(mixed):
    plain = load_images(mixed, 24)
    views = load_images(mixed, 24, augment=0)
    assert (plain.files, views.files, len(views.names)) == (7, 7, 7 * VIEWS)
    np.testing.assert_array_equal(views.pixels[:7], plain.pixels)
    assert views.names == plain.names * VIEWS
    changes = np.abs(views.pixels.reshape(VIEWS, 7, 24, 24, 3)[1:] - plain.pixels).mean(axis=(2, 3, 4))
    assert changes.min() > 0.005


def test_a_run_draws_all_views_and_its_epochs_are_as_long(tiny_sd, mixed, tmp_path):
    from test_step import Problem

    problem = Problem(tiny_sd, mixed, tmp_path, augment=True, num_train_epochs=2, repeats=3)
    dataset = problem.dataset
    assert dataset.moments.shape[0] == dataset.time_ids.shape[0] == len(dataset.entries) == 7 * VIEWS
    assert len({np.asarray(each).tobytes() for each in dataset.moments[:, 0]}) == 7 * VIEWS
    pictures = problem.concept.pictures
    assert len(problem.concept.entries) // pictures.views == 7
    plain = Problem(tiny_sd, mixed, tmp_path)
    np.testing.assert_array_equal(dataset.time_ids[:7], plain.dataset.time_ids)
