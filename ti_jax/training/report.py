"""Logs of a run: the progress bar, ``metrics.jsonl``, TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

from ti_jax.config import TrainConfig
from ti_jax.errors import InputError
from ti_jax.files import append, disk_errors, write_atomically
from ti_jax.training.chips import TERA
from ti_jax.training.wandb_board import WandbBoard

if TYPE_CHECKING:
    from ti_jax.training.tensorboard import Board


@dataclass(frozen=True)
class Work:
    """What relates speed to the device: the least FLOPs of an update on each device, and a device's peak in FLOP/s."""

    flops: float
    peak: float


class Reporter:
    """Shows and logs a run. A resumed run truncates the log to its step and appends to the same files.

    Figures that cannot be logged are a warning: on a full disk the word may still find its place.
    """

    def __init__(
        self, config: TrainConfig, output_dir: Path, first_step: int, total_steps: int, work: Work | None = None
    ):
        self._metrics_path = output_dir / "metrics.jsonl"
        with disk_errors(self._metrics_path):
            self._cut_back(first_step)
        append(self._metrics_path, b"")
        self._warned, self._work = False, work
        logs = output_dir / config.logging_dir  # an absolute logging_dir stands alone
        self._boards: list[Board | WandbBoard] = []
        if "tensorboard" in config.report_to:
            from ti_jax.training.tensorboard import Board

            self._boards.append(Board(logs, first_step))
        if "wandb" in config.report_to:
            self._log(lambda: self._boards.append(WandbBoard(config, logs, first_step)))
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc="learning",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
        )
        self._last_time = time.perf_counter()

    def _cut_back(self, first_step: int) -> None:
        if not self._metrics_path.exists():
            return
        kept = [json.dumps(line) + "\n" for line in read_lines(self._metrics_path) if line["step"] <= first_step]
        write_atomically(self._metrics_path, "".join(kept).encode())

    def chunk(self, step: int, losses: Sequence[float], learning_rate: float, samples: int) -> None:
        """Log the updates since the last call.

        Args:
          step: number of updates so far; losses: one per update; samples: pictures seen in them, over all devices.
        """
        now = time.perf_counter()
        seconds, self._last_time = now - self._last_time, now
        figures = {
            "loss": sum(losses) / len(losses),
            "learning_rate": learning_rate,
            "steps_per_second": len(losses) / seconds,
            "samples_per_second": samples / seconds,
        }
        shown = {"loss": f"{figures['loss']:.4f}", "samples/s": f"{figures['samples_per_second']:.1f}"}
        if self._work is not None:
            speed = self._work.flops * len(losses) / seconds
            figures |= {"tflops_per_device": speed / TERA, "mfu": speed / self._work.peak}
            shown |= {"TFLOP/s": f"{speed / TERA:.0f}", "MFU": f"{figures['mfu']:.1%}"}
        self._bar.set_postfix(shown, refresh=False)
        self._write({"step": step, **figures, "losses": losses})
        self._scalars(figures, step)

    def progress(self, count: int) -> None:
        """Advance the progress bar by ``count`` updates."""
        self._bar.update(count)

    def rows(self, step: int, figures: dict[str, float]) -> None:
        """Log the rows' distances, cosines and norms."""
        self._write({"step": step, **figures})
        self._scalars(figures, step)

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Show a PIL picture in TensorBoard and on Weights & Biases."""
        for board in self._boards:
            self._log(partial(board.image, name, image, step))

    def pause(self) -> None:
        """Exclude the time since the last chunk (saving, drawing) from the speed of the next one."""
        self._last_time = time.perf_counter()

    def print_line(self, text: str) -> None:
        """Print a line above the progress bar."""
        tqdm.write(text, file=sys.stderr)

    def _write(self, record: dict[str, Any]) -> None:
        self._log(lambda: append(self._metrics_path, (json.dumps(record) + "\n").encode()))

    def _scalars(self, figures: dict[str, float], step: int) -> None:
        for board in self._boards:
            for name, value in figures.items():
                self._log(partial(board.scalar, name, value, step))

    def _log(self, write: Callable[[], None]) -> None:
        try:
            write()
        except InputError as error:
            if not self._warned:
                self.print_line(f"warning: {error}; figures are missing in the logs from here on")
            self._warned = True

    def close(self) -> None:
        """Finish the bar and the logs."""
        self._bar.close()
        for board in self._boards:
            self._log(board.close)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a ``.jsonl`` file, except for lines left incomplete by a killed run."""
    records = []
    with disk_errors(path):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def print_row_figures(figures: list[dict], step: int, prefix: str = "") -> None:
    """Print on stderr how far each row moved; warn of rows that did not move, or have become very long."""
    for row in figures:
        where = f"{prefix}row {row['row']}" + ("" if row["encoder"] == "text_encoder" else f" of {row['encoder']}")
        if row["distance"] == 0.0 and step > 0:
            print(
                f"warning: {where} did not move at all in {step} steps: nothing was learned (is the learning rate 0?)",
                file=sys.stderr,
            )
            continue
        print(
            f"{where} moved by {row['distance']:.3f} (cosine to its start {row['cosine']:.2f}); its norm is "
            f"{row['norm']:.2f}, the vocabulary's usual one {row['usual_norm']:.2f}",
            file=sys.stderr,
        )
        if row["norm"] > 4.0 * row["usual_norm"]:
            print(
                f"warning: {where} is much longer than the words that the model knows; it may drown the rest of a "
                f"prompt. A lower --learning_rate or fewer steps keep it shorter",
                file=sys.stderr,
            )
