"""The files of a run: where they lie, and what becomes of an earlier run's."""

from __future__ import annotations

import sys
from pathlib import Path

from ..embeddings import Embedding
from ..files import disk_errors

EMBEDDING_FILE = "learned_embeds.safetensors"
ONE_FILE = "learned_embeds_sdxl.safetensors"  # of an SDXL word, for AUTOMATIC1111 and ComfyUI
OVERVIEW_FILE = "overview.png"
_RESULTS = (
    "learned_embeds*",
    "checkpoints",
    "samples",
    "logs",
    "metrics.jsonl",
    "scores.json*",
    "config.yaml",
    OVERVIEW_FILE,
    "README.md",
)


def prepare(folder: Path, resume: bool) -> None:
    """Make room for a run: one that does not resume moves an earlier one's results aside.

    Raises:
      InputError: the folder cannot be written.
    """
    earlier = [path for pattern in _RESULTS for path in sorted(folder.glob(pattern))]
    if earlier and not resume:
        number = 1
        while (aside := folder / f"previous-{number}").exists():
            number += 1
        with disk_errors(aside):
            aside.mkdir()
            for path in earlier:
                path.rename(aside / path.name)
        print(f"the results of an earlier run are moved to {aside}", file=sys.stderr)
    with disk_errors(folder):
        (folder / "samples").mkdir(exist_ok=True)


def save_embedding(embedding: Embedding, folder: Path, step: int | None = None) -> None:
    """Write the word in diffusers' format: as ``learned_embeds.safetensors``, or under its step.

    The two files of an SDXL word are for diffusers; the one with ``clip_l`` and ``clip_g`` that AUTOMATIC1111 and
    ComfyUI read is written beside the last of them.
    """
    name = EMBEDDING_FILE if step is None else f"learned_embeds-steps-{step}.safetensors"
    embedding.save(folder / name, format="diffusers")
    if step is None and len(embedding.vectors) > 1:
        embedding.save(folder / ONE_FILE, format="comfyui")
