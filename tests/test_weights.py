"""Every published layout of the same weights loads as the same tree, bit by bit, and in bounded memory."""

import functools
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from safetensors.torch import load_file, save_file

from ti_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from ti_jax.models.shapes import param_shapes
from ti_jax.models.unet import UNet2DConditionModel, UNetConfig
from ti_jax.models.vae import AutoencoderKL, VAEConfig
from ti_jax.weights.config_files import read_component_config
from ti_jax.weights.identity import Identity
from ti_jax.weights.load import load_component

COMPONENTS = ("text_encoder", "unet", "vae")


@functools.cache
def torch_models(use_linear_projection: bool = False) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        eos_token_id=39,
    )
    return {
        "text_encoder": transformers.CLIPTextModel(text),
        "unet": diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
            use_linear_projection=use_linear_projection,
            sample_size=8,
        ),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        ),
    }


def shapes_of(folder: Path, component: str) -> dict:
    return shapes_of_config(component, json.dumps(read_component_config(folder, component)))


@functools.cache
def shapes_of_config(component: str, config: str) -> dict:
    config = json.loads(config)
    if component == "text_encoder":
        return param_shapes(CLIPTextModel(CLIPTextConfig.from_dict(config)), jax.ShapeDtypeStruct((1, 8), jnp.int32))
    if component == "unet":
        module = UNet2DConditionModel(UNetConfig.from_dict(config))
        shapes = (1, 8, 8, 4), (1,), (1, 8, 16)
        return param_shapes(module, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    module = AutoencoderKL(VAEConfig.from_dict(config))
    return param_shapes(module, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))


def load(folder: Path, component: str, variant=None, dtype=jnp.float32) -> tuple[dict, str]:
    identity = Identity()
    tree = load_component(folder, component, shapes_of(folder, component), dtype, variant, identity)
    return tree, identity.hexdigest()


