"""``report.html``: what a run has learned and how, on one page that needs no other file and no network."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ti_jax.evaluation.scores import MEASURES
from ti_jax.training import curves
from ti_jax.training.curves import Picture, Points, Record
from ti_jax.training.uses import Use

TEMPLATE = Path(__file__).parents[1] / "assets" / "report.html.jinja"
# A larger picture is shown as a smaller JPEG: the sheets of SDXL have tens of megabytes.
LARGEST_PICTURE = 600_000
WIDEST_PICTURE = 1600

Nearest = Sequence[tuple[str, float]]
"""Words of the vocabulary with their cosines."""


@dataclass(frozen=True)
class Row:
    """A row of the token-embedding table that was learned.

    Attributes:
      name: also of its figures in ``metrics.jsonl``, after the concept's prefix. usual_norm: the vocabulary's.
      nearest_start, nearest_now: empty: not known.
    """

    name: str
    norm_start: float
    norm: float
    usual_norm: float
    cosine: float
    distance: float
    nearest_start: Nearest = ()
    nearest_now: Nearest = ()


@dataclass(frozen=True)
class Word:
    """A concept.

    Attributes:
      about: facts by name. overview, progress: data URIs of pictures; None: there are none yet. scores: of the saved
        word; scores_log: of states during the run, with their steps.
      prefix: of its figures in ``metrics.jsonl``. link: its own page, if this one is that of a run of several.
    """

    token: str
    about: Mapping[str, str]
    rows: Sequence[Row]
    overview: str | None = None
    progress: str | None = None
    scores: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scores_log: Sequence[Record] = ()
    uses: Sequence[Use] = ()
    prefix: str = ""
    link: str | None = None


@dataclass(frozen=True)
class Page:
    """All that a page shows.

    Attributes:
      title: plain text. state: what the run is doing, or how it ended. step, total: updates.
      running: the page is to be loaded again by itself. records: of ``metrics.jsonl``.
      settings: name, value and default of those that are not the default. seconds: by phase.
      versions: by package or file. resumed_at: step from which on ``seconds`` are counted.
    """

    title: str
    state: str
    step: int
    total: int
    running: bool
    words: Sequence[Word]
    records: Sequence[Record]
    facts: Mapping[str, str]
    settings: Mapping[str, tuple[Any, Any]]
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    resumed_at: int = 0


def data_uri(path: Path) -> str | None:
    """A picture's file as a ``data:`` URI, smaller if it is large; None if there is no picture."""
    try:
        content = path.read_bytes()
        kind = "png"
        if len(content) > LARGEST_PICTURE:
            with Image.open(io.BytesIO(content)) as image:
                small = image.convert("RGB")
            small.thumbnail((WIDEST_PICTURE, 100 * WIDEST_PICTURE))
            file = io.BytesIO()
            small.save(file, "JPEG", quality=85)
            content, kind = file.getvalue(), "jpeg"
    except OSError:  # not there yet, or damaged by somebody else
        return None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def render(page: Page) -> str:
    """The page as HTML."""
    last = [record for record in page.records if "samples_per_second" in record][-1:]
    return _template().render(
        page=page,
        run_curves=_run_curves(page.records),
        word_curves=[_word_curves(word, page.records) for word in page.words],
        speed=last[0]["samples_per_second"] if last else None,
        longest=max(page.seconds.values(), default=0.0),
    )


@functools.cache
def _template() -> Any:
    # Here, so that a command that shows no page need not wait for it.
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"plain": _plain, "cosines": _cosines}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _plain(value: Any) -> str:
    """A setting's value as a flag or a config would have it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _cosines(words: Nearest) -> str:
    return ", ".join(f"{word} {cosine:.2f}" for word, cosine in words)


def _run_curves(records: Sequence[Record]) -> dict[str, Picture]:
    """Pictures by title."""
    means, smooth = curves.losses(records)
    found: dict[str, Picture] = {}
    if len(means) > 1:
        lines = {"loss": means, "moving average": smooth}
        found["Loss"] = curves.draw(lines, faint=["loss"])
    rate = curves.series(records, "learning_rate")
    if len(rate) > 1:
        found["Learning rate"] = curves.draw({"learning rate": rate}, number="{:.2g}")
    return found


def _word_curves(word: Word, records: Sequence[Record]) -> dict[str, Picture]:
    """Pictures by title: norm and direction of each row, and scores."""
    found: dict[str, Picture] = {}

    def with_start(row: Row, figure: str, start: float) -> Points:
        points = curves.series(records, f"{word.prefix}{row.name}/{figure}")
        return [(0.0, start), *points]

    several = len({row.name.split("/")[0] for row in word.rows}) > 1

    def short(row: Row) -> str:
        encoder, number = row.name.split("/")
        return f"{number.replace('_', ' ')} of {encoder}" if several else number.replace("_", " ")

    norms = {short(row): with_start(row, "norm", row.norm_start) for row in word.rows}
    if last := max((points[-1][0] for points in norms.values()), default=0.0):
        usual = {row.name.split("/")[0]: row.usual_norm for row in word.rows}
        flat = {f"usual{f' of {name}' if several else ''}": [(0.0, norm), (last, norm)] for name, norm in usual.items()}
        found["Norm"] = curves.draw({**norms, **flat}, faint=list(flat))
        cosines = {short(row): with_start(row, "cosine", 1.0) for row in word.rows}
        found["Direction: cosine to the start"] = curves.draw(cosines)
    scores = {name: curves.series(word.scores_log, name) for name in MEASURES}
    scores = {name: points for name, points in scores.items() if len(points) > 1}
    if scores:
        found["Scores"] = curves.draw(scores)
    return found
