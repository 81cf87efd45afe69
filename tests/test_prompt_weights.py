"""Weighted prompts: the notation, the chunks, and the weighting against the same computation on PyTorch."""

import jax
import numpy as np
import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from ti_jax.config import ASSETS
from ti_jax.embeddings import Embedding
from ti_jax.errors import InputError
from ti_jax.pipeline import StableDiffusion
from ti_jax.text import prompt_weights
from ti_jax.text.prompt_weights import Piece, parse

WORDS = {"<cleo>": 2, "my(cat)": 1}
LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(ASSETS / "mini-sd" / "tokenizer")


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a person", [("a person", 1.0)]),
        ("", []),
        ("a (red) cap", [("a ", 1.0), ("red", 1.1), (" cap", 1.0)]),
        ("a ((red)) cap", [("a ", 1.0), ("red", 1.1**2), (" cap", 1.0)]),
        ("(red:1.5) [cap]", [("red", 1.5), (" ", 1.0), ("cap", 1 / 1.1)]),
        ("(a (red:2) cap:0.5)", [("a ", 0.5), ("red", 1.0), (" cap", 0.5)]),
        (r"a \(red\) \[cap\] \\", [(r"a (red) [cap] \ "[:-1], 1.0)]),
        ("a (red cap", [("a ", 1.0), ("red cap", 1.1)]),
        ("a red) cap] at 5:30)", [("a red) cap] at 5:30)", 1.0)]),
        ("(red : .5 )", [("red ", 0.5)]),
        ("a [red (cap]:1.3)", [("a ", 1.0), ("red ", 1 / 1.1), ("cap", 1.3 / 1.1)]),
        ("red BREAK cap", [("red", 1.0), (None, 1.0), ("cap", 1.0)]),
        ("BREAKS (a BREAK b:2)", [("BREAKS ", 1.0), ("a", 2.0), (None, 2.0), ("b", 2.0)]),
        ("a <cleo> and (my(cat):1.2)", [("a <cleo> and ", 1.0), ("my(cat)", 1.2)]),
    ],
)  # fmt: skip
def test_notation(prompt, pieces):
    found = parse(prompt, WORDS)
    assert [piece.text for piece in found] == [text for text, _ in pieces]
    np.testing.assert_allclose([piece.weight for piece in found], [weight for _, weight in pieces], rtol=1e-12)
    assert all(isinstance(piece, Piece) for piece in found)


def cut(tokenizer, prompt, length=LENGTH):
    """Words and weights between start and end of each chunk."""
    vocab_size = len(tokenizer)
    result = []
    for ids, weights in prompt_weights.chunks(tokenizer, prompt, WORDS, vocab_size, length):
        assert len(ids) == len(weights) == length and ids[0] == tokenizer.bos_token_id
        end = int(np.argmax(ids == tokenizer.eos_token_id))
        assert (ids[end + 1 :] == tokenizer.pad_token_id).all() and weights[0] == 1 and (weights[end:] == 1).all()
        texts = [f"row{i - vocab_size}" if i >= vocab_size else tokenizer.decode([i]).strip() for i in ids[1:end]]
        result.append(list(zip(texts, weights[1:end].tolist(), strict=True)))
    return result


def words_of(chunks):
    return [[text for text, _ in chunk] for chunk in chunks]


def test_chunks(tokenizer):
    assert cut(tokenizer, "") == [[]]
    assert cut(tokenizer, "a (<cleo>:1.5) cap") == [[("a", 1), ("row0", 1.5), ("row1", 1.5), ("cap", 1)]]
    assert words_of(cut(tokenizer, "red BREAK cap")) == [["red"], ["cap"]]
    assert words_of(cut(tokenizer, "red " * 30)) == [["red"] * 14, ["red"] * 14, ["red"] * 2]
    assert words_of(cut(tokenizer, "red " * 14)) == [["red"] * 14]


def test_rows_of_a_word_stay_together(tokenizer):
    chunks = words_of(cut(tokenizer, "red " * 13 + "<cleo> cap"))
    assert chunks == [["red"] * 13, ["row0", "row1", "cap"]]
    with pytest.raises(InputError, match="a word of 15 vectors does not fit into the 14 tokens"):
        prompt_weights.chunks(tokenizer, "a <x>", {"<x>": 15}, len(tokenizer), LENGTH)


def test_a_full_chunk_ends_at_its_last_comma(tokenizer):
    (comma,) = tokenizer(",", add_special_tokens=False).input_ids
    comma = tokenizer.decode([comma]).strip()
    assert words_of(cut(tokenizer, "red " * 10 + ", " + "cap " * 6)) == [["red"] * 10 + [comma], ["cap"] * 6]
    far = words_of(cut(tokenizer, "red , " + "cap " * 40, length=32))
    assert far == [["red", comma] + ["cap"] * 28, ["cap"] * 12]


