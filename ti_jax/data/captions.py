"""Captions: what the user, or another tool, says about each picture.

They are in a text file beside each picture, ``NAME.txt`` or ``NAME.caption`` as kohya's scripts and AUTOMATIC1111 have
them, or in one ``metadata.jsonl`` for all pictures of a folder, as Hugging Face's imagefolder has it.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ti_jax.config import TrainConfig
from ti_jax.data.picture_files import files_in, name_in
from ti_jax.errors import InputError, one_line
from ti_jax.text.embedded_words import note_unknown

SUFFIXES = (".txt", ".caption")
METADATA = "metadata.jsonl"
TEXT_COLUMN = "text"

# Text files that are in folders of pictures without being about one of them.
_ABOUT_THE_FOLDER = ("readme", "license", "licence", "copying", "notice", "credits", "attribution")


def read_captions(
    folder: str | Path, recursive: bool = False, column: str | None = None, templates: str | Path | None = None
) -> dict[str, str]:
    """The captions of a folder, by the names of their pictures as `ti_jax.data.folder.load_images` gives them.

    White space of any kind and length becomes one space: a caption is one line.

    Args:
      recursive: also those in sub-folders.
      column: the key of the caption in ``metadata.jsonl``; None: ``text``.
      templates: a file of prompt templates, which is no caption even if it is in the folder.

    Raises:
      InputError: a caption without a picture, an empty one, two for one picture; a file that cannot be read, is not
        UTF-8, or has a line that is not as described.
    """
    paths = files_in(folder, recursive)
    names = {name_in(folder, path): path for path in paths}
    captions: dict[str, str] = {}
    places: dict[str, str] = {}
    pictures: dict[str, list[str]] = {}
    for name, path in names.items():
        if path.suffix.lower() not in SUFFIXES:
            pictures.setdefault(name.removesuffix(path.suffix), []).append(name)

    def add(picture: str, caption: str, place: str) -> None:
        if picture in places:
            raise InputError(
                f"{place}: a second caption for {picture}, which {places[picture]} has one for; remove one"
            )
        captions[picture], places[picture] = caption, place

    for name, path in names.items():
        if path.suffix.lower() in SUFFIXES:
            described = pictures.get(name.removesuffix(path.suffix), ())
            if not described and _is_about_the_folder(path, templates):
                continue
            if not described:
                raise InputError(
                    f"{path}: a caption without a picture: no {path.stem}.png, .jpg or the like is beside it; rename "
                    f"it like its picture, move it out of the folder, or ignore all captions with --no_captions"
                )
            caption = _one_line(_read_text(path))
            if not caption:
                raise InputError(
                    f"{path}: an empty caption; say in it what is in the picture, or remove the file, and the picture "
                    f"is learned from with the plain templates"
                )
            for picture in described:
                add(picture, caption, str(path))
        elif path.name == METADATA:
            for picture, caption, place in _read_metadata(path, column):
                beside = posixpath.normpath(posixpath.join(posixpath.dirname(name), picture))
                if beside not in names:
                    deeper = "" if recursive or "/" not in picture else ", add --recursive to read sub-folders"
                    raise InputError(
                        f"{place}: a caption without a picture: there is no {picture} beside this file; correct "
                        f"file_name, remove the line{deeper}, or ignore all captions with --no_captions"
                    )
                add(beside, caption, place)
    return captions


def report_captions(
    config: TrainConfig,
    folder: str | Path,
    captions: Mapping[str, str],
    pictures: Sequence[str],
    report: Callable[[str], None],
) -> None:
    """Report how many of the pictures of a folder have a caption, and which settings do nothing there."""
    described = sum(picture in captions for picture in pictures)
    given = [] if described else ["shuffle_tags", "tag_dropout", "caption_dropout"]
    if described:
        report(f"captions: used for {described} of {len(pictures)} pictures; --no_captions ignores them")
        used = [captions[picture] for picture in pictures if picture in captions]
        if config.pretrained_model_name_or_path is None and (note := note_unknown(used, "captions")) is not None:
            report(note)
    if config.no_captions:
        given.append("caption_column")
    elif config.caption_column is not None and config.dataset_name is None and not _has_metadata(folder, config):
        report(f"note: --caption_column {config.caption_column} does nothing, because {folder} has no {METADATA}")
    if given := [f"--{name}" for name in given if getattr(config, name)]:
        why = "--no_captions is given" if config.no_captions else "no picture has a caption"
        report(f"note: {' and '.join(given)} {'do' if len(given) > 1 else 'does'} nothing, because {why}")


def _has_metadata(folder: str | Path, config: TrainConfig) -> bool:
    return any(path.name == METADATA for path in files_in(folder, config.recursive))


def _is_about_the_folder(path: Path, templates: str | Path | None) -> bool:
    """Whether a text file without a picture need not be a caption."""
    is_templates = templates is not None and Path(templates).exists() and path.samefile(templates)
    return is_templates or (path.suffix.lower() == ".txt" and path.name.lower().split(".")[0] in _ABOUT_THE_FOLDER)


def _read_metadata(path: Path, column: str | None) -> Iterator[tuple[str, str, str]]:
    """File name, caption and place of each line."""
    key, text = column or TEXT_COLUMN, _read_text(path)
    if not text.strip():
        raise InputError(f"{path}: an empty file; write a line with the caption of each picture in it, or remove it")
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        row = _parse(line, place)
        name, caption = row.get("file_name"), row.get(key)
        if not isinstance(name, str) or not name:
            raise InputError(
                f'{place}: no file_name; each line must be like {{"file_name": "a.png", "{key}": "a ..."}}'
            )
        if key not in row:
            raise InputError(
                f"{place}: no {key!r} beside {_listed(row)}; name the one that has the caption with --caption_column, "
                f"or ignore all captions with --no_captions"
            )
        if caption is not None and not isinstance(caption, str):
            raise InputError(f"{place}: {key!r} of {name} is {json.dumps(caption)[:60]}, and must be a text in quotes")
        if caption is None or not caption.strip():
            raise InputError(
                f"{place}: an empty caption; say in it what is in {name}, or remove the line, and the picture is "
                f"learned from with the plain templates"
            )
        yield name, _one_line(caption), place


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(
            f"{place}: not JSON ({one_line(error)}); each line must be one object, like "
            f'{{"file_name": "a.png", "text": "a red car"}}'
        ) from error
    if not isinstance(row, dict):
        raise InputError(
            f'{place}: found {line.strip()[:60]} where an object like {{"file_name": "a.png", ...}} must be'
        )
    return row


def _listed(row: dict[str, Any]) -> str:
    return ", ".join(list(row)[:8])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: the caption cannot be read ({error.strerror}); change its permissions") from error
    # Half of the bytes of plain English are zeros in UTF-16, which is still valid UTF-8.
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        raise InputError(f"{path}: text in UTF-16 or UTF-32; save the file as UTF-8")
    try:
        return content.decode("utf-8-sig")  # Windows editors write a byte order mark
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {number}: not UTF-8 text, perhaps Windows' own encoding (cp1252); save the file as UTF-8"
        ) from error
