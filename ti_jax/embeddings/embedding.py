"""A learned word in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ti_jax.embeddings.families import describe, family_of
from ti_jax.errors import InputError
from ti_jax.files import write_together
from ti_jax.models.components import TEXT_ENCODERS
from ti_jax.words import check_token

# Metadata entries: what a format's reader says was lost; of a word for the negative prompt, what is in its place in
# prompts.
CAVEAT, NEGATIVE_CLASS = "caveat", "negative_class"


@dataclass(frozen=True, eq=False, repr=False)
class Embedding:
    """A learned word: its rows of the token-embedding tables.

    Attributes:
      token: the word, e.g. "<cat-toy>".
      vectors: float32 [n, D] by text encoder, "text_encoder" and for SDXL "text_encoder_2"; the same n for both.
      metadata: where it comes from (base model, steps, initializer, ...), str to str. Saved if the format can.
      stored_name: another name for it in its file, or None; `infer` accepts it for the word, too. Not saved.
      notes: notes of the reader about its name. Not saved.

    Raises:
      InputError: an empty word or one with spaces; vectors that are not [n, D], or not all finite; a number of vectors
        that differs between the text encoders.
    """

    token: str
    vectors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str] = field(default_factory=dict)
    stored_name: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_token(self.token, "token")
        if not self.vectors or not set(self.vectors) <= set(TEXT_ENCODERS):
            raise InputError(f"a word has vectors for {' and '.join(TEXT_ENCODERS)}, not for {list(self.vectors)}")
        # Copies, so that the caller cannot change them later.
        vectors = {name: np.array(self.vectors[name], np.float32) for name in TEXT_ENCODERS if name in self.vectors}
        for name, value in vectors.items():
            if value.ndim != 2 or 0 in value.shape:
                raise InputError(f"the vectors for {name} have the shape {list(value.shape)}, expected [n, D]")
            if not np.isfinite(value).all():
                raise InputError(
                    f"the vectors for {name} hold NaN or infinite numbers; the word is spoilt, train it again"
                )
            value.setflags(write=False)
        if len({len(value) for value in vectors.values()}) != 1:
            counts = " and ".join(f"{len(value)} for {name}" for name, value in vectors.items())
            raise InputError(f"the number of vectors differs: {counts}")
        object.__setattr__(self, "vectors", vectors)
        object.__setattr__(self, "metadata", {str(key): str(value) for key, value in self.metadata.items()})

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in self.vectors.items())
        return f"Embedding({self.token!r}, {shapes})"

    @property
    def num_vectors(self) -> int:
        """Number of vectors, and of tokens that the word takes in a prompt."""
        return len(next(iter(self.vectors.values())))

    @property
    def dims(self) -> dict[str, int]:
        """Length of its vectors, by text encoder."""
        return {name: value.shape[1] for name, value in self.vectors.items()}

    @property
    def family(self) -> str | None:
        """The model family that it is for: "SD1.x", "SD2.x", "SDXL", or None if it fits none of them."""
        return family_of(self.dims, self.metadata)

    @property
    def caveat(self) -> str:
        """Says what was lost when its file was read; empty if nothing was lost."""
        return self.metadata.get(CAVEAT, "")

    @property
    def remarks(self) -> list[str]:
        """Notes for the user about the file that it was read from, one per line."""
        return [*([f"read as {self.caveat}"] if self.caveat else []), *self.notes]

    @classmethod
    def load(cls, path: str | Path, token: str | None = None) -> Embedding:
        """Read a word from a file of any known format, detected by content; see `ti_jax.embeddings.formats`.

        Args:
          path: the file, or a folder with a ``learned_embeds.safetensors`` or ``.bin``.
          token: the word to read it as. None: the word in the file; if there is none, and for AUTOMATIC1111's
            pickles, the file's name without suffix, with hyphens for spaces.

        Raises:
          InputError: no such file, broken, of no known format, or not a word.
        """
        from ti_jax.embeddings.formats import read

        return read(Path(path), token)

    def save(self, path: str | Path, format: str = "diffusers") -> None:
        """Write the word in one of the formats of `ti_jax.embeddings.formats`; an existing file is replaced atomically.

        Args:
          path: its suffix must be one of the format's.
          format: "diffusers" (``.safetensors``, ``.bin``; the two halves of an SDXL word are two files, beside
            ``learned_embeds.safetensors`` also ``learned_embeds_2.safetensors``), "comfyui" (``.safetensors`` with
            ``emb_params``, or ``clip_l`` and ``clip_g``), "a1111" (``.pt``) or "card" (AUTOMATIC1111's ``.png``).

        Raises:
          InputError: an unknown format, a suffix that the format does not have, a word that it cannot hold, or a disk
            that is full or cannot be written.
        """
        from ti_jax.embeddings.formats import render

        write_together(render(self, Path(path), format))


def check_fits(embedding: Embedding, dims: Mapping[str, int], where: object) -> None:
    """Raise `InputError` unless a word is for a model with these embedding lengths.

    Args:
      dims: token-embedding width by text encoder (`StableDiffusion.embedding_dims`).
      where: the word's file, for the message.
    """
    if embedding.dims == dict(dims):
        return
    remedy = "use a word that was learned on a model of the same family"
    if embedding.dims.items() < dims.items() and embedding.family == family_of(dims):
        remedy = "use a file that has both, or put its other half beside it"
    raise InputError(
        f"{where}: the word {embedding.token!r} is for {describe(embedding.dims, embedding.metadata)}, but the model "
        f"here is {describe(dims)}; {remedy}"
    )
