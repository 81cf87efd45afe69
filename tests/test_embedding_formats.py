"""Every format for every family: ours in diffusers itself, other programs' here, and all of them into each other."""

import itertools

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import VOCAB
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from words import as_read, assert_same, numbers, refusal, sdxl_word, word

from ti_jax.config import ASSETS
from ti_jax.embeddings import Embedding, check_fits
from ti_jax.embeddings.formats import FORMATS, WRITTEN, format_for, read_as_found
from ti_jax.errors import InputError

ONE_ENCODER = [("diffusers", ".safetensors"), ("diffusers", ".bin"), ("a1111", ".pt"), ("comfyui", ".safetensors"),
               ("card", ".png")]  # fmt: skip
TWO_ENCODERS = [("diffusers", ".safetensors"), ("diffusers", ".bin"), ("comfyui", ".safetensors")]
MAKERS = {"SD1.x": lambda n: word(n, 768), "SD2.x": lambda n: word(n, 1024), "SDXL": sdxl_word}
CASES = [(family, *entry) for family in ("SD1.x", "SD2.x") for entry in ONE_ENCODER]
CASES += [("SDXL", *entry) for entry in TWO_ENCODERS]


def encoder(dim, kind=CLIPTextModel):
    return kind(
        CLIPTextConfig(
            vocab_size=VOCAB, hidden_size=dim, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
            max_position_embeddings=40, projection_dim=8, bos_token_id=VOCAB - 2, eos_token_id=VOCAB - 1,
            pad_token_id=VOCAB - 1,
        )
    )  # fmt: skip


def tokenizer():
    return CLIPTokenizer.from_pretrained(ASSETS / "mini-sd" / "tokenizer")


