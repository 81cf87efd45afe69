"""Report on a word's file: format, family, norms of the vectors against the vocabulary's, nearest words, metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ti_jax.embeddings.containers import PICTURES
from ti_jax.embeddings.embedding import CAVEAT, Embedding
from ti_jax.embeddings.families import describe
from ti_jax.embeddings.formats import read_as_found, word_file


@dataclass(frozen=True)
class Vocabulary:
    """The whole words in a text encoder's vocabulary.

    Attributes:
      model: the model's name.
      words: V of them. table: their rows of the token-embedding table, float32 [V, D].
      usual_norm: median Euclidean norm over all rows of the table.
    """

    model: str
    words: Sequence[str]
    table: np.ndarray
    usual_norm: float

    @cached_property
    def lengths(self) -> np.ndarray:
        """Norms of the words' rows, float32 [V]."""
        return np.linalg.norm(self.table, axis=1)


@dataclass(frozen=True)
class VectorReport:
    """One vector of a word.

    Attributes:
      norm: Euclidean.
      nearest: vocabulary words with the cosine similarity to their rows, nearest first; empty without a vocabulary.
    """

    norm: float
    nearest: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Report:
    """The result of `load_for_inspection`, extended by `compare`; ``str`` of it is a few lines for the user.

    Attributes:
      container: kind of file. format: name in `ti_jax.embeddings.formats`, and a description.
      encoders: reports of the vectors by text encoder. vocabularies: those they were compared with, by text encoder.
    """

    path: Path
    container: str
    format: str
    embedding: Embedding
    encoders: dict[str, tuple[VectorReport, ...]]
    vocabularies: dict[str, Vocabulary]

    def __str__(self) -> str:
        embedding = self.embedding
        lines = [
            str(self.path),
            f"  word     {embedding.token}",
            f"  format   {self.format}; {self.container}",
            f"  family   {describe(embedding.dims, embedding.metadata)}",
            f"  vectors  {embedding.num_vectors}",
        ]
        if embedding.stored_name is not None:
            lines.insert(2, f"  stored   {embedding.stored_name}: the name in the file, which diffusers goes by")
        lines += [f"  note     {note}" for note in embedding.notes]
        if embedding.caveat:
            lines.append(f"  caveat   {embedding.caveat}")
        for name, vectors in self.encoders.items():
            lines.append(f"  {name}, {self._against(name)}")
            for number, vector in enumerate(vectors):
                line = f"    vector {number}  norm {vector.norm:.3f}"
                if name in self.vocabularies:
                    line += f", {vector.norm / self.vocabularies[name].usual_norm:.2f} times the usual"
                if vector.nearest:
                    line += "; nearest " + ", ".join(f"{word} {cosine:.2f}" for word, cosine in vector.nearest)
                lines.append(line)
        shown = {key: value for key, value in embedding.metadata.items() if key != CAVEAT}
        lines.append("  metadata" if shown else "  metadata  none")
        lines += [f"    {key}  {' '.join(value.split())}" for key, value in sorted(shown.items())]
        return "\n".join(lines)

    def _against(self, name: str) -> str:
        if name not in self.vocabularies:
            return "compared with no vocabulary: name a model of this family with --pretrained_model_name_or_path"
        vocabulary = self.vocabularies[name]
        return f"against the vocabulary of {vocabulary.model} (usual norm {vocabulary.usual_norm:.3f})"


def load_for_inspection(path: str | Path, token: str | None = None) -> Report:
    """Format, family and metadata of a file, without comparison; see `Embedding.load` for arguments and errors."""
    path = word_file(path)
    embedding, form, content = read_as_found(path, token)
    encoders = {
        name: tuple(VectorReport(float(np.linalg.norm(row.astype(np.float64))), ()) for row in vectors)
        for name, vectors in embedding.vectors.items()
    }
    container = PICTURES.get(content.container, content.container)
    return Report(path, container, f"{form.name} ({form.looks_like})", embedding, encoders, {})


def compare(report: Report, vocabularies: dict[str, Vocabulary], count: int = 5) -> Report:
    """The report with each vector's ``count`` nearest words, for each text encoder in ``vocabularies``."""
    encoders = {
        name: tuple(
            VectorReport(vector.norm, nearest_words(row, vocabularies[name], count))
            for vector, row in zip(vectors, report.embedding.vectors[name], strict=True)
        )
        for name, vectors in report.encoders.items()
    }
    return Report(report.path, report.container, report.format, report.embedding, encoders, vocabularies)


def nearest_words(row: np.ndarray, vocabulary: Vocabulary, count: int) -> tuple[tuple[str, float], ...]:
    """The words whose rows have the largest cosine to ``row`` float32 [D], with the cosine; empty for a zero row."""
    norm = np.linalg.norm(row)
    if norm == 0:
        return ()
    cosines = vocabulary.table @ (row / norm) / np.maximum(vocabulary.lengths, 1e-12)
    best = np.argsort(-cosines, kind="stable")[:count]
    return tuple((vocabulary.words[i], float(cosines[i])) for i in best)
