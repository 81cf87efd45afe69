"""A dataset of the Hugging Face hub as a folder of pictures with captions."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from ti_jax.cache import cache_folder
from ti_jax.config import TrainConfig
from ti_jax.data.captions import TEXT_COLUMN
from ti_jax.data.formats import format_by_content, readable_suffixes, suffix_of
from ti_jax.errors import InputError, listed, one_line
from ti_jax.files import disk_errors

IMAGE_COLUMN = "image"


def as_folder(config: TrainConfig) -> Path:
    """The folder with the pictures of ``--dataset_name``, and a caption beside each that has one.

    It is in the user's cache, named by the dataset's contents, and made once. From there on all is as with a folder of
    the user's own. The split is "train", or the only one.

    Raises:
      InputError: the package ``datasets`` is not installed; the dataset cannot be loaded or has not the columns; a row
        without a picture.
    """
    where = f"--dataset_name {config.dataset_name}"
    dataset = _load(config, where)
    pictures, column = _checked_columns(config, dataset, where)
    from datasets import Image

    dataset = dataset.cast_column(pictures, Image(decode=False))
    identity = json.dumps([dataset._fingerprint, pictures, column])
    # Without a limit: a folder from which some files are removed would be another dataset.
    if (cache := cache_folder("datasets", sys.maxsize)) is None:
        raise InputError(f"{where}: no cache folder for its pictures; set TI_JAX_CACHE to one that can be written")
    folder = cache / hashlib.sha256(identity.encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
    with disk_errors(folder):
        # Written aside, so that a folder is complete once it has its name.
        aside = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
        try:
            for number, row in enumerate(dataset):
                caption = row[column] if column else None
                _write(aside / f"{number:06d}", row[pictures], caption, f"{where}: row {number}")
            if not folder.is_dir():  # another process may have been faster
                os.replace(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def _load(config: TrainConfig, where: str) -> Any:
    """The dataset's split with the pictures."""
    try:
        import datasets
    except ImportError as error:
        name = str(config.dataset_name)
        absent = "" if Path(name).exists() else "no such folder or file here, and for a dataset of the hub it "
        raise InputError(f"{where}: {absent}needs the package datasets; pip install 'ti_jax[datasets]'") from error
    name = str(config.dataset_name)
    path = Path(name)
    try:
        if path.is_file():
            loaded = datasets.load_dataset("parquet", data_files=name)
        elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, token=config.hub_token)
    # Besides its own errors those of HTTP, of pyarrow and of the dataset's files.
    except Exception as error:
        absent = "" if path.exists() else "no such folder or file here, and as a dataset of the hub it "
        raise InputError(
            f"{where}: {absent}cannot be loaded ({one_line(error)}); give the id of a dataset on the hub (private "
            f"ones need --hub_token), a folder of its files, or a parquet file"
        ) from error
    if isinstance(loaded, dict):
        if "train" not in loaded and len(loaded) != 1:
            raise InputError(f"{where}: no split 'train' among {listed(list(loaded))}; give a dataset that has it")
        loaded = loaded["train" if "train" in loaded else next(iter(loaded))]
    return loaded


def _checked_columns(config: TrainConfig, dataset: Any, where: str) -> tuple[str, str | None]:
    """The columns with the pictures and with the captions; None: there is none, or it is not to be used.

    Raises:
      InputError: the dataset has not the columns of the config, or they hold something else.
    """
    from datasets import Image, Value

    columns, pictures = dataset.column_names, config.image_column or IMAGE_COLUMN
    if pictures not in columns:
        raise InputError(
            f"{where}: no column {pictures!r} beside {listed(columns)}; name the one with the pictures with "
            f"--image_column"
        )
    if not isinstance(dataset.features[pictures], Image):
        raise InputError(
            f"{where}: the column {pictures!r} does not hold pictures; name the one that does with --image_column"
        )
    if config.no_captions:
        return pictures, None
    column = config.caption_column or TEXT_COLUMN
    if column not in columns:
        if config.caption_column is None:
            return pictures, None
        raise InputError(
            f"{where}: no column {column!r} beside {listed(columns)}; name the one with the captions with "
            f"--caption_column, or ignore all captions with --no_captions"
        )
    feature = dataset.features[column]
    if not isinstance(feature, Value) or feature.dtype not in ("string", "large_string", "string_view"):
        raise InputError(
            f"{where}: the column {column!r} does not hold texts; name the one with the captions with --caption_column"
        )
    return pictures, column


def _write(path: Path, picture: dict[str, Any] | None, caption: str | None, where: str) -> None:
    """Write a row: the picture as it is in the dataset, and its caption unless that is empty."""
    content = None if picture is None else picture["bytes"]
    if content is None and picture is not None and picture["path"] is not None:
        content = Path(picture["path"]).read_bytes()
    if not content:
        raise InputError(f"{where}: no picture in it; remove the row from the dataset")
    path.write_bytes(content)
    assert picture is not None, "it has content"
    given = Path(picture["path"] or "").suffix.lower()
    path.rename(path.with_suffix(given if given in readable_suffixes() else suffix_of(format_by_content(path))))
    if caption and caption.strip():
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
