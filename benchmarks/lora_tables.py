"""The tables of benchmarks/lora.py, from the lines of its results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from learning import Person, scores

from ti_jax.evaluation.avatar_judge import Judge

# What every palette of a style decides about.
HIDDEN_BY_STYLES = ("hair_colour", "skin")
COLUMNS = ("identity", "editability", "others", "levels", "anyone", "seconds", "kB")
SHARES = COLUMNS[:2]


def figures_of(
    line: Mapping[str, Any], plain: Mapping[str, Any] | None, person: Person, judge: Judge
) -> dict[str, float]:
    """The `COLUMNS` of a concept's line. A word changes no other prompt: there it has what `plain`'s line has."""
    found = scores(line, person.truth, judge)
    figures = {name: found[name] for name in ("identity", "editability") if name in found}
    figures |= {name: line[name] for name in ("seconds",) if name in line}
    if "bytes" in line:
        figures["kB"] = line["bytes"] / 1e3
    rest = line if "others" in line else plain
    if rest is not None and line["method"] != "described":
        figures |= {"others": rest["others"], "levels": rest["levels"]}
        figures["anyone"] = scores({**line, "readings": rest.get("anyone", rest["readings"])}, person.truth, judge)[
            "identity"
        ]
    return figures


def label(line: Mapping[str, Any]) -> str:
    """Method and learning rate."""
    return " ".join([line["method"], *(f"{name}={value:g}" for name, value in line["changes"].items())])


def mean(values: Sequence[float], name: str) -> str:
    """The mean as a table has it, of shares with the standard deviation."""
    if not values:
        return ""
    if name in ("levels", "seconds", "kB"):
        return f"{np.mean(values):.1f}"
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values):.2f}" if name in SHARES and len(values) > 1 else "")


def concept_table(lines: Sequence[Mapping[str, Any]], everyone: Sequence[Person], judge: Judge) -> Iterator[str]:
    """Means over concepts and seeds, by method and rate, and differences to ours, paired by both."""
    known = {person.name: person for person in everyone}
    plain = {line["person"]: line for line in lines if line["method"] == "plain"}
    by_label: dict[str, dict[tuple, dict[str, float]]] = defaultdict(dict)
    for line in lines:
        if line["person"] in known:
            figures = figures_of(line, plain.get(line["person"]), known[line["person"]], judge)
            by_label[label(line)][line["person"], line["seed"]] = figures
    yield f"| method | runs | {' | '.join(COLUMNS)} |"
    yield "|---" * (len(COLUMNS) + 2) + "|"
    for name, cells in by_label.items():
        row = [mean([cell[column] for cell in cells.values() if column in cell], column) for column in COLUMNS]
        yield f"| {name} | {len(cells)} | {' | '.join(row)} |"
    yield ""
    for name, cells in by_label.items():
        both = [cell for cell in cells if cell in by_label.get("ours", {})] if name.startswith("lora") else []
        for column in SHARES if len(both) > 1 else ():
            paired = [cells[cell][column] - by_label["ours"][cell][column] for cell in both]
            error = np.std(paired, ddof=1) / len(paired) ** 0.5
            yield f"{name} - ours, {column}: {np.mean(paired):+.3f} ± {error:.3f} (standard error, {len(paired)} pairs)"


def share(readings: Sequence[Mapping[str, str]], truth: Mapping[str, str]) -> float:
    """The share of attributes that is right."""
    return float(np.mean([reading[name] == word for reading in readings for name, word in truth.items()]))


def told_apart(pair: Sequence[Person]) -> tuple[dict[str, str], dict[str, str]]:
    """What counts of each of a pair: of two people where they differ, of a person in a style what every style shows."""
    first, second = (dict(person.truth) for person in pair)
    if pair[1].is_style:
        return {name: word for name, word in first.items() if name not in HIDDEN_BY_STYLES}, second
    differ = [name for name in first if name in second and first[name] != second[name]]
    return {name: first[name] for name in differ}, {name: second[name] for name in differ}


def pair_table(
    lines: Sequence[Mapping[str, Any]], alone: Sequence[Mapping[str, Any]], pairs: Mapping[str, Sequence[Person]]
) -> Iterator[str]:
    """Shares of both in one prompt, of the first in its own prompts while both are there, and of each by itself.

    `alone` are the concepts' lines.
    """
    names = ("first", "second", "neither", "first's own prompts", "first alone", "second alone")

    def cell(line: Mapping[str, Any], person: str) -> tuple:
        return line["method"], person, line["seed"], label(line)

    single = {cell(line, line["person"]): line["readings"] for line in alone}
    by_kind: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for line in lines:
        if line["person"] in pairs:
            pair = pairs[line["person"]]
            truth = told_apart(pair)
            shares = [share(line["readings"], each) for each in truth]
            own = [single.get(cell(line, person.name)) for person in pair]
            first, second = (share(seen, each) if seen else np.nan for seen, each in zip(own, truth, strict=True))
            # A word changes no prompt that it is not in.
            kept = share(line["first"], truth[0]) if "first" in line else first
            neither = np.nan if pair[1].is_style else 1 - sum(shares)
            kind = "person and style" if pair[1].is_style else "two people"
            by_kind[kind, label(line)].append([*shares, neither, kept, first, second])
    yield f"| | method | pairs | {' | '.join(names)} |"
    yield "|---" * (len(names) + 3) + "|"
    for (kind, method), rows in by_kind.items():
        means = ("" if np.isnan(each) else f"{each:.2f}" for each in np.mean(rows, axis=0))
        yield f"| {kind} | {method} | {len(rows)} | {' | '.join(means)} |"


def memory_table(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Peak memory by method."""
    yield "| method | peak memory in GB |\n|---|---|"
    for line in lines:
        yield f"| {line['method']} | {line['gigabytes']:.2f} |"
