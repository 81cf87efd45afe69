"""Curves of a run from the records of ``metrics.jsonl``, as small SVG pictures that stand in a page by themselves."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Points = Sequence[tuple[float, float]]
"""(step, value) pairs, in order."""
Record = Mapping[str, Any]

MOST_POINTS = 200  # of a curve: more cannot be told apart on a screen
SMOOTHED = 0.04  # share of a run that the loss is averaged over
# Distinct in light and dark, and to most who see few colours: near Okabe and Ito's, without black and yellow.
COLOURS = ("#2f8fd0", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY = "rgba(128, 128, 128, 0.6)"


def losses(records: Sequence[Record]) -> tuple[Points, Points]:
    """The loss of the updates, as means over at most `MOST_POINTS` parts of the run, and its moving average."""
    steps: list[int] = []
    values: list[float] = []
    for record in records:
        of_record = record.get("losses", [])
        steps += range(record["step"] - len(of_record) + 1, record["step"] + 1)
        values += of_record
    if not values:
        return [], []
    parts = np.array_split(np.arange(len(values)), min(MOST_POINTS, len(values)))
    means = [(float(steps[part[-1]]), float(np.mean(np.asarray(values)[part]))) for part in parts]
    # Of the past alone, so that a point stays where it is when the run goes on; at the start of what there is.
    window = max(1, round(len(values) * SMOOTHED))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = [int(part[-1]) + 1 for part in parts]
    smooth = [(float(steps[end - 1]), float((sums[end] - sums[(first := max(0, end - window))]) / (end - first)))
              for end in ends]  # fmt: skip
    return means, smooth


def series(records: Sequence[Record], key: str) -> Points:
    """One figure of the records that have it, at most `MOST_POINTS` of them and always the last."""
    points = [(float(record["step"]), float(record[key])) for record in records if key in record]
    stride = -(-len(points) // MOST_POINTS) or 1
    return points[::stride] + (points[-1:] if points and (len(points) - 1) % stride else [])


@dataclass(frozen=True)
class Picture:
    """Some curves as SVG, and the colour of each by name."""

    svg: str
    colours: Mapping[str, str]


def draw(curves: Mapping[str, Points], *, faint: Sequence[str] = (), number: str = "{:.3g}") -> Picture:
    """One picture of some curves over the steps.

    It takes the colours of text and lines from the CSS variables ``--ink`` and ``--line`` of the page.

    Args:
      curves: by name. faint: names of those that are background to the others. number: format of values.
    """
    pygal = _library()
    strong = iter(COLOURS * (1 + len(curves) // len(COLOURS)))
    colours = {name: GREY if name in faint else next(strong) for name in curves}
    style = pygal.style.Style(
        background="transparent", plot_background="transparent", value_background="transparent",
        foreground="var(--ink)", foreground_strong="var(--ink)", foreground_subtle="var(--line)",
        guide_stroke_color="var(--line)", major_guide_stroke_color="var(--line)",
        guide_stroke_dasharray="0", major_guide_stroke_dasharray="0", stroke_opacity="1", transition="0s",
        font_family="inherit", label_font_size=14, major_label_font_size=14, colors=tuple(colours.values()),
    )  # fmt: skip
    values = [value for points in curves.values() for _, value in points]
    flat = {"range": (0.0, 2.0 * values[0])} if min(values) == max(values) > 0 else {}
    # The legend is the page's: pygal leaves no room for one below that has fewer entries than columns.
    chart = pygal.XY(
        style=style, width=480, height=240, margin=6, js=[], show_dots=False, show_legend=False, max_scale=8,
        disable_xml_declaration=True, show_x_guides=False, x_value_formatter="{:g}".format,
        value_formatter=number.format, **flat,
    )  # fmt: skip
    for name, points in curves.items():
        chart.add(name, list(points), stroke_style={"width": 1 if name in faint else 2.2})
    chart.add_xml_filter(_plain)
    return Picture(chart.render(is_unicode=True), colours)


@functools.cache
def _library() -> Any:
    """The module pygal; not imported before, so that a command that shows no page need not wait for it."""
    import pygal
    import pygal.style

    # It adds a finder of its maps to Python's, of a kind that Python warns of at each import that fails.
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "pygal"]
    return pygal


def _plain(root: Any) -> Any:
    """An SVG's tree without pygal's settings for its scripts, which the page does not have, and without comments."""
    for parent in list(root.iter()):
        for child in list(parent):
            if callable(child.tag) or child.tag.endswith("script"):
                parent.remove(child)
    return root
