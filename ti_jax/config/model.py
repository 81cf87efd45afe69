"""The settings that name a model, which several commands have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ti_jax.config.fields import setting
from ti_jax.config.rules import TEXT, WHOLE

PredictionType = Literal["epsilon", "v_prediction"]
SamplerName = Literal["ddim", "euler", "euler_a", "dpm++"]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model's files come from."""

    pretrained_model_name_or_path: str | None = setting(None, TEXT, path="model", first=True)
    """The model that the word is for: a diffusers folder, a Hugging Face Hub id, e.g.
    stable-diffusion-v1-5/stable-diffusion-v1-5, or a single .safetensors or .ckpt checkpoint; folder and file may be
    URLs (gs://bucket/model, with the extra `gcs`). Left out: the small model that comes with ti_jax."""
    revision: str | None = setting(None, TEXT)
    """Branch, tag or commit of the hub repository."""
    variant: str | None = setting(None, TEXT)
    """Variant of the weight files, e.g. fp16."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings(ModelSource):
    """A model, and how it runs."""

    prediction_type: PredictionType | None = None
    """What the UNet predicts, for a single checkpoint that does not say it. Left out: what the model says; else epsilon
    (noise), but an SD2.x file must be told."""
    clip_skip: int = setting(0, WHOLE, fingerprint=True)
    """Last layers of the text encoder to leave out, counted as diffusers does: 1 is what AUTOMATIC1111 calls clip skip
    2, which many anime models were trained with. A word is drawn best with the number that it was trained with."""
    vae: str | None = setting(None, TEXT, path="input")
    """Folder of another autoencoder in diffusers' layout (config.json and weights), instead of the model's own."""
    mixed_precision: Literal["no", "bf16"] | None = None
    """Precision of the model's weights and activations; what is trained, its loss and its optimizer are always float32.
    Left out: bf16 on TPU and on GPUs that have it (NVIDIA's from Ampere on), else no (float32, and no TF32); on a CPU
    with AVX512_BF16, too, bf16 is faster."""
