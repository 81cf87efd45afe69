"""The UNet is diffusers' UNet2DConditionModel, through the loader: whole, its parts, and its gradient."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers_models import (
    BATCH,
    CONTEXT_DIM,
    CONTEXT_LENGTH,
    SD1,
    SDXL,
    UNETS,
    assert_close,
    channels_first,
    channels_last,
    loaded_unet,
    run_torch_unet,
    torch_unet,
    unet_inputs,
)

from ti_jax.errors import InputError
from ti_jax.models.layers import Downsample2D, GroupNorm, ResnetBlock2D, TimestepEmbedding, Upsample2D
from ti_jax.models.transformer import Attention, BasicTransformerBlock, FeedForward, Transformer2DModel
from ti_jax.models.unet import UNet2DConditionModel, UNetConfig
from ti_jax.ops.rematerialisation import checkpointed
from ti_jax.training.compile import REMAT_POLICIES
from ti_jax.training.parallel import CPU_OPTIONS

# Down to 2 x 2; and sizes where halving rounds up, so that the way up must match the way down.
SIZES = {"sd1": (8, 8), "sd2": (7, 10), "sdxl": (9, 5), "pruned": (8, 8), "distilled-xl": (7, 6), "options": (5, 9)}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def function_of_text(module, params, inputs):
    """The output, and the gradient of a random weighting of it, as a function of the text; compiled."""
    weights = normal(BATCH, *inputs["sample"].shape[1:3], module.config.out_channels, seed=1)

    def loss(context, params):
        output = module.apply({"params": params}, **(inputs | {"encoder_hidden_states": context}))
        return jnp.sum(weights * output), output

    def output_and_gradient(context):
        gradient, output = jax.jit(jax.grad(loss, has_aux=True))(context, params)
        return output, gradient

    return output_and_gradient


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_whole_unet_and_its_gradient(name, tmp_path):
    model = torch_unet(**UNETS[name])
    module, params = loaded_unet(model, tmp_path)
    inputs = unet_inputs(module.config, *SIZES[name])
    output, gradient = function_of_text(module, params, inputs)(inputs["encoder_hidden_states"])

    context = torch.from_numpy(inputs["encoder_hidden_states"]).requires_grad_()
    theirs = run_torch_unet(model, inputs, context)
    (torch.from_numpy(normal(*theirs.shape, seed=1)) * theirs).sum().backward()
    assert_close(output, theirs.detach(), 1e-4)
    assert_close(gradient, context.grad, 1e-4)


@pytest.mark.parametrize("name", ["pruned", "distilled-xl", "options"])
def test_whole_unet_of_rarer_options(name, tmp_path):
    model = torch_unet(**UNETS[name])
    module, params = loaded_unet(model, tmp_path)
    inputs = unet_inputs(module.config, *SIZES[name])
    with torch.no_grad():
        theirs = run_torch_unet(model, inputs)
    assert_close(jax.jit(module.apply)({"params": params}, **inputs), theirs, 1e-4)


def test_gradient_checkpointing_recomputes_every_block_and_changes_nothing(tmp_path):
    def unet(*down, up):
        levels = dict(block_out_channels=(16, 32)[: len(down)], down_block_types=down, up_block_types=up)
        module, params = loaded_unet(torch_unet(**SD1 | levels), tmp_path / str(len(down)))
        return module, params, unet_inputs(module.config, 8, 8)

    # With all kinds of blocks; nothing is compiled.
    module, params, inputs = unet("CrossAttnDownBlock2D", "DownBlock2D", up=("UpBlock2D", "CrossAttnUpBlock2D"))

    def recomputed(way):
        frugal = dataclasses.replace(module, gradient_checkpointing=way)
        jaxpr = jax.make_jaxpr(lambda inputs: frugal.apply({"params": params}, **inputs))(inputs)
        return sum(equation.primitive.name.startswith(("remat", "checkpoint")) for equation in jaxpr.jaxpr.eqns)

    # Residual blocks: 2 down, 2 mid, 4 up. Transformer blocks: 1 down, 1 mid, 2 up.
    assert [recomputed(way) for way in REMAT_POLICIES] == [0, 8 + 4, 8 + 4]

    module, params, inputs = unet("CrossAttnDownBlock2D", up=("UpBlock2D",))
    output, gradient = function_of_text(module, params, inputs)(inputs["encoder_hidden_states"])
    for way in ("policy", "full"):
        frugal = dataclasses.replace(module, gradient_checkpointing=way)
        ours = function_of_text(frugal, params, inputs)(inputs["encoder_hidden_states"])
        assert_close(ours[0], output, 1e-5)
        assert_close(ours[1], gradient, 1e-5)


@pytest.mark.slow
def test_policy_computes_no_product_again_but_attention_scores(tmp_path):
    """In the compiled program, where what nobody reads is gone."""
    module, params = loaded_unet(torch_unet(**SD1), tmp_path)
    inputs = unet_inputs(module.config, 8, 8)

    def program(way):
        frugal = dataclasses.replace(module, gradient_checkpointing=way)

        def loss(context, params):
            return jnp.mean(frugal.apply({"params": params}, **(inputs | {"encoder_hidden_states": context})))

        lowered = jax.jit(jax.value_and_grad(loss)).lower(inputs["encoder_hidden_states"], params)
        return lowered.compile(compiler_options=CPU_OPTIONS)

    programs = {way: program(way) for way in REMAT_POLICIES}
    convolutions, products, memory = (
        {way: count(programs[way]) for way in REMAT_POLICIES}
        for count in (
            lambda compiled: compiled.as_text().count(" convolution("),
            lambda compiled: compiled.as_text().count(" dot("),
            lambda compiled: compiled.memory_analysis().temp_size_in_bytes,
        )
    )
    # On the way forward 31 of 3 x 3 pixels: in and out, 11 residual blocks of 2, 2 down, 2 up.
    assert convolutions["none"] > 28
    assert convolutions["policy"] == convolutions["none"] < convolutions["full"]
    # 7 transformer blocks with two attentions, whose scores are so small here that not all are made by a product.
    assert products["none"] <= products["policy"] <= products["none"] + 14 < products["full"]
    assert memory["policy"] < memory["none"]


def test_an_unknown_way_of_gradient_checkpointing_is_refused():
    with pytest.raises(ValueError, match="gradient_checkpointing True: must be none, policy or full"):
        checkpointed(ResnetBlock2D, True)


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def parts(request, tmp_path_factory):
    """A random UNet as PyTorch's and as ours, to take parts of."""
    model = torch_unet(**UNETS[request.param])
    module, params = loaded_unet(model, tmp_path_factory.mktemp(request.param))
    return model, module.config, params


