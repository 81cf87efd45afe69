"""What the site's pages have from elsewhere: a hook of MkDocs, see mkdocs.yml.

A line of a page that is one of these comments is replaced:

    <!-- messages -->          every error, warning and note of the package, by subject
    <!-- settings train -->    the settings of a command, from the fields of its config
    <!-- include FILE.md -->   a page of the repository that lies outside of docs/
"""

from __future__ import annotations

import dataclasses
import html
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

from messages import Message, Slot, messages

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ti_jax"

# Subjects, and the files of the package whose messages belong to them; a file is put to the first that it matches.
SUBJECTS = {
    "Flags and config files": ("config/", "cli/flags", "cli/main"),
    "Pictures and masks": (
        "data/picture", "data/reading", "data/folder", "data/masks", "data/size", "data/buckets", "data/dataset",
        "data/survey",
    ),
    "Captions, templates and prompts": ("data/", "text/", "words"),
    "Several processes": ("training/multihost", "training/launchers"),
    "Memory, devices and plans": ("training/gpus", "training/plan", "training/compile", "training/cpu", "machine"),
    "Run folders and checkpoints": ("training/run_folder", "training/checkpoint", "files", "interrupts"),
    "Training": ("training/", "diffusion/losses"),
    "Models: folders, the hub, single files": ("weights/", "models/", "pipeline/model", "diffusion/"),
    "Embedding files": ("embeddings/", "cli/embedding", "cli/verify"),
    "Scores": ("evaluation/",),
    "The page of ti-jax ui": ("ui/",),
    "Drawing and the rest": ("",),
}  # fmt: skip


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the comments of a page."""
    comment = re.compile(rf"^<!-- ({'|'.join(_MAKERS)})(?: (\S+))? -->$", re.MULTILINE)
    return comment.sub(lambda found: _MAKERS[found[1]](found[2]), markdown)


def _messages(_: str) -> str:
    found = messages(PACKAGE)
    groups: dict[str, list[Message]] = {subject: [] for subject in SUBJECTS}
    for message in found:
        groups[_subject(message.module)].append(message)
    return "\n\n".join(f"### {subject}\n\n" + "\n".join(_entries(group)) for subject, group in groups.items() if group)


def _subject(module: str) -> str:
    return next(subject for subject, starts in SUBJECTS.items() if module.startswith(starts))


def _entries(group: list[Message]) -> Iterator[str]:
    """Lines of a list: the message, its remedy on a line of its own."""
    for message in group:
        marked = (f"\x01{part.replace('_', ' ')}\x02" if isinstance(part, Slot) else part for part in message.text)
        text = " ".join("".join(marked).split())
        what, _, remedy = text.rpartition("; ")
        if re.fullmatch(r"\x01[^\x02]*\x02", remedy):  # it depends
            what, remedy = text, ""
        lines = [_plain(line).replace("\x01", "<i>").replace("\x02", "</i>") for line in (what, remedy) if line]
        yield "- " + "<br>→ ".join(f"<code>{line}</code>" for line in lines)


def _plain(text: str) -> str:
    """A text as HTML that Markdown reads as nothing else."""
    text = html.escape(text, quote=False)
    return re.sub(r"([\\`*_{}\[\]#|~])", lambda found: f"&#{ord(found[1])};", text)


def _settings(command: str) -> str:
    """The settings of a command as a list, with the headings that the comments of its config have."""
    from ti_jax.cli.flags import field_docs
    from ti_jax.config.fields import setting_of
    from ti_jax.config.yaml import expected, strip_optional

    cls, without = _configs()[command]
    docs, headings, hints = field_docs(cls), _headings(cls), typing.get_type_hints(cls)
    lines = []
    for field in dataclasses.fields(cls):
        if field.name in without:
            continue
        if field.name in headings:
            heading, _, about = headings[field.name].partition(": ")
            lines += [f"### {heading}\n", *([f"{about[0].upper()}{about[1:]}.\n"] if about else [])]
        rule, hint = setting_of(field).rule, strip_optional(hints[field.name])[0]
        notes = [] if field.default in (None, (), False) else [f"default: {_shown(field.default)}"]
        notes += [rule.allowed] if rule is not None and not rule.allowed.startswith("text") else []
        notes += [expected(hint)] if typing.get_origin(hint) is Literal else []
        note = f" ({_plain('; '.join(notes))})" if notes else ""
        parts = docs[field.name].split("`")  # every other one is code
        doc = "`".join(part if number % 2 else _plain(part) for number, part in enumerate(parts))
        lines.append(f"`--{field.name}`{note}\n:   {doc}\n")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@cache
def _configs() -> dict[str, tuple[type, set[str]]]:
    """The config of each command, and the settings that are explained elsewhere."""
    from ti_jax.cli import embedding, main
    from ti_jax.config import DataConfig, EvaluateConfig, InferConfig, PlanConfig, TrainConfig

    def names(cls: Any) -> set[str]:
        return {field.name for field in dataclasses.fields(cls)}

    configs: dict[str, tuple[type, set[str]]] = {
        "train": (TrainConfig, set()),
        "infer": (InferConfig, set()),
        "evaluate": (EvaluateConfig, set()),
        "plan": (PlanConfig, names(TrainConfig)),
        "data": (DataConfig, names(TrainConfig)),
        "verify": (main.VerifyConfig, set()),
        "doctor": (main.DoctorConfig, set()),
        "ui": (main.UiConfig, set()),
    }
    return configs | {name: (cls, set()) for name, (_, cls, *_) in embedding.COMMANDS.items()}


def _headings(cls: type) -> dict[str, str]:
    """Comments like ``# -- shapes`` in a config, by the field that follows."""
    found, last = {}, None
    for base in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(base).splitlines() if dataclasses.is_dataclass(base) else ():
            if heading := re.match(r"    # -- (.*)", line):
                last = heading[1]
            elif last and (field := re.match(r"    (\w+): ", line)):
                found[field[1]], last = last[0].upper() + last[1:], None
    return found


def _include(name: str) -> str:
    """A page of the repository; its links into docs/ are made relative, its first heading is the page's own."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/", "](", re.sub(r"\A# .*\n", "", text))


_MAKERS: dict[str, Callable[[str], str]] = {"messages": _messages, "settings": _settings, "include": _include}
