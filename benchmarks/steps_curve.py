"""How many updates does a word need? What the judge reads along a run, for ours and for diffusers' method.

    python benchmarks/steps_curve.py --seeds 2                                          # ours, the dev people
    python benchmarks/steps_curve.py --seeds 2 --methods stock-best                     # diffusers' method
    python benchmarks/steps_curve.py --seeds 2 --set learning_rate=1e-3                 # another setting
    python benchmarks/steps_curve.py --table                                            # of all results so far

A word is trained once, to the last of --steps, and drawn with as it was at each of them; people, probes and scores are
those of `benchmarks/learning.py`. A schedule of the learning rate ends at the last of --steps. A line of --results is
one word at one step; those that are there are not measured again. Seconds are those of the training up to there, as
there: on an idle machine they count, beside other work they do not.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from learning import CORES, ROOT, TOKEN, Bench, Person, given_changes, key, label, people, read_results, scores
from subjects import SPLITS, probes_for

from ti_jax import Embedding, train
from ti_jax.evaluation.avatar_judge import Judge
from ti_jax.machine import enable_compilation_cache
from ti_jax.training.report import read_lines
from ti_jax.training.run_folder import copy_name

STEPS = (10, 20, 40, 60, 80, 120, 160, 250)
METHODS = ("ours", "stock", "stock-best")
Along = dict[int, tuple[Embedding, float]]  # by step: the word and the seconds of training up to there


def ours(bench: Bench, person: Person, seed: int, changes: dict[str, Any], steps: Sequence[int]) -> Along:
    """The word at each of ``steps`` of one of our runs."""
    config = bench.config(person, seed, {"max_train_steps": max(steps), "save_steps": math.gcd(*steps), **changes})
    with TemporaryDirectory() as folder:
        train(replace(config, output_dir=folder))
        lines = [line for line in read_lines(Path(folder) / "metrics.jsonl") if "losses" in line]
        seconds = {
            step: sum(len(line["losses"]) / line["steps_per_second"] for line in lines if line["step"] <= step)
            for step in steps
        }
        return {step: (Embedding.load(Path(folder) / copy_name(step)), seconds[step]) for step in steps}


def stock(bench: Bench, method: str, person: Person, seed: int, changes: dict[str, Any], steps: Sequence[int]) -> Along:
    """The word at each of ``steps`` of diffusers' method."""
    loop, found, seconds = bench.stock_loop(method, person, seed, changes), {}, 0.0
    for step, before in zip(steps, (0, *steps), strict=False):
        seconds += loop.run(step - before)
        found[step] = Embedding(TOKEN, loop.rows), seconds
    return found


def measure(bench: Bench, wanted: Mapping[str, Any], person: Person, steps: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A line for each of ``steps``, ascending."""
    method, seed, changes = wanted["method"], wanted["seed"], wanted["changes"]
    if method == "ours":
        along = ours(bench, person, seed, changes, steps)
    else:
        along = stock(bench, method, person, seed, changes, steps)
    probes = probes_for(person.truth, bench.judge, bench.images)
    for step, (word, seconds) in along.items():
        norm = float(np.linalg.norm(word.vectors["text_encoder"], axis=-1).mean())
        drawn = bench.draw([person.prompt(probe, TOKEN) for probe in probes], word)
        yield {
            **wanted, "step": step, "seconds": round(seconds, 2), "norm": round(norm, 3),
            "readings": bench.judge.read(drawn),
        }  # fmt: skip


def table(lines: Sequence[Mapping[str, Any]], everyone: Sequence[Person], judge: Judge) -> Iterator[str]:
    """For each setting and step the means over people and seeds, and the identity against the last step, paired."""
    truth = {person.name: person.truth for person in everyone}
    by_label: dict[str, dict[int, dict[tuple, dict[str, float]]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        if line["person"] in truth:
            cell = by_label[label(line)][line["step"]]
            found = scores(line, truth[line["person"]], judge)
            cell[line["person"], line["seed"]] = {**found, "norm": line["norm"], "seconds": line["seconds"]}
    for name, by_step in by_label.items():
        attributes = sorted({key for cell in by_step[max(by_step)].values() for key in cell if "identity/" in key})
        columns = ["identity", *attributes, "editability", "norm", "seconds"]
        yield f"\n{name}\n"
        shown = " | ".join(column.split("/")[-1].replace("_", " ") for column in columns)
        yield f"| step | runs | {shown} | against the last step |"
        yield "|---" * (len(columns) + 3) + "|"
        for step, cells in sorted(by_step.items()):
            means = [np.mean([cell[column] for cell in cells.values() if column in cell]) for column in columns]
            last = by_step[max(by_step)]
            paired = [cells[each]["identity"] - last[each]["identity"] for each in cells if each in last]
            error = np.std(paired, ddof=1) / len(paired) ** 0.5 if len(paired) > 1 else math.nan
            row = " | ".join(f"{mean:.3f}" for mean in means[:-1])
            yield f"| {step} | {len(cells)} | {row} | {means[-1]:.1f} | {np.mean(paired):+.3f} ± {error:.3f} |"


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="dev", choices=SPLITS, help="whom to learn")
    parser.add_argument("--people", nargs="+", default=None, help="only these of them")
    parser.add_argument("--seeds", type=int, default=1, help="runs for each person")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["ours"])
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="where the word is drawn with")
    parser.add_argument("--images", type=int, default=2, help="pictures of each of the judge's probes")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings other than the defaults")
    parser.add_argument("--results", type=Path, default=ROOT / ".work" / "steps.jsonl", help="where lines are kept")
    parser.add_argument("--table", action="store_true", help="measure nothing; print the table")
    arguments = parser.parse_args()

    enable_compilation_cache()
    everyone, steps = people(arguments.split), sorted(set(arguments.steps))
    bench = Bench(arguments.results.parent / "strips", everyone, arguments.images)
    lines = read_results(arguments.results)
    done = {(*key(line), line["step"]) for line in lines}
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(0 if arguments.table else arguments.seeds):
        for person in everyone:
            if arguments.people is not None and person.name not in arguments.people:
                continue
            for method in arguments.methods:
                changes = given_changes(arguments.set)
                wanted = {"method": method, "person": person.name, "seed": seed, "cores": CORES, "changes": changes}
                if all((*key(wanted), step) in done for step in steps):
                    continue
                began = time.perf_counter()
                for line in measure(bench, wanted, person, steps):
                    if (*key(line), line["step"]) in done:
                        continue
                    lines.append(line)
                    with arguments.results.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                took = time.perf_counter() - began
                print(f"{person.name} seed {seed} {label(wanted)}: {took:.0f} s in all", flush=True)
    print("\n".join(table(lines, everyone, bench.judge)))


if __name__ == "__main__":
    main()
