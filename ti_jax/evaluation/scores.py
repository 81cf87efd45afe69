"""Scores of a learned word: *identity* (is it the concept?) and *editability* (are prompts still followed?).

Pictures are scored either by a `Judge`, which classifies their attributes, or by a `CLIP` model, whose scores are those
of the textual inversion paper (Gal et al. 2022, arXiv 2208.01618, section 5.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ti_jax.evaluation.avatar_judge import Judge, Probe
from ti_jax.evaluation.clip import CLIP
from ti_jax.words import fill

Draw = Callable[[Sequence[str]], list[Image.Image]]
"""Draws one picture for each prompt, each with its own seed."""

CLIP_IMAGES = 64
CLIP_PROMPT = "a photo of {}"
CLIP_EDITS = (
    "a photo of {} on the beach",
    "a photo of {} in the snow",
    "a photo of {} on the moon",
    "a watercolor painting of {}",
    "a pencil drawing of {}",
    "{} in the style of Monet",
)


@dataclass(frozen=True)
class Scores:
    """Scores; None for those not measured.

    Attributes:
      identity: share of drawn pictures with the concept's value, averaged over the identity attributes.
      editability: share of drawn pictures with the value that the probe asked for, averaged over those attributes.
      by_attribute: the shares by attribute, such as ``identity/hair`` or ``editability/background``.
      reference: the concept's identity attributes, as the judge classifies its pictures.
      clip_i: mean cosine between drawn pictures and the concept's, over all pairs.
      clip_t: mean cosine between each prompt, without the word, and the mean of the pictures drawn for it.
      rank: rank of the concept among the distractors by similarity to the drawn pictures (1 is best).
      candidates: number of concepts ranked.
    """

    identity: float | None = None
    editability: float | None = None
    by_attribute: Mapping[str, float] = field(default_factory=dict)
    reference: Mapping[str, str] = field(default_factory=dict)
    clip_i: float | None = None
    clip_t: float | None = None
    rank: int | None = None
    candidates: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The measured scores, for a JSON file."""
        return {name: value for name, value in vars(self).items() if value not in (None, {})}

    def __str__(self) -> str:
        """The scores on one line."""
        parts = [f"{name} {getattr(self, name):.3f}" for name in MEASURES if getattr(self, name) is not None]
        if self.rank is not None:
            parts.append(f"rank {self.rank} of {self.candidates}")
        return ", ".join(parts)


MEASURES = ("identity", "editability", "clip_i", "clip_t")


def reference_attributes(judge: Judge, pictures: np.ndarray, names: Sequence[str] | None = None) -> dict[str, str]:
    """Attributes of a concept: the likeliest values for all its pictures, uint8 [N, S, S, 3], together.

    `names` are those to tell; None: the identity's.
    """
    words = judge.config.words
    probabilities = judge.probabilities(pictures)
    return {
        name: words[name][int(np.log(probabilities[name] + 1e-6).mean(axis=0).argmax())]
        for name in (judge.config.identity if names is None else names)
    }


def attribute_scores(
    readings: Sequence[Mapping[str, str]], probes: Sequence[Probe], reference: Mapping[str, str]
) -> dict[str, float]:
    """Share of correct pictures by attribute.

    Args:
      readings: each picture's attributes, from `Judge.read`.
      probes: the probe that each picture was drawn for.
      reference: the concept's identity attributes.

    Returns:
      ``identity/NAME`` for each attribute in `reference`, over the pictures whose probe does not ask for another value;
      ``editability/NAME`` for each attribute that a probe asks for.
    """
    right: dict[str, list[bool]] = {}
    for seen, probe in zip(readings, probes, strict=True):
        asked = dict(probe.expects)
        for name, word in asked.items():
            right.setdefault(f"editability/{name}", []).append(seen[name] == word)
        for name, word in reference.items():
            if name not in asked:
                right.setdefault(f"identity/{name}", []).append(seen[name] == word)
    return {name: float(np.mean(values)) for name, values in sorted(right.items())}


def mean_of(shares: Mapping[str, float], kind: str) -> float | None:
    """Mean over the attributes of a kind, ``identity`` or ``editability``."""
    values = [share for name, share in shares.items() if name.startswith(f"{kind}/")]
    return float(np.mean(values)) if values else None


def judge_scores(
    judge: Judge,
    draw: Draw,
    word: str,
    pictures: np.ndarray,
    images_a_probe: int,
    distractors: Sequence[np.ndarray] = (),
    learnable_property: str = "object",
) -> Scores:
    """Draw the judge's probes with `word`, and score the pictures.

    Args:
      judge: its config has the probes.
      draw: draws a picture for each prompt.
      word: replaces ``{}`` in the probes.
      pictures: of the concept, uint8 [N, S, S, 3].
      images_a_probe: pictures drawn per probe.
      distractors: pictures of other concepts, one array for each.
      learnable_property: whether the concept is an "object" or a "style".
    """
    names, own_probes = judge.config.concept(learnable_property)
    probes = [probe for probe in own_probes for _ in range(images_a_probe)]
    drawn = np.stack([np.asarray(image) for image in draw([fill(probe.prompt, word) for probe in probes])])
    reference = reference_attributes(judge, pictures, names)
    shares = attribute_scores(judge.read(drawn), probes, reference)
    rank = rank_among(judge.features(drawn), [judge.features(other) for other in (pictures, *distractors)])
    return Scores(
        identity=mean_of(shares, "identity"),
        editability=mean_of(shares, "editability"),
        by_attribute=shares,
        reference=reference,
        rank=rank if distractors else None,
        candidates=1 + len(distractors) if distractors else None,
    )


def rank_among(drawn: np.ndarray, candidates: Sequence[np.ndarray]) -> int:
    """Rank of the first candidate by mean cosine to `drawn`; all are unit feature vectors [N, D]."""
    likeness = [float(np.mean(drawn @ candidate.T)) for candidate in candidates]
    return 1 + sum(other > likeness[0] for other in likeness[1:])


def clip_scores(
    clip: CLIP,
    draw: Draw,
    word: str,
    pictures: Sequence[Image.Image],
    images: int = CLIP_IMAGES,
    prompt: str = CLIP_PROMPT,
    edits: Sequence[str] = CLIP_EDITS,
    distractors: Sequence[Sequence[Image.Image]] = (),
) -> Scores:
    """The paper's scores: `images` pictures of `prompt` for the image score, and of each edit for the text score.

    For the text score the word is left out of the prompt: ``a photo of on the beach``.
    """
    drawn = clip.image_features(draw([fill(prompt, word)] * images))
    concept = clip.image_features(pictures)
    similarity = []
    for edit in edits:
        mean = clip.image_features(draw([fill(edit, word)] * images)).mean(axis=0)
        text = clip.text_features([" ".join(fill(edit, " ").split())])[0]
        similarity.append(float(mean @ text / np.linalg.norm(mean)))
    rank = rank_among(drawn, [concept, *(clip.image_features(other) for other in distractors)])
    return Scores(
        clip_i=float(np.mean(drawn @ concept.T)),
        clip_t=float(np.mean(similarity)),
        rank=rank if distractors else None,
        candidates=1 + len(distractors) if distractors else None,
    )