@partial(jax.jit, static_argnums=0)
def apply(module, params, *inputs):
    """One program: operation by operation there would be dozens to compile."""
    return module.apply({"params": params}, *inputs)


@torch.no_grad()
def test_resnet(parts):
    model, config, params = parts
    time = normal(BATCH, config.time_embed_dim, seed=1)
    # With a shortcut convolution and without.
    for block, name, channels in ((model.down_blocks[1], "down_blocks_1", 16), (model.mid_block, "mid_block", 48)):
        x = normal(BATCH, 4, 6, channels)
        theirs = channels_last(block.resnets[0](channels_first(x), torch.from_numpy(time)))
        ours = apply(ResnetBlock2D(theirs.shape[-1], 8, 1e-5), params[name]["resnets_0"], x, time)
        assert_close(ours, theirs, 1e-5)


@torch.no_grad()
def test_transformer(parts):
    model, config, params = parts
    x, context = normal(BATCH, 4, 6, 32), normal(BATCH, CONTEXT_LENGTH, CONTEXT_DIM, seed=1)
    theirs = model.down_blocks[1].attentions[0](channels_first(x), torch.from_numpy(context), return_dict=False)[0]
    module = Transformer2DModel(4, 1, 8, config.use_linear_projection)
    ours = apply(module, params["down_blocks_1"]["attentions_0"], x, context)
    assert_close(ours, channels_last(theirs), 1e-5)


