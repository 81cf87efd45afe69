import unicodedata

import numpy as np
import pytest
from conftest import VOCAB
from transformers import CLIPTokenizer

from ti_jax.config import ASSETS
from ti_jax.text import prompt_weights, tokens
from ti_jax.words import contains_word, find_words, fold, same_word

# Letters whose lower case has another length, another form at the end of a word, or that re.IGNORECASE confuses.
ODD_WORDS = [
    "<İst>",
    "<İ>",
    "<ışık>",
    "ıx",
    "<ſt>",
    "<ΑΣ>",
    "ΟΔΟΣ",
    "<Καφές>",
    "<Cafe\u0301>",
    "<CAFÉ>",
    "<K-\u212a>",
    "<각>",
    "<가\u11a8>",
]


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(ASSETS / "mini-sd" / "tokenizer")


def with_word_added(word):
    reference = CLIPTokenizer.from_pretrained(ASSETS / "mini-sd" / "tokenizer")
    assert reference.add_tokens(word) == 1
    return reference


@pytest.mark.parametrize("word", ODD_WORDS)
@pytest.mark.parametrize("form", ["{}", "NFD", "lower", "upper", "folded"])
def test_a_word_is_found_where_the_tokenizer_finds_it(tokenizer, word, form):
    forms = {"{}": word, "NFD": unicodedata.normalize("NFD", word), "lower": word.lower(), "upper": word.upper()}
    prompt = f"a portrait of {forms.get(form, fold(word))}, smiling"
    expected = with_word_added(word)(prompt, add_special_tokens=False).input_ids
    assert tokens.prompt_ids(tokenizer, prompt, {word: 1}, VOCAB) == expected
    weighted = prompt_weights.chunks(tokenizer, f"({prompt}:1.5)", {word: 1}, VOCAB, 77)
    assert len(weighted) == 1 and weighted[0].ids[1 : 1 + len(expected)].tolist() == expected
    assert contains_word(prompt, word) == (VOCAB in expected)


@pytest.mark.parametrize("word", ["<ist>", "ix", "<st>", "sks", "<k>"])
def test_letters_that_only_look_alike_are_others(tokenizer, word):
    for other in ("<İst>", "<ıst>", "ıx", "<ſt>", "ſks", "<\u212ax>"):
        prompt = f"a {other} here"
        expected = with_word_added(word)(prompt, add_special_tokens=False).input_ids
        assert tokens.prompt_ids(tokenizer, prompt, {word: 1}, VOCAB) == expected


def test_several_vectors_of_an_odd_word(tokenizer):
    ids = [i - VOCAB for i in tokens.prompt_ids(tokenizer, "<İST> <i̇st>_2 <İst> <İst>_1 <İst>_2", {"<İst>": 3}, VOCAB)]
    assert ids == [0, 1, 2, 2, 0, 1, 2]


def test_places_are_those_in_the_prompt_as_written():
    prompt = "İİ e\u0301 (<İst>:1.2) e\u0301<Cafe\u0301>!"
    found = find_words(prompt, {"<İst>": 1, "<CAFÉ>": 2})
    assert [prompt[place.start : place.end] for place in found] == ["<İst>", "<Cafe\u0301>"]
    assert [(place.word, list(place.rows)) for place in found] == [("<İst>", [0]), ("<CAFÉ>", [0, 1])]
    pieces = prompt_weights.parse(prompt, {"<İst>": 1, "<CAFÉ>": 2})
    assert [piece.text for piece in pieces] == ["İİ e\u0301 ", "<İst>", " e\u0301<Cafe\u0301>!"]


def test_whole_words():
    assert contains_word("a Rick, smiling", "rick") and contains_word("(rick:1.2)", "rick")
    assert not contains_word("a brick wall", "rick") and not contains_word("tricks", "rick")
    assert contains_word("two<cat>in one", "<cat>") and not contains_word("a <cat-toy>", "<cat>")
    assert not contains_word("", "<cat>")


def test_words_that_a_prompt_cannot_tell_apart():
    assert same_word("<CAFÉ>", ["<x>", "<cafe\u0301>"]) and same_word("<ΑΣ>", ["<ασ>"])
    assert not same_word("<ΑΣ>", ["<ας>"]) and not same_word("<ist>", ["<İst>", "<ıst>"])


def test_fold_is_what_the_tokenizer_does_to_every_character(tokenizer):
    normalize = tokenizer.backend_tokenizer.normalizer.normalize_str
    characters = [chr(code) for code in range(0x21, 0x20000) if not 0xD800 <= code < 0xE000]
    # Python's Unicode and the tokenizer's may be a version apart: only what both know.
    known = [c for c in characters if unicodedata.category(c) != "Cn" and not c.isspace()]
    different = [c for c in known if fold(c) != normalize(c)]
    assert len(known) > 60_000 and different == []


def test_rows_that_are_read_are_those_of_the_word(tokenizer):
    ids = tokens.tokenize(tokenizer, ["a <ışık> b"], {"<x>": 2, "<ışık>": 1}, VOCAB, 32)
    assert np.flatnonzero(ids[0] == VOCAB + 2).tolist() == [2]
