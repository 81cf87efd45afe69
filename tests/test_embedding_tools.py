"""ti-jax embedding: what convert, inspect, merge and prune say and write, and what they refuse."""

import os
import re

import numpy as np
import pytest
import safetensors.torch
import torch
from permissions import shared_folder, without_rights  # noqa: F401 (a fixture)
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer
from words import a1111_file, assert_same, numbers, sdxl_word, word

from ti_jax.cli import main
from ti_jax.embeddings import Embedding, prune
from ti_jax.embeddings.inspect import Vocabulary, nearest_words
from ti_jax.embeddings.merge import merge, slerp
from ti_jax.errors import InputError
from ti_jax.text.text_encoders import TextEncoders


@pytest.fixture
def tool(tmp_path, monkeypatch, capsys):
    """Runs a command line in a folder of its own: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(line, *more):
        status = main.main(["embedding", *line.split(), *more])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        if status == 2:
            assert out == "" and err.startswith("ti-jax: error: ") and err.count("\n") == 1
        return status, out, err

    return run


def small(n=3, token="<a>", seed=0, dim=192, **metadata):
    rows = np.random.default_rng(seed).standard_normal((n, dim)) * 0.05
    return Embedding(token, {"text_encoder": rows}, metadata)


# -- convert


def test_convert(tool, tmp_path):
    word(2, metadata={"steps": "7"}).save("a.safetensors")
    for target, form in [("b.pt", "a1111"), ("c.png", "card"), ("d.bin", "diffusers"), ("e.safetensors", "diffusers")]:
        status, out, err = tool(f"convert a.safetensors {target}")
        assert (status, err) == (0, "")
        assert out == f"{target}: <cat-toy>, 2 vectors, for SD1.x (768 numbers a vector), as {form}\n"
        assert_same(Embedding.load(target), word(2, token="b" if form == "a1111" else "<cat-toy>"))
    assert Embedding.load("c.png").metadata == {"steps": "7"}
    assert tool("convert c.png f.safetensors --format comfyui --token", "<y>")[0] == 0
    assert list(safetensors.torch.load_file("f.safetensors")) == ["emb_params"]
    assert Embedding.load("f.safetensors").token == "<y>"


def test_convert_an_sdxl_pair_into_one_file_and_back(tool):
    sdxl_word(2).save("learned_embeds.safetensors")
    status, out, _ = tool("convert learned_embeds_2.safetensors toy.safetensors --format comfyui")
    assert status == 0 and out.endswith("for SDXL (768 and 1280 numbers a vector), as comfyui\n")
    status, out, _ = tool("convert toy.safetensors back.safetensors")
    assert status == 0 and out.startswith("back.safetensors and back_2.safetensors: <cat-toy>, 2 vectors, ")
    assert_same(Embedding.load("back_2.safetensors"), sdxl_word(2))


def test_convert_with_a_picture_on_the_card(tool):
    word().save("a.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    Image.fromarray(pixels).save("p.png")
    assert tool("convert a.safetensors card.png --picture p.png")[0] == 0
    with Image.open("card.png") as card:
        edge = (card.width - 48) // 2
        assert card.height == 64 and np.array_equal(np.asarray(card)[:, edge : edge + 48], pixels)
    assert_same(Embedding.load("card.png"), word())


def test_convert_says_what_an_xti_file_loses(tool):
    names = [f"IN0{i}" for i in (1, 2, 4, 5, 7, 8)] + ["MID"] + [f"OUT{i:02d}" for i in range(3, 12)]
    safetensors.torch.save_file({name: torch.ones(1, 768) * i for i, name in enumerate(names)}, "xti.safetensors")
    status, out, err = tool("convert xti.safetensors a.pt")
    assert status == 0 and out and err.startswith("note: xti.safetensors: read as the mean of the 16 words")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "no command given; one of convert, inspect, merge, prune, transfer, or ti-jax embedding --help"),
        ("convrt a b", "unknown command 'convrt'; did you mean convert?"),
        ("convert", "files given: none; expected ti-jax embedding convert FILE OUT, with the flags after them"),
        ("convert a.safetensors", "files given: a.safetensors; expected ti-jax embedding convert FILE OUT"),
        ("convert a b c", "files given: a b c; expected ti-jax embedding convert FILE OUT"),
        ("convert nope.pt b.pt", "nope.pt: no such file"),
        ("convert a.safetensors b.ckpt", "b.ckpt: no format has this suffix; use .safetensors, .bin, .pt or .png"),
        ("convert a.safetensors b.pt --format comfyui", "b.pt: a word in ComfyUI's format is a .safetensors file"),
        (
            "convert a.safetensors b.pt --format webui",
            "--format webui: must be one of diffusers, comfyui, a1111 or card",
        ),
        ("convert a.safetensors b.pt --fromat card", "unknown flag --fromat; did you mean --format?"),
        ("convert a.safetensors no/b.pt", "cannot write no/b.pt: there is no such folder"),
        ("convert a.safetensors b.pt --picture p.png", "--picture p.png: only an image card has a picture"),
        ("convert a.safetensors b.png --picture p.png", "--picture p.png: no such file"),
        ("convert a.safetensors b.png --picture a.safetensors", "--picture a.safetensors: not a picture"),
        ("convert xl.safetensors b.pt", "b.pt: AUTOMATIC1111's own formats have one text encoder, and '<cat-toy>' is "),
        ("inspect", "files given: none; expected ti-jax embedding inspect FILE ..."),
        ("inspect a.safetensors --nearest -1", "--nearest -1: must be 0 or more"),
        ("inspect a.safetensors --pretrained_model_name_or_path nope", "nope: no such folder"),
        (
            "merge a.safetensors b.pt --token <m>",
            "files given: a.safetensors b.pt; expected ti-jax embedding merge FILE",
        ),
        ("merge a.safetensors a.safetensors m.pt", "--token is missing: give the new word a name, like <catdog>"),
        (
            "merge a.safetensors xl.safetensors m.pt --token <m>",
            "a.safetensors is for SD1.x (768 numbers a vector), and ",
        ),
        (
            "merge a.safetensors two.safetensors m.pt --token <m>",
            "a.safetensors has 1 vectors, and two.safetensors 2; ",
        ),
        ("merge a.safetensors a.safetensors m.pt --token <m> --weights 1", "1 weights for 2 words; give one for each"),
        ("merge a.safetensors a.safetensors m.pt --token <m> --weights 1 x", "--weights x: must be numbers"),
        (
            "merge a.safetensors a.safetensors m.pt --token <m> --weights 1 nan",
            "weights 1 nan: must be finite, and not",
        ),
        (
            "merge a.safetensors a.safetensors m.pt --token <m> --weights 0 0",
            "weights 0 0: must be finite, and not all",
        ),
        (
            "merge a.safetensors a.safetensors m.pt --token <m> --method slerp --weights 1 -1",
            "weights 1 -1: an arc has",
        ),
        (
            "merge a.safetensors a.safetensors m.pt --token <m> --method concat --weights 1 1",
            "concat leaves the vectors",
        ),
        ("merge a.safetensors a.safetensors m.pt --token <m> --method mean", "--method mean: must be one of sum, "),
        ("prune two.safetensors b.pt", "give one of --keep (how many vectors to keep) and --drop"),
        ("prune two.safetensors b.pt --keep 1 --drop 0", "give one of --keep (how many vectors to keep) and --drop"),
        ("prune two.safetensors b.pt --keep 2", "--keep 2: the word has 2 vectors; keep from 1 to 1 of them"),
        ("prune two.safetensors b.pt --keep 0", "--keep 0: the word has 2 vectors; keep from 1 to 1 of them"),
        ("prune a.safetensors b.pt --keep 1", "the word has one vector; there is nothing to prune"),
        ("prune two.safetensors b.pt --drop 0 1", "--drop 0 1: no vector would stay of the word"),
        ("prune two.safetensors b.pt --drop 2", "--drop 2: the word has the vectors 0 to 1"),
        ("prune two.safetensors b.pt --drop one", "--drop one: must be whole numbers"),
        (
            "prune two.safetensors b.pt --keep 1",
            "two.safetensors: the word '<cat-toy>' is for SD1.x (768 numbers a vec",
        ),
        ("prune small.safetensors b.pt --keep 1 --prompt cat", "--prompt 'cat': the word <a> is not in it; write it"),
    ],
)
def test_what_is_refused(tool, line, said):
    word().save("a.safetensors")
    word(2).save("two.safetensors")
    sdxl_word().save("xl.safetensors")
    small(2).save("small.safetensors")
    (before,) = [sorted(os.listdir())]
    status, _, err = tool(line)
    assert status == 2 and err.startswith(f"ti-jax: error: {said}"), err
    assert sorted(os.listdir()) == before


def test_words_with_spaces_are_refused(tool):
    word().save("a.safetensors")
    for line in ("convert a.safetensors b.pt", "merge a.safetensors a.safetensors b.pt", "inspect a.safetensors"):
        status, _, err = tool(f"{line} --token", "my cat")
        assert status == 2 and "--token 'my cat': must be one word without spaces, like <cat-toy>" in err


def test_a_failed_write_leaves_the_old_file(tool, shared_folder):  # noqa: F811
    word(4).save(shared_folder / "old.pt", format="a1111")
    word().save(shared_folder / "a.safetensors")
    word().save("hidden.safetensors")
    shared_folder.chmod(0o555)
    with without_rights():
        status, _, err = tool(f"convert {shared_folder / 'a.safetensors'} {shared_folder / 'old.pt'}")
        hidden = tool("convert hidden.safetensors b.pt")
    assert hidden[0] == 2 and "hidden.safetensors: cannot be read (Permission denied)" in hidden[2]
    assert status == 2 and "no permission" in err
    assert_same(Embedding.load(shared_folder / "old.pt"), word(4, token="old"))


def test_a_file_may_be_converted_onto_itself(tool):
    word().save("a.safetensors")
    assert tool("convert a.safetensors a.safetensors --format comfyui")[0] == 0
    assert_same(Embedding.load("a.safetensors"), word())


# -- help


@pytest.mark.parametrize("command", ["convert", "inspect", "merge", "prune"])
def test_help_has_every_flag_and_examples(tool, capsys, command):
    assert f"\n  {command} FILE" in tool("--help")[1]
    with pytest.raises(SystemExit) as stop:
        main.main(["embedding", command, "--help"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == ""
    assert out.startswith(f"usage: ti-jax embedding {command} FILE") and "\n  ti-jax embedding " + command in out
    flags = {"convert": ["format", "token", "picture"], "inspect": ["nearest", "revision", "variant"],
             "merge": ["method", "weights", "token"], "prune": ["keep", "drop", "prompt"]}[command]  # fmt: skip
    assert all(f"--{flag}" in out for flag in flags)


# -- inspect


def test_inspect_against_the_embedded_model(tool):
    encoders = TextEncoders.from_pretrained()
    vocabulary = encoders.vocabulary("text_encoder")
    table, tokenizer = vocabulary.table, encoders.tokenizers["text_encoder"]
    hair, red = (table[vocabulary.words.index(name)] for name in ("hair", "red"))
    (own_id,) = tokenizer("hair", add_special_tokens=False).input_ids
    whole = np.asarray(encoders.params["text_encoder"]["embeddings"]["token_embedding"]["embedding"])
    assert np.array_equal(whole[own_id], hair)
    rows = np.stack([2 * hair, 0.5 * red])
    Embedding("<a>", {"text_encoder": rows}, {"steps": "3", "base_model": "x\ny"}).save("a.safetensors")
    status, out, err = tool("inspect a.safetensors --nearest 2")
    assert (status, err) == (0, "")
    usual = np.median(np.linalg.norm(whole, axis=1))
    assert "  word     <a>\n  format   diffusers (one tensor [n, D] under the word); safetensors\n" in out
    assert "  family   a model with 192 numbers a vector\n  vectors  2\n" in out
    assert f"against the vocabulary of mini-sd (usual norm {usual:.3f})" in out
    norm = np.linalg.norm(2 * hair)
    assert re.search(
        rf"vector 0  norm {norm:.3f}, {norm / usual:.2f} times the usual; nearest hair 1\.00, \S+ 0\.", out
    )
    assert re.search(r"vector 1  norm .*; nearest red 1\.00, \S+ 0\.\d\d\n", out)
    assert out.endswith("  metadata\n    base_model  x y\n    steps  3\n    token  <a>\n")


def test_inspect_without_a_model_that_fits(tool, tiny_sd):
    sdxl_word(metadata={"note": "hi"}).save("xl.safetensors")
    torch.save(a1111_file(torch.ones(1, 1024)), "a.pt")
    status, out, err = tool("inspect xl.safetensors a.pt")
    assert (status, err) == (0, "")
    first, second = out.split("\n\n")
    assert "family   SDXL (768 and 1280 numbers a vector)" in first and "text_encoder_2, compared with no voc" in first
    assert "format   a1111 (string_to_param); PyTorch pickle" in second and "norm 32.000\n" in second
    status, _, err = tool(f"inspect a.pt --pretrained_model_name_or_path {tiny_sd}")
    assert status == 2 and "is for SD2.x (1024 numbers a vector), but the model here is a model with 32 numbers" in err


def test_nearest_words():
    vocabulary = Vocabulary("m", ["x", "y", "zero", "-x"], np.array([[2, 0], [1, 1], [0, 0], [-1, 0]], np.float32), 1)
    found = nearest_words(np.array([3, 0], np.float32), vocabulary, 4)
    assert [name for name, _ in found] == ["x", "y", "zero", "-x"]
    np.testing.assert_allclose([cosine for _, cosine in found], [1, 0.5**0.5, 0, -1], atol=1e-6)
    assert nearest_words(np.zeros(2, np.float32), vocabulary, 4) == ()


# -- merge


def test_merge_of_files(tool):
    a, b = small(2, base_model="m", base_model_hash="1"), small(2, "<b>", 1, base_model="m", base_model_hash="2")
    a.save("a.safetensors")
    b.save("b.safetensors")
    assert tool("merge a.safetensors b.safetensors m.safetensors --token <m> --weights 2 -0.5")[0] == 0
    merged = Embedding.load("m.safetensors")
    x, y = (e.vectors["text_encoder"].astype(np.float64) for e in (a, b))
    np.testing.assert_array_equal(merged.vectors["text_encoder"], (2 * x - 0.5 * y).astype(np.float32))
    assert merged.metadata == {
        "token": "<m>", "merged_from": "a.safetensors, b.safetensors", "merge_method": "sum",
        "merge_weights": "2 -0.5", "base_model": "m",
    }  # fmt: skip
    assert tool("merge a.safetensors b.safetensors m.pt --token <m> --method concat")[0] == 0
    both = np.concatenate([a.vectors["text_encoder"], b.vectors["text_encoder"]])
    assert Embedding.load("m.pt").vectors["text_encoder"].tobytes() == both.tobytes()


@pytest.mark.parametrize("make", [word, sdxl_word])
def test_merges_of_every_family(make):
    words = [make(2, token=f"<{i}>") for i in range(3)]
    mean = merge(words, "<m>")
    for name, value in words[0].vectors.items():
        np.testing.assert_allclose(mean.vectors[name], value, rtol=1e-6)
    assert merge(words, "<m>", "concat").num_vectors == 6
    with pytest.raises(InputError, match="1 word to merge; give two or more"):
        merge(words[:1], "<m>")
    with pytest.raises(InputError, match="unknown method 'mean'"):
        merge(words, "<m>", "mean")


def test_slerp_turns_at_a_constant_angle_and_changes_length_in_proportion():
    start, end = numbers(3, 8).astype(np.float64), numbers(3, 8, seed=1).astype(np.float64)
    norm = np.linalg.norm
    angle = np.arccos((start * end).sum(1) / norm(start, axis=1) / norm(end, axis=1))
    for t in (0.0, 0.25, 0.5, 1.0):
        between = slerp(start, end, t, "b")
        lengths = norm(between, axis=1)
        np.testing.assert_allclose(lengths, (1 - t) * norm(start, axis=1) + t * norm(end, axis=1), rtol=1e-12)
        turned = np.arccos(np.clip((between * start).sum(1) / lengths / norm(start, axis=1), -1, 1))
        np.testing.assert_allclose(turned, t * angle, atol=1e-7)
        remaining = np.arccos(np.clip((between * end).sum(1) / lengths / norm(end, axis=1), -1, 1))
        np.testing.assert_allclose(remaining, (1 - t) * angle, atol=1e-7)  # so it lies in their plane
    np.testing.assert_allclose(slerp(start, 2 * start, 0.5, "b"), 1.5 * start, rtol=1e-12)


def test_slerp_of_words():
    a, b, c = (small(2, f"<{seed}>", seed) for seed in range(3))
    assert_same(merge([a, b], "<0>", "slerp", [1, 0]), a)
    assert_same(merge([a, b], "<1>", "slerp", [0, 5]), b)
    x, y, z = (e.vectors["text_encoder"].astype(np.float64) for e in (a, b, c))
    expected = slerp(slerp(x, y, 1 / 3, ""), z, 0.5, "").astype(np.float32)
    np.testing.assert_array_equal(merge([a, b, c], "<m>", "slerp", [2, 1, 3]).vectors["text_encoder"], expected)
    opposite = Embedding("<b>", {"text_encoder": -a.vectors["text_encoder"]})
    with pytest.raises(InputError, match=r"b\.pt: vector 0 points the opposite way"):
        merge([a, opposite], "<m>", "slerp", names=["a.pt", "b.pt"])
    with pytest.raises(InputError, match="<b>: vector 0 has no direction"):
        merge([a, Embedding("<b>", {"text_encoder": np.zeros((2, 192))})], "<m>", "slerp")
    # A word of no weight may have no direction.
    assert_same(merge([Embedding("<b>", {"text_encoder": np.zeros((2, 192))}), a], "<0>", "slerp", [0, 1]), a)


# -- prune


def torch_end_state(folder, rows, selection):
    """The state at the end-of-text token of "a photo of" and the selected rows, by transformers on PyTorch."""
    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    encoder.resize_token_embeddings(len(tokenizer) + len(rows), mean_resizing=False)
    with torch.no_grad():
        encoder.get_input_embeddings().weight[len(tokenizer) :] = torch.from_numpy(rows.copy())
        start = tokenizer("a photo of").input_ids[:-1]
        ids = [*start, *(len(tokenizer) + row for row in selection), tokenizer.eos_token_id]
        return encoder(torch.tensor([ids])).last_hidden_state[0, -1].numpy()


def test_end_states_are_those_of_transformers(tiny_sd):
    encoders = TextEncoders.from_pretrained(str(tiny_sd))
    embedding = small(3, dim=32)
    rows = embedding.vectors["text_encoder"]
    selections = [[0, 1, 2], [], [1], [0, 2]] * 3  # more than one batch
    found = encoders.end_states("a photo of {}", embedding, selections)["text_encoder"]
    assert found.shape == (12, 32)
    for state, selection in zip(found, selections, strict=True):
        np.testing.assert_allclose(state, torch_end_state(tiny_sd, rows, selection), atol=1e-5, rtol=0)
    np.testing.assert_array_equal(found, encoders.end_states("a photo of <a>", embedding, selections)["text_encoder"])
    with pytest.raises(InputError, match="would be cut"):
        encoders.end_states("a " * 40 + "{}", embedding, selections)


def test_losses_and_the_choice_of_what_stays():
    """With an encoder whose output is a sum, all is known: the smallest rows go first."""
    rows = np.array([[3.0, 0], [0, 1], [0, 2], [4, 0]], np.float32)

    def states(selections):
        return {
            "text_encoder": np.stack([rows[list(s)].sum(0) + np.eye(2)[0] for s in selections]),
            "text_encoder_2": np.zeros((len(selections), 5), np.float32),
        }

    (loss,) = prune.losses(4, [[0, 2, 3]], states)
    np.testing.assert_allclose([loss.relative, loss.of_the_word], [1 / np.hypot(8, 3), 1 / np.hypot(7, 3)])
    assert str(loss) == "the text encoder's output moves by 11.7% of its length, 13.1% of what the word does to it"
    assert [prune.choose(4, keep, states) for keep in (3, 2, 1)] == [[0, 2, 3], [0, 3], [3]]


def test_prune_of_files(tool, tiny_sd):
    embedding = small(4, dim=32, num_vectors="4", steps="9")
    embedding.save("a.safetensors")
    model = f"--pretrained_model_name_or_path {tiny_sd}"
    status, out, err = tool(f"prune a.safetensors b.safetensors --drop 0 2 {model}")
    assert (status, err) == (0, "")
    written, told = out.splitlines()
    assert written == "b.safetensors: <a>, 2 vectors, for a model with 32 numbers a vector, as diffusers"
    pruned = Embedding.load("b.safetensors")
    assert pruned.vectors["text_encoder"].tobytes() == embedding.vectors["text_encoder"][[1, 3]].tobytes()
    assert pruned.metadata == {"num_vectors": "2", "steps": "9", "pruned_to": "1 3 of 4 vectors", "token": "<a>"}
    rows = embedding.vectors["text_encoder"]
    whole, without, rest = (torch_end_state(tiny_sd, rows, s) for s in ([0, 1, 2, 3], [], [1, 3]))
    moved = np.linalg.norm(rest - whole)
    of_length, of_word = (100 * moved / np.linalg.norm(other) for other in (whole, without - whole))
    assert told.startswith("vectors 0 2 of 4 dropped: for 'a photo of <a>' the text encoder's output moves by ")
    assert f"moves by {of_length:.1f}% of its length, {of_word:.1f}% of what the word does to it" in told
    status, out, _ = tool(f"prune a.safetensors c.pt --keep 3 {model}")
    assert status == 0 and Embedding.load("c.pt").num_vectors == 3
    # The one that goes is the one whose loss is the smallest of the four.
    states = (torch_end_state(tiny_sd, rows, [j for j in range(4) if j != i]) for i in range(4))
    each = [np.linalg.norm(state - whole) for state in states]
    assert f"vector {np.argmin(each)} of 4 dropped" in out