def torch_context(folder, chunks, embedding):
    """The weighting on PyTorch: each chunk through transformers' encoder, times its weights, its mean restored."""
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    vocab_size = encoder.config.vocab_size
    encoder.resize_token_embeddings(vocab_size + len(embedding), mean_resizing=False)
    with torch.no_grad():
        encoder.get_input_embeddings().weight[vocab_size:] = torch.tensor(embedding)
        parts = []
        for ids, weights in chunks:
            state = encoder(torch.tensor(ids).long()[None])[0]
            emphasized = state * torch.tensor(weights)[None, :, None]
            parts.append(emphasized * (state.mean() / emphasized.mean()))
        return torch.cat(parts, dim=1).numpy()


@pytest.fixture(scope="module")
def sd(tiny_sd):
    return StableDiffusion.from_pretrained(tiny_sd)


ROWS = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
OPTIONS = {"num_inference_steps": 2, "guidance_scale": 3.0}


# The mean of their states is not near 0; where it is, the ratio of two means has few digits in any float32 program.
@pytest.mark.parametrize(
    "prompt",
    ["a (<cleo>:1.4) with [red] hair", "a (portrait) of <cleo> BREAK (glasses:0.6) BREAK", "(glasses:1.3) hair " * 25],
)
def test_equal_to_the_same_weighting_on_pytorch(sd, tiny_sd, prompt):
    words = {"<cleo>": 2}
    reader = sd.prompt_tokenizers.readers()["text_encoder"]
    chunks = prompt_weights.chunks(reader.tokenizer, prompt, words, *reader[1:])
    stacked = prompt_weights.stack([chunks], len(chunks), chunks[0])
    encode = jax.jit(prompt_weights.encode_weighted, static_argnums=0)
    condition = encode(sd.networks, sd.params, {"text_encoder": stacked}, {"text_encoder": ROWS})
    theirs = torch_context(tiny_sd, chunks, ROWS)
    assert any((chunk.weights != 1).any() for chunk in chunks)
    assert condition.context.shape == theirs.shape == (1, len(chunks) * len(chunks[0].ids), 32)
    assert np.abs(np.asarray(condition.context) - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_without_weights_it_is_the_plain_path(sd):
    embedding = Embedding("<cleo>", {"text_encoder": ROWS})
    prompts = ["a portrait of <cleo> with red hair", "a cap"]
    options = OPTIONS | {"embeddings": [embedding], "negative_prompt": "a <cleo> with glasses", "seed": 3}
    plain = sd.generate(prompts, **options)
    assert np.array_equal(np.stack(sd.generate(prompts, weighted=True, **options)), np.stack(plain))
    weighted = sd.generate(["a portrait of (<cleo>:1.5) with red hair", "a cap"], weighted=True, **options)
    assert not np.array_equal(np.asarray(weighted[0]), np.asarray(plain[0]))
    # Brackets are text for who does not ask for weights.
    assert np.array_equal(
        np.stack(sd.generate(["a ( cap )"], **OPTIONS)),
        np.stack(sd.generate([r"a \( cap \)"], weighted=True, **OPTIONS)),
    )


def test_a_picture_does_not_hang_on_the_length_of_another_prompt(sd):
    prompts = ["a (red:1.3) cap", "red hair " * 20, "a portrait BREAK glasses"]
    together = sd.generate(prompts, weighted=True, seed=5, **OPTIONS)
    for number, prompt in enumerate(prompts):
        (alone,) = sd.generate([prompt], weighted=True, seed=5 + number, **OPTIONS)
        assert np.abs(np.asarray(alone, int) - np.asarray(together[number], int)).max() <= 1


def test_a_long_negative_prompt_lengthens_the_prompt(sd):
    options = OPTIONS | {"weighted": True}
    (long,) = sd.generate(["a cap"], negative_prompt="(glasses:1.2) " * 40, **options)
    (short,) = sd.generate(["a cap"], negative_prompt="(glasses:1.2)", **options)
    assert not np.array_equal(np.asarray(long), np.asarray(short))


def test_infer_reads_weights_unless_told_not_to(tiny_sd, tmp_path):
    from ti_jax.cli.infer import draw
    from ti_jax.config import InferConfig, resolve_infer

    def drawn(prompt, **changes):
        config = InferConfig(
            prompt=(prompt,), pretrained_model_name_or_path=str(tiny_sd), num_inference_steps=2,
            output=str(tmp_path / "out.png"), **changes,
        )  # fmt: skip
        return draw(resolve_infer(config))[0].read_bytes()

    assert drawn("a (red:1.5) cap") != drawn("a red cap")
    with pytest.raises(InputError, match="its end would be cut: shorten it"):
        drawn("red cap " * 40, plain_prompts=True)
    assert drawn("red cap " * 40)
