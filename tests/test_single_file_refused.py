"""Files that are no checkpoint of a family that is read, or a damaged one: one line that says so, and nothing worse."""

import functools
import json
import re
import time
import zipfile
from pathlib import Path

import jax.numpy as jnp
import ldm_checkpoints
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors.torch import save_file

from ti_jax.errors import InputError
from ti_jax.models.networks import make_networks, network_shapes
from ti_jax.weights.identity import Identity
from ti_jax.weights.single_file import open_file
from ti_jax.weights.sources import open_source

UNET = "model.diffusion_model."


@functools.cache
def state_of(family):
    return ldm_checkpoints.original(family, ldm_checkpoints.parts(family, vocab_size=300))


@functools.cache
def shapes_of(configs):
    """Trees that the modules of these configs want; tracing them is most of the time that a file takes."""
    return network_shapes(make_networks(json.loads(configs), jnp.float32))


def load(path, prediction_type="epsilon"):
    """The trees of a checkpoint. (Without tokenizer: a vocabulary of 300 keeps the files small.)"""
    with open_source(path, None, prediction_type) as source:
        return source.load(shapes_of(json.dumps(source.configs)), jnp.float32, Identity())


def write(path, state):
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path)
    return path


def refusal(path):
    with pytest.raises(InputError) as error:
        load(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


# -- other models, and parts of one


def without(family, *prefixes):
    return {name: tensor for name, tensor in state_of(family).items() if not name.startswith(prefixes)}


def with_inputs(family, channels):
    return state_of(family) | {
        f"{UNET}input_blocks.0.0.weight": torch.ones(32 if family != "sd2" else 64, channels, 3, 3)
    }


def refiner():
    state = without("sdxl", "conditioner.embedders.0.")
    return {name.replace("conditioner.embedders.1.", "conditioner.embedders.0."): t for name, t in state.items()}


ONE = torch.ones(2, 2)
OTHER_FILES = {
    "inpainting": (lambda: with_inputs("sd1", 9), "an inpainting model: its UNet takes 9 channels, not 4"),
    "inpainting-xl": (lambda: with_inputs("sdxl", 9), "an inpainting model"),
    "depth": (lambda: with_inputs("sd2", 5), "a depth-to-image model"),
    "pix2pix": (lambda: with_inputs("sd1", 8), "an image-editing model"),
    "refiner": (refiner, "the refiner of Stable Diffusion XL; give the base model"),
    "no VAE": (lambda: without("sd2", "first_stage_model."), "a Stable Diffusion 2.x checkpoint without its VAE"),
    "no text encoder": (lambda: without("sd1", "cond_stage_model."), "a checkpoint without its text encoder"),
    "no second": (
        lambda: without("sdxl", "conditioner.embedders.1."),
        "a Stable Diffusion XL checkpoint without one of its text encoders (conditioner.embedders.1.model.*)",
    ),
    "no UNet": (lambda: without("sd1", UNET), "a checkpoint without its UNet"),
    "unclip": (
        lambda: state_of("sd2") | {f"{UNET}label_emb.0.0.weight": ONE},
        "a Stable Diffusion 2.x model that is conditioned on pictures too",
    ),
    "edm": (lambda: state_of("sdxl") | {"edm_vpred.sigma_max": ONE}, "an EDM model"),
    "SD3": (lambda: {f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": ONE}, "a Stable Diffusion 3 model"),
    "Flux": (lambda: {"double_blocks.0.img_attn.norm.key_norm.scale": ONE}, "a Flux model"),
    "LoRA of kohya": (lambda: {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": ONE}, "a LoRA"),
    "LoRA of diffusers": (lambda: {"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": ONE}, "a LoRA"),
    "ControlNet": (lambda: {"control_model.input_hint_block.0.weight": ONE}, "a ControlNet"),
    "component": (lambda: {"down_blocks.0.resnets.0.conv1.weight": ONE}, "one component in diffusers' layout"),
    "VAE": (lambda: {"encoder.down.0.block.0.conv1.weight": ONE}, "a VAE alone"),
    "UNet": (lambda: {"input_blocks.0.0.weight": ONE}, "a UNet alone"),
    "word": (lambda: {"emb_params": ONE}, "a learned word, not a model"),
    "something": (lambda: {"a": ONE}, "no Stable Diffusion checkpoint; ti_jax reads"),
    "nothing": (dict, "holds no tensors"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files(tmp_path, name):
    make, said = OTHER_FILES[name]
    assert said in refusal(write(tmp_path / "model.safetensors", make()))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GGUF\x03\0\0\0" + bytes(100), "a GGUF file, whose quantised weights ti_jax does not read"),
        (b"<!DOCTYPE html><html></html>", "a web page and not a model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a git-lfs pointer"),
        (b"", "an empty file"),
        (bytes(100), "neither a safetensors file nor a PyTorch checkpoint"),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt", "gguf"])
def test_no_tensors_at_all(tmp_path, content, said, suffix):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    assert said in refusal(path)


def test_all_names_in_one_line(tmp_path):
    state = dict(state_of("sdxl"))
    fused = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias"
    del state[f"{UNET}middle_block.2.out_layers.0.bias"], state["first_stage_model.decoder.up.1.block.0.conv1.bias"]
    state |= {
        "model.something": ONE,
        f"{UNET}output_blocks.9.0.in_layers.0.weight": ONE,
        "conditioner.embedders.1.model.transformer.resblocks.0.extra": ONE,
        "conditioner.embedders.0.transformer.text_model.extra": ONE,
        fused: torch.ones(3 * 65),
        "first_stage_model.quant_conv.bias": torch.ones(8, dtype=torch.int8),
    }
    message = refusal(write(tmp_path / "model.safetensors", state))
    assert "tensors that are not those of a Stable Diffusion XL checkpoint: " in message
    missing = "2 missing: unet/mid_block/resnets_1/norm2/bias, vae/decoder/up_blocks_0/resnets_0/conv1/bias"
    assert missing in message and "4 unexpected: " in message
    for name in ("model.something", "output_blocks.9.0.in_layers.0.weight", "resblocks.0.extra", "text_model.extra"):
        assert name in message
    assert f"1 mis-shaped: {fused} [65]: [65] where the model has [64]" in message
    assert "1 of a dtype that is not read: first_stage_model.quant_conv.bias I8" in message


def test_given_twice(tmp_path):
    name = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    state = state_of("sd1") | {name.replace("text_model.", ""): state_of("sd1")[name].clone()}
    assert "1 given twice: cond_stage_model.transformer." in refusal(write(tmp_path / "model.safetensors", state))


@pytest.mark.parametrize(
    ("family", "name", "tensor", "said"),
    [
        ("sd1", f"{UNET}label_emb_not", ONE, "1 unexpected"),
        ("sd1", f"{UNET}input_blocks.0.0.weight", torch.ones(3), "input_blocks.0.0.weight has the shape [3]"),
        ("sd1", f"{UNET}input_blocks.1.0.out_layers.3.weight", torch.ones(48, 48, 3, 3), "does not divide 48"),
        ("sd2", "cond_stage_model.model.token_embedding.weight", torch.ones(300, 0), "has the shape [300, 0]"),
        ("sd2", "cond_stage_model.model.token_embedding.weight", torch.ones(300, 40), "num_attention_heads is 0"),
        ("sd2", "cond_stage_model.model.token_embedding.weight", torch.ones(300, 64), "text of width 128 where the"),
        ("sdxl", f"{UNET}label_emb.0.0.weight", torch.ones(128, 81), "81 numbers in addition to the text"),
    ],
)
def test_sizes_that_are_none(tmp_path, family, name, tensor, said):
    assert said in refusal(write(tmp_path / "model.safetensors", state_of(family) | {name: tensor}))


def test_numbers_that_are_not_in_the_file(tmp_path):
    """A tensor of any size can be declared over one stored number."""
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    path = tmp_path / "model.ckpt"
    torch.save(state_of("sd1") | {name: torch.ones(1).expand(2**20, 128)}, path)
    assert f"{name.partition('.text_model.')[2]} has more numbers than the file" in refusal(path).replace(
        "text_model.", ""
    )


@pytest.mark.parametrize("kind", ["sparse", "nested", "meta", "number"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_pickles_of_more_than_plain_tensors(tmp_path, kind):
    tensor = {
        "sparse": lambda: ONE.to_sparse(),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        "meta": lambda: ONE.to("meta"),
        "number": lambda: 3,
    }[kind]()
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": tensor}}, path)
    assert re.search("not a dict of tensors|refused|not a complete", refusal(path))


# -- damage


def kibibytes(what):
    return int(re.search(what + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (exec, (f"open({str(self.target)!r}, 'w').close()",))


def nested(value, depth):
    for level in range(depth):
        value = {"a": value} if level % 2 else [value]
    return value


def mutations(tmp_path, seed):
    """(what was done, suffix, bytes of the file) of damaged checkpoints."""
    rng = np.random.default_rng(seed)
    good = write(tmp_path / "good.safetensors", state_of("sd1")).read_bytes()
    header_end = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:header_end])

    def with_header(header):
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + good[header_end:]

    def flipped(content, start, end, count):
        content = bytearray(content)
        for place in rng.integers(start, end, count):
            content[place] ^= 1 << rng.integers(8)
        return bytes(content)

    for size in (1, 7, 8, 9, 100, header_end - 1, header_end, header_end + 1, len(good) - 1):
        yield f"cut to {size}", "safetensors", good[:size]
    for _ in range(40):
        yield "bits of the header", "safetensors", flipped(good, 8, header_end, rng.integers(1, 4))
    for _ in range(10):
        yield "bits of the numbers", "safetensors", flipped(good, header_end, len(good), 20)
    for length in (0, 1, header_end, 2**31, 2**62, 2**64 - 1):
        yield f"header of {length}", "safetensors", length.to_bytes(8, "little") + good[8:]
    names = list(header)
    for _ in range(10):
        name = names[rng.integers(len(names))]
        for change in ({"shape": [2**40, 2**20]}, {"shape": [0, 2**62]}, {"dtype": "I64"}, {"dtype": "F4"}):
            yield f"{name} {change}", "safetensors", with_header(header | {name: header[name] | change})
    text = json.dumps(header)
    twice = "{" + text[1:].split("}", 1)[0] + "}, " + text[1:]
    yield "a name twice", "safetensors", len(twice).to_bytes(8, "little") + twice.encode() + good[header_end:]
    many = header | {f"{UNET}middle_block.1.transformer_blocks.{i}.norm1.weight": {
        "dtype": "F32", "shape": [0], "data_offsets": [len(good) - header_end] * 2} for i in range(2, 5000)
    }  # fmt: skip
    yield "5000 layers", "safetensors", with_header(many)

    path = tmp_path / "good.ckpt"
    for zipped in (True, False):
        torch.save({"state_dict": state_of("sd1"), "epoch": 1}, path, _use_new_zipfile_serialization=zipped)
        good = path.read_bytes()
        # The pickle stands in front of the numbers.
        pickle_end = good.index(b"PK\x07\x08") if zipped else 100_000
        for size in (1, 3, 100, pickle_end, len(good) // 2, len(good) - 1):
            yield f"pickle cut to {size}", "ckpt", good[:size]
        for _ in range(12):
            yield "bits of the pickle", "ckpt", flipped(good, 0, pickle_end, rng.integers(1, 4))
        for depth in (0, 1, 5, 50):
            payload = {"state_dict": state_of("sd1"), "callbacks": nested(Payload(tmp_path / "was-run"), depth)}
            torch.save(payload, path, _use_new_zipfile_serialization=zipped)
            yield f"code {depth} deep", "ckpt", path.read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/data/0", bytes(2**28))
    yield "zip bomb", "ckpt", path.read_bytes()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of memory")
def test_damaged_files(tmp_path):
    good = flatten_dict(load(write(tmp_path / "model.safetensors", state_of("sd1"))))
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory counts from here
    before = kibibytes("VmRSS")
    count = loaded = 0
    for what, suffix, content in mutations(tmp_path, seed=0):
        path = tmp_path / f"damaged.{suffix}"
        path.write_bytes(content)
        start = time.monotonic()
        try:
            tree = flatten_dict(load(path))
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error), what
        else:
            loaded += 1
            assert {place: leaf.shape for place, leaf in tree.items()} == {
                place: leaf.shape for place, leaf in good.items()
            }, what
            if suffix == "safetensors" and "numbers" not in what:
                assert all(np.array_equal(leaf, good[place]) for place, leaf in tree.items()), what
        assert time.monotonic() - start < 30, what
        count += 1
    assert count > 150 and 10 <= loaded < count / 2
    assert not (tmp_path / "was-run").exists()
    assert kibibytes("VmHWM") - before < 2**20


@pytest.mark.parametrize("first", [0x80, ord("<"), ord("P")])
def test_safetensors_are_recognised_whatever_byte_their_header_length_begins_with(tmp_path, first):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    header += b" " * ((first - len(header)) % 256)
    path = tmp_path / "model.ckpt"
    path.write_bytes(len(header).to_bytes(8, "little") + header + np.float32(3).tobytes())
    assert path.read_bytes()[0] == first
    with open_file(path) as file:
        assert file.read("a") == 3.0
