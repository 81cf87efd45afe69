import os

import numpy as np
import pytest
import safetensors.torch
import torch
from words import a1111_file, as_read, assert_same, numbers, refusal, sdxl_word, word

from ti_jax.embeddings import Embedding, check_fits
from ti_jax.embeddings.diffusers_format import first_path, second_path
from ti_jax.errors import InputError

SUFFIXES = [("diffusers", ".safetensors"), ("diffusers", ".bin"), ("a1111", ".pt"), ("comfyui", ".safetensors")]


# -- in memory


def test_a_word_in_memory():
    vectors = np.ones((2, 768), np.float64)
    embedding = Embedding("<x>", {"text_encoder": vectors}, {"steps": 3})
    vectors[:] = 5
    assert embedding.vectors["text_encoder"].dtype == np.float32 and (embedding.vectors["text_encoder"] == 1).all()
    with pytest.raises(ValueError, match="read-only"):
        embedding.vectors["text_encoder"][0] = 2
    assert (
        embedding.num_vectors == 2 and embedding.dims == {"text_encoder": 768} and embedding.metadata == {"steps": "3"}
    )
    assert repr(embedding) == "Embedding('<x>', text_encoder [2, 768])"
    # In the order of the text encoders, whatever order they came in.
    both = Embedding("<x>", {"text_encoder_2": np.ones((1, 4)), "text_encoder": np.ones((1, 3))})
    assert list(both.dims.items()) == [("text_encoder", 3), ("text_encoder_2", 4)]


@pytest.mark.parametrize(
    ("token", "vectors", "why"),
    [
        ("", {"text_encoder": np.ones((1, 4))}, "must be one word without spaces"),
        ("my cat", {"text_encoder": np.ones((1, 4))}, "must be one word without spaces"),
        ("<x>", {}, "a word has vectors for text_encoder and text_encoder_2"),
        ("<x>", {"unet": np.ones((1, 4))}, "not for .'unet'."),
        ("<x>", {"text_encoder": np.ones(4)}, r"the shape \[4\], expected \[n, D\]"),
        ("<x>", {"text_encoder": np.ones((0, 4))}, r"the shape \[0, 4\]"),
        ("<x>", {"text_encoder": np.array([[1, np.nan]])}, "NaN or infinite"),
        ("<x>", {"text_encoder": np.array([[1, np.inf]])}, "NaN or infinite"),
        (
            "<x>",
            {"text_encoder": np.ones((1, 4)), "text_encoder_2": np.ones((2, 4))},
            "differs: 1 .* and 2 for text_enc",
        ),
    ],
)
def test_what_is_no_word(token, vectors, why):
    with pytest.raises(InputError, match=why):
        Embedding(token, vectors)


# -- there and back


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("dim", [768, 1024, 192])
@pytest.mark.parametrize(("form", "suffix"), SUFFIXES)
def test_round_trip(tmp_path, form, suffix, dim, n):
    embedding = word(n, dim)
    embedding.save(tmp_path / f"a{suffix}", format=form)
    assert os.listdir(tmp_path) == [f"a{suffix}"]
    assert_same(Embedding.load(tmp_path / f"a{suffix}"), as_read(embedding, tmp_path / "a", form))
    renamed = Embedding.load(str(tmp_path / f"a{suffix}"), token="sks")
    assert_same(renamed, Embedding("sks", embedding.vectors))


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("dims", [(768, 1280), (32, 64)])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_round_trip_of_an_sdxl_word_in_diffusers_two_files(tmp_path, suffix, dims, n):
    if suffix == ".bin" and dims != (768, 1280):
        dims = (768, 1280)  # only safetensors have room for a note of what belongs together
    embedding = sdxl_word(n, dims)
    embedding.save(tmp_path / f"learned_embeds{suffix}")
    assert sorted(os.listdir(tmp_path)) == [f"learned_embeds{suffix}", f"learned_embeds_2{suffix}"]
    for name in os.listdir(tmp_path):
        assert_same(Embedding.load(tmp_path / name), embedding)
        assert Embedding.load(tmp_path / name, token="sks").token == "sks"


@pytest.mark.parametrize("n", [1, 4])
def test_round_trip_of_an_sdxl_word_in_one_file(tmp_path, n):
    embedding = sdxl_word(n)
    embedding.save(tmp_path / "a.safetensors", format="comfyui")
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert_same(Embedding.load(tmp_path / "a.safetensors"), embedding)


@pytest.mark.parametrize("form", ["diffusers", "comfyui"])
@pytest.mark.parametrize("dim", [1280, 64])
def test_the_second_half_alone(tmp_path, form, dim):
    half = Embedding("<x>", {"text_encoder_2": numbers(2, dim)})
    half.save(tmp_path / "a.safetensors", format=form)
    assert_same(Embedding.load(tmp_path / "a.safetensors"), half)


