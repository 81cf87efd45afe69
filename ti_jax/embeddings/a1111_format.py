"""AUTOMATIC1111's ``.pt``, and the paper's own, from which it comes: a pickle with ``string_to_param``.

Held to AUTOMATIC1111's ``create_embedding_from_data`` and ``Embedding.save``. It takes the file's name for the word,
diffusers takes ``name``, and the key in ``string_to_param`` is ``*`` in every file that it writes; the paper's code has
no ``name``, and may have several words, each under its own key.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from .containers import PICKLE_SUFFIXES, Content, pickle_bytes
from .embedding import Embedding
from .vectors import encoder_of, vectors_of

_KEY = "*"
_ID_OF_KEY = 265  # of "*" in CLIP's vocabulary

# Its names for what our metadata has too.
_METADATA = {"step": "steps", "sd_checkpoint": "sd_checkpoint", "sd_checkpoint_name": "base_model"}


def read(content: Content, token: str | None) -> Embedding | None:
    """The word in a file, or the one that ``token`` names where it has several; None if it is not this format."""
    parameters = content.data.get("string_to_param")
    if not isinstance(parameters, dict):
        return None
    if not parameters:
        raise InputError("its string_to_param is empty: there is no word in it")
    key = next(iter(parameters))
    if len(parameters) > 1:
        if token not in parameters:
            words = ", ".join(repr(word) for word in parameters)
            raise InputError(f"it holds {len(parameters)} words, {words}; say which with token=")
        key = token
    name = content.data.get("name")
    word = (
        token or (name if isinstance(name, str) and name else None) or (content.path.stem if key == _KEY else str(key))
    )
    vectors = vectors_of(parameters[key], str(key))
    metadata = {
        ours: str(content.data[theirs]) for theirs, ours in _METADATA.items() if content.data.get(theirs) is not None
    }
    return Embedding(word, {encoder_of(vectors): vectors}, metadata)


def write(embedding: Embedding, path: Path) -> dict[Path, bytes]:
    """The ``.pt`` file of a word for SD1.x or SD2.x."""
    if list(embedding.vectors) != ["text_encoder"]:
        raise InputError(
            f"{path}: this .pt format has one text encoder, and {embedding.token!r} is for SDXL; save it with format "
            "'comfyui', which AUTOMATIC1111 reads too"
        )
    if path.suffix not in PICKLE_SUFFIXES:
        raise InputError(f"{path}: a word in AUTOMATIC1111's format is a .pt file")
    steps = embedding.metadata.get("steps", "")
    data = {
        "string_to_token": {_KEY: _ID_OF_KEY},
        "string_to_param": {_KEY: embedding.vectors["text_encoder"]},
        "name": embedding.token,
        "step": int(steps) if steps.isdecimal() else None,
        "sd_checkpoint": embedding.metadata.get("sd_checkpoint"),
        "sd_checkpoint_name": embedding.metadata.get("base_model"),
    }
    return {path: pickle_bytes(path, data)}
