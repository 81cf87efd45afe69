"""The embedded model is a Stable Diffusion for diffusers, too: same text, same noise, and the same pictures."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ti_jax.evaluation.avatar_judge import Judge
from ti_jax.pipeline import StableDiffusion
from ti_jax.pipeline.sampling import image_keys, image_noise, image_seeds

pytestmark = [
    pytest.mark.heavy,
    # PyTorch's own, inside the reference.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

LIMIT = 40 * 10**6  # bytes of all weights in half precision
STEPS, GUIDANCE = 10, 3.0


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion.from_pretrained()


@pytest.fixture(scope="module")
def pipe(sd):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd.path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def prompts(sd):
    """The judge's probes with a description in the place of the word."""
    judge = Judge.load(sd.path)
    person = "a person with long red hair and brown skin"
    return judge, [(probe, probe.prompt.replace("{}", person)) for probe in judge.config.probes]


def close(ours, theirs, tolerance):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(np.asarray(ours) / scale, theirs / scale, atol=tolerance)


def test_size(sd):
    assert sum(path.stat().st_size for path in sd.path.rglob("*.safetensors")) <= LIMIT


def test_text_context_and_noise_prediction(sd, pipe, prompts):
    texts = [text for _, text in prompts[1]]
    with torch.no_grad():
        context, _ = pipe.encode_prompt(texts, "cpu", 1, do_classifier_free_guidance=False)
        condition = sd.encode_text(sd.tokenize(texts))
        close(condition.context, context.numpy(), 1e-5)
        latents = torch.randn(len(texts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
        timesteps = torch.linspace(10, 990, len(texts)).long()
        theirs = pipe.unet(latents, timesteps, context).sample.numpy().transpose(0, 2, 3, 1)
    ours = sd.predict_noise(latents.numpy().transpose(0, 2, 3, 1), jnp.asarray(timesteps.numpy()), condition)
    close(ours, theirs, 1e-4)


PORTRAITS = [
    f"a portrait of a person with {hair} hair on a {ground} background"
    for hair, ground in [("red", "blue"), ("black", "yellow")]
]


@pytest.fixture(scope="module")
def drawn(sd, pipe, prompts):
    """Pictures of the portraits and of the probes, uint8 [N, 64, 64, 3]: ours and diffusers'."""
    texts = [*PORTRAITS, *(text for _, text in prompts[1])]
    noise = image_noise(image_keys(jnp.asarray(image_seeds(0, len(texts)))), 0, sd.latent_shape(64, 64))
    theirs = pipe(
        texts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np",
        latents=torch.tensor(np.asarray(noise).transpose(0, 3, 1, 2)),
    ).images  # fmt: skip
    theirs = (theirs * 255).round().astype(np.uint8)
    ours = np.stack(
        [np.asarray(image) for image in sd.generate(texts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=0)]
    )
    return ours, theirs


def test_pictures(drawn):
    ours, theirs = drawn
    assert np.abs(ours.astype(int) - theirs).max() <= 2


def test_pictures_are_what_was_asked_for(drawn, prompts):
    judge, asked = prompts
    expected = [{"hair_colour": "red", "skin": "brown", **dict(probe.expects)} for probe, _ in asked]
    for pictures in drawn:
        both = zip(judge.read(pictures[len(PORTRAITS) :]), expected, strict=True)
        assert np.mean([seen[name] == word for seen, wanted in both for name, word in wanted.items()]) > 0.9


def test_hair_and_backgrounds_have_the_colours_that_they_are_asked_to_have(drawn):
    blue, yellow = drawn[0][: len(PORTRAITS)].astype(int)
    corners = np.s_[:12, [*range(8), *range(-8, 0)]]
    red, green, azure = blue[corners].mean((0, 1))
    assert azure > green + 50 > red + 50
    red, green, azure = yellow[corners].mean((0, 1))
    assert min(red, green) > azure + 100
    hair = np.s_[14:20, 28:36]
    assert blue[hair].mean((0, 1))[0] > 150 > 120 > yellow[hair].mean()