def assert_equal_trees(ours: dict, expected: dict) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for (path, leaf), other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Tiny models with random weights, as save_pretrained writes them today."""
    folder = tmp_path_factory.mktemp("plain")
    for component, model in torch_models().items():
        model.save_pretrained(folder / component)
    return folder


@pytest.fixture
def copy(plain, tmp_path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(plain, tmp_path / "copy"))


def weights_file(folder: Path, component: str) -> Path:
    return next((folder / component).glob("*.safetensors"))


@pytest.mark.parametrize("component", COMPONENTS)
def test_values_and_layout(plain, component):
    """Against the state dict, module by module as PyTorch computes with it: not by way of our own name rule."""
    model = torch_models()[component]
    tree, _ = load(plain, component)
    seen = 0
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        node = tree
        for word in re.sub(r"\.(\d+)", r"_\1", name).split("."):
            node = node[word]
        weight = own["weight"].detach().numpy()
        if isinstance(module, torch.nn.Conv2d):
            np.testing.assert_array_equal(node["kernel"], np.einsum("oihw->hwio", weight))
        elif isinstance(module, torch.nn.Linear):
            np.testing.assert_array_equal(node["kernel"], weight.T)
        elif isinstance(module, torch.nn.Embedding):
            np.testing.assert_array_equal(node["embedding"], weight)
        else:
            np.testing.assert_array_equal(node["scale"], weight)
        if "bias" in own:
            np.testing.assert_array_equal(node["bias"], own["bias"].detach().numpy())
        seen += len(own)
    assert seen == len(flatten_dict(tree))


LAYOUTS = {
    "variant": (dict(variant="fp16"), "fp16"),
    "shards": (dict(max_shard_size="8KB"), None),
    "shards of a variant": (dict(max_shard_size="8KB", variant="fp16"), "fp16"),
    "pickle": (dict(safe_serialization=False), None),
    "pickle of a variant": (dict(safe_serialization=False, variant="fp16"), "fp16"),
    "pickle in shards": (dict(safe_serialization=False, max_shard_size="8KB"), None),
    "pickle of a variant in shards": (
        dict(safe_serialization=False, max_shard_size="8KB", variant="non_ema"),
        "non_ema",
    ),
}


# transformers 5 writes no pickles; test_pickles_of_old has them.
@pytest.mark.parametrize(
    ("component", "layout"),
    [(c, layout) for c in COMPONENTS for layout in LAYOUTS if c != "text_encoder" or "pickle" not in layout],
)
def test_layouts_as_saved(plain, tmp_path, component, layout):
    options, variant = LAYOUTS[layout]
    torch_models()[component].save_pretrained(tmp_path / component, **options)
    files = sorted(path.name for path in (tmp_path / component).iterdir())
    if "shards" in layout:
        assert sum("-of-" in name for name in files) > 2
        assert sum(name.endswith(".json") for name in files) == 2
    assert any(name.endswith(".bin" if "pickle" in layout else ".safetensors") for name in files)
    tree, identity = load(tmp_path, component, variant)
    expected, expected_identity = load(plain, component)
    assert_equal_trees(tree, expected)
    assert identity == expected_identity


@pytest.mark.parametrize("index_name", ["{}.safetensors.index.fp16.json", "{}.safetensors.fp16.index.json"])
def test_earlier_names_of_a_variants_shards(plain, tmp_path, index_name):
    torch_models()["unet"].save_pretrained(tmp_path / "unet", max_shard_size="8KB")
    folder = tmp_path / "unet"
    index = next(folder.glob("*.index.json"))
    content = json.loads(index.read_text())
    for shard in folder.glob("*.safetensors"):
        shard.rename(shard.with_suffix(".fp16.safetensors"))
    content["weight_map"] = {
        k: v.replace(".safetensors", ".fp16.safetensors") for k, v in content["weight_map"].items()
    }
    index.unlink()
    (folder / index_name.format("diffusion_pytorch_model")).write_text(json.dumps(content))
    assert_equal_trees(load(tmp_path, "unet", "fp16")[0], load(plain, "unet")[0])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_pickles_of_old(plain, copy, component, zipped):
    file = weights_file(copy, component)
    state_dict = load_file(file)
    file.unlink()
    name = "pytorch_model.bin" if component == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(state_dict, copy / component / name, _use_new_zipfile_serialization=zipped)
    tree, identity = load(copy, component)
    assert_equal_trees(tree, load(plain, component)[0])
    assert identity == load(plain, component)[1]


def test_safetensors_before_pickle(plain, copy):
    torch.save({"other": torch.zeros(1)}, copy / "vae" / "diffusion_pytorch_model.bin")
    assert_equal_trees(load(copy, "vae")[0], load(plain, "vae")[0])


def rewrite(folder: Path, component: str, change) -> None:
    file = weights_file(folder, component)
    save_file(change(load_file(file)), file)


def with_text_model_prefix(state_dict):
    old = {f"text_model.{name}": tensor for name, tensor in state_dict.items()}
    return old | {"text_model.embeddings.position_ids": torch.arange(8)[None]}


def without_text_model_prefix(state_dict):
    return {name.removeprefix("text_model."): tensor for name, tensor in state_dict.items()} | {
        "embeddings.position_ids": torch.arange(8)[None]
    }


def old_vae_attention(state_dict):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    changed = {}
    for name, tensor in state_dict.items():
        for new, old in names.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        changed[name] = tensor
    assert sum(".proj_attn." in name for name in changed) == 4
    return changed


def convolutions_for_attention(state_dict):
    return {
        name: tensor[:, :, None, None].contiguous() if ".attentions.0." in name and tensor.ndim == 2 else tensor
        for name, tensor in state_dict.items()
    }


@pytest.mark.parametrize(
    ("component", "change"),
    [
        ("text_encoder", with_text_model_prefix),
        ("text_encoder", without_text_model_prefix),
        ("vae", old_vae_attention),
        ("vae", lambda state_dict: convolutions_for_attention(old_vae_attention(state_dict))),
        ("vae", convolutions_for_attention),
    ],
)
def test_older_namings(plain, copy, component, change):
    rewrite(copy, component, change)
    tree, identity = load(copy, component)
    expected, expected_identity = load(plain, component)
    assert_equal_trees(tree, expected)
    assert identity == expected_identity


@pytest.mark.parametrize("use_linear_projection", [False, True])
def test_projections_of_the_unet_as_the_model_wants_them(tmp_path, use_linear_projection):
    """Checkpoints with linear projections serve models with 1x1 convolutions, and the other way."""
    torch_models(use_linear_projection)["unet"].save_pretrained(tmp_path / "unet")
    expected, expected_identity = load(tmp_path, "unet")
    kernel = expected["down_blocks_0"]["attentions_0"]["proj_in"]["kernel"]
    assert kernel.shape == ((8, 8) if use_linear_projection else (1, 1, 8, 8))

    def other(state_dict):
        return {
            name: tensor.reshape(*tensor.shape[:2], *([1, 1] if tensor.ndim == 2 else [])).contiguous()
            if re.search(r"\.proj_(in|out)\.weight", name)
            else tensor
            for name, tensor in state_dict.items()
        }

    rewrite(tmp_path, "unet", other)
    tree, identity = load(tmp_path, "unet")
    assert_equal_trees(tree, expected)
    assert identity == expected_identity


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickle"])
def test_dtypes(plain, copy, stored, pickled):
    file = weights_file(copy, "vae")
    state_dict = {name: tensor.to(stored) for name, tensor in load_file(file).items()}
    save_file(state_dict, file)
    if pickled:
        file.unlink()
        torch.save(state_dict, file.with_suffix(".bin"))
    for dtype in (jnp.float32, jnp.bfloat16):
        tree, _ = load(copy, "vae", dtype=dtype)
        kernel = tree["encoder"]["conv_in"]["kernel"]
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}
        theirs = state_dict["encoder.conv_in.weight"].to(torch.bfloat16 if dtype == jnp.bfloat16 else torch.float32)
        np.testing.assert_array_equal(np.asarray(kernel, np.float32), np.einsum("oihw->hwio", theirs.float().numpy()))


def test_identity_is_of_the_numbers(plain, copy):
    _, identity = load(plain, "vae")
    assert load(plain, "vae", dtype=jnp.bfloat16)[1] == identity
    assert len(identity) == 64 and load(plain, "unet")[1] != identity

    rewrite(copy, "vae", lambda state_dict: {name: tensor.half() for name, tensor in state_dict.items()})
    assert load(copy, "vae")[1] != identity
    shutil.copy(weights_file(plain, "vae"), weights_file(copy, "vae"))
    assert load(copy, "vae")[1] == identity

    def nudge(state_dict):
        state_dict["decoder.conv_out.bias"][0] += 1e-3
        return state_dict

    rewrite(copy, "vae", nudge)
    assert load(copy, "vae")[1] != identity


def test_identity_samples_large_tensors():
    tensor = np.zeros(100_000, np.float32)
    one, other = Identity(), Identity()
    one.add("unet", ("kernel",), tensor.shape, tensor)
    tensor[::98] += 1  # stride of 1024 samples: ceil(100000 / 1024)
    other.add("unet", ("kernel",), tensor.shape, tensor)
    assert one.hexdigest() != other.hexdigest()


def test_identity_of_all_components_in_one(plain):
    together, reverse = Identity(), Identity()
    for component in COMPONENTS:
        load_component(plain, component, shapes_of(plain, component), jnp.float32, None, together)
    for component in reversed(COMPONENTS):
        load_component(plain, component, shapes_of(plain, component), jnp.float32, None, reverse)
    assert together.hexdigest() == reverse.hexdigest()
    assert together.hexdigest() not in {load(plain, component)[1] for component in COMPONENTS}


MEASURE = """
    import re, sys
    from pathlib import Path
    import jax, jax.numpy as jnp
    from flax.traverse_util import unflatten_dict
    from ti_jax.weights.load import load_component

    def kibibytes(what):
        return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

    def load(folder, sizes):
        shapes = {(f"layers_{i}", "kernel"): jax.ShapeDtypeStruct((n, n), jnp.float32) for i, n in enumerate(sizes)}
        return load_component(Path(folder), "unet", unflatten_dict(shapes), jnp.float32)

    load(sys.argv[1] + "/small", [8])
    before = kibibytes("VmRSS")
    tree = load(sys.argv[1] + "/large", [2048] * 8)
    print(kibibytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_memory_is_the_tree_and_a_tensor(tmp_path, stored):
    for name, sizes in {"small": [8], "large": [2048] * 8}.items():
        (tmp_path / name / "unet").mkdir(parents=True)
        tensors = {f"layers.{i}.weight": torch.full((n, n), float(i), dtype=stored) for i, n in enumerate(sizes)}
        save_file(tensors, tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path)]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024
    tree, tensor, slack = 8 * 16, 16, 8  # MiB
    assert tree < peak < tree + tensor + slack
