"""Several concepts in one run: ``--concepts``, a folder with a sub-folder for each, or a YAML file with a list.

What is read here is the settings of each concept, as the config that a run of it alone would have.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ti_jax.config.train import TrainConfig
from ti_jax.config.yaml import load_yaml_list
from ti_jax.errors import InputError
from ti_jax.remote import local_copy
from ti_jax.words import fold

# What a concept may have for itself; all else is the run's.
KEYS = ("train_data_dir", "placeholder_token", "initializer_token", "num_vectors", "learnable_property", "templates")

# Files and folders of the run, beside which each concept has a folder.
_TAKEN = re.compile(
    r"samples|logs|checkpoints|previous-.*|config\.yaml|(metrics|scores)\.jsonl?|(overview|progress)\.png|report\.html|readme\.md"
    r"|learned_embeds.*|\..*",
    re.IGNORECASE,
)


def concept_configs(config: TrainConfig) -> tuple[TrainConfig, ...]:
    """The config of each concept of a run: what it has for itself, the rest from the run.

    ``output_dir`` is the folder of the concept's own results, in that of the run. A run without ``--concepts`` has one
    concept, whose config is that of the run.

    Raises:
      InputError: ``--concepts`` cannot be read, has no concept, or two that cannot be told apart.
    """
    if config.concepts is None:
        return (config,)
    found: dict[str, tuple[str, str]] = {}
    configs = []
    for where, entry in _entries(config.concepts):
        if entry.get("train_data_dir") is None:
            raise InputError(f"{where}: no train_data_dir; give the folder with the concept's pictures")
        folder = os.path.expanduser(entry["train_data_dir"])
        token = entry.get("placeholder_token") or f"<{slug(Path(os.path.abspath(folder)).name)}>"
        name = folder_name(token, where)
        other = found.setdefault(fold(name), (token, where))
        if other[1] != where:
            first, its_place = other
            same = "the same word" if fold(first) == fold(token) else f"the same folder, {name}, for its results"
            raise InputError(
                f"{where}: {token} has {same} as {first} of {its_place}; give one another placeholder_token"
            )
        repository = config.hub_model_id or Path(config.output_dir).absolute().name
        own = {key: value for key, value in entry.items() if value is not None}
        changes = {
            **own,
            "train_data_dir": folder,
            "placeholder_token": token,
            "output_dir": str(Path(config.output_dir) / name),
            "hub_model_id": f"{repository}-{name}",
            "concepts": None,
            "concepts_per_batch": None,
        }
        configs.append(replace(config, **changes))
    return tuple(configs)


def _entries(concepts: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place of each concept, for messages, and its own settings."""
    path = local_copy(concepts)
    if path.is_dir():
        try:
            folders = sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
        except OSError as error:
            raise InputError(f"--concepts {path}: the folder cannot be read ({error.strerror})") from error
        if not folders:
            raise InputError(
                f"--concepts {path}: no sub-folder in it; put the pictures of each concept into one, named like its "
                f"word (for a single concept give --train_data_dir)"
            )
        for folder in folders:
            yield f"--concepts {path}, sub-folder {folder.name}", {"train_data_dir": str(folder)}
    elif path.exists():
        for number, entry in enumerate(load_yaml_list(path, TrainConfig, KEYS, "concept"), start=1):
            yield f"{path}, concept {number}", entry
    else:
        raise InputError(f"--concepts {path}: no such folder or file; give a folder of folders, or a YAML file")


def folder_name(token: str, where: str) -> str:
    """The folder of a word's results: the word without its brackets.

    Raises:
      InputError: no file system takes it, or the run has something else of this name.
    """
    name = token.strip("<>")
    if not name or re.search(r'[/\\:*?"<>|\x00-\x1f]|\.$', name) or _TAKEN.fullmatch(name):
        raise InputError(
            f"{where}: the results of {token} would be in a folder {name!r}, which "
            f"{'is for what the run itself writes' if _TAKEN.fullmatch(name) else 'cannot be a name'}; give another "
            f"placeholder_token"
        )
    return name


def slug(name: str) -> str:
    """A folder's name as a word: letters, digits and hyphens."""
    return re.sub(r"[\W_]+", "-", name.lower()).strip("-") or "concept"
