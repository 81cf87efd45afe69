"""Scores of the word during and after training, and a copy of the best state so far."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from ti_jax.config import TrainConfig
from ti_jax.data.concept import Concept
from ti_jax.data.folder import as_uint8
from ti_jax.embeddings import Embedding
from ti_jax.errors import InputError
from ti_jax.evaluation.evaluate import Evaluator, load_measure, sampler_steps, write_scores
from ti_jax.evaluation.scores import Scores
from ti_jax.files import append, write_atomically
from ti_jax.interrupts import interruptible
from ti_jax.pipeline import StableDiffusion
from ti_jax.pipeline.sampling import DEFAULT_BATCH_SIZE
from ti_jax.training.report import read_lines
from ti_jax.training.run_folder import copy_name

LOG_FILE = "scores.jsonl"
SCORES_FILE = "scores.json"
BEST_FILE = "learned_embeds-best.safetensors"


@dataclass
class ScoreTracker:
    """Scores states of the word; with ``keep_best`` saves the best one in the run's folder.

    Attributes:
      by: name of the score to compare by (``--keep_best``), or None.
      best: step and scores of the best state so far, which is saved in `BEST_FILE`.
      last: step and scores of the state measured last.
    """

    evaluator: Evaluator
    others: tuple[Embedding, ...]
    folder: Path
    by: str | None
    best: tuple[int, Scores] | None = None
    last: tuple[int, Scores] | None = None

    def measure(self, sd: StableDiffusion, embedding: Embedding, step: int) -> Scores:
        """Score the word and log the scores; save the word if it is the best so far."""
        if self.last is not None and self.last[0] == step:
            return self.last[1]
        scores = interruptible(lambda: self.evaluator.scores(sd, embedding, self.others))
        self.last = (step, scores)
        # The word first: a kill between the two must not leave a logged best state that was not saved.
        if self._is_best(scores):
            embedding.save(self.folder / BEST_FILE, format="diffusers")
            self.best = self.last
        try:
            append(self.folder / LOG_FILE, (json.dumps({"step": step, **scores.as_dict()}) + "\n").encode())
        except InputError as error:  # the scores are valid even if they cannot be logged
            print(f"warning: {error}; a resumed run measures step {step} again", file=sys.stderr)
        return scores

    def _is_best(self, scores: Scores) -> bool:
        if self.by is None:
            return False
        value = getattr(scores, self.by)
        if value is None:
            raise InputError(f"--keep_best {self.by}: it was not measured; it needs another model to score with")
        # Among equals the first: with fewer steps a word stays closer to the vocabulary.
        return self.best is None or value > getattr(self.best[1], self.by)

    def resume(self, state: Embedding, step: int) -> None:
        """Reload scores up to ``step``; drop later ones, which will be recomputed.

        Args:
          state: the word at ``step``.
        """
        path = self.folder / LOG_FILE
        if not path.exists():
            return
        kept = [line for line in read_lines(path) if line["step"] <= step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        for line in kept:
            self.last = (line["step"], Scores(**{name: value for name, value in line.items() if name != "step"}))
            if self._is_best(self.last[1]):
                self.best = self.last
        if self.best is not None:
            self._keep_best(self.best[0], state, step)

    def _keep_best(self, best: int, state: Embedding, step: int) -> None:
        """Restore the state at ``best`` in `BEST_FILE`, which a step after the checkpoint may have overwritten."""
        file, copy = self.folder / BEST_FILE, self.folder / copy_name(best)
        if file.exists() and Embedding.load(file).metadata.get("steps") == str(best):
            return
        if best == step:
            state.save(file, format="diffusers")
        elif copy.exists():
            Embedding.load(copy).save(file, format="diffusers")
        else:
            print(
                f"warning: {file} is no longer the word of step {best}, the best up to step {step}: the best of the "
                f"steps after it will be kept",
                file=sys.stderr,
            )
            self.best = None

    def finish(self, sd: StableDiffusion, embedding: Embedding, step: int) -> tuple[Embedding, Scores]:
        """Score the last state; return the final word, which is the best one with ``keep_best``, and its scores."""
        scores = self.measure(sd, embedding, step)
        if self.best is not None and self.best[0] != step:
            embedding, scores = Embedding.load(self.folder / BEST_FILE), self.best[1]
        write_scores(self.folder / SCORES_FILE, embedding, scores)
        return embedding, scores


def measures(config: TrainConfig) -> bool:
    """Whether a run scores its words."""
    return config.evaluate or config.keep_best is not None


def make_score_tracker(sd: StableDiffusion, concept: Concept) -> ScoreTracker:
    """The score tracker of a concept whose config asks for scores.

    Raises:
      InputError: there is neither a CLIP model nor a judge to score with.
    """
    config = concept.config
    assert config.validation_guidance_scale is not None, "the config is resolved"
    steps = sampler_steps(config)
    # Where the run's other pictures have as many steps, the same program draws all of them.
    alike = steps == config.validation_inference_steps
    evaluator = Evaluator(
        load_measure(sd, config.evaluation_clip),
        as_uint8(concept.pictures.pixels[: concept.pictures.files]),
        images=config.evaluation_images,
        num_inference_steps=steps,
        guidance_scale=config.validation_guidance_scale,
        scheduler=config.scheduler,
        seed=config.seed,
        batch_size=DEFAULT_BATCH_SIZE if alike else Evaluator.batch_size,
    )
    return ScoreTracker(evaluator, concept.others, concept.folder, config.keep_best)