def test_metadata_goes_along(tmp_path):
    metadata = {
        "base_model": "sd-v1-5",
        "steps": "500",
        "token": "<cat-toy>",
        "initializer_token": "toy",
        "note": "ünï",
    }
    for form in ("diffusers", "comfyui"):
        word(metadata=metadata).save(tmp_path / "a.safetensors", format=form)
        assert Embedding.load(tmp_path / "a.safetensors").metadata == metadata
        renamed = Embedding.load(tmp_path / "a.safetensors", token="sks")
        assert renamed.metadata == {**metadata, "token": "sks"}
        renamed.save(tmp_path / "b.safetensors", format=form)
        assert_same(Embedding.load(tmp_path / "b.safetensors"), renamed)
    sdxl_word(metadata=metadata).save(tmp_path / "c.safetensors")
    assert Embedding.load(tmp_path / "c.safetensors").metadata == metadata
    word(metadata=metadata).save(tmp_path / "a.pt", format="a1111")
    assert Embedding.load(tmp_path / "a.pt").metadata == {"base_model": "sd-v1-5", "steps": "500"}


@pytest.mark.parametrize("token", ["*", "emb_params", "clip_l", "string_to_param", "<ünï>", "sks"])
@pytest.mark.parametrize(("form", "suffix"), [entry for entry in SUFFIXES if entry[1] != ".bin"])
def test_words_that_look_like_a_format(tmp_path, form, suffix, token):
    embedding = word(token=token)
    embedding.save(tmp_path / f"a{suffix}", format=form)
    assert_same(Embedding.load(tmp_path / f"a{suffix}"), as_read(embedding, tmp_path / "a", form))


# -- what others write


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(768,), (1, 768), (4, 768)])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_diffusers_files(tmp_path, suffix, shape, dtype):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    path = tmp_path / f"learned_embeds{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file({"<cat-toy>": tensor}, path, metadata={"format": "pt"})
    else:
        torch.save({"<cat-toy>": tensor}, path)
    embedding = Embedding.load(path)
    assert embedding.token == "<cat-toy>" and embedding.metadata == {}
    np.testing.assert_array_equal(embedding.vectors["text_encoder"], tensor.float().reshape(-1, 768).numpy())
    if suffix != ".pt":
        assert_same(Embedding.load(tmp_path), embedding)


