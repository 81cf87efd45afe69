"""The settings of measuring. A field's doc is its flag's help."""

from __future__ import annotations

from dataclasses import dataclass

from ti_jax.config.fields import setting
from ti_jax.config.model import ModelSettings, SamplerName
from ti_jax.config.rules import COUNT, JSON, NOT_NEGATIVE, SEED, TEXT


@dataclass(frozen=True)
class EvaluateConfig(ModelSettings):
    """Measure a learned word: is the concept there (identity), and does the prompt rule the rest (editability)?"""

    train_data_dir: str | None = setting(None, TEXT, path="input", first=True)
    """Folder with pictures of the concept, best some that the word was not trained on."""
    distractors: str | None = setting(None, TEXT, path="input", first=True)
    """Folder with a folder of pictures for each of some other concepts, among which the word should find its own."""
    evaluation_clip: str | None = setting(None, TEXT, path="input")
    """Folder of a CLIP model (hf download openai/clip-vit-large-patch14 --local-dir ...): CLIP-I and CLIP-T as in the
    textual inversion paper. Left out: the judge that comes with the model, if it has one, as the embedded model has."""
    evaluation_images: int | None = setting(None, COUNT)
    """Pictures of each prompt. Left out: 64 with a CLIP model, as in the paper; 4 with a judge."""

    # -- the pictures
    num_inference_steps: int | None = setting(None, COUNT)
    """Steps of the sampler. Left out: 50, as in the paper (embedded model: 25)."""
    guidance_scale: float | None = setting(None, NOT_NEGATIVE)
    """Classifier-free guidance. Left out: 7.5 (embedded model: 3)."""
    scheduler: SamplerName | None = None
    """The sampler. Left out: the one that comes with the model; where that is not implemented ddim (SDXL: euler)."""
    seed: int = setting(0, SEED)
    """Seed of the noise that the first picture of each prompt starts from; the next has seed + 1, and so on."""
    batch_size: int = setting(8, COUNT)
    """Pictures drawn at once: more is faster, less needs less memory."""
    output: str | None = setting(None, JSON, path="output")
    """File for the scores, .json. Left out: they are only printed."""
