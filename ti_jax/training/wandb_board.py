"""Curves and pictures on Weights & Biases (``--report_to wandb``); WANDB_MODE decides where they go, as for any run."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ti_jax.config import TrainConfig
from ti_jax.config.fields import setting_of
from ti_jax.errors import InputError, one_line
from ti_jax.files import disk_errors, write_atomically

# The run's id, so that a resumed run goes on in the same place; wandb has a folder of this name for its own files.
ID_FILE = "wandb/run-id.txt"


def check_wandb() -> None:
    """Check that wandb is there, and knows where to send a run to.

    Raises:
      InputError: it is not installed, or nobody is logged in.
    """
    wandb = _wandb()
    try:
        if wandb.setup().settings.mode == "online":
            wandb.login()
    except wandb.Error as error:
        raise InputError(
            f"--report_to wandb: {one_line(error)}; log in with `wandb login`, or set WANDB_MODE=offline to send the "
            f"run later with `wandb sync`"
        ) from error


class WandbBoard:
    """One run on Weights & Biases; the same methods as `ti_jax.training.tensorboard.Board`.

    Raises:
      InputError: wandb cannot start the run, or log to it.
    """

    def __init__(self, config: TrainConfig, folder: Path, first_step: int):
        """Start a run, or go on with the one that ``folder`` has the id of if ``first_step`` is not 0.

        wandb drops what a resumed run logs again for steps that it has already: the figures are the same.
        """
        self._wandb = _wandb()
        path = folder / ID_FILE
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            known = first_step > 0 and path.exists()
            name = path.read_text(encoding="utf-8").strip() if known else secrets.token_hex(4)
        write_atomically(path, name.encode())
        # Nothing of the machine is sent: no console, commit, code or load.
        settings = self._wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True,
            x_disable_machine_info=True,
        )  # fmt: skip
        with self._errors():
            self._run = self._wandb.init(
                project="ti_jax", dir=str(folder), id=name, name=config.placeholder_token, resume="allow",
                config=_settings(config), settings=settings,
            )  # fmt: skip

    def scalar(self, name: str, value: float, step: int) -> None:
        """One point of a curve."""
        with self._errors():
            self._run.log({name: value}, step=step)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """One picture."""
        with self._errors():
            self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Send what is left, and end the run."""
        with self._errors():
            self._run.finish()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (self._wandb.Error, OSError) as error:
            raise InputError(f"wandb: {one_line(error)}") from error


def _settings(config: TrainConfig) -> dict[str, Any]:
    """The settings to show with a run: no secrets, and no paths of this machine."""
    kept = {}
    for field in dataclasses.fields(config):
        value, about = getattr(config, field.name), setting_of(field)
        is_local = about.path is not None and (about.path != "model" or (value is not None and Path(value).exists()))
        if not (about.secret or about.of_this_process or is_local):
            kept[field.name] = list(value) if isinstance(value, tuple) else value
    return kept


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise InputError("--report_to wandb: wandb is not installed: pip install 'ti_jax[wandb]'") from error
    return wandb
