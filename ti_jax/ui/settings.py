"""From the fields of the page to the settings of a run; what the page may not choose is refused here."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ti_jax.config import ASSETS, TrainConfig, config_path, load_yaml, resolve
from ti_jax.config.fields import settings_of
from ti_jax.config.rates import Rates
from ti_jax.errors import InputError

EMBEDDED = "embedded model (small, for a first try)"
PRESETS = ("sd15", "sd21", "sdxl")
EXAMPLE = ASSETS / "concepts" / "cleo"
EXAMPLE_WORD = "<cleo>"

# Settings that send something from this machine, or belong to a run in several processes.
_ELSEWHERE = ("push_to_hub", "hub_model_id", "hub_license", "report_to", "distributed", "revision", "variant")
SHARE = 5  # of a run between two validations and two copies of the word, where the page is not told


class Models:
    """The models that the page offers: the embedded one, those that were named at the start, and any hub id.

    Attributes:
      offered: path by the name that the page shows; None is the embedded one.
    """

    def __init__(self, given: Sequence[str]):
        """Look for the models in what was given.

        Args:
          given: diffusers folders, single files, or folders of such.

        Raises:
          InputError: there is none.
        """
        self.offered: dict[str, str | None] = {EMBEDDED: None}
        for each in given:
            found = list(_models_in(Path(each).expanduser()))
            if not found:
                raise InputError(
                    f"--models {each}: neither a diffusers folder (with model_index.json) nor a .safetensors or .ckpt "
                    f"file, nor a folder of such"
                )
            self.offered |= {str(path): str(path.absolute()) for path in found}

    def path(self, chosen: Any) -> str | None:
        """What ``pretrained_model_name_or_path`` is for a choice on the page.

        Raises:
          InputError: neither offered nor a hub id.
        """
        if chosen in self.offered:
            return self.offered[chosen]
        name = str(chosen).strip()
        is_id = re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[\w.-]*\w", name, re.ASCII) and ".." not in name
        if is_id and not os.path.exists(name) and not name.endswith((".safetensors", ".ckpt")):
            return name
        raise InputError(
            f"{name!r}: neither a model of the list nor a hub id (owner/name); a folder or file of this machine is "
            f"named when the page is started: ti-jax ui --models PATH"
        )


def _models_in(path: Path) -> list[Path]:
    if _is_model(path):
        return [path]
    return sorted(each for each in path.glob("*") if _is_model(each)) if path.is_dir() else []


def _is_model(path: Path) -> bool:
    if path.is_dir():
        return (path / "model_index.json").is_file()
    return path.is_file() and path.suffix.lower() in (".safetensors", ".ckpt")


@dataclass(frozen=True)
class Form:
    """The fields of the page.

    Attributes:
      preset: one of `PRESETS` that the settings start from, for a model that is not the embedded one.
      prompts: of the validation pictures. further: lines ``name: value`` of a config. Empty: what suits the model.
    """

    model: str = EMBEDDED
    word: str = ""
    initializer: str = ""
    kind: str = "object"
    steps: str = ""
    learning_rate: str = ""
    vectors: str = ""
    batch: str = ""
    preset: str = ""
    prompts: str = ""
    every: str = ""
    further: str = ""


def make_config(form: Form, models: Models, pictures: Path, output: Path) -> TrainConfig:
    """The settings of a run, not yet resolved, but checked.

    Args:
      pictures: their folder. output: the run's folder.

    Raises:
      InputError: a value that cannot be, or that the page may not choose.
    """
    model = models.path(form.model)
    settings: dict[str, Any] = {}
    if model is not None and form.preset:
        if form.preset not in PRESETS:
            raise InputError(f"settings of {form.preset!r}: must be one of {', '.join(PRESETS)}")
        settings |= load_yaml(config_path(form.preset), TrainConfig)
    if not form.word.strip():
        raise InputError("the new word is missing: a name that the model does not know, like <cat-toy>")
    if model is not None and not form.initializer.strip():
        raise InputError("what to start from is missing: a word that the model knows and that comes near, like toy")
    prompts = tuple(line.strip() for line in form.prompts.splitlines() if line.strip())
    given = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": str(pictures),
        "placeholder_token": form.word.strip(),
        "initializer_token": form.initializer.strip() or None,
        "learnable_property": form.kind,
        "max_train_steps": whole("steps", form.steps),
        "learning_rate": _rate(form.learning_rate),
        "num_vectors": whole("vectors", form.vectors),
        "train_batch_size": whole("pictures a step", form.batch),
        "validation_prompt": prompts or None,
        "output_dir": str(output),
    }
    settings |= {name: value for name, value in given.items() if value is not None}
    settings["pretrained_model_name_or_path"] = model  # also None, against a preset
    total = resolve(TrainConfig(**settings)).max_train_steps or 1
    every = whole("a picture every", form.every) or max(1, total // SHARE)
    settings |= {"validation_steps": every, "save_steps": every, "checkpointing_steps": every}
    config = TrainConfig(**settings | further_settings(form.further))
    resolve(config)
    return config


def may_choose(name: str) -> bool:
    """Whether the page may choose a setting by its name: not what reads or writes other files, or sends something."""
    about = settings_of(TrainConfig)[name]
    return about.path is None and not about.secret and not about.of_this_process and name not in _ELSEWHERE


def further_settings(text: str) -> dict[str, Any]:
    """Settings from lines ``name: value``, as in a config.

    Raises:
      InputError: not such lines, or a setting that the page may not choose.
    """
    if not text.strip():
        return {}
    where = "further settings"
    with tempfile.TemporaryDirectory(prefix="ti_jax-") as folder:
        path = Path(folder) / "settings.yaml"
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        try:
            found = load_yaml(path, TrainConfig)
        except InputError as error:
            raise InputError(str(error).replace(str(path), where)) from error
    for name in found:
        if not may_choose(name):
            raise InputError(f"{where}: {name} cannot be chosen on the page; use ti-jax train on the command line")
    return found


def whole(name: str, value: Any) -> int | None:
    """The whole number in a field of the page, 1 or more; None: it is empty.

    Raises:
      InputError: something else is in it.
    """
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    text = "" if value is None else str(whole).strip()
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise InputError(f"{name} {text!r}: must be a whole number, 1 or more, or empty")
    return int(text)


def number(name: str, value: Any) -> float | None:
    """As `whole`, for a number that may have a fraction."""
    text = "" if value is None else str(value).strip()
    try:
        return float(text) if text else None
    except ValueError:
        raise InputError(f"{name} {text!r}: must be a number, or empty") from None


def _rate(value: Any) -> Any:
    """A learning rate as the command line takes it: a number, or several with their last steps."""
    text = str(value or "").strip()
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        try:
            return Rates(text)
        except ValueError as error:
            raise InputError(f"learning rate {text!r}: must be {Rates.EXPECTED}") from error
