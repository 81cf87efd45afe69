"""Scores of the word while it is learned and at the end, and which of its states was the best."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..config import TrainConfig
from ..data.images import as_uint8
from ..embeddings import Embedding
from ..errors import InputError
from ..evaluation.evaluate import Evaluator, load_measure, sampler_steps, write_scores
from ..evaluation.scores import Scores
from ..files import disk_errors
from ..pipeline import StableDiffusion
from .setup import Concept

LOG_FILE = "scores.jsonl"
SCORES_FILE = "scores.json"
BEST_FILE = "learned_embeds-best.safetensors"


@dataclass
class Measuring:
    """Measures states of the word; with ``keep_best`` it keeps a copy of the best one in the run's folder.

    Attributes:
      by: the measure to keep the best by, or None.
      best: step and scores of the best state so far, whose vectors are in `BEST_FILE`. last: of the last one measured.
    """

    evaluator: Evaluator
    others: tuple[Embedding, ...]
    folder: Path
    by: str | None
    best: tuple[int, Scores] | None = None
    last: tuple[int, Scores] | None = None

    def measure(self, sd: StableDiffusion, embedding: Embedding, step: int) -> Scores:
        """Measure, log, and keep the word if it is the best so far."""
        if self.last is not None and self.last[0] == step:
            return self.last[1]
        scores = self.evaluator.scores(sd, embedding, self.others)
        self.last = (step, scores)
        with disk_errors(self.folder), (self.folder / LOG_FILE).open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step, **scores.as_dict()}) + "\n")
        if self._is_best(scores):
            self.best = self.last
            embedding.save(self.folder / BEST_FILE, format="diffusers")
        return scores

    def _is_best(self, scores: Scores) -> bool:
        if self.by is None:
            return False
        value = getattr(scores, self.by)
        if value is None:
            raise InputError(f"--keep_best {self.by}: was not measured; it needs another model to measure with")
        # Of equals the first: fewer steps keep a word nearer to the language.
        return self.best is None or value > getattr(self.best[1], self.by)

    def resume(self, step: int) -> None:
        """Take up what an earlier part of the run measured, up to `step`; later lines are of steps to be made again."""
        path = self.folder / LOG_FILE
        if not path.exists():
            return
        with disk_errors(path):
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            kept = [line for line in lines if line["step"] <= step]
            path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        for line in kept:
            scores = Scores(**{name: value for name, value in line.items() if name != "step"})
            if self._is_best(scores):
                self.best = (line["step"], scores)

    def finish(self, sd: StableDiffusion, embedding: Embedding, step: int) -> tuple[Embedding, Scores]:
        """Measure the last state, and return the word that the run ends with, and its scores."""
        scores = self.measure(sd, embedding, step)
        if self.best is not None and self.best[0] != step:
            embedding, scores = Embedding.load(self.folder / BEST_FILE), self.best[1]
        write_scores(self.folder / SCORES_FILE, embedding, scores)
        return embedding, scores


def make_measuring(config: TrainConfig, sd: StableDiffusion, concept: Concept, folder: Path) -> Measuring | None:
    """What the config asks for: None if it asks for no scores.

    Raises:
      InputError: nothing to measure with.
    """
    if not config.evaluate and config.keep_best is None:
        return None
    assert config.validation_guidance_scale is not None, "the config is resolved"
    evaluator = Evaluator(
        load_measure(sd, config.evaluation_clip),
        as_uint8(concept.pictures.pixels),
        images=config.evaluation_images,
        num_inference_steps=sampler_steps(config),
        guidance_scale=config.validation_guidance_scale,
        scheduler=config.scheduler,
        seed=config.seed,
    )
    return Measuring(evaluator, concept.others, folder, config.keep_best)
