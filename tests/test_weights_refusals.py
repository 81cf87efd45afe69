"""Weight files that are wrong give one line that names the file and what to do."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

from ti_jax.errors import InputError
from ti_jax.weights.files import variants_in
from ti_jax.weights.load import load_component

TENSORS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "conv.bias": np.ones(2, np.float32),
    "blocks.0.to_out.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "blocks.0.norm.weight": np.ones(3, np.float32),
}


def leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


SHAPES = {
    "conv": {"kernel": leaf(2, 2, 3, 2), "bias": leaf(2)},
    "blocks_0": {"to_out_0": {"kernel": leaf(3, 2)}, "norm": {"scale": leaf(3)}},
}


@pytest.fixture
def unet(tmp_path) -> Path:
    """Folder of a component with good weights, to be spoilt."""
    folder = tmp_path / "unet"
    folder.mkdir()
    save_file(TENSORS, folder / "diffusion_pytorch_model.safetensors")
    return folder


def load(unet: Path, variant: str | None = None) -> dict:
    return load_component(unet.parent, "unet", SHAPES, jnp.float32, variant)


def refusal(unet: Path, variant: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load(unet, variant)
    message = str(caught.value)
    assert "\n" not in message and str(unet) in message
    return message


def file_of(unet: Path) -> Path:
    return unet / "diffusion_pytorch_model.safetensors"


def shard(unet: Path) -> Path:
    """Turn the weights into two shards; returns the index."""
    file_of(unet).unlink()
    names = list(TENSORS)
    weight_map = {}
    for i, part in enumerate((names[:2], names[2:]), 1):
        shard = f"diffusion_pytorch_model-{i:05}-of-00002.safetensors"
        save_file({name: TENSORS[name] for name in part}, unet / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 100}, "weight_map": weight_map}))
    return index


def test_what_is_spoilt_below_is_good(unet):
    tree = load(unet)
    np.testing.assert_array_equal(tree["blocks_0"]["to_out_0"]["kernel"], TENSORS["blocks.0.to_out.0.weight"].T)
    shard(unet)
    np.testing.assert_array_equal(load(unet)["conv"]["kernel"], tree["conv"]["kernel"])


def test_all_names_in_one_line(unet):
    tensors = dict(TENSORS)
    del tensors["conv.bias"]
    tensors["blocks.1.norm.weight"] = np.ones(3, np.float32)
    tensors["blocks.0.norm.bias"] = np.ones(3, np.float32)
    tensors["blocks.0.to_out.0.weight"] = np.ones((3, 3), np.float32)
    save_file(tensors, file_of(unet))
    message = refusal(unet)
    assert message.startswith(f"{file_of(unet)}: weights that do not fit the model of config.json: 1 missing")
    assert "1 missing: conv/bias" in message
    assert "2 unexpected: blocks.0.norm.bias, blocks.1.norm.weight" in message
    assert "1 mis-shaped: blocks.0.to_out.0.weight [3, 3]: [3, 3] where the model has [3, 2]" in message


def test_eight_names_and_the_count(unet):
    save_file(TENSORS | {f"more.{i}.bias": np.ones(1, np.float32) for i in range(20)}, file_of(unet))
    message = refusal(unet)
    assert "20 unexpected: " in message and message.count("more.") == 8 and message.endswith(", ...")


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        (
            "conv.weight",
            np.ones((2, 3, 2, 1), np.float32),
            "[2, 3, 2, 1]: [2, 1, 3, 2] where the model has [2, 2, 3, 2]",
        ),
        ("conv.weight", np.ones((2, 3), np.float32), "[2, 3]: [1, 1, 3, 2] where the model has [2, 2, 3, 2]"),
        ("conv.bias", np.ones((), np.float32), "[]: [] where the model has [2]"),
        ("blocks.0.to_out.0.weight", np.ones((2, 3, 1), np.float32), "[2, 3, 1]: [2, 3, 1] where"),
        (
            "blocks.0.to_out.0.weight",
            np.ones((2, 3, 3, 3), np.float32),
            "[2, 3, 3, 3]: [2, 3, 3, 3] where the model has [3, 2]",
        ),
        ("conv.bias", np.ones(2, np.int8), "1 of a dtype that is not read: conv.bias I8"),
    ],
)
def test_shapes_and_dtypes(unet, name, tensor, said):
    save_file(TENSORS | {name: tensor}, file_of(unet))
    assert said in refusal(unet)


def test_same_leaf_from_two_names(tmp_path):
    """As in a VAE that was saved under both namings at once."""
    (tmp_path / "vae").mkdir()
    weight = np.ones((2, 2), np.float32)
    names = ("mid_block.attentions.0.query.weight", "mid_block.attentions.0.to_q.weight")
    save_file(dict.fromkeys(names, weight), tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    shapes = {"mid_block": {"attentions_0": {"to_q": {"kernel": leaf(2, 2)}}}}
    with pytest.raises(InputError, match=r"1 given twice: mid_block\.attentions\.0\.to_q\.weight"):
        load_component(tmp_path, "vae", shapes, jnp.float32)


def test_float8_is_named(unet):
    tensors = {name: torch.from_numpy(tensor) for name, tensor in TENSORS.items()}
    tensors["conv.bias"] = tensors["conv.bias"].to(torch.float8_e4m3fn)
    save_torch_file(tensors, file_of(unet))
    assert "of a dtype that is not read: conv.bias F8_E4M3" in refusal(unet)
    file_of(unet).unlink()
    torch.save(tensors, unet / "diffusion_pytorch_model.bin")
    assert "of a dtype that is not read: conv.bias float8_e4m3fn" in refusal(unet)


# -- files


def test_no_folder(unet):
    shutil.rmtree(unet)
    assert "no such folder" in refusal(unet)


def test_no_weights(unet):
    file_of(unet).rename(unet / "flax_model.msgpack")
    assert "no weight file" in refusal(unet)


def test_variants_are_listed(unet):
    assert "no weights of variant fp16; there are: the plain weights; leave out --variant" in refusal(unet, "fp16")
    file_of(unet).rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    (unet / "diffusion_pytorch_model.non_ema.bin").touch()
    assert "no weights without a variant; there are: fp16, non_ema; choose one with --variant" in refusal(unet)
    assert "no weights of variant bf16; there are: fp16, non_ema; choose" in refusal(unet, "bf16")


def test_variants_in():
    names = [
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00001-of-00002.ema.safetensors",
    ]
    assert variants_in(names) == [None]
    for form in (
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "model.fp16.safetensors.index.json",
        "model.safetensors.fp16.index.json",
        "pytorch_model.fp16.bin",
        "pytorch_model.bin.index.fp16.json",
    ):
        assert variants_in([form]) == ["fp16"]
    assert variants_in(["diffusion_flax_model.msgpack", "openvino_model.bin", "model.onnx"]) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:-1],
        lambda content: content[:20],
        lambda content: content[:4],
        lambda content: b"",
        lambda content: content + b"more",
        lambda content: content[:8] + b"x" * 40 + content[48:],
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: b"<!DOCTYPE html><html><head><title>Not found</title></head></html>",
    ],
    ids=["a byte short", "header cut", "length cut", "empty", "longer", "header broken", "length absurd", "web page"],
)
def test_broken_safetensors(unet, spoil):
    file_of(unet).write_bytes(spoil(file_of(unet).read_bytes()))
    message = refusal(unet)
    assert "not a complete safetensors file" in message and "download it again" in message
    assert file_of(unet).name in message


def test_git_lfs_pointer(unet):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3438167534\n"
    file_of(unet).write_bytes(pointer)
    assert "git-lfs pointer" in refusal(unet) and "git lfs pull" in refusal(unet)
    file_of(unet).unlink()
    (unet / "diffusion_pytorch_model.bin").write_bytes(pointer)
    assert "git-lfs pointer" in refusal(unet)
    (unet / "diffusion_pytorch_model.bin").unlink()
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_bytes(pointer)
    assert "git-lfs pointer" in refusal(unet)


def test_missing_shard(unet):
    shard(unet)
    (unet / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    message = refusal(unet)
    assert "1 of its 2 shards are missing: diffusion_pytorch_model-00002-of-00002.safetensors" in message


def test_shard_cut_short(unet):
    shard(unet)
    second = unet / "diffusion_pytorch_model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-4])
    assert second.name in refusal(unet)


def test_shard_without_a_tensor_that_its_index_names(unet):
    shard(unet)
    second = unet / "diffusion_pytorch_model-00002-of-00002.safetensors"
    rest = load_file(second)
    del rest["blocks.0.norm.weight"]
    save_file(rest, second)
    assert "1 missing: blocks_0/norm/scale" in refusal(unet)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
    ],
)
def test_broken_index(unet, content):
    index = shard(unet)
    index.write_text(content)
    assert "not an index of weight shards" in refusal(unet) and index.name in refusal(unet)


# -- pickles


@pytest.fixture
def pickled(unet) -> Path:
    """The same weights as a pickle; returns its path."""
    file_of(unet).unlink()
    path = unet / "diffusion_pytorch_model.bin"
    torch.save({name: torch.from_numpy(tensor) for name, tensor in TENSORS.items()}, path)
    load(unet)
    return path


class Payload:
    def __reduce__(self):
        return (exec, ("open('was-run', 'w')",))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_with_code_is_refused(unet, pickled, zipped, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv.weight": Payload()}, pickled, _use_new_zipfile_serialization=zipped)
    assert "refused, it is broken or holds more than tensors" in refusal(unet)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("size", [0, 3, 40, 500, -1])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_cut_short(unet, pickled, zipped, size):
    torch.save(torch.load(pickled, weights_only=True), pickled, _use_new_zipfile_serialization=zipped)
    pickled.write_bytes(pickled.read_bytes()[:size])
    assert "download it again" in refusal(unet) or "get it as .safetensors" in refusal(unet)


@pytest.mark.parametrize("content", [[1, 2], {"conv.weight": 3}, {1: torch.ones(1)}, torch.ones(2)])
def test_pickle_of_something_else(unet, pickled, content):
    torch.save(content, pickled)
    assert "not a dict of tensors" in refusal(unet)


WITHOUT_TORCH = """
    import sys
    from pathlib import Path

    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "torch":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Hidden())
    import numpy as np
    from safetensors.numpy import save_file
    import jax
    from ti_jax.errors import InputError
    from ti_jax.weights.load import load_component

    folder = Path(sys.argv[1])
    shapes = {"conv": {"bias": jax.ShapeDtypeStruct((2,), np.float32)}}
    try:
        load_component(folder, "unet", shapes, np.float32)
    except InputError as error:
        print(error)
    (folder / "vae").mkdir()
    save_file({"conv.bias": np.ones(2, np.float32)}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    print(load_component(folder, "vae", shapes, np.float32)["conv"]["bias"].sum())
"""


def test_without_pytorch(unet, pickled):
    """safetensors load, pickles say what they need."""
    command = [sys.executable, "-c", textwrap.dedent(WITHOUT_TORCH), str(unet.parent)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 2 and lines[1] == "2.0"
    assert "diffusion_pytorch_model.bin: reading a .bin file needs PyTorch (pip install 'ti_jax[torch]')" in lines[0]
