"""Under which word a file is read, and the formats that are only read."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from words import a1111_file, assert_same, refusal, word

from ti_jax.cli import main
from ti_jax.embeddings import Embedding
from ti_jax.embeddings.naming import load_given, split_word, with_stored_name
from ti_jax.embeddings.warn import word_warnings
from ti_jax.errors import InputError


def embedding_of(name, tensor, encoder="text_encoder"):
    return Embedding(name, {encoder: tensor.numpy()})


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_the_trigger_of_an_automatic1111_file_is_its_name(tmp_path, suffix):
    tensor = torch.randn(3, 768)
    torch.save(a1111_file(tensor), tmp_path / f"my-style{suffix}")
    loaded = Embedding.load(tmp_path / f"my-style{suffix}")
    assert_same(loaded, embedding_of("my-style", tensor))
    assert loaded.stored_name == "mein-stil" and loaded.notes == ()
    torch.save(a1111_file(tensor, name="My-Style"), tmp_path / f"my-style{suffix}")
    assert Embedding.load(tmp_path / f"my-style{suffix}").stored_name is None


def test_the_name_of_a_card_is_the_one_stored_in_it(tmp_path):
    word(2).save(tmp_path / "renamed.png", format="card")
    assert_same(Embedding.load(tmp_path / "renamed.png"), word(2))


def test_the_stored_name_in_prompts(tmp_path):
    torch.save(a1111_file(torch.randn(3, 768)), tmp_path / "my-style.pt")
    loaded = Embedding.load(tmp_path / "my-style.pt")
    prompts, note = with_stored_name(
        loaded, ["a house, (Mein-Stil:1.2)", "mein-stil mein-stil_1 mein-stil_2, mein-stil_2"]
    )
    assert prompts == ["a house, (my-style:1.2)", "my-style, my-style_2"]
    assert note == "mein-stil is the name stored in the file, and is taken for its word my-style"
    for prompts in (["my-style and mein-stil"], ["a house"], ["mein-stilist"]):
        assert with_stored_name(loaded, prompts) == (prompts, None)


def test_names_with_spaces(tmp_path):
    safetensors.torch.save_file({"emb_params": torch.ones(1, 768)}, tmp_path / "my big  cat.safetensors")
    safetensors.torch.save_file({"my cat": torch.ones(1, 768)}, tmp_path / "a.safetensors")
    torch.save(a1111_file(torch.ones(1, 768)), tmp_path / "my big  cat.pt")
    for name, token in [
        ("my big  cat.safetensors", "my-big-cat"),
        ("a.safetensors", "my-cat"),
        ("my big  cat.pt", "my-big-cat"),
    ]:
        loaded = Embedding.load(tmp_path / name)
        assert loaded.token == token and len(loaded.notes) == 1
        assert f"has spaces: write {token} in prompts" in loaded.remarks[0]
        loaded = Embedding.load(tmp_path / name, token="<cat>")
        assert loaded.token == "<cat>" and loaded.remarks == []
    with pytest.raises(InputError, match="'two words': must be one word without spaces"):
        Embedding.load(tmp_path / "a.safetensors", token="two words")


def test_a_file_with_a_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    word().save("a=b.safetensors")
    word().save("c.safetensors")
    word().save("a.safetensors")
    assert split_word("c.safetensors") == ("c.safetensors", None)
    assert split_word("c.safetensors=<x>") == ("c.safetensors", "<x>")
    assert split_word("c.safetensors=<x=y>") == ("c.safetensors", "<x=y>")
    assert split_word("a=b.safetensors") == ("a=b.safetensors", None)
    assert split_word("a=b.safetensors=<x>") == ("a=b.safetensors", "<x>")
    assert split_word("no.safetensors=<x>") == ("no.safetensors", "<x>")
    tokens = [embedding.token for embedding in load_given(["a=b.safetensors=<x>", "c.safetensors", "a.safetensors=y"])]
    assert tokens == ["<x>", "<cat-toy>", "y"]
    for text in ("c.safetensors=", "c.safetensors=my cat"):
        with pytest.raises(InputError, match=r"c\.safetensors=.*: the word .*: must be one word without spaces"):
            load_given([text])


@pytest.mark.parametrize("n", [1, 2])
def test_cog_sdxl(tmp_path, n):
    first, second = torch.randn(n, 768).half(), torch.randn(n, 1280).half()
    safetensors.torch.save_file({"text_encoders_0": first, "text_encoders_1": second}, tmp_path / "embeddings.pti")
    both = {"text_encoder": first.float().numpy(), "text_encoder_2": second.float().numpy()}
    assert_same(Embedding.load(tmp_path / "embeddings.pti"), Embedding("embeddings", both))
    (tmp_path / "special_params.json").write_text(json.dumps({"TOK": "<s0><s1>"}))
    assert_same(Embedding.load(tmp_path / "embeddings.pti"), Embedding("TOK", both))
    assert Embedding.load(tmp_path / "embeddings.pti", token="<x>").token == "<x>"
    for broken in ("", "[]", "{", '{"my tok": ""}'):
        (tmp_path / "special_params.json").write_text(broken)
        assert Embedding.load(tmp_path / "embeddings.pti").token in ("embeddings", "my-tok")


def test_lists_of_dicts(tmp_path):
    """ComfyUI's `load_embed` joins the tensors of an encoder's width, in their order."""
    a, b, g = torch.randn(2, 768), torch.randn(768), torch.randn(3, 1280)
    torch.save([{"x": a}, {"y": b}], tmp_path / "cat.pt")
    assert_same(Embedding.load(tmp_path / "cat.pt"), embedding_of("cat", torch.cat([a, b[None]])))
    torch.save([{"clip_g": g, "clip_l": a}, {"l": b}], tmp_path / "cat.pt")
    both = {"text_encoder": torch.cat([a, b[None]]).numpy(), "text_encoder_2": g.numpy()}
    assert_same(Embedding.load(tmp_path / "cat.pt"), Embedding("cat", both))
    torch.save([{"x": a, "y": torch.ones(1, 1024)}], tmp_path / "cat.pt")
    assert "a list of tensors of widths [768, 1024]" in refusal(tmp_path / "cat.pt")
    for nothing in ([], [{}], [1, 2], [{"x": 1}]):
        torch.save(nothing, tmp_path / "cat.pt")
        refusal(tmp_path / "cat.pt")
    torch.save([{"x": a}] * 65, tmp_path / "cat.pt")
    assert "a model or a LoRA" in refusal(tmp_path / "cat.pt")


@pytest.mark.parametrize("shape", [(768,), (3, 768)])
def test_a_bare_tensor(tmp_path, shape):
    tensor = torch.randn(shape)
    torch.save(tensor, tmp_path / "cat.pt")
    assert_same(Embedding.load(tmp_path / "cat.pt", token="<cat>"), embedding_of("<cat>", tensor.reshape(-1, 768)))
    assert "a bare tensor, without a word: give the word with --token" in refusal(tmp_path / "cat.pt")


def test_words_in_a_lora(tmp_path):
    lora = {f"lora_unet_{i}.lora_up.weight": torch.ones(4, 4) for i in range(100)}
    sd, clip_l, clip_g = torch.randn(2, 768), torch.randn(1, 768), torch.randn(1, 1280)
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({**lora, "bundle_emb.cat.string_to_param.*": sd}, path)
    loaded = Embedding.load(path)
    assert_same(loaded, embedding_of("cat", sd))
    assert "the LoRA itself is not applied" in loaded.caveat
    xl = {"bundle_emb.dog.clip_l": clip_l, "bundle_emb.dog.clip_g": clip_g}
    safetensors.torch.save_file({**lora, **xl, "bundle_emb.cat.emb_params": sd}, path)
    dog = Embedding("dog", {"text_encoder": clip_l.numpy(), "text_encoder_2": clip_g.numpy()})
    assert_same(Embedding.load(path, token="dog"), dog)
    assert_same(Embedding.load(path, token="cat"), embedding_of("cat", sd))
    said = refusal(path)
    assert "it holds 2 words, " in said and "'dog'" in said and "say which with token=" in said
    safetensors.torch.save_file(lora, path)
    assert "a model or a LoRA" in refusal(path)


def test_onetrainer_files_with_output_embeddings_load_their_input_part(tmp_path):
    first, second = torch.randn(2, 768), torch.randn(2, 1280)
    path = tmp_path / "toy.safetensors"
    safetensors.torch.save_file(
        {"clip_l": first, "clip_g": second, "clip_l_out": first + 1, "clip_g_out": second + 1}, path
    )
    loaded = Embedding.load(path)
    assert_same(loaded, Embedding("toy", {"text_encoder": first.numpy(), "text_encoder_2": second.numpy()}))
    assert "its input embedding alone: clip_g_out and clip_l_out" in loaded.caveat
    safetensors.torch.save_file({"clip_l_out": first}, path)
    assert "it has only clip_l_out: OneTrainer's output embedding" in refusal(path)


@pytest.mark.parametrize(
    "entries", [{"t5": 4096}, {"clip_l": 768, "clip_g": 1280, "t5xxl": 4096}, {"emb_params": 4096}, {"<x>": 4096}]
)
def test_words_for_t5(tmp_path, entries):
    safetensors.torch.save_file(
        {key: torch.ones(1, width) for key, width in entries.items()}, tmp_path / "a.safetensors"
    )
    assert "a word for the T5 text encoder of SD3 or Flux" in refusal(tmp_path / "a.safetensors")


def test_a_jpeg_is_called_one(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "card.png", format="JPEG")
    assert refusal(tmp_path / "card.png").startswith(
        f"{tmp_path / 'card.png'}: a JPEG picture, and image cards are PNG"
    )


def test_what_the_caller_allowed_pytorch_to_load_stays_allowed(tmp_path):
    torch.save(a1111_file(torch.ones(1, 768)), tmp_path / "a.pt")
    # PyTorch keeps them in a set, so that the order of the list may change with every addition.
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([torch.nn.ParameterDict]):
        Embedding.load(tmp_path / "a.pt")
        assert torch.nn.ParameterDict in torch.serialization.get_safe_globals()
    Embedding.load(tmp_path / "a.pt")
    assert set(torch.serialization.get_safe_globals()) == before


def test_inspect_goes_on_after_a_file_that_it_cannot_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.pt").write_bytes(b"hello")
    torch.save(a1111_file(torch.ones(1, 768)), "my style.pt")
    assert main.main(["embedding", "inspect", "broken.pt", "my style.pt"]) == 0
    out = capsys.readouterr().out
    assert "not read: broken.pt: " in out
    assert "  word     my-style\n" in out and "  stored   mein-stil: the name in the file" in out
    assert "  note     its name 'my style' has spaces: write my-style in prompts" in out
    assert main.main(["embedding", "inspect", "broken.pt"]) == 2
    assert main.main(["embedding", "inspect", "broken.pt", "none.pt"]) == 2


def test_warnings_for_other_programs(tmp_path, monkeypatch, capsys):
    def vectors(n):
        return {"text_encoder": np.ones((n, 768), np.float32)}

    assert word_warnings(Embedding("<cat>", vectors(4))) == word_warnings(Embedding("<Cat>", vectors(1))) == []
    (said,) = word_warnings(Embedding("<Cat>", vectors(4)))
    assert "save it as <cat>, or write <Cat> <Cat>_1 <Cat>_2 ... there" in said
    for known in ("cat", "Cat", "style"):
        assert f"{known} is a token of CLIP's already" in word_warnings(Embedding(known, vectors(1)))[0]
    monkeypatch.chdir(tmp_path)
    word(2, token="<Cat>").save("a.safetensors")
    assert main.main(["embedding", "convert", "a.safetensors", "b.pt", "--token", "Cat"]) == 0
    assert capsys.readouterr().err.count("warning: ") == 2
    assert main.main(["embedding", "convert", "a.safetensors", "b.pt", "--token", "<cat>"]) == 0
    assert capsys.readouterr().err == ""
