"""Tiny random Stable Diffusions on PyTorch, saved as a diffusers folder, and the same in the original layout.

The writer goes from diffusers' names to the original ones by arithmetic on block numbers, as the programs do that
export such files; the loader goes the other way, by counting what is there.
"""

import re
from types import SimpleNamespace

import diffusers
import torch
import transformers
from diffusers_models import randomize

from ti_jax.weights.tokenizers import clip_tokenizer

CLIP = dict(
    vocab_size=49408, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=77, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407, projection_dim=128,
)  # fmt: skip
OPEN_CLIP = CLIP | dict(hidden_act="gelu", pad_token_id=0)
SECOND = OPEN_CLIP | dict(hidden_size=64, intermediate_size=96, num_attention_heads=1, projection_dim=80)

UNET = dict(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=128, attention_head_dim=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
UNETS = {
    "sd1": UNET,
    "sd2": UNET | dict(
        block_out_channels=(64, 128), attention_head_dim=(1, 2), use_linear_projection=True, upcast_attention=True,
    ),
    "sdxl": UNET | dict(
        block_out_channels=(32, 64, 128), attention_head_dim=(1, 1, 2), use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3), cross_attention_dim=192, addition_embed_type="text_time",
        addition_time_embed_dim=10, projection_class_embeddings_input_dim=80 + 6 * 10,
    ),
}  # fmt: skip
VAE = dict(
    block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, sample_size=16,
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
)  # fmt: skip
BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)


def parts(family, vocab_size=49408):
    """The networks of a tiny random model, by the names that diffusers gives them."""
    text, with_projection = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection
    first = (OPEN_CLIP if family == "sd2" else CLIP) | dict(vocab_size=vocab_size)
    networks = {"text_encoder": text(transformers.CLIPTextConfig(**first))}
    if family == "sdxl":
        networks["text_encoder_2"] = with_projection(
            transformers.CLIPTextConfig(**SECOND | dict(vocab_size=vocab_size))
        )
    networks["unet"] = diffusers.UNet2DConditionModel(**UNETS[family])
    networks["vae"] = diffusers.AutoencoderKL(**VAE, scaling_factor=0.13025 if family == "sdxl" else 0.18215)
    for network in networks.values():
        randomize(network)
    return networks


