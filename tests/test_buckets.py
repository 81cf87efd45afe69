"""Aspect-ratio buckets: their shapes, what a picture loses in one, what SDXL is told, and the order of updates."""

import numpy as np
import pytest
from PIL import Image

from ti_jax.data import folder as folders
from ti_jax.data.buckets import BucketOrder, bucket_shapes, nearest_shape
from ti_jax.data.cropping import crop_box, cropped_to
from ti_jax.data.dataset import time_ids
from ti_jax.data.folder import load_images
from ti_jax.data.masks import MaskReader
from ti_jax.errors import InputError

# -- shapes


def test_the_buckets_of_sdxl_are_those_that_it_was_trained_with():
    """Those of its paper's table (arXiv 2307.01952, appendix I) with about 1024 squared pixels and a ratio up to 2."""
    upright = [shape for shape in bucket_shapes(1024, 64, 2.0) if shape[0] > shape[1]]
    assert upright == [(1088, 960), (1152, 896), (1216, 832), (1280, 768), (1344, 768), (1408, 704)]


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (768, 64), (64, 8), (64, 16), (520, 40), (1024, 8)])
def test_buckets_are_similar_in_area_and_never_larger_than_the_square(resolution, step):
    shapes = bucket_shapes(resolution, step, 2.0)
    square = resolution // step * step
    assert shapes[0] == (square, square) and len(set(shapes)) == len(shapes) > 1
    for height, width in shapes:
        assert height % step == width % step == 0
        assert 0.75 * resolution**2 < height * width <= resolution**2
        assert max(height, width) <= 2 * min(height, width) and (width, height) in shapes


@pytest.mark.parametrize(("resolution", "step", "ratio"), [(64, 64, 2.0), (512, 64, 1.2), (32, 64, 2.0), (512, 8, 1.0)])
def test_buckets_that_leave_only_the_square_are_refused(resolution, step, ratio):
    with pytest.raises(InputError, match="no bucket but the square has sides that are multiples of --bucket_step"):
        bucket_shapes(resolution, step, ratio)


def test_a_picture_goes_to_the_nearest_shape():
    shapes = bucket_shapes(64, 8, 2.0)
    assert shapes == ((64, 64), (72, 56), (56, 72), (80, 48), (48, 80))
    for size, shape in {
        (4000, 3000): (56, 72), (3000, 4000): (72, 56), (1920, 1080): (48, 80), (1000, 1000): (64, 64),
        (9000, 100): (48, 80), (100, 9000): (80, 48), (66, 64): (64, 64),
    }.items():  # fmt: skip
        assert nearest_shape(*size, shapes) == shape


# -- pixels