@torch.no_grad()
def test_transformer_block_and_its_parts(parts):
    model, _, params = parts
    block = model.down_blocks[1].attentions[0].transformer_blocks[0]
    params = params["down_blocks_1"]["attentions_0"]["transformer_blocks_0"]
    hidden, context = normal(BATCH, 24, 32), normal(BATCH, CONTEXT_LENGTH, CONTEXT_DIM, seed=1)
    torch_hidden, torch_context = torch.from_numpy(hidden), torch.from_numpy(context)

    ours = apply(BasicTransformerBlock(4), params, hidden, context)
    assert_close(ours, block(torch_hidden, encoder_hidden_states=torch_context), 1e-5)
    assert_close(apply(Attention(4), params["attn1"], hidden), block.attn1(torch_hidden), 1e-5)
    ours = apply(Attention(4), params["attn2"], hidden, context)
    assert_close(ours, block.attn2(torch_hidden, torch_context), 1e-5)
    assert_close(apply(FeedForward(), params["ff"], hidden), block.ff(torch_hidden), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
@pytest.mark.parametrize("name", ["sd1", "options"])  # padding on all sides, and at the end alone
def test_down_and_up_samplers(name, size, tmp_path):
    model = torch_unet(**UNETS[name])
    module, params = loaded_unet(model, tmp_path)
    x = normal(BATCH, *size, 16)
    theirs = channels_last(model.down_blocks[0].downsamplers[0](channels_first(x)))
    ours = apply(Downsample2D(module.config.downsample_padding), params["down_blocks_0"]["downsamplers_0"], x)
    assert_close(ours, theirs, 1e-5)

    x = normal(BATCH, *theirs.shape[1:3], 48)
    theirs = channels_last(model.up_blocks[0].upsamplers[0](channels_first(x), size))
    variables = {"params": params["up_blocks_0"]["upsamplers_0"]}
    ours = jax.jit(lambda x: Upsample2D().apply(variables, x, *size))(x)
    assert_close(ours, theirs, 1e-5)


@torch.no_grad()
def test_time_embedding_and_group_norm(parts):
    model, config, params = parts
    waves = normal(BATCH, 16)
    ours = apply(TimestepEmbedding(config.time_embed_dim), params["time_embedding"], waves)
    assert_close(ours, model.time_embedding(torch.from_numpy(waves)), 1e-5)
    x = normal(BATCH, 5, 3, 16) * 3 + 2
    ours = apply(GroupNorm(8, 1e-5), params["conv_norm_out"], x)
    assert_close(ours, channels_last(model.conv_norm_out(channels_first(x))), 1e-5)


@pytest.mark.slow
def test_bfloat16_is_as_near_to_float32_as_pytorch_is(tmp_path):
    """Rounding errors of one draw are chance; over several, ours are no larger than PyTorch's."""
    model = torch_unet(**SDXL)
    module, params = loaded_unet(model, tmp_path)
    inputs = unet_inputs(module.config, 8, 8)
    half_params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    half = UNet2DConditionModel(module.config, jnp.bfloat16)
    half_model = model.to(torch.bfloat16)

    @partial(jax.jit, static_argnums=0)
    def output_and_gradient(module, params, sample, context, weight):
        def weighted(context):
            output = module.apply({"params": params}, sample, inputs["timesteps"], context, inputs["added_cond"])
            return jnp.sum(output.astype(jnp.float32) * weight), output

        gradient, output = jax.grad(weighted, has_aux=True)(context)
        return output, gradient

    errors = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        sample, context = (
            rng.normal(size=inputs[name].shape).astype(np.float32) for name in ("sample", "encoder_hidden_states")
        )
        weight = rng.normal(size=sample.shape).astype(np.float32)
        exact = output_and_gradient(module, params, sample, context, weight)
        ours = output_and_gradient(half, half_params, sample, context, weight)
        assert [array.dtype for array in ours] == [jnp.bfloat16, jnp.float32]
        their_context = torch.from_numpy(context).requires_grad_()
        output = run_torch_unet(half_model, {**inputs, "sample": sample}, their_context, torch.bfloat16)
        (torch.from_numpy(weight) * output).sum().backward()
        theirs = output.detach().float(), their_context.grad
        errors.append([[relative_error(x, y) for x, y in zip(each, exact, strict=True)] for each in (ours, theirs)])
    our_errors, their_errors = np.sqrt(np.mean(np.square(errors), axis=0))
    assert np.all(our_errors > 0) and np.all(our_errors < 1.25 * their_errors) and np.all(their_errors < 0.1)


def relative_error(ours, theirs):
    ours, theirs = (np.asarray(array, np.float32) for array in (ours, theirs))
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def test_what_sdxl_is_told_of_sizes_is_missed_and_not_wanted_elsewhere():
    inputs = [jnp.zeros((1, 8, 8, 4)), jnp.zeros(1, jnp.int32), jnp.zeros((1, CONTEXT_LENGTH, CONTEXT_DIM))]
    added_cond = {"text_embeds": jnp.zeros((1, 16)), "time_ids": jnp.zeros((1, 6))}
    with pytest.raises(ValueError, match="needs added_cond"):
        UNet2DConditionModel(UNetConfig.from_dict(SDXL)).init(jax.random.key(0), *inputs)
    with pytest.raises(ValueError, match="takes no added_cond"):
        UNet2DConditionModel(UNetConfig.from_dict(SD1)).init(jax.random.key(0), *inputs, added_cond)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"_class_name": "UNet3DConditionModel"}, "_class_name 'UNet3DConditionModel'"),
        ({"act_fn": "mish"}, "act_fn is 'mish'"),
        ({"addition_embed_type": "text_image"}, "addition_embed_type is 'text_image'"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim is None"),
        ({"attention_head_dim": [4, 4]}, r"attention_head_dim is \(4, 4\); expected 3 entries"),
        ({"attention_head_dim": 5}, "5 attention heads"),
        ({"attention_head_dim": [4, [4, 4], 4]}, r"attention_head_dim is \(4, \(4, 4\), 4\); expected a single value"),
        ({"block_out_channels": [[16, 16], 32, 48]}, r"block_out_channels is \(\(16, 16\), 32, 48\); expected a list"),
        ({"attention_head_dim": None}, "attention_head_dim is None"),
        ({"attention_type": "gated"}, "attention_type = 'gated'"),
        ({"block_out_channels": [16, 32, 44]}, "norm_num_groups is 8; does not divide 44"),
        ({"block_out_channels": 16}, "block_out_channels is 16"),
        ({"center_input_sample": True}, "center_input_sample = True"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"),
        ({"class_embeddings_concat": True}, "class_embeddings_concat = True"),
        ({"conv_in_kernel": 5}, "conv_in_kernel = 5"),
        ({"conv_out_kernel": 1}, "conv_out_kernel = 1"),
        ({"cross_attention_dim": [24, 24, 32]}, r"cross_attention_dim is \(24, 24, 32\)"),
        ({"cross_attention_norm": "layer_norm"}, "cross_attention_norm = 'layer_norm'"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "down_block_types is .*'AttnDownBlock2D'"),
        ({"downsample_padding": 2}, "downsample_padding is 2"),
        ({"dropout": 0.1}, "dropout = 0.1"),
        ({"dual_cross_attention": True}, "dual_cross_attention = True"),
        ({"encoder_hid_dim": 32}, "encoder_hid_dim = 32"),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type = 'text_proj'"),
        ({"flip_sin_to_cos": 1}, "flip_sin_to_cos is 1"),
        ({"freq_shift": 8}, "freq_shift is 8"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"layers_per_block": [2, 2]}, r"layers_per_block is \(2, 2\)"),
        ({"mid_block_only_cross_attention": True}, "mid_block_only_cross_attention = True"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor = 2"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type is 'UNetMidBlock2DSimpleCrossAttn'"),
        ({"norm_eps": "small"}, "norm_eps is 'small'"),
        ({"norm_num_groups": None}, "norm_num_groups is None"),
        ({"num_class_embeds": 1000}, "num_class_embeds = 1000"),
        ({"only_cross_attention": "yes"}, "only_cross_attention is 'yes'"),
        ({"projection_class_embeddings_input_dim": 64}, "projection_class_embeddings_input_dim is 64"),
        ({"resnet_out_scale_factor": 0.5}, "resnet_out_scale_factor = 0.5"),
        ({"resnet_skip_time_act": True}, "resnet_skip_time_act = True"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift = 'scale_shift'"),
        ({"reverse_transformer_layers_per_block": 2}, "reverse_transformer_layers_per_block is 2"),
        ({"sample_size": None}, "sample_size is None"),
        ({"sample_size": [8, 16]}, r"sample_size is \(8, 16\)"),
        ({"some_new_option": 3}, "some_new_option = 3"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim = 256"),
        ({"time_embedding_act_fn": "silu"}, "time_embedding_act_fn = 'silu'"),
        ({"time_embedding_dim": 64}, "time_embedding_dim = 64"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type = 'fourier'"),
        ({"timestep_post_act": "silu"}, "timestep_post_act = 'silu'"),
        ({"transformer_layers_per_block": [1, [1, 1], 1]}, "needs reverse_transformer_layers_per_block"),
        (
            {
                "transformer_layers_per_block": [1, [1], 1],
                "reverse_transformer_layers_per_block": [1, [1], 1],
            },
            "reverse_transformer_layers_per_block is .*; expected 2 entries for 2 layers",
        ),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "up_block_types is .*; expected 3 entries"),
        ({"use_linear_projection": None}, "use_linear_projection is None"),
    ],
)
def test_config_refuses_what_is_not_implemented(change, named):
    config = dict(torch_unet(**SD1).config)
    UNetConfig.from_dict(config)
    with pytest.raises(InputError, match=named) as error:
        UNetConfig.from_dict(config | change)
    assert "\n" not in str(error.value)


def test_number_of_heads_goes_by_either_name():
    config = SD1 | {"attention_head_dim": 3, "num_attention_heads": [2, 4, 8]}
    assert [level.heads for level in UNetConfig.from_dict(config).down_levels] == [2, 4, 8]
    assert [level.heads for level in UNetConfig.from_dict(SDXL).up_levels] == [6, 4, 2]


def test_lists_of_one_value_are_that_value():
    config = UNetConfig.from_dict(SD1 | {"sample_size": [8, 8], "cross_attention_dim": [24, 24, 24]})
    assert (config.sample_size, config.cross_attention_dim) == (8, 24)
    hash(UNetConfig.from_dict(SD1 | {"transformer_layers_per_block": [1, 2, 3]}))
