import numpy as np
import pytest
from conftest import VOCAB
from transformers import CLIPTokenizer

from ti_jax.config import ASSETS
from ti_jax.errors import InputError
from ti_jax.text import tokens

LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(ASSETS / "mini-sd" / "tokenizer")


def ids_of(tokenizer, prompt, words):
    return tokens.prompt_ids(tokenizer, prompt, words, VOCAB)


def reference_ids(prompt, words):
    """What diffusers does: add the expanded words to the tokenizer, and expand them in the prompt."""
    reference = CLIPTokenizer.from_pretrained(ASSETS / "mini-sd" / "tokenizer")
    assert len(reference) == VOCAB
    for word, count in words.items():
        for name in [word, *(f"{word}_{i}" for i in range(1, count))]:
            assert reference.add_tokens(name) == 1
    for word, count in sorted(words.items(), key=lambda item: -len(item[0])):
        prompt = prompt.replace(word, " ".join([word, *(f"{word}_{i}" for i in range(1, count))]))
    return reference(prompt, padding="max_length", max_length=LENGTH).input_ids


@pytest.mark.parametrize(
    "prompt",
    [
        "a portrait of <cat-toy>",
        "<cat-toy>",
        "a drawing of (<cat-toy>), with red hair!",
        "a portrait of <cat-toy>'s <cat-toy>s",
        "two<cat-toy>in one",
        "a   portrait  of\n<cat-toy> <cat-toy>",
        "a portrait of a person",
        "",
        "ünïcödé <cat-toy> — 🙂",
    ],
)
@pytest.mark.parametrize("count", [1, 4])
def test_ids_equal_those_of_a_tokenizer_with_the_words_added(tokenizer, prompt, count):
    words = {"<cat-toy>": count}
    ours = tokens.tokenize(tokenizer, [prompt], words, VOCAB, LENGTH)
    assert ours.dtype == np.int32 and ours.shape == (1, LENGTH)
    assert ours[0].tolist() == reference_ids(prompt, words)


def test_words_that_contain_each_other(tokenizer):
    words = {"<cat>": 2, "<cat>-toy": 1, "cat": 1, "cat-toy": 3}
    ids = [i - VOCAB for i in ids_of(tokenizer, "<cat>-toy <cat> cat-toy cat", words)]
    assert ids == [2, 0, 1, 4, 5, 6, 3]


def test_a_word_of_letters_must_stand_alone(tokenizer):
    words = {"sks": 1}
    inside = ids_of(tokenizer, "asks sksy sks1", words)
    assert inside == ids_of(tokenizer, "asks sksy sks1", {}) and max(inside) < VOCAB
    for prompt in ("a sks, person", "(sks)", "SKS", "sks's"):
        assert ids_of(tokenizer, prompt, words).count(VOCAB) == 1


def test_an_expanded_word_is_not_expanded_again(tokenizer):
    words = {"<other>": 1, "<cat>": 3}
    whole = ids_of(tokenizer, "a portrait of <cat> smiling", words)
    assert [i for i in whole if i >= VOCAB] == [VOCAB + 1, VOCAB + 2, VOCAB + 3]
    assert ids_of(tokenizer, "a portrait of <cat> <cat>_1 <cat>_2 smiling", words) == whole
    assert ids_of(tokenizer, "<cat>_2 <cat>_1", words) == [VOCAB + 3, VOCAB + 2]


def test_expansion_of_a_word_with_more_than_ten_rows(tokenizer):
    words = {"<cat>": 12}
    expanded = " ".join(["<cat>", *(f"<cat>_{i}" for i in range(1, 12))])
    assert ids_of(tokenizer, expanded, words) == list(range(VOCAB, VOCAB + 12))
    assert ids_of(tokenizer, "<cat>_11 <cat>_1", words) == [VOCAB + 11, VOCAB + 1]


def test_a_prompt_that_would_be_cut_is_refused(tokenizer):
    fits = " ".join(["red"] * (LENGTH - 3)) + " <new>"
    assert VOCAB in tokens.tokenize(tokenizer, [fits], {"<new>": 1}, VOCAB, LENGTH)[0]
    with pytest.raises(InputError, match=r"31 tokens where the text encoder reads 30.*with it the new word"):
        tokens.tokenize(tokenizer, ["red " + fits], {"<new>": 1}, VOCAB, LENGTH)
    with pytest.raises(InputError, match="takes 33 tokens") as error:
        tokens.tokenize(tokenizer, [fits], {"<new>": 4}, VOCAB, LENGTH)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("word", ["", "two words", " <x>", "person", "Person", "<|endoftext|>", "a", "*"])
def test_words_that_cannot_be_placeholders(tokenizer, word):
    with pytest.raises(InputError, match="placeholder"):
        tokens.check_new_word(tokenizer, word)


def test_good_placeholders(tokenizer):
    tokens.check_new_word(tokenizer, "<cat-toy>")
    tokens.check_new_word(tokenizer, "sks")


def test_initializer_words(tokenizer):
    red, hair = tokens.initializer_ids(tokenizer, "red hair")
    assert tokenizer.convert_ids_to_tokens([red, hair]) == ["red</w>", "hair</w>"]
    with pytest.raises(InputError, match=r"'qxqx' is not one token.*q\|x\|q\|x"):
        tokens.initializer_ids(tokenizer, "qxqx")
    with pytest.raises(InputError, match=r"known words spelt like it: .*person"):
        tokens.initializer_ids(tokenizer, "persons")
    with pytest.raises(InputError, match="empty"):
        tokens.initializer_ids(tokenizer, "  ")


def test_initial_rows():
    table = np.arange(12, dtype=np.float16).reshape(6, 2)
    assert tokens.initial_rows(table, [3], 2).tolist() == [[6, 7], [6, 7]]
    assert tokens.initial_rows(table, [3, 1], 3).tolist() == [[6, 7], [2, 3], [6, 7]]
    assert tokens.initial_rows(table, [0, 1, 5], 2).tolist() == [[1, 2], [10, 11]]
    assert tokens.initial_rows(table, [0, 2], 1).dtype == np.float32