def gradient(width, height):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / (width - 1), 255 * y / (height - 1), 40 + x * 0], -1).astype(np.uint8)


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (48, 48), (12, 18), (60, 37), (37, 60), (500, 9)])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_a_shape_is_covered_and_the_overhang_cut_on_both_sides_alike(size, shape):
    """As in a square: what is scaled keeps its aspect ratio to within the pixel that a crop is rounded to."""
    image = Image.fromarray(gradient(*size))
    left, top, right, bottom = crop_box(size, shape)
    assert (left, top) == ((size[0] - right + left) // 2, (size[1] - bottom + top) // 2)
    assert right - left == size[0] or bottom - top == size[1], "the largest part"
    assert abs((right - left) * shape[0] - (bottom - top) * shape[1]) <= max(shape) / 2
    cropped, offset = cropped_to(image, shape, center_crop=True)
    assert cropped.size == shape[::-1]
    np.testing.assert_array_equal(
        cropped, image.crop((left, top, right, bottom)).resize(shape[::-1], Image.Resampling.BICUBIC)
    )
    scale = shape[1] / (right - left), shape[0] / (bottom - top)
    assert offset == (round(top * scale[1]), round(left * scale[0]))


@pytest.fixture
def folder(tmp_path):
    """Two pictures of 40 x 24, one of 24 x 40, a small square, one that is much longer than wide."""
    sizes = {"a.png": (80, 48), "b.png": (24, 40), "c.png": (16, 16), "d.png": (120, 72), "e.png": (300, 40)}
    for name, size in sizes.items():
        Image.fromarray(gradient(*size)).save(tmp_path / name)
    return tmp_path


SHAPES = bucket_shapes(32, 8, 2.0)


def test_pictures_come_in_buckets_and_as_squares(folder):
    lines = []
    pictures = load_images(folder, 32, shapes=SHAPES, on_skip=lines.append)
    assert pictures.pixels.shape == (5, 32, 32, 3)
    found = {bucket.pictures.pixels.shape[1:3]: bucket.indices.tolist() for bucket in pictures.buckets}
    assert found == {(32, 32): [2], (24, 40): [0, 3, 4], (40, 24): [1]}
    for bucket in pictures.buckets:
        assert bucket.pictures.names == tuple(pictures.names[index] for index in bucket.indices)
        np.testing.assert_array_equal(bucket.pictures.original_sizes, pictures.original_sizes[bucket.indices])
    exact = pictures.buckets[1].pictures
    np.testing.assert_array_equal(exact.pixels[0], (gradient(24, 40) / 127.5 - 1.0).astype(np.float32))
    assert lines == [
        "pictures in buckets: 1 of 32 x 32, 1 of 24 x 40, 3 of 40 x 24 pixels",
        "warning: 1 picture is smaller than the bucket and enlarged, and the word learns the blur: c.png 2.0 times; "
        "give larger pictures, or a smaller --resolution",
        "warning: of 1 picture less than half is used: e.png; crop to the part that matters, or give a larger "
        "--max_aspect_ratio",
    ]


def test_a_picture_is_cropped_once_and_its_square_only_if_it_is_asked_for(folder, monkeypatch):
    cropped = []

    def watched(image, shape, *rest):
        cropped.append(shape)
        return cropped_to(image, shape, *rest)

    squares = load_images(folder, 32, on_skip=str).pixels
    monkeypatch.setattr(folders, "cropped_to", watched)
    pictures = load_images(folder, 32, shapes=SHAPES, on_skip=str)
    assert sorted(cropped) == [(24, 40)] * 3 + [(32, 32), (40, 24)]
    np.testing.assert_array_equal(pictures.pixels[1:3], squares[1:3])
    assert cropped[5:] == [(32, 32)] * 2


def test_masks_are_cropped_to_the_bucket(tmp_path):
    """The first picture is masked where its square would have nothing; the second has no mask."""
    for name in ("a.png", "b.png"):
        Image.fromarray(gradient(80, 48)).save(tmp_path / name)
    Image.fromarray(np.pad(np.full((48, 10), 255, np.uint8), ((0, 0), (0, 70)))).save(tmp_path / "a.mask.png")
    with pytest.raises(
        InputError, match="nothing is white in the part of its mask that is left after cropping to 32 x"
    ):
        load_images(tmp_path, 32, masks=MaskReader(), on_skip=str)
    lines = []
    pictures = load_images(tmp_path, 32, shapes=SHAPES, masks=MaskReader(), on_skip=lines.append)
    assert "masks: used for 1 of 2 pictures; the others are learned from as a whole" in lines
    (bucket,) = pictures.buckets
    masks = bucket.pictures.masks
    np.testing.assert_array_equal(masks[0], np.pad(np.full((24, 5), 255), ((0, 0), (0, 35))))
    assert masks[1].shape == (24, 40) and masks[1].min() == 255
    weights = masks.weights(8, 0.0)
    np.testing.assert_allclose(weights[0], [[5.0, 0, 0, 0, 0]] * 3)
    np.testing.assert_array_equal(weights[1], np.ones((3, 5)))


def test_sdxl_is_told_the_true_size_the_crop_and_the_bucket(tmp_path):
    """A picture of 90 x 41 in 40 x 24: 68 columns are left of it, 11 are cut on each side; scaled by 40 / 68."""
    Image.fromarray(gradient(90, 41)).save(tmp_path / "a.png")
    Image.fromarray(gradient(91, 41)).save(tmp_path / "b.png")  # one more on the right; mirrored, on the left
    (bucket,) = load_images(tmp_path, 32, shapes=SHAPES).buckets
    told = time_ids(bucket.pictures)
    assert told[0].tolist() == [[41, 90, 0, 6, 24, 40]] * 2
    assert told[1].tolist() == [[41, 91, 0, 6, 24, 40], [41, 91, 0, 7, 24, 40]]


# -- the order


def turns(order, count):
    return np.array([order.turn(step) for step in range(count)])


def test_buckets_take_turns_in_proportion_to_their_pictures():
    entries = [7, 2, 1]
    buckets, numbers = turns(BucketOrder(3, entries), 3000).T
    counts = np.cumsum(buckets[:, None] == np.arange(3), axis=0)
    expected = np.arange(1, 3001)[:, None] * np.array(entries) / 10
    assert np.abs(counts - expected).max() < 3, "at any time every picture was seen equally often"
    for bucket in range(3):
        assert numbers[buckets == bucket].tolist() == list(range(counts[-1, bucket]))
    assert len({tuple(each) for each in buckets.reshape(-1, 10)}) > 100, "in an order that changes"


def test_the_order_depends_on_the_seed_and_the_update_alone():
    whole = turns(BucketOrder(5, [3, 4, 5]), 5000)
    later = BucketOrder(5, [3, 4, 5])
    assert [later.turn(step) for step in (4999, 17, 2048)] == [tuple(whole[step]) for step in (4999, 17, 2048)]
    assert not np.array_equal(turns(BucketOrder(6, [3, 4, 5]), 100), whole[:100])


def test_updates_in_a_row_with_one_bucket():
    order = BucketOrder(0, [1, 9])
    buckets = turns(order, 500)[:, 0]
    for step in range(400):
        *_, length = order.next(step, most=6)
        assert 1 <= length <= 6 and (buckets[step : step + length] == buckets[step]).all()
        assert length == 6 or buckets[step + length] != buckets[step]
    assert BucketOrder(0, [4]).next(3, most=50) == (0, 3, 50)
