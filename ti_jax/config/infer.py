"""The settings of drawing. A field's doc is its flag's help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ti_jax.config.fields import setting
from ti_jax.config.model import ModelSettings, SamplerName
from ti_jax.config.rules import COUNT, NOT_NEGATIVE, PNG, SEED, SIDE, SOME_TEXTS, TEXTS

VaeTiling = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class InferConfig(ModelSettings):
    """Draw pictures of prompts, with learned words in them."""

    prompt: tuple[str, ...] = setting((), SOME_TEXTS, first=True)
    """What to draw; each in quotes, one or several. A learned word stands where the thing is named, e.g.
    "a portrait of <cleo> wearing a red jacket"."""
    embedding: tuple[str, ...] = setting((), TEXTS, path="input", first=True)
    """Files of the learned words that the prompts use, in any known format, or URLs of them. FILE=word reads one under
    a word of your own."""

    # -- the pictures
    negative_prompt: str | None = None
    """What the pictures should not show."""
    plain_prompts: bool = False
    """Take every character of a prompt as text. Otherwise prompts are read as AUTOMATIC1111 does: (word) and (word:1.3)
    weigh more, [word] less, BREAK starts a new chunk, \\( is a bracket, and a prompt may be of any length."""
    num_inference_steps: int | None = setting(None, COUNT)
    """Steps of the sampler. Left out: 30 (embedded model: 25)."""
    guidance_scale: float | None = setting(None, NOT_NEGATIVE)
    """Classifier-free guidance: how closely the prompt is followed; 1 is none. Left out: 7.5 (embedded model: 3)."""
    scheduler: SamplerName | None = None
    """The sampler. Left out: the one that comes with the model; where that is not implemented ddim (SDXL: euler)."""
    num_images: int = setting(1, COUNT)
    """Pictures of each prompt."""
    height: int | None = setting(None, SIDE)
    """Height in pixels, divisible by 8. Left out: the model's own."""
    width: int | None = setting(None, SIDE)
    """Width in pixels, divisible by 8. Left out: the model's own."""
    seed: int = setting(0, SEED)
    """Seed of the noise that the first picture starts from; the next has seed + 1, and so on."""
    batch_size: int = setting(4, COUNT)
    """Pictures drawn at once: more is faster, less needs less memory."""
    vae_tiling: VaeTiling = "auto"
    """Decode pictures in overlapping tiles, as large as those that the model was trained on: needs far less memory, and
    changes large pictures a little. auto: only where the free memory is too little for them whole."""
    output: str = setting("out.png", PNG, path="output")
    """Where the picture goes. Several go into numbered files beside it, out-0.png and so on, and together into
    out-grid.png."""
