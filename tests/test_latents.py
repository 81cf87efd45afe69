import numpy as np
import pytest

from ti_jax.data.latents import ENCODE_BATCH, encode_batch, encode_moments
from ti_jax.pipeline import StableDiffusion


class Encoder:
    """In the place of a model: four moments of each patch of 8 x 8 pixels, and the sizes of the batches asked for."""

    def __init__(self):
        self.batches = []

    def encode_image(self, pixels):
        self.batches.append(len(pixels))
        count, height, width, _ = pixels.shape
        patches = np.asarray(pixels).reshape(count, height // 8, 8, width // 8, 8, 3)
        mean = patches.mean(axis=(2, 4))
        return np.concatenate([mean, patches[:, :, 0, :, 0, :1]], axis=-1)


@pytest.mark.parametrize(
    ("resolution", "count", "batches"), [(64, 3, [4, 4]), (512, 1, [2]), (520, 3, [1] * 6), (1024, 1, [1, 1])]
)
def test_large_pictures_are_encoded_one_at_a_time(resolution, count, batches):
    """SDXL's: four at 1024 pixels would need seven times the memory of one."""
    pixels = np.random.default_rng(0).uniform(-1, 1, (count, resolution, resolution, 3)).astype(np.float32)
    encoder = Encoder()
    moments = np.asarray(encode_moments(encoder, [pixels], with_mirrored=True))
    assert encoder.batches == batches and encode_batch(resolution, 2 * count) == batches[0]
    assert moments.shape == (count, 2, resolution // 8, resolution // 8, 4)
    for index in range(count):
        for view, shown in enumerate((pixels[index], pixels[index, :, ::-1])):
            np.testing.assert_array_equal(moments[index, view], Encoder().encode_image(shown[None])[0])


def test_the_size_of_a_batch_changes_nothing_but_rounding():
    sd = StableDiffusion.from_pretrained()
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    moments = np.asarray(encode_moments(sd, [pixels], with_mirrored=True))
    assert encode_batch(32, 4) == ENCODE_BATCH
    alone = np.concatenate([np.asarray(sd.encode_image(picture[None])) for picture in pixels])
    assert moments.shape == (2, 2, 4, 4, 8)
    np.testing.assert_allclose(moments[:, 0], alone, rtol=0, atol=2e-5)
