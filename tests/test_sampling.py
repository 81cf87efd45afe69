"""Drawing, held to diffusers' StableDiffusionPipeline on the same weights and starting noise."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ti_jax.diffusion.samplers import make_sampler
from ti_jax.embeddings import Embedding
from ti_jax.errors import InputError
from ti_jax.models.networks import Networks
from ti_jax.pipeline import StableDiffusion, sampling
from ti_jax.pipeline.sampling import image_keys, image_noise, image_seeds, sample_latents

# PyTorch's own, inside the reference.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

PROMPTS = ["a portrait of a person with red hair", "a drawing of a person on a blue background"]
NEGATIVE = "glasses"
SHAPE = (8, 8, 4)
STEPS = 4
# The same for as many tests as can be, so that they share a program.
OPTIONS = {"num_inference_steps": STEPS, "guidance_scale": 5.0}
REFERENCE = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
}


@pytest.fixture(scope="module")
def sd(tiny_sd):
    return StableDiffusion.from_pretrained(tiny_sd)


def reference(folder, name):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = REFERENCE[name].from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def starting_noise(seed, count):
    """Ours for these pictures, as the reference wants it: [B, c, h, w]."""
    noise = image_noise(image_keys(jnp.asarray(image_seeds(seed, count))), 0, SHAPE)
    return torch.tensor(np.asarray(noise).transpose(0, 3, 1, 2))


def our_latents(sd, prompts, negatives, name, guidance_scale, seed):
    sampler = make_sampler(name, sd.scheduler_config, STEPS)
    condition = sd.encode_text(sd.tokenize([*negatives, *prompts]))

    @jax.jit
    def run(params, sampler, condition):
        keys = image_keys(jnp.asarray(image_seeds(seed, len(prompts))))
        return sample_latents(sd.networks, params, sampler, condition, keys, guidance_scale, SHAPE)

    return run(sd.params, sampler, condition)


def differ(ours, theirs):
    """The largest difference in levels of 255."""
    return np.abs(np.asarray(ours, np.int16) - np.asarray(theirs, np.int16)).max()


@pytest.mark.parametrize(
    ("prediction_type", "name", "guidance_scale"),
    [
        ("epsilon", "ddim", 5.0),
        ("epsilon", "ddim", 1.0),
        ("epsilon", "euler", 5.0),
        ("epsilon", "dpm++", 5.0),
        ("v_prediction", "ddim", 5.0),
    ],
)
def test_equal_to_stable_diffusion_pipeline(make_tiny_sd, prediction_type, name, guidance_scale):
    folder = make_tiny_sd(prediction_type)
    sd, pipe = StableDiffusion.from_pretrained(folder), reference(folder, name)
    options = dict(
        prompt=PROMPTS, negative_prompt=[NEGATIVE] * 2, num_inference_steps=STEPS, guidance_scale=guidance_scale,
        height=16, width=16, latents=starting_noise(3, 2),
    )  # fmt: skip
    their_latents = pipe(**options, output_type="latent").images.numpy().transpose(0, 2, 3, 1)
    their_pixels = pipe(**options, output_type="np").images
    latents = our_latents(sd, PROMPTS, [NEGATIVE] * 2 if guidance_scale > 1 else [], name, guidance_scale, seed=3)
    pixels = np.clip(np.asarray(sd.decode_latents(latents)) / 2 + 0.5, 0, 1)
    # Both compute in float32 and sum in another order; guidance multiplies the difference, and each step carries it on.
    scale = np.abs(their_latents).max()
    np.testing.assert_allclose(np.asarray(latents), their_latents, rtol=1e-4, atol=1e-4 * scale)
    np.testing.assert_allclose(pixels, their_pixels, atol=1e-4)
    assert their_pixels.std() > 0.05  # there is something in them


def test_generate_is_equal_to_stable_diffusion_pipeline_to_the_level(tiny_sd, sd):
    options = dict(negative_prompt=[NEGATIVE] * 2, **OPTIONS, height=16, width=16)
    theirs = reference(tiny_sd, "ddim")(PROMPTS, latents=starting_noise(3, 2), output_type="pil", **options).images
    ours = sd.generate(PROMPTS, seed=3, **options)
    # A level rounds the other way where the fifth digit decides.
    assert differ(np.stack(ours), np.stack(theirs)) <= 1
    assert (np.stack(ours) != np.stack(theirs)).mean() < 0.01


def test_equal_with_a_learned_word(tiny_sd, sd):
    vectors = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    pipe = reference(tiny_sd, "ddim")
    pipe.load_textual_inversion({"<cleo>": torch.tensor(vectors)})
    prompt = "a portrait of <cleo> wearing a red jacket"
    options = OPTIONS | {"height": 16, "width": 16}
    theirs = pipe(prompt, latents=starting_noise(0, 1), output_type="np", **options).images
    word = Embedding("<cleo>", {"text_encoder": vectors}, {})
    ours = sd.generate([prompt], [word], **options)
    assert differ(np.stack(ours), (theirs * 255).round()) <= 1
    other = sd.generate([prompt], [Embedding("<cleo>", {"text_encoder": -vectors}, {})], **options)
    assert differ(ours, other) > 20


def test_equal_to_stable_diffusion_xl_pipeline(tiny_sdxl):
    """Two encoders, pooled text, sizes, and guidance from zeros where no negative prompt is given."""

    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    options = OPTIONS | {"height": 16, "width": 16}
    theirs = pipe(PROMPTS, latents=starting_noise(0, 2), output_type="pil", **options).images
    ours = StableDiffusion.from_pretrained(tiny_sdxl).generate(PROMPTS, **options)
    assert differ(np.stack(ours), np.stack(theirs)) <= 1 and np.std(theirs) > 15
    assert (np.stack(ours) != np.stack(theirs)).mean() < 0.01


# -- seeds and batches


def test_a_picture_depends_on_its_own_seed_alone(sd):
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    options = OPTIONS | {"scheduler": "euler_a"}
    in_twos = sd.generate(prompts, seed=10, batch_size=2, **options)
    alone = [sd.generate([prompt], seed=10 + i, **options)[0] for i, prompt in enumerate(prompts)]
    assert len(in_twos) == 3
    # Sums over a batch of another size may round another way.
    assert differ(in_twos, alone) <= 1
    assert min(differ(in_twos[i], in_twos[j]) for i in range(3) for j in range(i)) > 20
    other_order = sd.generate(prompts[::-1], seed=[12, 11, 10], batch_size=2, **options)
    assert differ(in_twos, other_order[::-1]) <= 1


def test_ancestral_noise_is_new_at_each_step_and_from_the_seed():
    keys = image_keys(jnp.asarray([5, 6, 5], jnp.uint32))
    noise = np.stack([np.asarray(image_noise(keys, step, SHAPE)) for step in range(3)])
    np.testing.assert_array_equal(noise[:, 0], noise[:, 2])
    independent = noise[:, :2].reshape(6, -1)
    correlation = np.corrcoef(independent) - np.eye(6)
    assert np.abs(correlation).max() < 0.25  # 256 numbers each: 4 standard deviations
    assert abs(independent.mean()) < 0.1 and abs(independent.std() - 1) < 0.1


def test_seeds():
    assert image_seeds(7, 3).tolist() == [7, 8, 9]
    assert image_seeds(2**32 - 1, 3).tolist() == [2**32 - 1, 0, 1]
    assert image_seeds([4, 0, 4], 3).tolist() == [4, 0, 4]
    assert image_seeds(np.int64(2), 1).dtype == np.uint32
    for seed, message in [(-1, "not -1"), (2**32, "not 4294967296"), ([1, -2], "not -2"), ([1, 2, 3], "3 seeds for 2")]:
        with pytest.raises(InputError, match=message):
            image_seeds(seed, 2)


def test_each_prompt_may_have_its_own_negative_prompt(sd):
    options = OPTIONS
    both = sd.generate(PROMPTS[:1] * 2, negative_prompt=[NEGATIVE, "beard"], seed=[1, 1], **options)
    same = sd.generate(PROMPTS[:1] * 2, negative_prompt=NEGATIVE, seed=[1, 1], **options)
    assert differ(both[0], same[0]) <= 1 and differ(same[0], same[1]) <= 1
    assert differ(both[1], same[1]) > 5
    with pytest.raises(InputError, match="3 negative prompts for 2 prompts"):
        sd.generate(PROMPTS, negative_prompt=["a", "b", "c"], **options)


# -- what is computed, and how often it is compiled


@dataclasses.dataclass(frozen=True)
class Watched(Networks):
    """Networks that note the batches which they are traced with."""

    batches: list = dataclasses.field(default_factory=list, hash=False, compare=False)

    def predict_noise(self, params, latents, timesteps, condition):
        self.batches.append((latents.shape[0], timesteps.shape[0], condition.context.shape[0]))
        return super().predict_noise(params, latents, timesteps, condition)


@pytest.mark.parametrize(("guided", "rows"), [(True, 6), (False, 3)])
def test_guidance_is_one_batch_and_none_is_half_of_it(sd, guided, rows):
    networks = Watched(sd.networks.text_encoders, sd.networks.unet, sd.networks.vae)
    ids = sd.tokenize(PROMPTS[:1] * 3)
    pixels, _ = jax.eval_shape(
        lambda params: sampling._draw_batch.__wrapped__(
            networks, params, make_sampler("ddim", sd.scheduler_config, 2), ids, ids if guided else None, None,
            jnp.zeros(3, jnp.uint32), 3.0, latent_shape=SHAPE, guided=guided,
        ),
        sd.params,
    )  # fmt: skip
    assert pixels.shape == (3, 16, 16, 3) and pixels.dtype == jnp.uint8
    assert set(networks.batches) == {(rows, rows, rows)}


def test_without_negative_ids_the_unconditional_half_is_zeros(sd):
    ids, empty = sd.tokenize(PROMPTS), sd.tokenize([""] * 2)
    encode = jax.jit(sampling._encode, static_argnums=(0, 5))
    halves = jnp.split(encode(sd.networks, sd.params, ids, None, None, True).context, 2)
    assert not halves[0].any()
    np.testing.assert_allclose(halves[1], sd.encode_text(ids).context, rtol=1e-5, atol=1e-5)
    halves = jnp.split(encode(sd.networks, sd.params, ids, empty, None, True).context, 2)
    np.testing.assert_allclose(halves[0], sd.encode_text(empty).context, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(halves[1], sd.encode_text(ids).context, rtol=1e-5, atol=1e-5)


def test_one_program_for_everything_but_shapes_and_samplers(sd):
    sampling._draw_batch.clear_cache()

    def compiled(**changes):
        before = sampling._draw_batch._cache_size()
        options = dict(seed=0, guidance_scale=3.0, num_inference_steps=2, scheduler="ddim", batch_size=1) | changes
        count, value = options.pop("count", 1), options.pop("value", 0.0)
        word = Embedding("<new>", {"text_encoder": np.full((3, 32), value, np.float32)}, {})
        prompt = options.pop("prompt", "a <new>")
        assert len(sd.generate([prompt] * count, [word], **options)) == count
        return sampling._draw_batch._cache_size() - before

    compiled()
    for same in [
        {"seed": 5}, {"guidance_scale": 9.0}, {"count": 3}, {"value": 1.0}, {"prompt": "a drawing"},
        {"negative_prompt": "beard"},
    ]:  # fmt: skip
        assert compiled(**same) == 0, same
    for other in [{"num_inference_steps": 3}, {"scheduler": "euler"}, {"guidance_scale": 1.0}]:
        assert compiled(**other) == 1, other
        assert compiled(**other) == 0, other


def test_weights_are_arguments_of_the_program(sd):
    ids = {name: jnp.asarray(value) for name, value in sd.tokenize(PROMPTS).items()}
    sampler = make_sampler("euler_a", sd.scheduler_config, 2)
    traced = sampling._draw_batch.trace(
        sd.networks, sd.params, sampler, ids, ids, None, jnp.zeros(2, jnp.uint32), jnp.float32(3),
        latent_shape=SHAPE, guided=True,
    )  # fmt: skip
    assert max((np.size(constant) for constant in traced.jaxpr.consts), default=0) < 100
    weights = sum(leaf.size for leaf in jax.tree.leaves(sd.params))
    assert len(traced.lower().as_text()) < weights  # a constant would be written out, some digits for each number


# -- precision and faults


def test_bfloat16_draws_the_same_picture_with_a_float32_state(tiny_sd, sd):
    low = StableDiffusion.from_pretrained(tiny_sd, dtype=jnp.bfloat16)
    options = OPTIONS | {"seed": 1}
    ours, exact = (np.stack(model.generate(PROMPTS, **options)).astype(np.float32) for model in (low, sd))
    assert np.abs(ours - exact).mean() < 4.0 < exact.std()
    condition = jax.eval_shape(lambda: low.encode_text(low.tokenize(PROMPTS)))
    latents = jax.eval_shape(
        lambda params, condition: sample_latents(
            low.networks, params, make_sampler("euler_a", low.scheduler_config, 2), condition,
            image_keys(jnp.zeros(2, jnp.uint32)), 1.0, SHAPE,
        ),
        low.params, condition,
    )  # fmt: skip
    assert condition.context.dtype == jnp.bfloat16 and latents.dtype == jnp.float32


def test_a_picture_of_nan_is_not_handed_out_as_black(sd):
    (red,) = sd.tokenizers["text_encoder"]("red", add_special_tokens=False).input_ids
    params = jax.tree.map(lambda leaf: leaf, sd.params)
    table = params["text_encoder"]["embeddings"]["token_embedding"]
    table["embedding"] = table["embedding"].at[red].set(jnp.nan)
    spoilt = dataclasses.replace(sd, params=params)
    with pytest.raises(InputError, match="picture 3 of 4 came out as NaN"):
        spoilt.generate(["a person", "a green person", "a red person", "a person"], batch_size=2, **OPTIONS)


def test_bad_settings_are_named(sd):
    for options, message in [
        ({"seed": -1}, "a seed must be from 0"),
        ({"scheduler": "heun"}, "scheduler 'heun' is not known"),
        ({"num_inference_steps": 0}, "from 1 to 1000, not 0"),
        ({"height": 17}, "multiple of 2 pixels, not 17"),
        ({"batch_size": -1}, "the batch size must be 1 or more, not -1"),
    ]:
        with pytest.raises(InputError, match=message):
            sd.generate(PROMPTS, **{"num_inference_steps": 2, **options})
