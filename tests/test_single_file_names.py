"""The original layout's names: of the published models at full size, and against diffusers' own converters."""

import diffusers
import jax
import jax.numpy as jnp
import ldm_checkpoints
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils
from flax.traverse_util import flatten_dict
from test_full_size import TEXT_ENCODERS, UNETS, VAES

from ti_jax.models.clip_text import CLIPTextConfig
from ti_jax.models.networks import make_networks, network_shapes
from ti_jax.models.unet import UNetConfig
from ti_jax.models.vae import VAEConfig
from ti_jax.weights.families import SD1, SD2, SDXL, identify
from ti_jax.weights.ldm_names import is_buffer
from ti_jax.weights.load import plan
from ti_jax.weights.single_file import RenamedTensors, component_configs, component_names

FULL_SIZE = {
    "sd1": (SD1, "sd1.5", "sd1.5", {"text_encoder": "ViT-L"}, "epsilon"),
    "sd2": (SD2, "sd2.1", "sd1.5", {"text_encoder": "ViT-H"}, "v_prediction"),
    "sdxl": (SDXL, "sdxl", "sdxl", {"text_encoder": "ViT-L", "text_encoder_2": "bigG"}, "epsilon"),
}


class ShapesOnly:
    """Stands for an open file of which nothing is read."""

    def __init__(self, state):
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.dtypes = dict.fromkeys(state, np.dtype(np.float32))


@pytest.fixture(scope="module", params=FULL_SIZE)
def full_size(request):
    """A published model's family, networks on PyTorch without memory, and its state dict in the original layout."""
    family, unet, vae, text, prediction_type = FULL_SIZE[request.param]
    with torch.device("meta"):
        networks = {
            name: getattr(transformers, TEXT_ENCODERS[config]["architectures"][0])(
                transformers.CLIPTextConfig(**TEXT_ENCODERS[config])
            )
            for name, config in text.items()
        }
        networks["unet"] = diffusers.UNet2DConditionModel.from_config(UNETS[unet])
        networks["vae"] = diffusers.AutoencoderKL.from_config(VAES[vae])
        state = ldm_checkpoints.original(request.param, networks)
    return family, networks, state, prediction_type


def networks_of(configs):
    return make_networks({**configs, "scheduler": {}}, jnp.bfloat16)


def test_each_name_of_the_published_models_is_for_one_leaf(full_size):
    family, networks, state, prediction_type = full_size
    file = ShapesOnly(state)
    assert identify("x", file.shapes) is family
    configs = component_configs(file.shapes, family, prediction_type)
    names = component_names(file.shapes, family, configs)

    # From names to leaves: each name is one component's, or known to be no weight.
    for name in state:
        components = [component for component, parts in names.items() if name in parts]
        assert len(components) + is_buffer(name) == 1, name

    # And from leaves to names: each leaf has one tensor, of its shape.
    for component, tree in network_shapes(networks_of(configs)).items():
        targets = flatten_dict(tree)
        placed, faults = plan([RenamedTensors(file, names[component])], component, targets)
        assert len(placed) == len(targets) and not any(faults.values()), faults
        parameters = sum(torch.Size(leaf.shape).numel() for leaf in jax.tree.leaves(tree))
        assert parameters == sum(parameter.numel() for parameter in networks[component].parameters())


def test_configs_of_the_published_models(full_size):
    """What the tensors tell is what the published configs say, wherever that changes what is computed."""
    family, _, state, prediction_type = full_size
    _, unet, vae, text, _ = next(entry for entry in FULL_SIZE.values() if entry[0] is family)
    networks = networks_of(component_configs(ShapesOnly(state).shapes, family, prediction_type))
    ours = networks.unet
    published = UNetConfig.from_dict(UNETS[unet])
    assert (ours.config.down_levels, ours.config.mid_level, ours.config.up_levels) == (
        published.down_levels, published.mid_level, published.up_levels,
    )  # fmt: skip
    for option in ("sample_size", "cross_attention_dim", "addition_time_embed_dim", "flip_sin_to_cos", "norm_eps"):
        assert getattr(ours.config, option) == getattr(published, option)
    # SD2's two kinds share a VAE and tell it the side of their own pictures, 768 or 512.
    side = networks.latent_factor * UNETS[unet]["sample_size"]
    assert networks.vae.config == VAEConfig.from_dict({**VAES[vae], "sample_size": side})
    for name, module in networks.text_encoders:
        published = CLIPTextConfig.from_dict(TEXT_ENCODERS[text[name]])
        for option in ("num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "with_projection"):
            assert getattr(module.config, option) == getattr(published, option)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_diffusers_converts_to_the_same(family):
    """The test's own writer, and the loader's names, against the converters that diffusers has for such files."""
    networks = ldm_checkpoints.parts(family, vocab_size=300)
    state = ldm_checkpoints.original(family, networks)
    configs = {name: network.config for name, network in networks.items()}
    theirs = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(state, dict(configs["unet"])),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(state, dict(configs["vae"])),
    }
    if family != "sd2":
        prefix = "conditioner.embedders.0.transformer." if family == "sdxl" else "cond_stage_model.transformer."
        theirs["text_encoder"] = single_file_utils.convert_ldm_clip_checkpoint(state, prefix)
    if family != "sd1":
        name, prefix = "text_encoder", "cond_stage_model.model."
        if family == "sdxl":
            name, prefix = "text_encoder_2", "conditioner.embedders.1.model."
        theirs[name] = single_file_utils.convert_open_clip_checkpoint(networks[name], state, prefix)

    described = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}[family]
    file = ShapesOnly(state)
    names = component_names(file.shapes, described, component_configs(file.shapes, described, "epsilon"))
    for component, network in networks.items():
        ours = {part.name: (name, part) for name, parts in names[component].items() for part in parts}
        for name, tensor in theirs[component].items():
            short = name.removeprefix("text_model.")
            if short not in network.state_dict() and name not in network.state_dict():
                # SD2's last layer, which diffusers' model has no place for, and buffers.
                assert short not in ours and name not in ours
                continue
            source, part = ours.pop(name, None) or ours.pop(short)
            found = state[source]
            if part.third is not None:
                found = found.chunk(3)[part.third]
            found = found.T if part.transposed else found
            assert torch.equal(found.reshape(tensor.shape), tensor), name
        assert not ours