def pipeline(family):
    """diffusers' pipeline of the family with text encoders of its widths, and nothing else."""
    nothing = {"vae": None, "unet": None, "scheduler": None}
    if family == "SDXL":
        return StableDiffusionXLPipeline(
            text_encoder=encoder(768), tokenizer=tokenizer(),
            text_encoder_2=encoder(1280, CLIPTextModelWithProjection), tokenizer_2=tokenizer(), **nothing,
        )  # fmt: skip
    return StableDiffusionPipeline(
        text_encoder=encoder({"SD1.x": 768, "SD2.x": 1024}[family]), tokenizer=tokenizer(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, **nothing,
    )  # fmt: skip


# -- ours, in diffusers


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(("family", "form", "suffix"), [case for case in CASES if case[1] != "card"])
def test_diffusers_loads_what_we_save(tmp_path, family, form, suffix, n):
    embedding = MAKERS[family](n)
    embedding.save(tmp_path / f"learned_embeds{suffix}", format=form)
    pipe = pipeline(family)
    for name, vectors in embedding.vectors.items():
        half = "_2" if name == "text_encoder_2" else ""
        source = str(tmp_path / f"learned_embeds{half}{suffix}")
        if family == "SDXL" and form == "comfyui":  # as diffusers' documentation says
            source = safetensors.torch.load_file(tmp_path / f"learned_embeds{suffix}")["clip_g" if half else "clip_l"]
        keywords = {"text_encoder": getattr(pipe, name), "tokenizer": getattr(pipe, f"tokenizer{half}")}
        pipe.load_textual_inversion(source, token="<cat-toy>" if form == "comfyui" else None, **keywords)
        ids = keywords["tokenizer"].convert_tokens_to_ids(["<cat-toy>", *(f"<cat-toy>_{i}" for i in range(1, n))])
        assert ids == list(range(VOCAB, VOCAB + n))
        rows = keywords["text_encoder"].get_input_embeddings().weight[ids].detach().numpy()
        assert rows.tobytes() == vectors.tobytes()


# -- round trips


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(("family", "form", "suffix"), CASES)
def test_round_trips_keep_every_bit(tmp_path, family, form, suffix, n):
    embedding = MAKERS[family](n)
    embedding.save(tmp_path / f"a{suffix}", format=form)
    read, found, _ = read_as_found(tmp_path / f"a{suffix}")
    assert_same(read, as_read(embedding, tmp_path / "a", form))
    assert read.family == family and found.name == form and read.caveat == ""


@pytest.mark.parametrize("entries", [ONE_ENCODER, TWO_ENCODERS])
def test_from_each_format_into_each(tmp_path, entries):
    embedding = word(3) if entries is ONE_ENCODER else sdxl_word(3)
    for number, ((first, suffix), (second, other)) in enumerate(itertools.product(entries, repeat=2)):
        embedding.save(tmp_path / f"{number}a{suffix}", format=first)
        Embedding.load(tmp_path / f"{number}a{suffix}", "<cat-toy>").save(tmp_path / f"{number}b{other}", second)
        written = tmp_path / f"{number}b{other}"
        assert_same(Embedding.load(written), as_read(embedding, written, second))


def test_numbers_at_the_edges_keep_every_bit(tmp_path):
    row = np.zeros((1, 768), np.float32)
    row[0, :6] = [-0.0, 1e-45, -1e-38, 3.4028235e38, 1 / 3, -np.float32(0.1)]
    embedding = Embedding("<x>", {"text_encoder": row})
    for form, suffix in ONE_ENCODER:
        embedding.save(tmp_path / f"a{suffix}", format=form)
        assert_same(Embedding.load(tmp_path / f"a{suffix}"), as_read(embedding, tmp_path / "a", form))


# -- theirs


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("dim", [768, 1024])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_kohya_and_invoke_files(tmp_path, suffix, dim, n):
    """kohya's save_weights: {"emb_params": [n, D]} as safetensors or by torch.save; invoke's is the first of them."""
    tensor = torch.from_numpy(numbers(n, dim))
    path = tmp_path / f"toy{suffix}"
    torch.save({"emb_params": tensor}, path) if suffix == ".pt" else safetensors.torch.save_file(
        {"emb_params": tensor}, path
    )
    assert_same(Embedding.load(path), Embedding("toy", {"text_encoder": tensor.numpy()}))
    assert_same(Embedding.load(path, token="<x>"), Embedding("<x>", {"text_encoder": tensor.numpy()}))


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_xti_files(tmp_path, suffix, n):
    """kohya's XTI save_weights: [16 n, D] cut into 16 layers, each [n, D]."""
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((16 * n, 768)).astype(np.float32)).half()
    names = [f"IN0{i}" for i in (1, 2, 4, 5, 7, 8)] + ["MID"] + [f"OUT{i:02d}" for i in range(3, 12)]
    pieces = rows.reshape(16, -1, 768).chunk(16)
    data = {name: piece.squeeze(0).clone() for name, piece in zip(names, pieces, strict=True)}
    path = tmp_path / f"toy{suffix}"
    torch.save(data, path) if suffix == ".pt" else safetensors.torch.save_file(data, path)
    embedding = Embedding.load(path)
    mean = rows.float().reshape(16, n, 768).double().mean(0).float().numpy()
    assert_same(embedding, Embedding("toy", {"text_encoder": mean}))
    assert "the mean of the 16 words" in embedding.caveat
    # What was lost stays said where the word goes on.
    embedding.save(tmp_path / "b.safetensors")
    assert Embedding.load(tmp_path / "b.safetensors").caveat == embedding.caveat
    del data["OUT11"], data["MID"]
    torch.save(data, tmp_path / "c.pt")
    assert "an XTI file without MID, OUT11: not complete" in refusal(tmp_path / "c.pt")
    data |= {"OUT11": torch.ones(n + 1, 768), "MID": torch.ones(n, 768)}
    torch.save(data, tmp_path / "c.pt")
    assert "whose layers differ in their shapes" in refusal(tmp_path / "c.pt")
    with pytest.raises(InputError, match="unknown format 'xti'"):
        embedding.save(tmp_path / "d.safetensors", format="xti")


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_onetrainer_files(tmp_path, dtype, n):
    """OneTrainer's savers: "emp_params", or "clip_l" and "clip_g"; the same with "_out" for its output embeddings."""
    first, second = torch.randn(n, 768).to(dtype), torch.randn(n, 1280).to(dtype)
    path = tmp_path / "toy.safetensors"
    safetensors.torch.save_file({"emp_params": first}, path)
    assert_same(Embedding.load(path), Embedding("toy", {"text_encoder": first.float().numpy()}))
    safetensors.torch.save_file({"clip_l": first, "clip_g": second}, path)
    both = {"text_encoder": first.float().numpy(), "text_encoder_2": second.float().numpy()}
    assert_same(Embedding.load(path), Embedding("toy", both))
    safetensors.torch.save_file({"emp_params_out": first}, path)
    assert "OneTrainer's output embedding" in refusal(path)
    # A word may be called so in diffusers' format all the same.
    safetensors.torch.save_file({"<x_out>": first}, path)
    assert Embedding.load(path).token == "<x_out>"


