"""The prompts of each picture: captions in templates, their variants, and those that are too long."""

from dataclasses import replace

import numpy as np
import pytest
from transformers import CLIPTokenizer

from ti_jax.config import ASSETS, TrainConfig
from ti_jax.data.prompts import VARIANTS, picture_prompts, with_placeholder
from ti_jax.text import tokens
from ti_jax.text.templates import CAPTION_TEMPLATES, OBJECT_TEMPLATES, STYLE_TEMPLATES, for_captions, load_templates

PLAIN, CAPTIONED = ["a {}", "one {}"], ["a photo of {}, {caption}"]
CONFIG = TrainConfig()


def anything(prompt):
    return True


def prompts_of(captions, fits=anything, plain=PLAIN, captioned=CAPTIONED, **changes):
    """Each picture's prompts, all of its variants; and those that are cut."""
    made = picture_prompts(captions, plain, captioned, replace(CONFIG, **changes), fits)
    assert len(set(made.templates)) == len(made.templates)
    assert set(made.prompts_of.ravel()) - {-1} == set(range(len(made.templates)))
    rows = [row[row >= 0] for row in made.prompts_of]
    assert all((row[len(own) :] == -1).all() for row, own in zip(made.prompts_of, rows, strict=True))
    return [[made.templates[index] for index in row] for row in rows], made.cut


# -- templates


def test_templates_for_captions(tmp_path):
    assert for_captions(load_templates("object"), "object") == (list(OBJECT_TEMPLATES), ["a photo of {}, {caption}"])
    assert for_captions(load_templates("style"), "style") == (list(STYLE_TEMPLATES), ["{caption}, in the style of {}"])
    path = tmp_path / "style_filewords.txt"  # as AUTOMATIC1111 has them
    path.write_text("a painting of [filewords], art by [name]\n{} with {caption}\n")
    templates = load_templates("style", path)
    assert templates == ["a painting of {caption}, art by {}", "{} with {caption}"]
    assert for_captions(templates, "style") == (list(STYLE_TEMPLATES), templates)
    path.write_text("a [name]\n")
    assert for_captions(load_templates("object", path), "object") == (["a {}"], [CAPTION_TEMPLATES["object"]])


# -- captions


def test_without_captions_every_picture_has_every_template():
    made = picture_prompts(
        [None] * 3, ["a {}", "a {}", "{}"], CAPTIONED, replace(CONFIG, caption_dropout=0.5), anything
    )
    assert made.templates == ["a {}", "a {}", "{}"] and made.prompts_of.tolist() == [[0, 1, 2]] * 3


def test_a_caption_with_the_word_is_the_prompt_and_another_is_put_into_a_template():
    two = ["a photo of {}, {caption}", "{caption} by {}"]
    found, cut = prompts_of(["red hair", "my {} at sea", None], plain=["a {}", "one {}", "the {}"], captioned=two)
    assert cut == []
    assert found == [
        ["a photo of {}, red hair", "red hair by {}"],
        ["my {} at sea"],
        ["a {}", "one {}", "the {}"],
    ]


def test_the_word_in_a_caption():
    words = {"<ana>": 2, "<ben>": 1, "sks": 1}
    place = {
        "<ana> beside <ben>": "{} beside <ben>",
        "<ANA>, <ana> <ana>_1, <ana>_1": "{}, {}, <ana>_1",  # all of its vectors, or one of them
        "(<ana>:1.3) and {}": "({}:1.3) and {}",
        "a {caption} of banana": "a {caption} of banana",
    }
    assert {caption: with_placeholder(caption, "<ana>", words) for caption in place} == place
    assert with_placeholder("she asks sks", "sks", words) == "she asks {}"
    found, _ = prompts_of(["of {caption} and {0}"])
    assert found == [["a photo of {}, of {caption} and {0}"]]


# -- variants


