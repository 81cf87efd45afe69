"""The ``.safetensors`` that ComfyUI, kohya, invoke and OneTrainer share: keyed by text encoder, not by word.

Held to ComfyUI's ``load_embed``. SD1.x and SD2.x: ``emb_params`` (OneTrainer writes ``emp_params``); SDXL: ``clip_l``
for the first text encoder and ``clip_g`` for the second. The word is the file's name; our files also have it in the
header.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ti_jax.embeddings.containers import Content, safetensors_bytes
from ti_jax.embeddings.embedding import CAVEAT, Embedding
from ti_jax.embeddings.naming import named
from ti_jax.embeddings.vectors import T5_WORD, encoder_of, vectors_of
from ti_jax.errors import InputError

SINGLE_KEYS = ("emb_params", "emp_params")
KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
T5_KEYS = ("t5", "t5xxl", "t5_xxl")
OUTPUT = "_out"  # OneTrainer's "output embedding"


def read(content: Content, token: str | None) -> Embedding | None:
    """The word in a file; None if it is not this format."""
    if not isinstance(content.data, dict):
        return None
    keys = set(content.data)
    if keys & set(T5_KEYS):
        raise InputError(f"it has {' and '.join(sorted(keys & set(T5_KEYS)))}: {T5_WORD}")
    outputs = {f"{key}{OUTPUT}" for key in (*SINGLE_KEYS, *KEYS.values())}
    caveat = {}
    if keys & outputs and keys <= {*outputs, *SINGLE_KEYS, *KEYS.values()}:
        left, keys = keys & outputs, keys - outputs
        caveat = {
            CAVEAT: f"its input embedding alone: {' and '.join(sorted(left))}, OneTrainer's output embedding, "
            "is added after the text encoder and cannot be used here"
        }
    if caveat and not keys:
        raise InputError(
            f"it has only {' and '.join(sorted(left))}: OneTrainer's output embedding, which is added after the "
            "text encoder and is no word; train it again with that option off"
        )
    if len(keys) == 1 and keys <= set(SINGLE_KEYS):
        (key,) = keys
        array = vectors_of(content.data[key], key)
        vectors = {encoder_of(array): array}
    elif keys and keys <= set(KEYS.values()):
        vectors = {name: vectors_of(content.data[key], key) for name, key in KEYS.items() if key in keys}
    else:
        return None
    embedding = named(content, token, content.metadata.get("token") or content.path.stem, vectors)
    return dataclasses.replace(embedding, metadata={**embedding.metadata, **caveat})


def write(embedding: Embedding, path: Path) -> dict[Path, bytes]:
    """The ``.safetensors`` file of a word."""
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: a word in ComfyUI's format is a .safetensors file")
    if list(embedding.vectors) == ["text_encoder"]:
        tensors = {SINGLE_KEYS[0]: embedding.vectors["text_encoder"]}
    else:
        tensors = {KEYS[name]: vectors for name, vectors in embedding.vectors.items()}
    return {path: safetensors_bytes(tensors, embedding.token, embedding.metadata)}
