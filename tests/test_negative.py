"""A word for the negative prompt: its settings, where it stands in prompts, and what is drawn and told of it."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ti_jax
from ti_jax.config import ASSETS, TrainConfig, resolve
from ti_jax.data.dataset import make_dataset
from ti_jax.data.folder import as_uint8, load_images
from ti_jax.data.inputs import read_inputs
from ti_jax.embeddings import Embedding
from ti_jax.errors import InputError
from ti_jax.evaluation.avatar_judge import Judge
from ti_jax.evaluation.evaluate import Evaluator
from ti_jax.evaluation.scores import reference_attributes
from ti_jax.training.flops import batch_flops
from ti_jax.training.hub import model_card
from ti_jax.training.job import load_model_and_concepts
from ti_jax.training.step import StepInputs
from ti_jax.words import without_word

OTHER = {
    "pretrained_model_name_or_path": "some/model", "train_data_dir": "cat", "placeholder_token": "<bad>",
    "initializer_token": "hand",
}  # fmt: skip


def test_what_is_left_out_is_filled_in():
    config = resolve(TrainConfig(learn_negative=True))
    assert (config.negative_class, config.negative_guidance_scale) == ("a person", 0.5)
    assert resolve(config) == config
    config = resolve(TrainConfig(**OTHER, learn_negative=True, negative_guidance_scale=3.0))
    assert (config.negative_class, config.negative_guidance_scale) == ("hand", 3.0)
    config = resolve(TrainConfig())
    assert (config.negative_class, config.negative_guidance_scale) == (None, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"negative_class": "a hand"},
            "--negative_class a hand: only a word for the negative prompt has it; ",
        ),
        ({"negative_guidance_scale": 0.5}, "--negative_guidance_scale 0.5: only a word for the negative prompt has it"),
        (
            {"learn_negative": True, "keep_best": "identity"},
            "--keep_best identity: pictures with the word of ",
        ),
        (
            {"learn_negative": True, "validation_guidance_scale": 1.0},
            "--validation_guidance_scale 1: without ",
        ),
        (
            {"learn_negative": True, "validation_negative_prompt": "blurry"},
            "--validation_negative_prompt 'blurry': the new word <bad> is not in it; write it, or {} in its place",
        ),
        (
            {"learn_negative": True, "initializer_token": None, "initializer_embedding": "a.pt"},
            "--negative_class must be given with --pretrained_model_name_or_path",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(values, message):
    with pytest.raises(InputError) as error:
        resolve(TrainConfig(**{**OTHER, **values}))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a <x> here", "a hand here"), ("<x>", "hand"), ("a <X> and <x>", "a hand and hand"), ("a <xy>", "a <xy>"),
        ("a <x> <x>_1 b", "a hand b"), ("no word", "no word"), ("{} <x>", "{} hand"),
    ],
)  # fmt: skip
def test_another_text_stands_in_the_words_place(prompt, wanted):
    assert without_word(prompt, "<x>", 2, "hand") == wanted


@pytest.fixture
def config(short_run):
    return replace(
        short_run, learn_negative=True, negative_class="a person", num_vectors=2, validation_guidance_scale=3.0,
        max_train_steps=2, validation_steps=2, num_validation_images=1, validation_prompt=("a drawing of {}",),
        validation_negative_prompt="red, {}",
    )  # fmt: skip


def test_the_word_stands_alone_on_the_other_side_of_the_prompts(config):
    config = resolve(config)
    sd, (concept,) = load_model_and_concepts([config], [read_inputs(config, print)], print)
    dataset = make_dataset(config, sd, [concept])
    size = sd.vocab_sizes["text_encoder"]
    assert np.asarray(dataset.ids["text_encoder"]).max() < size
    word = np.asarray(dataset.negative.ids["text_encoder"])
    assert [number for number in word[0] if number >= size] == [size, size + 1] and len(word) == 1
    assert float(dataset.negative.guidance_scale) == 0.5
    # Twice forward, and one of the two backward.
    frozen = StepInputs(sd.params, sd.schedule, dataset, concept.row_mask, jax.random.key(0))
    both = batch_flops(sd.networks, frozen, concept.rows, 4)
    alone = batch_flops(sd.networks, frozen._replace(dataset=dataset._replace(negative=None)), concept.rows, 4)
    assert 1.3 * alone < both < 1.7 * alone


def test_pictures_of_the_run_have_the_word_in_their_negative_prompt(config):
    result = ti_jax.train(replace(config, overview_prompts=("a portrait of {}",)), devices=jax.devices()[:1])
    out, word = result.output_dir, result.embedding
    assert word.metadata["negative_class"] == "a person" and word.metadata["steps"] == "2"

    def told(name):
        with Image.open(out / "samples" / name) as image:
            return np.asarray(image), image.text["parameters"].splitlines()

    assert told("step-000002.png")[1][:2] == ["a drawing of a person", "Negative prompt: red, <new>"]
    assert told("overview-00.png")[1][:2] == ["a portrait of a person", "Negative prompt: red"]
    pixels, text = told("overview-04.png")
    assert text[:2] == ["a portrait of a person", "Negative prompt: red, <new>"]
    sd = ti_jax.StableDiffusion.from_pretrained(config.pretrained_model_name_or_path)
    (drawn,) = sd.generate(
        ["a portrait of a person"], [word], negative_prompt="red, <new>", num_inference_steps=2, guidance_scale=3.0,
        seed=0, height=16, width=16,
    )  # fmt: skip
    assert np.abs(np.asarray(drawn).astype(int) - pixels).max() <= 1
    assert (out / "progress.png").exists()


@pytest.fixture(scope="module")
def problem(tiny_sd, pictures, tmp_path_factory):
    from test_step import Problem

    changes = {"learn_negative": True, "negative_class": "a person", "negative_guidance_scale": 0.5}
    return Problem(tiny_sd, pictures, tmp_path_factory.mktemp("problem"), **changes)


def test_a_resumed_run_is_the_same_to_the_bit(problem):
    run_steps, frozen, start = problem.program(num_devices=1, batch_size=8)
    start = jax.device_get(start)

    def steps(state, count):
        state, losses = run_steps(frozen, jax.device_put(state), jnp.int32(count))
        return jax.device_get(state), losses

    whole, losses = steps(start, 8)
    middle, first = steps(start, 3)
    again, rest = steps(middle, 5)
    assert np.array_equal(np.concatenate([first[:3], rest[:5]]), losses[:8])
    for resumed, expected in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        assert np.array_equal(resumed, expected)
    assert not np.array_equal(whole.rows["text_encoder"], middle.rows["text_encoder"])


def test_eight_devices_end_with_the_rows_of_one(problem):
    from test_step import relative

    one, _ = problem.run(num_devices=1, batch_size=8, steps=10)
    eight, _ = problem.run(num_devices=8, batch_size=1, steps=10)
    assert relative(eight.rows["text_encoder"], one.rows["text_encoder"]) < 1e-6
    assert relative(one.rows["text_encoder"], problem.concept.rows["text_encoder"]) > 0.01, "nothing was learned"


@pytest.mark.parametrize("negative", [False, True])
def test_measuring_puts_the_word_where_it_belongs(negative):
    asked = []

    class Model:
        def generate(self, prompts, embeddings, **settings):
            asked.append((set(prompts), settings["negative_prompt"]))
            return [Image.new("RGB", (4, 4))] * len(prompts)

    class Measure:
        def image_features(self, images):
            return np.ones((len(images), 1), np.float32)

        def text_features(self, texts):
            return np.ones((len(texts), 1), np.float32)

    metadata = {"negative_class": "a hand"} if negative else {}
    word = Embedding("<bad>", {"text_encoder": np.ones((1, 8), np.float32)}, metadata)
    Evaluator(Measure(), np.zeros((2, 4, 4, 3), np.uint8), images=1).scores(Model(), word)
    subject = "a hand" if negative else "<bad>"
    assert all(subject in prompt for prompts, _ in asked for prompt in prompts)
    assert {given for _, given in asked} == {"<bad>" if negative else None}


def test_the_model_card_says_how_to_use_it(tmp_path):
    metadata = {"negative_class": "a hand", "base_model": "a/b", "steps": "3", "initializer_token": "hand"}
    word = Embedding("<bad>", {"text_encoder": np.ones((1, 768), np.float32)}, metadata)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "overview-04.png").touch()
    config = TrainConfig(**OTHER, overview_prompts=("a photo of {}",))
    card = model_card(config, word, "me/bad", tmp_path)
    assert 'pipe("a photo of a hand", negative_prompt="<bad>")' in card and "A word for negative prompts for" in card
    assert '- text: "a photo of a hand"\n  parameters:\n    negative_prompt: "<bad>"\n  output:' in card


def test_it_is_learned_alone(tmp_path):
    for name in ("ana", "ben"):
        shutil.copytree(ASSETS / "concepts" / name, tmp_path / name)
    with pytest.raises(InputError, match=r"^--concepts .* and --learn_negative: a word for the negative prompt is lea"):
        resolve(TrainConfig(concepts=str(tmp_path), learn_negative=True))


@pytest.mark.slow
def test_with_the_word_in_the_negative_prompt_the_judge_sees_somebody_else(tmp_path):
    """On the embedded model; benchmarks/negative.py measures it on more people."""
    person = ASSETS / "concepts" / "cleo"
    config = TrainConfig(
        train_data_dir=str(person), placeholder_token="<no>", learn_negative=True,
        overview_prompts=("a portrait of {}",), report_to="none", output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    word = ti_jax.train(config, devices=jax.devices()[:1]).embedding
    sd = ti_jax.StableDiffusion.from_pretrained()
    judge = Judge.load(sd.path)
    own = as_uint8(load_images(person, sd.default_resolution).pixels)
    reference = reference_attributes(judge, own)

    def seen(**settings):
        drawn = sd.generate(["a portrait of a person"] * 16, num_inference_steps=25, guidance_scale=3.0, **settings)
        pixels = np.stack([np.asarray(image) for image in drawn])
        readings = judge.read(pixels)
        right = [reading[name] == value for reading in readings for name, value in reference.items()]
        return np.mean(right), np.mean(judge.features(pixels) @ judge.features(own).T)

    identity, likeness = seen()
    identity_away, likeness_away = seen(embeddings=[word], negative_prompt="<no>")
    assert identity_away < identity - 0.05 and likeness_away < likeness - 0.02