def test_old_pickles_that_are_no_zip(tmp_path):
    tensor = torch.nn.Parameter(torch.randn(2, 768))
    torch.save({"<x>": tensor}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(Embedding.load(tmp_path / "a.bin").vectors["text_encoder"], tensor.detach().numpy())


def test_the_content_tells_the_format_not_the_suffix(tmp_path):
    word().save(tmp_path / "a.safetensors")
    os.rename(tmp_path / "a.safetensors", tmp_path / "a.bin")
    word().save(tmp_path / "a.pt", format="a1111")
    os.rename(tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert_same(Embedding.load(tmp_path / "a.bin"), word())
    assert_same(Embedding.load(tmp_path / "b.safetensors"), word(token="b"))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("steps", ["", "-steps-500"])
def test_two_files_of_diffusers_sdxl_script(tmp_path, suffix, steps):
    tensors = [torch.randn(2, 768).half(), torch.randn(2, 1280).half()]
    paths = [tmp_path / f"learned_embeds{steps}{suffix}", tmp_path / f"learned_embeds_2{steps}{suffix}"]
    for path, tensor in zip(paths, tensors, strict=True):
        if suffix == ".bin":
            torch.save({"<x>": tensor}, path)
        else:
            safetensors.torch.save_file({"<x>": tensor}, path, metadata={"format": "pt"})
    for path in paths:
        embedding = Embedding.load(path)
        assert embedding.dims == {"text_encoder": 768, "text_encoder_2": 1280}
        for vectors, tensor in zip(embedding.vectors.values(), tensors, strict=True):
            np.testing.assert_array_equal(vectors, tensor.float().numpy())


def test_files_side_by_side_that_are_no_pair(tmp_path):
    save = safetensors.torch.save_file
    # Two versions of a word for SD1.x; a word for another model; another word; another number of vectors.
    for second in (
        {"<x>": torch.ones(1, 768)},
        {"<x>": torch.ones(1, 1024)},
        {"<y>": torch.ones(1, 1280)},
        {"<x>": torch.ones(2, 1280)},
    ):
        save({"<x>": torch.zeros(1, 768)}, tmp_path / "cat.safetensors")
        save(second, tmp_path / "cat_2.safetensors")
        assert Embedding.load(tmp_path / "cat.safetensors").dims == {"text_encoder": 768}
        assert len(Embedding.load(tmp_path / "cat_2.safetensors").dims) == 1
    # A word of ours for SD1.x, where an SDXL word lay before.
    sdxl_word().save(tmp_path / "a.safetensors")
    word().save(tmp_path / "a.safetensors")
    assert_same(Embedding.load(tmp_path / "a.safetensors"), word())
    assert f"{tmp_path / 'a.safetensors'} is not its other half" in refusal(tmp_path / "a_2.safetensors")


def test_halves_of_different_saves_are_not_joined(tmp_path):
    sdxl_word().save(tmp_path / "a.safetensors")
    later = Embedding("<cat-toy>", {name: value + 1 for name, value in sdxl_word().vectors.items()})
    later.save(tmp_path / "b.safetensors")
    os.replace(tmp_path / "b_2.safetensors", tmp_path / "a_2.safetensors")
    for name, other in (("a", "a_2"), ("a_2", "a")):
        said = refusal(tmp_path / f"{name}.safetensors")
        assert f"one half of an SDXL word, and {tmp_path / other}.safetensors is not its other half" in said
    os.remove(tmp_path / "a_2.safetensors")
    assert "a_2.safetensors with the other half is missing" in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["learned_embeds.safetensors", "learned_embeds-steps-7.bin", "cat.safetensors"])
def test_names_of_the_second_half(tmp_path, name):
    second = second_path(tmp_path / name)
    assert second.name == {"l": name.replace("embeds", "embeds_2"), "c": "cat_2.safetensors"}[name[0]]
    assert first_path(second) == tmp_path / name and first_path(tmp_path / name) is None


def test_automatic1111_files(tmp_path):
    tensor = torch.randn(3, 768)
    torch.save(a1111_file(tensor), tmp_path / "a.pt")
    embedding = Embedding.load(tmp_path / "a.pt")
    assert_same(embedding, Embedding("a", {"text_encoder": tensor.numpy()}))
    assert embedding.metadata == {"steps": "1999", "sd_checkpoint": "6ce0161689", "base_model": "v1-5-pruned-emaonly"}
    assert Embedding.load(tmp_path / "a.pt", token="<s>").token == "<s>"
    # An unnamed one, and one that was saved while it was a parameter.
    parameter = torch.nn.Parameter(tensor.half())
    torch.save(a1111_file(parameter, name=None, step=None, sd_checkpoint=None), tmp_path / "stil.pt")
    embedding = Embedding.load(tmp_path / "stil.pt")
    assert embedding.token == "stil" and embedding.metadata == {"base_model": "v1-5-pruned-emaonly"}
    np.testing.assert_array_equal(embedding.vectors["text_encoder"], tensor.half().float().numpy())


def test_files_of_the_papers_code(tmp_path):
    """`EmbeddingManager.save`: an nn.ParameterDict, token ids as tensors, no name."""
    tensor = torch.randn(2, 768)
    torch.save(
        {
            "string_to_token": {"*": torch.tensor(265)},
            "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(tensor)}),
        },
        tmp_path / "cat.pt",
    )
    assert_same(Embedding.load(tmp_path / "cat.pt"), Embedding("cat", {"text_encoder": tensor.numpy()}))


def test_files_of_the_papers_code_with_several_words(tmp_path):
    tensors = {"<a>": torch.randn(2, 768), "<b>": torch.randn(1, 768)}
    for parameters in (dict(tensors), torch.nn.ParameterDict({k: torch.nn.Parameter(v) for k, v in tensors.items()})):
        torch.save({"string_to_token": {"<a>": 5, "<b>": 6}, "string_to_param": parameters}, tmp_path / "x.pt")
        for token, tensor in tensors.items():
            expected = Embedding(token, {"text_encoder": tensor.numpy()})
            assert_same(Embedding.load(tmp_path / "x.pt", token=token), expected)
        for kwargs in ({}, {"token": "<c>"}):
            said = refusal(tmp_path / "x.pt", **kwargs)
            assert said == f"{tmp_path / 'x.pt'}: it holds 2 words, '<a>', '<b>'; say which with token="
    torch.save({"string_to_param": {"<a>": tensors["<a>"]}}, tmp_path / "x.pt")
    assert Embedding.load(tmp_path / "x.pt").token == "<a>"


@pytest.mark.parametrize("key", ["emb_params", "emp_params"])
@pytest.mark.parametrize(("dim", "encoder"), [(768, "text_encoder"), (1024, "text_encoder"), (1280, "text_encoder_2")])
def test_files_of_kohya_and_onetrainer(tmp_path, key, dim, encoder):
    tensor = torch.randn(4, dim).bfloat16()
    safetensors.torch.save_file({key: tensor}, tmp_path / "cat-toy.safetensors", metadata={"ss_steps": "100"})
    embedding = Embedding.load(tmp_path / "cat-toy.safetensors")
    assert_same(embedding, Embedding("cat-toy", {encoder: tensor.float().numpy()}))
    assert embedding.metadata == {"ss_steps": "100"}
    assert Embedding.load(tmp_path / "cat-toy.safetensors", token="<cat-toy>").token == "<cat-toy>"


@pytest.mark.parametrize("keys", [("clip_l", "clip_g"), ("clip_g", "clip_l"), ("clip_l",), ("clip_g",)])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_sdxl_files_of_the_model_sites(tmp_path, keys, suffix):
    tensors = {"clip_l": torch.randn(2, 768).half(), "clip_g": torch.randn(2, 1280).half()}
    data = {key: tensors[key] for key in keys}
    path = tmp_path / f"cat{suffix}"
    torch.save(data, path) if suffix == ".pt" else safetensors.torch.save_file(data, path)
    names = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
    expected = {names[key]: tensor.float().numpy() for key, tensor in data.items()}
    assert_same(Embedding.load(path), Embedding("cat", expected))


# -- what others read


def comfyui_reads(path, key):
    """ComfyUI's load_embed, from its description in the order of its attempts."""
    embed = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    if "string_to_param" in embed:
        return next(iter(embed["string_to_param"].values()))
    return embed[key] if key in embed else next(iter(embed.values()))


def automatic1111_reads(path):
    """AUTOMATIC1111's create_embedding_from_data, from its description: tensor, or tensors of an SDXL word."""
    data = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    if "string_to_param" in data:
        parameters = data["string_to_param"]
        assert len(parameters) == 1
        return next(iter(parameters.values()))
    if "clip_g" in data and "clip_l" in data:
        return data
    assert type(data) is dict and len(data) == 1
    return next(iter(data.values()))


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(("form", "suffix"), SUFFIXES)
def test_other_programs_read_what_we_save(tmp_path, form, suffix, n):
    embedding = word(n, metadata={"steps": "500", "base_model": "sd-v1-5"})
    path = tmp_path / f"a{suffix}"
    embedding.save(path, format=form)
    for tensor in (comfyui_reads(path, "clip_l"), automatic1111_reads(path)):
        assert tensor.dtype == torch.float32 and tensor.shape == (n, 768)
        assert tensor.numpy().tobytes() == embedding.vectors["text_encoder"].tobytes()
    if form == "a1111":
        data = torch.load(path, weights_only=True)
        tensor = data["string_to_param"].pop("*")
        assert isinstance(tensor, torch.Tensor)
        assert data == {
            "string_to_token": {"*": 265},
            "string_to_param": {},
            "name": "<cat-toy>",
            "step": 500,
            "sd_checkpoint": None,
            "sd_checkpoint_name": "sd-v1-5",
        }
    if suffix == ".safetensors":
        with safetensors.safe_open(path, framework="pt") as file:
            assert file.metadata()["format"] == "pt" and file.metadata()["token"] == "<cat-toy>"
            assert list(file.keys()) == [{"diffusers": "<cat-toy>", "comfyui": "emb_params"}[form]]


@pytest.mark.parametrize("n", [1, 4])
def test_other_programs_read_our_sdxl_file(tmp_path, n):
    embedding = sdxl_word(n)
    embedding.save(tmp_path / "a.safetensors", format="comfyui")
    read = automatic1111_reads(tmp_path / "a.safetensors")
    assert set(read) == {"clip_l", "clip_g"}
    for key, name in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
        for tensor in (read[key], comfyui_reads(tmp_path / "a.safetensors", key)):
            assert tensor.numpy().tobytes() == embedding.vectors[name].tobytes()


# -- whether it fits


def test_whether_a_word_fits_the_model():
    check_fits(word(dim=768), {"text_encoder": 768}, "a.pt")
    check_fits(sdxl_word(), {"text_encoder": 768, "text_encoder_2": 1280}, "a.pt")
    for embedding, dims, said in [
        (
            word(dim=768),
            {"text_encoder": 1024},
            "SD1.x (768 numbers a vector), but the model here is SD2.x (1024 numbers",
        ),
        (
            word(dim=1024),
            {"text_encoder": 768},
            "SD2.x (1024 numbers a vector), but the model here is SD1.x (768 numbers",
        ),
        (sdxl_word(), {"text_encoder": 768}, "SDXL (768 and 1280 numbers a vector), but the model here is SD1.x"),
        (
            word(),
            {"text_encoder": 768, "text_encoder_2": 1280},
            "SD1.x (768 numbers a vector), but the model here is SDXL",
        ),
        (word(dim=192), {"text_encoder": 768}, "for a model with 192 numbers a vector, but the model here is SD1.x"),
        (word(), {"text_encoder": 192}, "but the model here is a model with 192 numbers a vector"),
    ]:
        with pytest.raises(InputError) as error:
            check_fits(embedding, dims, "a.pt")
        assert str(error.value).startswith("a.pt: the word '<cat-toy>' is for ") and said in str(error.value)
        assert "\n" not in str(error.value)
