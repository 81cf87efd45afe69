"""kohya's XTI files (read-only): one word for each of the UNet's 16 cross-attention layers.

Held to ``save_weights`` of sd-scripts' ``train_textual_inversion_XTI.py``. Extended Textual Inversion (Voynov et al.
2023, arXiv 2303.09522) conditions each layer on its own word. Here a prompt has one word for all layers, so the 16 are
averaged.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ti_jax.embeddings.containers import Content
from ti_jax.embeddings.embedding import CAVEAT, Embedding
from ti_jax.embeddings.naming import named
from ti_jax.embeddings.vectors import encoder_of, vectors_of
from ti_jax.errors import InputError

LAYERS = (
    "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID",
    "OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11",
)  # fmt: skip


def read(content: Content, token: str | None) -> Embedding | None:
    """The mean of the 16 words of a file, with a caveat; None if it is not this format."""
    if (
        not isinstance(content.data, dict)
        or not set(content.data) >= set(LAYERS[:2])
        or not set(content.data) <= set(LAYERS)
    ):
        return None
    missing = [layer for layer in LAYERS if layer not in content.data]
    if missing:
        raise InputError(f"an XTI file without {', '.join(missing)}: not complete, get it again")
    words = [vectors_of(content.data[layer], layer) for layer in LAYERS]
    if len({word.shape for word in words}) != 1:
        raise InputError("an XTI file whose layers differ in their shapes; get it again")
    mean = np.mean(np.stack(words).astype(np.float64), axis=0)
    length = max(float(np.linalg.norm(mean)), 1e-12)
    spread = max(float(np.linalg.norm(word - mean)) for word in words) / length
    caveat = (
        f"the mean of the {len(LAYERS)} words that an XTI file has, one for each layer of the UNet; the farthest of "
        f"them is {spread:.2f} of the mean's length away from it"
    )
    embedding = named(content, token, content.metadata.get("token") or content.path.stem, {encoder_of(mean): mean})
    return dataclasses.replace(embedding, metadata={**embedding.metadata, CAVEAT: caveat})
