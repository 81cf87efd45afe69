"""The family of a single-file checkpoint, identified by its tensors, and what all models of a family share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ti_jax.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CONV_IN = f"{UNET}input_blocks.0.0.weight"
CONV_OUT = f"{UNET}out.2.weight"


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a family.

    Attributes:
      name: of the component: ``text_encoder`` or ``text_encoder_2``.
      prefix: of its tensors in the file.
      layout: naming scheme of its tensors after the prefix.
      pad_token: padding token of its tokenizer.
      with_projection: the pooled state is projected.
      layers_unused: number of last layers in the file that the published model does not use.
    """

    name: str
    prefix: str
    layout: Literal["transformers", "open_clip"]
    pad_token: str
    with_projection: bool = False
    layers_unused: int = 0


@dataclass(frozen=True)
class Family:
    """What all models of a family share and their tensors do not show.

    Attributes:
      name: for messages.
      head_channels: channels of an attention head of the UNet; None: always 8 heads.
      scaling_factor: of the VAE.
      scheduler: ``scheduler_config.json`` as the original model was published with.
      prediction_type: what the UNet predicts; None: models of both kinds are published.
      sample_size: side of the latents that it was trained on, by prediction type.
      zeros_for_empty_prompt: without a negative prompt, guidance uses zeros (``force_zeros_for_empty_prompt``).
    """

    name: str
    text_encoders: tuple[TextEncoder, ...]
    head_channels: int | None
    scaling_factor: float
    scheduler: Mapping[str, Any]
    prediction_type: str | None
    sample_size: Mapping[str, int]
    zeros_for_empty_prompt: bool = False


END, EXCLAMATION_MARK = "<|endoftext|>", "!"

_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
}

SD1 = Family(
    name="Stable Diffusion 1.x",
    text_encoders=(TextEncoder("text_encoder", "cond_stage_model.transformer.", "transformers", END),),
    head_channels=None,
    scaling_factor=0.18215,
    scheduler={"_class_name": "PNDMScheduler", **_BETAS, "set_alpha_to_one": False, "skip_prk_steps": True},
    prediction_type="epsilon",
    sample_size={"epsilon": 64, "v_prediction": 64},
)
SD2 = Family(
    name="Stable Diffusion 2.x",
    text_encoders=(
        TextEncoder("text_encoder", "cond_stage_model.model.", "open_clip", EXCLAMATION_MARK, layers_unused=1),
    ),
    head_channels=64,
    scaling_factor=0.18215,
    scheduler={"_class_name": "DDIMScheduler", **_BETAS, "set_alpha_to_one": False},
    prediction_type=None,
    # The models of 512 pixels predict noise, those of 768 pixels v.
    sample_size={"epsilon": 64, "v_prediction": 96},
)
SDXL = Family(
    name="Stable Diffusion XL",
    text_encoders=(
        TextEncoder("text_encoder", "conditioner.embedders.0.transformer.", "transformers", END),
        TextEncoder(
            "text_encoder_2", "conditioner.embedders.1.model.", "open_clip", EXCLAMATION_MARK, with_projection=True
        ),
    ),
    head_channels=64,
    scaling_factor=0.13025,
    scheduler={"_class_name": "EulerDiscreteScheduler", **_BETAS, "timestep_spacing": "leading"},
    prediction_type="epsilon",
    sample_size={"epsilon": 128, "v_prediction": 128},
    zeros_for_empty_prompt=True,
)

# UNet input channels (4 for a text-to-image model) -> kind of model.
OTHER_INPUTS = {5: "a depth-to-image model", 7: "an upscaler", 8: "an image-editing model", 9: "an inpainting model"}

