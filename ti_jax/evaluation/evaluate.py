"""Score a learned word, with a CLIP model or with the judge that comes with the frozen model."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ti_jax.config import EMBEDDED_STEPS, PAPER_STEPS, EvaluateConfig, TrainConfig
from ti_jax.data.folder import as_uint8, load_images
from ti_jax.embeddings import Embedding, check_fits
from ti_jax.embeddings.embedding import NEGATIVE_CLASS
from ti_jax.embeddings.naming import load_given
from ti_jax.errors import InputError
from ti_jax.evaluation.avatar_judge import FOLDER, Judge
from ti_jax.evaluation.clip import CLIP, read_clip_config
from ti_jax.evaluation.scores import CLIP_IMAGES, Scores, clip_scores, judge_scores
from ti_jax.files import writable_folder, write_atomically
from ti_jax.machine import explaining_out_of_memory
from ti_jax.pipeline import StableDiffusion
from ti_jax.pipeline.model_description import ModelDescription, open_model_of
from ti_jax.remote import local_copy

JUDGE_IMAGES = 4


@dataclass(frozen=True)
class Evaluator:
    """Scores words of one concept for one model, always with the same prompts and seeds.

    Attributes:
      pictures: of the concept, uint8 [N, S, S, 3]. distractors: of other concepts, in the same form.
      measure: a CLIP model or a judge. images: number drawn per prompt; None: 64 for CLIP, 4 for a judge.
    """

    measure: CLIP | Judge
    pictures: np.ndarray
    distractors: tuple[np.ndarray, ...] = ()
    images: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    scheduler: str | None = None
    seed: int = 0
    batch_size: int = 8

    def scores(self, sd: StableDiffusion, embedding: Embedding, others: Sequence[Embedding] = ()) -> Scores:
        """Draw pictures with the word, and score them.

        Args:
          sd: the frozen model.
          embedding: the word. others: other learned words that prompts may use. A word for the negative prompt is used
            there, and what stands for it in the prompts is in its metadata; it is good if the identity is low.
        """
        draw = partial(self._draw, sd, embedding, others)
        subject = embedding.metadata.get(NEGATIVE_CLASS) or embedding.token
        if isinstance(self.measure, Judge):
            return judge_scores(
                self.measure,
                draw,
                subject,
                self.pictures,
                self.images or JUDGE_IMAGES,
                self.distractors,
                _kind(embedding),
            )
        pictures, *distractors = (
            [Image.fromarray(picture) for picture in concept] for concept in (self.pictures, *self.distractors)
        )
        return clip_scores(self.measure, draw, subject, pictures, self.images or CLIP_IMAGES, distractors=distractors)

    def compile(self, sd: StableDiffusion, embedding: Embedding, others: Sequence[Embedding] = ()) -> None:
        """Compile what `scores` draws with; the arguments are of the same kinds."""
        together = self.images or CLIP_IMAGES
        if isinstance(self.measure, Judge):
            together = (self.images or JUDGE_IMAGES) * len(self.measure.config.concept(_kind(embedding))[1])
        self._draw(sd, embedding, others, [embedding.token] * together, compile_only=True)

    def _draw(
        self,
        sd: StableDiffusion,
        embedding: Embedding,
        others: Sequence[Embedding],
        prompts: Sequence[str],
        compile_only: bool = False,
    ) -> list[Image.Image]:
        # A prompt's seeds do not depend on the other prompts, so that scores of two words are comparable.
        count: dict[str, int] = {}
        seeds = []
        for prompt in prompts:
            seeds.append((self.seed + count.get(prompt, 0)) % 2**32)
            count[prompt] = count.get(prompt, 0) + 1
        height, width = self.pictures.shape[1:3]
        return sd.generate(
            prompts,
            embeddings=[embedding, *others],
            negative_prompt=embedding.token if NEGATIVE_CLASS in embedding.metadata else None,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            scheduler=self.scheduler,
            height=height,
            width=width,
            seed=seeds,
            batch_size=self.batch_size,
            compile_only=compile_only,
        )


def _kind(embedding: Embedding) -> str:
    """Whether the word is for an "object" or a "style"."""
    return embedding.metadata.get("learnable_property", "object")


def sampler_steps(config: TrainConfig) -> int:
    """Number of sampler steps when a run scores its word."""
    return EMBEDDED_STEPS if config.pretrained_model_name_or_path is None else PAPER_STEPS


def check_measure(model: ModelDescription, clip: str | None) -> None:
    """Raise InputError if there is neither a CLIP model nor a judge for `load_measure`."""
    if clip is not None:
        read_clip_config(local_copy(clip))
    elif not (model.path / FOLDER).is_dir():
        raise InputError(
            f"{model.name}: no judge comes with this model, so that scores need a CLIP model; give the folder of one "
            "with --evaluation_clip (hf download openai/clip-vit-large-patch14 --local-dir clip)"
        )


def load_measure(model: ModelDescription, clip: str | None) -> CLIP | Judge:
    """The CLIP model in the folder `clip`, or the judge that comes with the model.

    Raises:
      InputError: there is neither, or it cannot be read.
    """
    check_measure(model, clip)
    return Judge.load(model.path) if clip is None else CLIP.from_pretrained(local_copy(clip))


@explaining_out_of_memory("give a smaller --batch_size, or end other programs that use the device")
def evaluate(file: str, config: EvaluateConfig) -> Scores:
    """Score the word in `file` with the settings of a resolved config; also writes the scores to ``config.output``.

    Raises:
      InputError: something is wrong with the file, the pictures or the models.
    """
    with contextlib.nullcontext() if config.output is None else writable_folder(Path(config.output).parent):
        return _evaluate(file, config)


def _evaluate(file: str, config: EvaluateConfig) -> Scores:
    assert config.num_inference_steps and config.guidance_scale is not None and config.train_data_dir, "it is resolved"
    (embedding,) = load_given([file])
    for remark in embedding.remarks:
        print(f"note: {file}: {remark}", file=sys.stderr)
    folders = [local_copy(config.train_data_dir)]
    if config.distractors is not None:
        folders += concept_folders(local_copy(config.distractors), besides=folders[0])
    with open_model_of(config) as model:
        check_fits(embedding, model.embedding_dims, file)
        if (note := model.sampler_choice(config.scheduler).note) is not None:
            print(f"note: {note}", file=sys.stderr)
        model.make_sampler(config.scheduler, config.num_inference_steps)
        resolution = model.default_resolution
        pictures, *distractors = (as_uint8(load_images(folder, resolution).pixels[:]) for folder in folders)
        measure = load_measure(model, config.evaluation_clip)
        sd = StableDiffusion.load(model)
    evaluator = Evaluator(
        measure, pictures, tuple(distractors), config.evaluation_images, config.num_inference_steps,
        config.guidance_scale, config.scheduler, config.seed, config.batch_size,
    )  # fmt: skip
    scores = evaluator.scores(sd, embedding)
    if config.output is not None:
        write_scores(Path(config.output), embedding, scores)
        print(f"the scores are saved in {config.output}", file=sys.stderr)
    return scores


def write_scores(path: Path, embedding: Embedding, scores: Scores) -> None:
    """Write the scores as JSON."""
    content = {"token": embedding.token, **scores.as_dict()}
    write_atomically(
        path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    )


def concept_folders(folder: Path, besides: Path) -> list[Path]:
    """Sub-folders of `folder`, sorted, without `besides`, the concept's own.

    Raises:
      InputError: there is none.
    """
    inside = sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))
    found = [path for path in inside if path.resolve() != besides.resolve()]
    if not found:
        raise InputError(f"--distractors {folder}: it has no sub-folder with another concept's pictures")
    return found
