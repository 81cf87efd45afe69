"""Pictures that are dropped on the page: copied into a run's folder, and looked at as ``ti-jax data`` does."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ti_jax.config import DataConfig, resolve_data
from ti_jax.data.formats import format_by_suffix, readable_suffixes, remedy
from ti_jax.data.masks import picture_of
from ti_jax.data.survey import survey
from ti_jax.errors import InputError
from ti_jax.files import disk_errors

CAPTIONS = (".txt", ".caption")
SHEET = "contact_sheet.png"


@dataclass(frozen=True)
class Look:
    """What a run would see.

    Attributes:
      sheet: the crops; None: no picture can be read. captions: by picture. remarks: lines on the pictures.
      refused: names of the pictures that a run would stop at.
    """

    sheet: Image.Image | None
    captions: dict[str, str]
    remarks: list[str]
    refused: list[str]


def copy_files(files: Iterable[str | Path], folder: Path) -> None:
    """Copy pictures and caption files into a folder; of two of the same name the second gets a number.

    Raises:
      InputError: neither a picture nor a caption, or the disk is full.
    """
    for file in map(Path, files):
        _check_kind(file)
        name = re.sub(r"[^\w.() -]", "_", file.name).lstrip(".") or "picture"
        target, number = folder / name, 1
        while target.exists():
            number += 1
            target = folder / f"{Path(name).stem}-{number}{Path(name).suffix}"
        with disk_errors(target):
            shutil.copyfile(file, target)


def _check_kind(file: Path) -> None:
    suffix = file.suffix.lower()
    if suffix in readable_suffixes() or suffix in CAPTIONS:
        return
    known = format_by_suffix(file)
    raise InputError(
        f"{file.name}: " + (f"a {known} file: {remedy(known)}" if known else "not a picture; leave it out")
    )


def look_at(folder: Path, aside: Path, model: str | None, resolution: int | None = None) -> Look:
    """Look at a folder's pictures.

    Args:
      aside: a folder for the contact sheet. model: which a resolution that is left out depends on.

    Raises:
      InputError: there is no picture.
    """
    sheet = aside / SHEET
    found = survey(
        resolve_data(
            DataConfig(
                pretrained_model_name_or_path=model, train_data_dir=str(folder), resolution=resolution,
                contact_sheet=str(sheet),
            )
        )
    )  # fmt: skip
    remarks = [f"{row.name}: {'; '.join(row.problems)}" for row in found.rows if row.problems]
    remarks += [each.replace(str(folder), "those that were dropped") for each in found.remarks]
    picture = None
    if found.sheet is not None:
        with Image.open(found.sheet) as file:
            picture = file.convert("RGB")
    captions = {row.name: _caption(folder / row.name) for row in found.rows}
    return Look(picture, captions, remarks, [row.name for row in found.rows if row.refused])


def _caption(picture: Path) -> str:
    for suffix in CAPTIONS:
        path = picture.with_suffix(suffix)
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace").strip()
    return ""


def write_captions(folder: Path, captions: Mapping[str, str]) -> None:
    """Write captions beside the pictures; an empty one is removed.

    Raises:
      InputError: a picture that is not in the folder.
    """
    known = {path.name for path in folder.iterdir() if path.suffix.lower() in readable_suffixes()}
    for name, text in captions.items():
        if name not in known or picture_of(name) is not None:
            raise InputError(f"{name!r}: no such picture among those that were dropped")
        with disk_errors(folder / name):
            for suffix in CAPTIONS:
                (folder / name).with_suffix(suffix).unlink(missing_ok=True)
            if text.strip():
                (folder / name).with_suffix(".txt").write_text(text.strip() + "\n", encoding="utf-8")


def captions_in(table: Sequence[Sequence[object]] | None) -> dict[str, str]:
    """Captions by picture from the rows of the page's table.

    Raises:
      InputError: rows of another form.
    """
    rows = [row for row in table or () if row]
    if not all(len(row) >= 2 for row in rows):
        raise InputError("captions: must be rows of a picture's name and its caption")
    return {str(row[0]): str(row[1] or "") for row in rows if row[0]}
