"""Read-only formats, with other data or without a name: cog-sdxl's, lists, bare tensors, LoRA bundles.

Held to cog-sdxl's ``TokenEmbeddingsHandler`` (``embeddings.pti``: ``text_encoders_0`` and ``text_encoders_1``, the
trigger in ``special_params.json`` beside it), to ComfyUI's ``load_embed`` (lists of dicts: all tensors of one
encoder's width are concatenated; ``bundle_emb.NAME.*`` in a LoRA), and to diffusers (a bare tensor has no name).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ti_jax.embeddings.containers import BUNDLE, Content
from ti_jax.embeddings.embedding import CAVEAT, Embedding
from ti_jax.embeddings.families import FAMILIES
from ti_jax.embeddings.naming import chosen, named
from ti_jax.embeddings.vectors import encoder_of, vectors_of
from ti_jax.errors import InputError

COG_KEYS = {"text_encoder": "text_encoders_0", "text_encoder_2": "text_encoders_1"}
_CLIP_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_PARAMETER = "string_to_param."


def read_cog(content: Content, token: str | None) -> Embedding | None:
    """The word of a cog-sdxl ``embeddings.pti``; None if it is not this format."""
    data = content.data
    if not isinstance(data, dict) or not data or not set(data) <= set(COG_KEYS.values()):
        return None
    vectors = {name: vectors_of(data[key], key) for name, key in COG_KEYS.items() if key in data}
    return named(content, token, _cog_trigger(content.path) or content.path.stem, vectors)


def _cog_trigger(path: Path) -> str | None:
    """The placeholder of ``special_params.json`` beside the file: ``{"TOK": "<s0><s1>"}``; None if there is none."""
    try:
        parameters = json.loads(path.with_name("special_params.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return next(iter(parameters), None) if isinstance(parameters, dict) else None


def read_list(content: Content, token: str | None) -> Embedding | None:
    """The word in a list of dicts of tensors; those of one width are concatenated. None if it is not this format."""
    data = content.data
    if not isinstance(data, list) or not data or not all(isinstance(item, dict) for item in data):
        return None
    by_width: dict[int, list[np.ndarray]] = {}
    for number, item in enumerate(data):
        for key, value in item.items():
            vectors = vectors_of(value, f"{number}: {key}")
            by_width.setdefault(vectors.shape[1], []).append(vectors)
    joined = {width: np.concatenate(parts) for width, parts in by_width.items()}
    if len(joined) > 1 and set(joined) != set(FAMILIES["SDXL"].values()):
        raise InputError(f"a list of tensors of widths {sorted(joined)}: not of one model family")
    vectors_by_encoder = {encoder_of(vectors): vectors for _, vectors in sorted(joined.items())}
    return named(content, token, content.path.stem, vectors_by_encoder) if joined else None


def read_tensor(content: Content, token: str | None) -> Embedding | None:
    """The word in a file that is a single bare tensor; None if it is not this format."""
    if not isinstance(content.data, np.ndarray):
        return None
    if token is None:
        raise InputError("a bare tensor, without a word: give the word with --token, token= or FILE=word")
    vectors = vectors_of(content.data, "the tensor")
    return named(content, token, token, {encoder_of(vectors): vectors})


def read_bundle(content: Content, token: str | None) -> Embedding | None:
    """The word bundled in a LoRA file, or the one named ``token`` if there are several; None if there is none."""
    data = content.data
    if not isinstance(data, dict) or not data or not all(str(key).startswith(BUNDLE) for key in data):
        return None
    bundles: dict[str, dict[str, Any]] = {}
    for key, value in data.items():
        name, _, part = str(key).removeprefix(BUNDLE).partition(".")
        bundles.setdefault(name, {})[part.removeprefix(_PARAMETER)] = value
    name = chosen(bundles, token)
    parts = bundles[name]
    if set(parts) <= set(_CLIP_KEYS.values()):
        vectors = {encoder: vectors_of(parts[key], key) for encoder, key in _CLIP_KEYS.items() if key in parts}
    elif len(parts) == 1:
        ((key, value),) = parts.items()
        array = vectors_of(value, key)
        vectors = {encoder_of(array): array}
    else:
        raise InputError(f"the bundled word {name!r} holds {', '.join(sorted(parts))}; expected one tensor, or two")
    metadata = {CAVEAT: "the word alone that a LoRA file brings along; the LoRA itself is not applied"}
    return named(content, token, name, vectors, metadata)