def test_shuffled_tags():
    caption = "1girl, solo, red hair, smile"
    ((variants), (same)), _ = prompts_of([caption, caption], shuffle_tags=True, keep_tags=1)
    assert len(variants) == VARIANTS and variants != same, "each picture has its own"
    orders = {tuple(prompt.removeprefix("a photo of {}, ").split(", ")) for prompt in variants}
    assert {order[0] for order in orders} == {"1girl"}
    assert {frozenset(order) for order in orders} == {frozenset(caption.split(", "))}
    assert len(orders) == 6, "every order of the other three"
    again, _ = prompts_of([caption, caption], shuffle_tags=True, keep_tags=1)
    assert again == [variants, same]
    other, _ = prompts_of([caption, caption], shuffle_tags=True, keep_tags=1, seed=1)
    assert other != again


def test_dropped_tags():
    caption = "portrait, {} person, " + ", ".join(f"tag{number}" for number in range(20))
    found, _ = prompts_of([caption] * 20, tag_dropout=0.25, keep_tags=1)
    tags = [prompt.split(", ") for variants in found for prompt in variants]
    assert all(each[:2] == ["portrait", "{} person"] for each in tags), "neither the first one nor the word is lost"
    assert all(each == sorted(each, key=caption.split(", ").index) for each in tags), "the order is kept"
    left = np.array([len(each) - 2 for each in tags])
    assert abs(left.mean() / 20 - 0.75) < 0.01 and left.std() > 1
    found, _ = prompts_of(["a, b"], tag_dropout=1.0)
    assert set(found[0]) == set(PLAIN), "without tags the plain templates remain"


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 1.0])
def test_dropped_captions(share):
    """Exactly the share, over all pictures; and every plain template stands in for them."""
    found, _ = prompts_of(["red hair"] * 10, caption_dropout=share)
    prompts = [prompt for variants in found for prompt in variants]
    assert len(prompts) == 10 * VARIANTS and set(prompts) - {"a photo of {}, red hair"} == set(PLAIN)
    assert sum(prompt in PLAIN for prompt in prompts) == share * len(prompts)


def test_many_pictures_have_fewer_variants():
    found, _ = prompts_of(["a, b, c, d"] * 5000, shuffle_tags=True)
    assert {len(variants) for variants in found} == {8}


# -- length


@pytest.fixture(scope="module")
def clip():
    """Whether a prompt fits the 75 tokens that Stable Diffusion reads, with a word of two vectors."""
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "clip_tokenizer")

    def taken(prompt):
        return len(tokens.prompt_ids(tokenizer, prompt.replace("{}", "<new>"), {"<new>": 2}, 49408))

    return taken


def test_a_caption_that_is_too_long_loses_its_last_tags_but_never_the_word(clip):
    tags = [f"red car number {number}" for number in range(30)]
    long, with_word = ", ".join(tags), ", ".join([*tags, "a photo of {} at sea"])
    fits = lambda prompt: clip(prompt) <= 75  # noqa: E731
    (own, short, of_word), cut = prompts_of([long, "red hair", with_word], fits)
    assert cut == [0, 2]
    assert short == ["a photo of {}, red hair"]
    kept = own[0].removeprefix("a photo of {}, ").split(", ")
    assert kept == tags[: len(kept)] and fits(own[0])
    assert not fits(f"{own[0]}, {tags[len(kept)]}"), "no more is lost than must be"
    *kept, last = of_word[0].split(", ")
    assert last == "a photo of {} at sea" and kept == tags[: len(kept)] and 70 < clip(of_word[0]) <= 75


def test_a_sentence_that_is_too_long_loses_its_last_words(clip):
    sentence = "a very " + "very " * 100 + "long walk"
    fits = lambda prompt: clip(prompt) <= 75  # noqa: E731
    (own, of_word), cut = prompts_of([sentence, sentence + " with {} at sea"], fits)
    assert cut == [0, 1]
    assert own[0].startswith("a photo of {}, a very very") and fits(own[0]) and not fits(f"{own[0]} very")
    assert of_word[0].startswith("a very very") and of_word[0].endswith("very {}")
    assert fits(of_word[0]) and not fits(of_word[0].replace("very {}", "very very {}"))


def test_a_template_that_is_too_long_is_not_cut():
    """It is left as it is, and refused by its length later."""
    found, _ = prompts_of(["red hair, smile"], fits=lambda prompt: False)
    assert found == [["a photo of {}"]]
