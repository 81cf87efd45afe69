"""What does it cost to keep the moments on the host? The embedded model, fed and with all moments on the device.

    python benchmarks/feeding.py --pictures 2000 --updates 10 --rounds 6

Both ways run by turns in one process, each chunk of updates like the training loop's: the losses of one are read after
the next was dispatched. The moments of four pictures are repeated as often as is asked for. Prints seconds a step, the
bytes of moments on a device, what the host does for a step in the meantime, and whether all losses are equal.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from ti_jax.config import ASSETS, TrainConfig, resolve  # noqa: E402
from ti_jax.data.latents import aligned  # noqa: E402
from ti_jax.machine import enable_compilation_cache  # noqa: E402
from ti_jax.training.feeding import WINDOWS, Feeder, bytes_of, placed, without_moments  # noqa: E402
from ti_jax.training.job import Job, prepare  # noqa: E402
from ti_jax.training.parallel import replicate  # noqa: E402


def with_pictures(job: Job, pictures: int) -> Any:
    """The job's inputs with so many pictures, their moments on the host."""
    (frozen,) = job.frozen
    dataset = frozen.dataset
    moments = aligned((pictures, *dataset.moments.shape[1:]))
    index = np.arange(pictures) % len(dataset.moments)
    moments[:] = dataset.moments[index]
    small = {"prompts_of": dataset.prompts_of[index], "time_ids": dataset.time_ids[index]}
    entries = replicate(jnp.arange(pictures, dtype=jnp.int32), job.mesh)
    return frozen._replace(dataset=dataset._replace(moments=moments, entries=entries, **replicate(small, job.mesh)))


class Way:
    """One of the two ways to give the step its moments."""

    def __init__(self, job: Job, inputs: Any, fed: bool):
        self.job, self.feeder, dataset = job, None, inputs.dataset
        if fed:
            self.feeder = Feeder(dataset, job.config.seed, job.builder)
        self.frozen = inputs._replace(dataset=without_moments(dataset) if fed else placed(dataset, job.mesh))
        shapes = None if self.feeder is None else self.feeder.shapes
        self.program = job.builder.lower(self.frozen, job.start, "none", fed=shapes).compile()
        self.bytes = bytes_of(dataset) if self.feeder is None else WINDOWS * self.feeder.nbytes
        sizes = self.program.memory_analysis()
        self.peak = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
        self.peak += 0 if self.feeder is None else (WINDOWS - 1) * self.feeder.nbytes
        self.state, self.step, self.losses = replicate(job.start, job.mesh), 0, []

    def run(self, updates: int) -> float:
        """Seconds of so many updates."""
        began, end, pending = time.perf_counter(), self.step + updates, None
        while self.step < end:
            count, given = min(self.job.builder.longest_chunk, end - self.step), ()
            if self.feeder is not None:
                count, *given = self.feeder.next(self.step, count)
            number = replicate(np.int32(count), self.job.mesh)
            self.state, losses = self.program(self.frozen, self.state, number, *given)
            if self.feeder is not None:
                self.feeder.ahead(self.step)
            if pending is not None:
                self.losses += np.asarray(pending[0])[: pending[1]].tolist()
            pending, self.step = (losses, count), self.step + count
        self.losses += np.asarray(pending[0])[: pending[1]].tolist()
        return time.perf_counter() - began

    def gather(self, windows: int) -> float:
        """Seconds to draw, gather and send the samples of an update, while the devices have nothing else to do."""
        assert self.feeder is not None
        length = self.feeder.shapes.pictures.shape[0]
        began = time.perf_counter()
        for number in range(1000, 1000 + windows):
            jax.block_until_ready(self.feeder.next(number * length, length))
        return (time.perf_counter() - began) / windows / length


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--updates", type=int, default=10, help="in each turn")
    parser.add_argument("--chunk", type=int, default=5, help="updates in a dispatch, and in a window")
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    enable_compilation_cache()
    with TemporaryDirectory() as output, contextlib.ExitStack() as holding:
        config = TrainConfig(
            train_data_dir=str(ASSETS / "concepts" / "cleo"), placeholder_token="<cleo>", output_dir=output,
            max_train_steps=1000, logging_steps=args.chunk,
        )  # fmt: skip
        config = resolve(config)
        job = prepare(config, jax.devices()[:1], 1, holding)
    inputs = with_pictures(job, args.pictures)
    ways = {"all on the device": Way(job, inputs, fed=False), "fed": Way(job, inputs, fed=True)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way.run(args.updates)
    for _ in range(args.rounds):
        for name, way in ways.items():
            seconds[name].append(way.run(args.updates) / args.updates)
    whole, fed = ways.values()
    for name, way in ways.items():
        each = np.array(seconds[name]) * 1e3
        print(
            f"{name}: {np.median(each):.1f} ms a step ({each.min():.1f} to {each.max():.1f}); moments take "
            f"{way.bytes:,} bytes of {way.peak:,} on the device"
        )
    ratios = np.array(seconds["fed"]) / np.array(seconds["all on the device"])
    print(f"fed / on the device: {np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f})")
    print(f"drawing, gathering and sending: {fed.gather(20) * 1e3:.2f} ms a step; equal: {fed.losses == whole.losses}")


if __name__ == "__main__":
    main()