# -- families


@pytest.mark.parametrize(
    ("dims", "metadata", "family", "said"),
    [
        ((768,), {}, "SD1.x", "SD1.x (768 numbers a vector)"),
        ((1024,), {}, "SD2.x", "SD2.x (1024 numbers a vector)"),
        ((768, 1280), {}, "SDXL", "SDXL (768 and 1280 numbers a vector)"),
        ((None, 1280), {}, "SDXL", "the second text encoder of SDXL alone (1280 numbers a vector)"),
        (
            (768,),
            {"modelspec.architecture": "stable-diffusion-xl-v1-base/textual-inversion"},
            "SDXL",
            "the first text encoder of SDXL alone (768 numbers a vector)",
        ),
        ((768,), {"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL", "the first text encoder of SDXL alone"),
        ((768,), {"ss_base_model_version": "sd_v1"}, "SD1.x", "SD1.x (768"),
        # Metadata never goes against the numbers.
        ((768,), {"modelspec.architecture": "stable-diffusion-v2-768-v/textual-inversion"}, "SD1.x", "SD1.x (768"),
        ((1024,), {"ss_base_model_version": "sd_v1"}, "SD2.x", "SD2.x (1024"),
        ((192,), {"ss_base_model_version": "sd_v1"}, None, "a model with 192 numbers a vector"),
    ],
)
def test_families_are_told_from_lengths_and_metadata(tmp_path, dims, metadata, family, said):
    tensors = {key: torch.ones(2, dim) for key, dim in zip(("clip_l", "clip_g"), dims, strict=False) if dim}
    safetensors.torch.save_file(tensors, tmp_path / "toy.safetensors", metadata=metadata)
    embedding = Embedding.load(tmp_path / "toy.safetensors")
    assert embedding.family == family
    with pytest.raises(InputError) as error:
        check_fits(embedding, {"text_encoder": 4}, "toy.safetensors")
    expected = f"toy.safetensors: the word 'toy' is for {said}"
    assert str(error.value).startswith(expected) and "but the model here is a model with 4 numbers" in str(error.value)


def test_half_an_sdxl_word_is_told_what_it_lacks(tmp_path):
    safetensors.torch.save_file({"clip_g": torch.ones(1, 1280)}, tmp_path / "toy.safetensors")
    with pytest.raises(InputError, match=r"second text encoder of SDXL alone .* but the model here is SDXL .*has both"):
        check_fits(Embedding.load(tmp_path / "toy.safetensors"), {"text_encoder": 768, "text_encoder_2": 1280}, "toy")


def test_the_suffix_tells_the_format_to_write(tmp_path):
    expected = {".safetensors": "diffusers", ".bin": "diffusers", ".pt": "a1111", ".png": "card", ".PNG": "card"}
    assert {suffix: format_for(tmp_path / f"a{suffix}") for suffix in expected} == expected
    with pytest.raises(InputError, match=r"no format has this suffix; use \.safetensors"):
        format_for(tmp_path / "a.ckpt")
    assert {form.name for form in FORMATS} - set(WRITTEN) == {"xti", "cog-sdxl", "bundle", "list", "tensor"}
