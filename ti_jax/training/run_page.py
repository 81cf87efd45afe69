"""Keeps ``report.html`` of a run up to date: what the page says comes from the run and from the files in its folder."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ti_jax import __version__
from ti_jax.config import TrainConfig
from ti_jax.config.defaults import differing
from ti_jax.config.fields import settings_of
from ti_jax.data.concept import Concept, public_name
from ti_jax.embeddings import Embedding
from ti_jax.embeddings.families import describe
from ti_jax.embeddings.inspect import Vocabulary, nearest_words
from ti_jax.errors import one_line, utf8
from ti_jax.files import write_atomically
from ti_jax.startup import version_of
from ti_jax.training import page
from ti_jax.training.job import Job
from ti_jax.training.measure import LOG_FILE, SCORES_FILE
from ti_jax.training.report import read_lines
from ti_jax.training.rows import figures_of
from ti_jax.training.run_folder import EMBEDDING_FILE, ONE_FILE, OVERVIEW_FILE, PROGRESS_FILE, REPORT_FILE
from ti_jax.training.uses import SECOND_FILE, base_of, example_prompt, uses

# Seconds between two pages of a run that goes on, and how much longer than making the last one has taken: a hundredth
# of the run's time.
EVERY, SHARE = 20.0, 0.01
NEAREST = 6
PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "safetensors", "numpy")


class RunPage:
    """The pages of a run: one in its folder and, where it has several concepts, one in the folder of each.

    A page that cannot be made is a warning.
    """

    def __init__(self, job: Job):
        self._job = job
        self._first = int(job.start.step)
        self._words = job.embeddings(job.start)
        self._vocabularies: dict[str, Vocabulary] = {}
        self._next = time.perf_counter() + EVERY
        self._warned = False

    def seen(self, words: Sequence[Embedding]) -> None:
        """Keep the words of now, for the next page."""
        self._words = tuple(words)

    def refresh(self, step: int) -> None:
        """Write the pages of a run that goes on, unless it has only just been done."""
        if time.perf_counter() >= self._next:
            self._write(step, f"learning: {step} of {self._job.total} steps", running=True)

    def finish(self, words: Sequence[Embedding], step: int, state: str) -> None:
        """Write the pages of a run that has ended.

        Args:
          words: those that it has saved. state: how it ended.
        """
        self._words = tuple(words)
        self._write(step, state, running=False)

    def _write(self, step: int, state: str, running: bool) -> None:
        began = time.perf_counter()
        try:
            for folder, text in self._pages(step, state, running):
                write_atomically(folder / REPORT_FILE, utf8(text).encode())
        except Exception as error:  # whatever is wrong with a page, the words that are learned are worth more
            if not self._warned:
                tqdm.write(f"warning: {REPORT_FILE} could not be made: {one_line(error)}", file=sys.stderr)
            self._warned = True
        now = time.perf_counter()
        self._next = now + max(EVERY, (now - began) / SHARE)

    def _pages(self, step: int, state: str, running: bool) -> list[tuple[Path, str]]:
        """The pages with their folders."""
        job = self._job
        records = read_lines(job.folder / "metrics.jsonl") if (job.folder / "metrics.jsonl").exists() else []
        if not running:  # reading a vocabulary of 49,000 words takes a second
            self._vocabularies = {name: job.sd.text.vocabulary(name) for name in job.sd.tokenizers}
        words = [self._word(*each) for each in zip(job.concepts, self._words, strict=True)]
        self._vocabularies = {}

        def made(config: TrainConfig, title: str, words: Sequence[page.Word]) -> str:
            return page.render(
                page.Page(
                    title=title, state=state, step=step, total=job.total, running=running, words=words,
                    records=records, facts=self._facts(), settings=self._settings(config),
                    seconds=job.clock.seconds, versions=self._versions(), resumed_at=self._first,
                )
            )  # fmt: skip

        if len(words) == 1:
            return [(job.folder, made(job.config, words[0].token, words))]
        found = [
            (concept.folder, made(concept.config, word.token, [word]))
            for concept, word in zip(job.concepts, words, strict=True)
        ]
        short = [_linked(concept, word) for concept, word in zip(job.concepts, words, strict=True)]
        return [(job.folder, made(job.config, f"{len(words)} words", short)), *found]

    def _word(self, concept: Concept, embedding: Embedding) -> page.Word:
        folder, base = concept.folder, embedding.metadata["base_model"]
        prompt = example_prompt(concept.config)
        scores = json.loads(text) if (text := _text(folder / SCORES_FILE)) else {}
        log = folder / LOG_FILE
        return page.Word(
            token=concept.token,
            about={
                "learned from": f"{concept.pictures.files} pictures, {len(concept.prompts)} prompts",
                "rows": f"{embedding.num_vectors} for {describe(embedding.dims, embedding.metadata)}",
                "started from": concept.initializer or public_name(str(concept.config.initializer_embedding)),
                "saved at step": embedding.metadata["steps"],
                **_hashes(folder),
            },
            rows=self._rows(concept, embedding),
            overview=page.data_uri(folder / OVERVIEW_FILE),
            progress=page.data_uri(folder / PROGRESS_FILE),
            scores=scores,
            scores_log=read_lines(log) if log.exists() else [],
            uses=uses(embedding, prompt, f"path/to/{folder.absolute().name}", base_of(concept.config, base)),
            prefix=self._job.prefix(concept),
        )

    def _rows(self, concept: Concept, embedding: Embedding) -> list[page.Row]:
        start = {name: rows[concept.own] for name, rows in concept.rows.items()}
        found = []
        for row in figures_of(embedding.vectors, concept, self._job.usual_norms):
            encoder, number = row["encoder"], row["row"]
            found.append(
                page.Row(
                    name=f"{encoder}/row_{number}",
                    norm_start=float(np.linalg.norm(start[encoder][number])),
                    norm=row["norm"],
                    usual_norm=row["usual_norm"],
                    cosine=row["cosine"],
                    distance=row["distance"],
                    nearest_start=self._nearest(encoder, start[encoder][number]),
                    nearest_now=self._nearest(encoder, embedding.vectors[encoder][number]),
                )
            )
        return found

    def _nearest(self, encoder: str, row: np.ndarray) -> page.Nearest:
        vocabulary = self._vocabularies.get(encoder)
        return nearest_words(row, vocabulary, NEAREST) if vocabulary is not None else ()

    def _facts(self) -> dict[str, str]:
        job = self._job
        devices = f"{job.mesh.size} x {job.mesh.devices.flat[0].device_kind}"
        return {
            "model": public_name(job.sd.name),
            "devices": f"{devices}, {np.dtype(job.sd.dtype).name}",
            "resolution": f"{job.config.resolution} px",
            "samples": f"{job.samples_per_step} a step",
            "gradient checkpointing": str(job.config.gradient_checkpointing),
        }

    def _settings(self, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Those that differ from the defaults, without paths of this machine: the page may be passed on."""
        found, about = differing(config), settings_of(config)
        found.pop("gradient_checkpointing", None)  # chosen for the device, and among the facts
        if config.resolution == self._job.sd.default_resolution:
            found.pop("resolution", None)
        return {
            name: (value, default) if about[name].path is None else (_names(value), _names(default))
            for name, (value, default) in found.items()
        }

    def _versions(self) -> dict[str, str]:
        found = {"ti_jax": __version__, "Python": platform.python_version()}
        found |= {name: version for name in PACKAGES if (version := version_of(name)) is not None}
        return {**found, "system": platform.platform(terse=True), "weights of the model": self._job.sd.identity}


def page_of(job: Job) -> RunPage:
    """The pages of a run that has begun; on the leader process."""
    assert job.page is not None, "only the leader process has them"
    return job.page


def _linked(concept: Concept, word: page.Word) -> page.Word:
    """A word as the page of a run of several shows it: what is drawn of it, and where its own page is."""
    return page.Word(
        token=word.token, about={}, rows=word.rows, overview=word.overview, scores=word.scores,
        prefix=word.prefix, link=f"{concept.folder.name}/{REPORT_FILE}",
    )  # fmt: skip


def _names(value: Any) -> Any:
    """Paths without their folders."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_names, value))
    return public_name(value) if isinstance(value, str) else value


def _hashes(folder: Path) -> dict[str, str]:
    paths = [folder / name for name in (EMBEDDING_FILE, SECOND_FILE, ONE_FILE)]
    return {f"SHA-256 of {path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.exists()}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
