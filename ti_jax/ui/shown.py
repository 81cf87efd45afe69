"""What the page shows of runs, as HTML, Markdown and updates of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ti_jax.errors import InputError
from ti_jax.training import curves
from ti_jax.training.run_folder import OVERVIEW_FILE, PROGRESS_FILE, REPORT_FILE
from ti_jax.training.uses import Use, example_prompt
from ti_jax.ui.pictures import Look
from ti_jax.ui.runs import (
    HERE,
    LOG_FILE,
    METRICS_FILE,
    Runs,
    State,
    config_of,
    log_end,
    place_of,
    process_of,
    records_of,
    state_of,
    words_of,
)
from ti_jax.ui.trying import class_of

HEADER = """<div class="head"><b>ti_jax</b> <span class="soft">learns a new word for Stable Diffusion from a few
pictures</span></div>"""

STYLE = """
:root, .gradio-container { --ink: #1c1e21; --soft: #5f6670; --line: #dfe2e6; }
.dark, .dark .gradio-container { --ink: #e6e8eb; --soft: #9aa2ad; --line: #3d434b; }
.head { font-size: 1.25rem; padding: .2rem 0 .4rem; }
.soft, .soft p { color: var(--soft); font-size: .9rem; }
.status { display: inline-block; padding: .1rem .7rem; border-radius: 1rem; border: 1px solid var(--line); }
.status.learning, .status.starting, .status.stopping { background: #2f8fd0; border-color: #2f8fd0; color: white; }
.status.finished { background: #00855f; border-color: #00855f; color: white; }
.status.failed { background: #b42318; border-color: #b42318; color: white; }
.bar { height: .5rem; border-radius: .25rem; background: var(--line); margin: .7rem 0 .2rem; overflow: hidden; }
.bar > div { height: 100%; background: #2f8fd0; }
.error { border-left: .25rem solid #b42318; padding: .4rem .8rem; margin: .6rem 0; overflow-wrap: anywhere; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin: 0 .3rem 0 .9rem; }
#runs label { width: 100%; }
footer { display: none !important; }
"""

FORMAT_NAMES = {
    "diffusers": "diffusers, AUTOMATIC1111, Forge (.safetensors)",
    "comfyui": "ComfyUI, kohya (.safetensors)",
    "a1111": "AUTOMATIC1111 (.pt)",
    "card": "AUTOMATIC1111, a picture with the word in it (.png)",
}
NO_OTHER = "nothing else"
NOTHING = """<p>No run yet. Drop pictures on the first page, or start one with <code>ti-jax train</code> in this
folder.</p>"""


@dataclass(frozen=True)
class Shown:
    """Updates of the page's parts, and marks of what the browser then has."""

    parts: list[Any]
    seen: dict[str, Any]


def of_run(runs: Runs, name: str | None, seen: dict[str, Any]) -> Shown:
    """The parts that show a run, where they are not as they were: see `page.build` for their order."""
    if name is None and "name" in seen:
        return Shown([gr.skip()] * 12, {"name": None})
    if name is None:
        nothing = [NOTHING, *[gr.Button(interactive=False)] * 2, "", *[gr.Image(None, visible=False)] * 2, ""]
        empty: list[Any] = [gr.Dropdown(choices=[], value=None)] * 2
        return Shown([*nothing, *empty, gr.skip(), gr.skip(), empty[0]], {"name": None})
    folder = runs.folder(name)
    state = state_of(folder)
    marks: dict[str, Any] = {"name": name, "list": seen.get("list"), "state": state}
    marks |= {
        each: _mark(folder / place_of(folder, each)) for each in (METRICS_FILE, PROGRESS_FILE, OVERVIEW_FILE, LOG_FILE)
    }
    marks["words"] = words_of(folder)

    def changed(*keys: str) -> bool:
        return any(marks[key] != seen.get(key) for key in keys)

    running, ended = state.running, not state.running
    buttons = [
        gr.Button(interactive=running and state.status != "stopping"),
        gr.Button(interactive=ended, value="Resume" if state.step < state.total or not state.total else "Learn on"),
    ]
    words = list(marks["words"])
    choices: list[Any] = [gr.skip()] * 5
    if changed("words", "name"):
        # What is chosen stays, where there was something to choose.
        first = {} if seen.get("words") else {"value": words[0] if words else None}
        none = {} if seen.get("words") else {"value": NO_OTHER}
        suits = _suiting(folder) if changed("name") else [gr.skip(), gr.skip()]
        listed = gr.Dropdown(choices=words, **first)
        choices = [listed, gr.Dropdown(choices=[NO_OTHER, *words], **none), *suits, listed]
    parts = [
        state_html(state, begun=any(marks[METRICS_FILE][1:])) if changed("state") else gr.skip(),
        *(buttons if changed("state") else [gr.skip(), gr.skip()]),
        loss_html(folder) if changed(METRICS_FILE) else gr.skip(),
        _picture(runs, name, PROGRESS_FILE) if changed(PROGRESS_FILE) else gr.skip(),
        _picture(runs, name, OVERVIEW_FILE) if changed(OVERVIEW_FILE) else gr.skip(),
        "\n".join(log_end(folder)[-40:]) if changed(LOG_FILE) else gr.skip(),
        *choices,
    ]
    return Shown(parts, marks)


def goes_on(seen: dict[str, Any]) -> bool:
    """Whether the run that is shown has a process."""
    return "state" in seen and seen["state"].running


def _suiting(folder: Path) -> list[Any]:
    """A prompt to try the word with, and what may stand in its place."""
    try:
        config = config_of(folder)
    except InputError:
        return [gr.skip(), gr.skip()]
    return [example_prompt(config), class_of(config)]


def _mark(path: Path) -> Any:
    """What changes with a file."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size


def _picture(runs: Runs, name: str, file: str) -> Any:
    """A picture of the run, read here: the browser gets a copy, and no path of this machine."""
    try:
        with Image.open(runs.file(name, place_of(runs.folder(name), file))) as opened:
            return gr.Image(opened.convert("RGB"), visible=True)
    except (InputError, OSError):  # none yet, or spoilt by somebody else
        return gr.Image(None, visible=False)


def short(path: Path) -> Path:
    """A path as seen from where the server was started, if it is below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) and path != here else path


def label(runs: Runs, name: str) -> str:
    """A run in the list."""
    shown = runs.root.name if name == HERE else name
    return f"{shown}  (learning)" if process_of(runs.folder(name)) is not None else shown


def state_html(state: State, begun: bool) -> str:
    """What a run does, as a line, a bar and its error."""
    of = f" of {state.total}" if state.total else ""
    count = f"step {state.step}{of}" if begun or state.step else ""
    share = min(1.0, state.step / state.total) if state.total else 0.0
    lines = [
        f'<span class="status {state.status}">{state.status}</span> &nbsp; <b>{escape(state.token)}</b> '
        f'<span class="soft">&nbsp; {count}</span>',
        f'<div class="bar"><div style="width: {100 * share:.1f}%"></div></div>',
    ]
    if state.status == "failed":
        lines.append(f'<div class="error">{escape(state.says)}</div>')
    elif state.says:
        lines.append(f'<div class="soft">{escape(state.says)}</div>')
    return "\n".join(lines)


def loss_html(folder: Path) -> str:
    """The curve of the loss."""
    means, smooth = curves.losses(records_of(folder))
    if not means:
        return '<p class="soft">The curve of the loss comes with the first steps.</p>'
    found = curves.draw({"loss": means, "its average over the last steps": smooth}, faint=["loss"])
    legend = "".join(f'<span><i style="background: {found.colours[each]}"></i>{each}</span>' for each in found.colours)
    return f'<div>{found.svg}</div><div class="legend soft">{legend}</div>'


def remarks(look: Look) -> str:
    """What is said of dropped pictures."""
    count = len(look.captions)
    lines = [f"{count} picture{'s' if count != 1 else ''}" + (": all can be learned from" if not look.remarks else "")]
    lines += [f"- {_plain(each)}" for each in look.remarks]
    if look.refused:
        lines.append(f"\n**{_plain(', '.join(look.refused))} cannot be learned from: remove it to go on.**")
    return "\n".join(lines)


def report(runs: Runs, name: Any) -> str:
    """The run's own page, in a frame that runs no scripts."""
    runs.folder(name)
    try:
        text = runs.file(name, REPORT_FILE).read_text(encoding="utf-8", errors="replace")
    except InputError:
        return '<p class="soft">There is none yet.</p>'
    return f'<iframe sandbox srcdoc="{escape(text)}" style="width: 100%; height: 80vh; border: 0"></iframe>'


def usage(uses: Sequence[Use], warnings: Sequence[str]) -> str:
    """What to do with a word in each program."""
    lines = ["`path/to` is where the run's folder is; a file that was downloaded has its own name."]
    lines += [f"- Note: {_plain(each)}" for each in warnings]
    for use in uses:
        lines += ["", f"#### {use.program}"]
        if use.place is not None:
            lines.append(f"Put the file into `{use.place}`, and write:")
        if use.code is not None:
            lines += ["```", use.code, "```"]
        else:
            lines += ["```", use.prompt, *([f"Negative prompt: {use.negative_prompt}"] if use.negative_prompt else [])]
            lines.append("```")
        if use.note is not None:
            lines.append(_plain(use.note))
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A text in Markdown that shows its own characters."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>#|$~" else letter for letter in text)


def theme() -> gr.themes.Base:
    """Fonts that are on the machine: others would be fetched from elsewhere."""
    return gr.themes.Default(
        primary_hue="blue", font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )  # fmt: skip
