"""Which options help a word? Each variant of the defaults, on the dev people, against the defaults themselves.

    python benchmarks/methods.py                                   # all variants, three seeds, both lengths: many hours
    python benchmarks/methods.py --variants dti initial --seeds 1 --people ana ben --lengths default
    python benchmarks/methods.py --minutes 4                       # a piece: no measurement begins after four minutes
    python benchmarks/methods.py --table                           # the tables of all results so far

A word is learned and measured as in benchmarks/learning.py, at the default length and over-trained, with four times the
updates at twice the rate: what happens to those who only know that more is better. *identity* and *editability* are
shares, *norm* is the mean norm of the word's rows, *seconds* those of the training. The tables have the difference to
the defaults, paired by person and seed, with its standard error; of one pair there is none.

Every measurement is a line in --results and is not repeated. A line has the updates and the rate that it was made with,
so that results of other defaults do not mix: --table shows those of today's, with as many pictures as --images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from learning import CORES, IMAGES_A_PROBE, ROOT, Bench, key, open_results, people, read_results, scores
from subjects import SPLITS, probes_for

from ti_jax.config import TrainConfig, resolve
from ti_jax.evaluation.avatar_judge import Judge
from ti_jax.machine import enable_compilation_cache

FREE = "free"
# What is changed of the defaults. A scheme of warm-up is a tenth of the default updates.
VARIANTS: dict[str, dict[str, Any]] = {
    FREE: {},
    "initial": {"row_norm": "initial"},
    "vocabulary": {"row_norm": "vocabulary"},
    "dti": {"optimizer": "dti"},
    "initializer_output": {"initializer_output": True},
    "initializer_output person": {"initializer_output": True, "initializer_token": "person"},
    "person": {"initializer_token": "person"},
    "context_loss": {"context_loss": 1.5e-4, "initializer_token": "person"},
    "context_loss x100": {"context_loss": 1.5e-2, "initializer_token": "person"},
    "timestep_range 500 900": {"timestep_range": (500, 900)},
    "snr_gamma 5": {"snr_gamma": 5.0},
    "ema_decay 0.99": {"ema_decay": 0.99},
    "num_vectors 2": {"num_vectors": 2},
    "num_vectors 4": {"num_vectors": 4},
    "warm-up": {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 6},
    "cosine": {"lr_scheduler": "cosine", "lr_warmup_steps": 0},
}
LENGTHS = {"default": (1, 1), "over-trained": (4, 2)}  # factors of the updates and of the rate
FIGURES = ("identity", "editability", "norm", "seconds")


def settings_of(variant: str, length: str) -> dict[str, Any]:
    """What a variant changes at a length, with its updates and its rate, as a line has it."""
    more, faster = LENGTHS[length]
    config = resolve(TrainConfig(**VARIANTS[variant]))
    assert config.max_train_steps is not None and isinstance(config.learning_rate, float), "the defaults have both"
    whole = {
        **VARIANTS[variant],
        "max_train_steps": more * config.max_train_steps,
        "learning_rate": faster * config.learning_rate,
    }
    return json.loads(json.dumps(whole))


def figures_of(line: Mapping[str, Any], truth: Mapping[str, str], judge: Judge) -> dict[str, float]:
    """The `FIGURES` of a line of the results."""
    found = scores(line, truth, judge)
    values = found["identity"], found.get("editability", float("nan")), float(np.mean(line["norms"])), line["seconds"]
    return dict(zip(FIGURES, values, strict=True))


def has_images(line: Mapping[str, Any], truth: Mapping[str, str], judge: Judge, images: int) -> bool:
    """Whether a line of the results has so many pictures of each of the judge's probes."""
    return len(line["readings"]) == len(probes_for(truth, judge, images))


def mean_and_error(values: Sequence[float]) -> str:
    """The mean of paired differences and its standard error; without one where there is a single pair."""
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):+.3f}{error}"


def table(found: Mapping[str, Mapping[tuple, Mapping[str, float]]]) -> Iterator[str]:
    """Lines of a table: means, and what identity and editability are more than with the defaults.

    Args:
      found: figures by variant, person and seed.
    """
    yield "| variant | runs | identity | editability | norm | seconds | identity - free | editability - free |"
    yield "|---" * 8 + "|"
    for variant, cells in found.items():
        means = (np.mean([cell[name] for cell in cells.values()]) for name in FIGURES)
        row = [f"{mean:.{digits}f}" for mean, digits in zip(means, (3, 3, 2, 1), strict=True)]
        for name in FIGURES[:2]:
            free = found.get(FREE, {})
            paired = [cells[cell][name] - free[cell][name] for cell in cells if cell in free]
            row.append(mean_and_error(paired) if paired and variant != FREE else "")
        yield f"| {variant} | {len(cells)} | {' | '.join(row)} |"


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS), help="what to learn")
    parser.add_argument("--lengths", nargs="+", choices=tuple(LENGTHS), default=tuple(LENGTHS), help="for how long")
    parser.add_argument("--split", choices=SPLITS, default="dev", help="whom to learn")
    parser.add_argument("--people", nargs="+", default=None, help="only these of them")
    parser.add_argument("--seeds", type=int, default=3, help="runs for each of them")
    parser.add_argument("--images", type=int, default=IMAGES_A_PROBE, help="pictures of each of the judge's probes")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no measurement begins after so many")
    parser.add_argument("--results", type=Path, default=ROOT / ".work" / "methods.jsonl", help="where lines are kept")
    parser.add_argument("--table", action="store_true", help="measure nothing; print the tables")
    arguments = parser.parse_args()
    began = time.perf_counter()
    enable_compilation_cache()
    everyone = people(arguments.split)
    chosen = [person for person in everyone if arguments.people is None or person.name in arguments.people]
    truth = {person.name: person.truth for person in everyone}
    bench = Bench(arguments.results.parent / "methods-strips", everyone, arguments.images)
    lines = [
        line
        for line in read_results(arguments.results)
        if line["person"] in truth and has_images(line, truth[line["person"]], bench.judge, arguments.images)
    ]
    done = {key(line) for line in lines}
    # Seeds and people outside, so that whatever is cut short still has pairs.
    wanted = [
        (seed, person, length, variant)
        for seed in range(arguments.seeds)
        for person in chosen
        for length in arguments.lengths
        for variant in arguments.variants
    ]
    for seed, person, length, variant in [] if arguments.table else wanted:
        line = {"method": "ours", "person": person.name, "seed": seed, "cores": CORES}
        line["changes"] = settings_of(variant, length)
        if key(line) in done:
            continue
        if time.perf_counter() - began > 60 * arguments.minutes:
            print("the minutes are over: start again to go on")
            break
        changes = {**line["changes"], **VARIANTS[variant]}  # tuples, where JSON has lists
        drawn, figures = bench.pictures("ours", person, seed, changes)
        lines.append(line | figures | {"readings": bench.judge.read(drawn)})
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        with open_results(arguments.results, "a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        found = figures_of(lines[-1], person.truth, bench.judge)
        said = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
        print(f"{person.name} seed {seed} {variant}, {length}: {said}", flush=True)
    names = {person.name for person in chosen}
    for length in arguments.lengths:
        by_variant = {}
        for variant in arguments.variants:
            settings = settings_of(variant, length)
            cells = {
                (line["person"], line["seed"]): figures_of(line, truth[line["person"]], bench.judge)
                for line in lines
                if line["changes"] == settings and line["person"] in names
            }
            if cells:
                by_variant[variant] = cells
        if by_variant:
            print(f"\n{length}:\n\n" + "\n".join(table(by_variant)))


if __name__ == "__main__":
    main()
