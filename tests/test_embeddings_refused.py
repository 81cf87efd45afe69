"""Files that are no learned words, and words that cannot be saved: each is one clear line."""

import os
import pickle
import sys

import pytest
import safetensors.torch
import torch
from permissions import shared_folder, without_rights  # noqa: F401 (a fixture)
from words import a1111_file, assert_same, refusal, sdxl_word, word

from ti_jax.embeddings import Embedding
from ti_jax.embeddings.formats import FORMATS
from ti_jax.errors import InputError


def test_files_that_are_not_there_or_not_readable(tmp_path, shared_folder):  # noqa: F811
    assert refusal(tmp_path / "a.bin") == f"{tmp_path / 'a.bin'}: no such file; give the file of a learned word"
    assert refusal(tmp_path).startswith(
        f"{tmp_path}: a folder without learned_embeds.safetensors or learned_embeds.bin"
    )
    (tmp_path / "f").write_bytes(b"")
    assert "cannot be read (Not a directory)" in refusal(tmp_path / "f" / "a.bin")
    word().save(shared_folder / "a.safetensors")
    (shared_folder / "a.safetensors").chmod(0o000)
    with without_rights():
        assert "cannot be read (Permission denied)" in refusal(shared_folder / "a.safetensors")


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.pt"])
def test_broken_files(tmp_path, name):
    path = tmp_path / name
    word().save(path, format="a1111" if name == "a.pt" else "diffusers")
    whole = path.read_bytes()
    for cut in (1, 9, 20, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        said = refusal(path)
        assert said.startswith(f"{path}: ") and ("download it again" in said or "get the word as" in said), said
    for content in (
        b"",
        b"hello, this is a text file",
        b"<!DOCTYPE html><html>",
        b"version https://git-lfs.github.com/spec/v1\n",
    ):
        path.write_bytes(content)
        assert refusal(path).startswith(f"{path}: ")
    path.write_bytes(b"\xff" * 8 + b"{" + b"x" * 100)
    assert "not a complete safetensors file" in refusal(path)
    path.write_bytes((20).to_bytes(8, "little") + b'{"a":{"dtype":"F32" ')
    assert "not a complete safetensors file" in refusal(path)


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    torch.save({"<x>": Harm()}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    said = refusal(tmp_path / "a.pt")
    assert "refused: it holds" in said and "system, which could run code when loaded" in said
    for protocol in (2, 4):
        (tmp_path / "b.pt").write_bytes(pickle.dumps({"<x>": Harm()}, protocol=protocol))
        assert refusal(tmp_path / "b.pt").startswith(f"{tmp_path / 'b.pt'}: ")
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.pt"]


def test_files_of_no_known_format_say_what_they_hold(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a.weight": torch.ones(1, 768), "b.weight": torch.ones(1, 768).half()}, path)
    said = refusal(path)
    assert "it holds 'a.weight' [1, 768] float32, 'b.weight' [1, 768] float16; known are card" in said
    assert all(form.name in said and form.looks_like in said for form in FORMATS)
    safetensors.torch.save_file({}, path)
    assert "it holds nothing" in refusal(path)
    safetensors.torch.save_file({f"k{i}": torch.ones(1) for i in range(9)}, path)
    assert "'k3' [1] float32 and 5 more" in refusal(path)
    for value, what in [
        ([torch.ones(1, 768)], "a list"),
        ({"<x>": 3}, "'<x>' int"),
        ({"string_to_param": 3}, "'string_to_param' int"),
    ]:
        torch.save(value, path)
        assert f"it holds {what}; known are" in refusal(path)


def test_models_are_told_from_words(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({f"layers.{i}.weight": torch.ones(2, 2) for i in range(65)}, path)
    assert "65 entries (layers.0.weight" in refusal(path) and "a model or a LoRA" in refusal(path)
    torch.save({f"layers.{i}.weight": torch.ones(2, 2) for i in range(65)}, path)
    assert "65 entries" in refusal(path)
    # Without the memory that the numbers would take.
    torch.save({"<x>": torch.ones(1).expand(1 << 30, 768)}, path)
    assert "far too large for a learned word" in refusal(path)
    safetensors.torch.save_file({"<x>": torch.ones(11_000, 1000)}, path)
    assert "far too large for a learned word" in refusal(path)
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(3 << 30)
    assert "more than 100,000,000 bytes, far too large for a learned word" in refusal(path)


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.ones(1, 2, 768), r"has the shape [1, 2, 768]"),
        (torch.ones(()), "has the shape []"),
        (torch.ones(0, 768), "has the shape [0, 768]"),
        (torch.ones(1, 768, dtype=torch.int64), "holds int64 numbers"),
        (torch.tensor([[1.0, float("nan")]]), "holds NaN or infinite numbers"),
        (torch.tensor([[1.0, float("inf")]]), "holds NaN or infinite numbers"),
        (torch.tensor([[1.0, 1e300]], dtype=torch.float64), "holds NaN or infinite numbers"),
        (torch.ones(1, 768, dtype=torch.complex64), "holds complex64 numbers"),
        (torch.ones(1, 768, dtype=torch.float8_e4m3fn), "not plain numbers"),
        (torch.ones(1, 768).to_sparse(), "not plain numbers"),
    ],
)
@pytest.mark.parametrize(
    "wrap", [lambda t: {"<x>": t}, a1111_file, lambda t: {"emb_params": t}, lambda t: {"clip_g": t}]
)
def test_tensors_that_are_no_vectors(tmp_path, tensor, why, wrap):
    path = tmp_path / "a.pt"
    torch.save(wrap(tensor), path)
    assert refusal(path).startswith(f"{path}: ") and why in refusal(path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_safetensors_of_other_numbers(tmp_path, dtype):
    safetensors.torch.save_file({"<x>": torch.ones(1, 8).to(dtype)}, tmp_path / "a.safetensors")
    said = refusal(tmp_path / "a.safetensors")
    assert "'<x>' holds" in said and "a word has numbers of F64, F32, F16, BF16" in said


def test_words_that_cannot_be(tmp_path):
    safetensors.torch.save_file({"emb_params": torch.ones(1, 768)}, tmp_path / "my cat.safetensors")
    assert "'my cat': must be one word without spaces" in refusal(tmp_path / "my cat.safetensors", token="my cat")
    assert Embedding.load(tmp_path / "my cat.safetensors", token="<cat>").token == "<cat>"
    safetensors.torch.save_file(
        {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(2, 1280)}, tmp_path / "a.safetensors"
    )
    assert "number of vectors differs" in refusal(tmp_path / "a.safetensors")
    torch.save({"string_to_param": {}}, tmp_path / "a.pt")
    assert "there is no word in it" in refusal(tmp_path / "a.pt")


def test_saves_that_are_refused(tmp_path):
    def said(embedding, name, **kwargs):
        with pytest.raises(InputError) as error:
            embedding.save(tmp_path / name, **kwargs)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert said(word(), "a.pt", format="webui") == (
        "unknown format 'webui' for a learned word; known are card, a1111, comfyui, diffusers"
    )
    assert "a .safetensors or a .bin file" in said(word(), "a.png")
    assert "is a .pt file" in said(word(), "a.safetensors", format="a1111")
    assert "is a .safetensors file" in said(word(), "a.pt", format="comfyui")
    assert "save it with format 'comfyui', which it reads too" in said(sdxl_word(), "a.pt", format="a1111")
    assert "there is no such folder" in said(word(), "missing/a.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_save_that_fails_leaves_the_old_word(shared_folder):  # noqa: F811
    word().save(shared_folder / "a.safetensors")
    shared_folder.chmod(0o555)
    with without_rights(), pytest.raises(InputError, match="no permission"):
        word(4).save(shared_folder / "a.safetensors")
    assert_same(Embedding.load(shared_folder / "a.safetensors"), word())


def test_without_pytorch_only_pickles_are_refused(tmp_path, monkeypatch):
    word().save(tmp_path / "a.pt", format="a1111")
    monkeypatch.setitem(sys.modules, "torch", None)
    word().save(tmp_path / "a.safetensors")
    assert_same(Embedding.load(tmp_path / "a.safetensors"), word())
    for attempt in (lambda: Embedding.load(tmp_path / "a.pt"), lambda: word().save(tmp_path / "b.bin")):
        with pytest.raises(InputError, match=r"need PyTorch \(pip install 'ti_jax\[torch\]'\)"):
            attempt()