# Other kinds of .safetensors and .ckpt files: substrings of tensor names, any of which identifies the kind; where in
# the name they occur; and what to say.
_OTHER_KINDS: tuple[tuple[tuple[str, ...], Literal["start", "anywhere"], str], ...] = (
    (
        ("lora_", "lycoris_", ".hada_w", ".lokr_w", ".oft_blocks"),
        "anywhere",
        "a LoRA, which modifies a model; give the model itself",
    ),
    (("control_model.", "controlnet_cond_embedding."), "start", "a ControlNet, which ti_jax does not read"),
    (("joint_blocks.", f"{UNET}joint_blocks."), "start", "a Stable Diffusion 3 model, which ti_jax does not read"),
    (("double_blocks.", f"{UNET}double_blocks."), "start", "a Flux model, which ti_jax does not read"),
    (
        ("down_blocks.", "encoder.down_blocks.", "text_model.", "encoder.layers."),
        "start",
        "one component in diffusers' layout; give the folder with model_index.json that it belongs to",
    ),
    (("input_blocks.",), "start", "a UNet alone; give a checkpoint with text encoder and VAE too"),
    (("encoder.down.",), "start", "a VAE alone; give a checkpoint with UNet and text encoder too"),
    (
        ("emb_params", "emp_params", "string_to_param", "clip_l", "clip_g"),
        "start",
        "a learned word, not a model; pass it as an embedding",
    ),
)


def identify(path: Path, shapes: Shapes) -> Family:
    """The family of the checkpoint at `path`, whose tensors have these shapes.

    Raises:
      InputError: another kind of file, a model of another kind, or a checkpoint without one of its components.
    """
    _refuse_other_kinds(path, shapes)
    family = _by_text_encoder(path, shapes)
    if family is not SDXL and has(shapes, f"{UNET}label_emb."):
        raise InputError(f"{path}: a {family.name} model that is conditioned on pictures too; ti_jax does not read it")
    if not has(shapes, VAE):
        raise InputError(f"{path}: a {family.name} checkpoint without its VAE ({VAE}*); get the complete file")
    return family


def has(shapes: Shapes, prefix: str) -> bool:
    """Whether a name begins with `prefix`."""
    return any(name.startswith(prefix) for name in shapes)


def _refuse_other_kinds(path: Path, shapes: Shapes) -> None:
    if not shapes:
        raise InputError(f"{path}: holds no tensors; download it again")
    for words, where, kind in _OTHER_KINDS:
        test = str.startswith if where == "start" else str.__contains__
        if any(test(name, word) for name in shapes for word in words):
            raise InputError(f"{path}: {kind}")
    if not has(shapes, f"{UNET}input_blocks."):
        missing = f"a checkpoint without its UNet ({UNET}*)" if has(shapes, VAE) else "no Stable Diffusion checkpoint"
        raise InputError(
            f"{path}: {missing}; ti_jax reads Stable Diffusion 1.x, 2.x and XL in the original layout, or a diffusers "
            "folder"
        )
    if has(shapes, "edm_"):
        raise InputError(f"{path}: an EDM model (Playground 2.5, CosXL), which ti_jax does not read")
    channels, outputs = (shapes.get(name, ()) for name in (CONV_IN, CONV_OUT))
    if len(channels) == 4 and len(outputs) == 4 and channels[1] != outputs[0]:
        what = OTHER_INPUTS.get(channels[1], "another kind of model")
        raise InputError(
            f"{path}: {what}: its UNet takes {channels[1]} channels, not {outputs[0]}; give a text-to-image model"
        )


def _by_text_encoder(path: Path, shapes: Shapes) -> Family:
    for family in (SDXL, SD2, SD1):
        if all(has(shapes, encoder.prefix) for encoder in family.text_encoders):
            return family
    if has(shapes, "conditioner.embedders.0.model."):
        raise InputError(f"{path}: the refiner of Stable Diffusion XL; give the base model")
    there = [encoder.prefix for encoder in SDXL.text_encoders if has(shapes, encoder.prefix)]
    if there:
        (absent,) = (encoder.prefix for encoder in SDXL.text_encoders if encoder.prefix not in there)
        raise InputError(
            f"{path}: a Stable Diffusion XL checkpoint without one of its text encoders ({absent}*); get the complete "
            "file"
        )
    raise InputError(
        f"{path}: a checkpoint without its text encoder (cond_stage_model.* or conditioner.*); get the complete file"
    )