def pipeline(family, networks, prediction_type):
    """diffusers' pipeline of `parts`."""
    if family == "sdxl":
        return diffusers.StableDiffusionXLPipeline(
            **networks, tokenizer=clip_tokenizer("<|endoftext|>"), tokenizer_2=clip_tokenizer("!"),
            scheduler=diffusers.EulerDiscreteScheduler(
                **BETAS, prediction_type=prediction_type, timestep_spacing="leading"
            ),
        )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        **networks, tokenizer=clip_tokenizer("!" if family == "sd2" else "<|endoftext|>"),
        scheduler=diffusers.DDIMScheduler(
            **BETAS, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def original(family, networks):
    """State dict of `parts` in the original layout, with the buffers that published files have."""
    linear = family != "sd1"
    state = {
        **{f"model.diffusion_model.{name}": tensor for name, tensor in original_unet(networks["unet"]).items()},
        **{f"first_stage_model.{name}": tensor for name, tensor in original_vae(networks["vae"]).items()},
    }
    assert any(tensor.ndim == 2 for name, tensor in state.items() if name.endswith("proj_in.weight")) == linear
    if family == "sd2":
        state |= open_clip(networks["text_encoder"], "cond_stage_model.model.", spare_layer=True)
        state["cond_stage_model.model.text_projection"] = torch.ones(128, 128)
    else:
        prefix = "conditioner.embedders.0.transformer." if family == "sdxl" else "cond_stage_model.transformer."
        for name, tensor in networks["text_encoder"].state_dict().items():
            state[f"{prefix}text_model.{name.removeprefix('text_model.')}"] = tensor
        state[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if family == "sdxl":
        state |= open_clip(networks["text_encoder_2"], "conditioner.embedders.1.model.")
        state["denoiser.sigmas"] = torch.ones(1000)
    else:
        for name in ("betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"):
            state[name] = torch.ones(1000)
        state["model_ema.diffusion_modelinput_blocks00weight"] = torch.ones(1)
        state["model_ema.num_updates"] = torch.tensor(7, dtype=torch.int32)
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def original_unet(unet):
    """A UNet's state dict as latent-diffusion's openaimodel.py names it."""
    per_level = unet.config.layers_per_block + 1
    attends_up = [kind.startswith("CrossAttn") for kind in unet.config.up_block_types]
    state = {}
    for name, tensor in unet.state_dict().items():
        new = name
        for theirs, its in {
            "conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2.",
            "time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.",
            "add_embedding.linear_1.": "label_emb.0.0.", "add_embedding.linear_2.": "label_emb.0.2.",
            "mid_block.resnets.0.": "middle_block.0.", "mid_block.attentions.0.": "middle_block.1.",
            "mid_block.resnets.1.": "middle_block.2.",
        }.items():  # fmt: skip
            if new.startswith(theirs):
                new = its + new.removeprefix(theirs)
        if found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", new):
            direction, level, kind, layer = found.groups()
            list_name = "input_blocks" if direction == "down" else "output_blocks"
            number = int(level) * per_level + int(layer) + (direction == "down")
            new = f"{list_name}.{number}.{0 if kind == 'resnets' else 1}.{new[found.end() :]}"
        if found := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.", new):
            new = f"input_blocks.{(int(found[1]) + 1) * per_level}.0.op.{new[found.end() :]}"
        if found := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.", new):
            place = 2 if attends_up[int(found[1])] else 1
            new = f"output_blocks.{(int(found[1]) + 1) * per_level - 1}.{place}.conv.{new[found.end() :]}"
        if "transformer_blocks" not in new and re.match(r"(input|output)_blocks\.\d+\.0|middle_block\.[02]", new):
            for theirs, its in {
                "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
                "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
            }.items():  # fmt: skip
                new = new.replace(f".{theirs}.", f".{its}.")
        assert new not in state and "resnets" not in new and "attentions" not in new
        state[new] = tensor
    return state


def original_vae(vae):
    """An autoencoder's state dict as latent-diffusion's model.py names it: its attention is 1x1 convolutions."""
    levels = len(vae.config.block_out_channels)
    state = {}
    for name, tensor in vae.state_dict().items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = new.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        new = new.replace("mid_block.attentions.0", "mid.attn_1")
        if ".attn_1." in new:
            new = new.replace("group_norm", "norm").replace("to_out.0", "proj_out")
            new = re.sub(r"to_([qkv])", r"\1", new)
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", new)
        assert new not in state
        state[new] = tensor
    return state


def open_clip(text_encoder, prefix, spare_layer=False):
    """A text encoder's state dict as OpenCLIP names it; `spare_layer`: with the last one, which SD2 does not use."""
    theirs = {name.removeprefix("text_model."): t for name, t in text_encoder.state_dict().items()}
    state = {
        "token_embedding.weight": theirs.pop("embeddings.token_embedding.weight"),
        "positional_embedding": theirs.pop("embeddings.position_embedding.weight"),
        "ln_final.weight": theirs.pop("final_layer_norm.weight"),
        "ln_final.bias": theirs.pop("final_layer_norm.bias"),
        "logit_scale": torch.tensor(4.6),
    }
    if "text_projection.weight" in theirs:
        state["text_projection"] = theirs.pop("text_projection.weight").T
    layers = text_encoder.config.num_hidden_layers
    for number in range(layers + spare_layer):
        old, new = f"encoder.layers.{min(number, layers - 1)}.", f"transformer.resblocks.{number}."
        take = theirs.get if number >= layers - 1 and spare_layer else theirs.pop
        for kind in ("weight", "bias"):
            fused = [take(f"{old}self_attn.{letter}_proj.{kind}") for letter in "qkv"]
            state[f"{new}attn.in_proj_{kind}"] = torch.cat(fused)
            for inside, its in {
                "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
                "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
            }.items():  # fmt: skip
                state[f"{new}{its}.{kind}"] = take(f"{old}{inside}.{kind}")
    left = [name for name in theirs if not (spare_layer and name.startswith(f"encoder.layers.{layers - 1}."))]
    assert not [name for name in left if "position_ids" not in name]
    return {prefix + name: tensor for name, tensor in state.items()}


def torch_outputs(family, networks, prompt, latents, timestep, pixels):
    """What PyTorch makes of prompts, latents [B, 4, h, w] and pixels [B, 3, H, W]."""
    pipe = pipeline(family, networks, "epsilon")
    with torch.no_grad():
        encoded = pipe.encode_prompt(
            prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        context, added = encoded[0], None
        pooled = encoded[2] if family == "sdxl" else None
        if pooled is not None:
            height, width = 2 * latents.shape[2], 2 * latents.shape[3]
            sizes = [height, width, 0, 0, height, width]
            added = {"text_embeds": pooled, "time_ids": torch.tensor([sizes] * len(prompt))}
        noise = networks["unet"](latents, timestep, context, added_cond_kwargs=added).sample
        moments = networks["vae"].encode(pixels).latent_dist.parameters
        decoded = networks["vae"].decode(latents / networks["vae"].config.scaling_factor).sample
    return SimpleNamespace(context=context, pooled=pooled, noise=noise, moments=moments, decoded=decoded)
