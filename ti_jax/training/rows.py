"""Distance of the learned rows from their start, and their norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ti_jax.data.concept import Concept
from ti_jax.models.networks import Rows
from ti_jax.pipeline import StableDiffusion


def usual_norms(sd: StableDiffusion) -> dict[str, float]:
    """The median norm of the frozen token embeddings, for each text encoder."""
    return {name: float(np.median(np.linalg.norm(sd.token_table(name), axis=-1))) for name in sd.tokenizers}


def row_figures(concept: Concept, rows: Rows, usual_norms: Mapping[str, float]) -> list[dict[str, Any]]:
    """`figures_of` the word of a concept with the run's rows."""
    own = {name: np.asarray(value)[concept.own] for name, value in rows.items()}
    return figures_of(own, concept, usual_norms)


def figures_of(
    vectors: Mapping[str, np.ndarray], concept: Concept, usual_norms: Mapping[str, float]
) -> list[dict[str, Any]]:
    """How far each row of a word has moved, for each text encoder, and its norm next to the vocabulary's.

    Args:
      vectors: the word's own rows, float32 [n, D] for each text encoder.

    Returns:
      One dict per row: ``encoder``, ``row``, ``distance`` (Euclidean) and ``cosine`` to its start, ``norm``, and
      ``usual_norm`` from ``usual_norms``.
    """
    figures = []
    for name, value in vectors.items():
        for row, (now, start) in enumerate(zip(value, concept.rows[name][concept.own], strict=True)):
            norm, start_norm = float(np.linalg.norm(now)), float(np.linalg.norm(start))
            figures.append(
                {
                    "encoder": name,
                    "row": row,
                    "distance": float(np.linalg.norm(now - start)),
                    "cosine": float(now @ start / max(norm * start_norm, 1e-12)),
                    "norm": norm,
                    "usual_norm": usual_norms[name],
                }
            )
    return figures
