"""Command-line flags for config dataclasses: tyro parses them and writes the help; errors are reported on one line.

tyro reports errors in a box of many lines, and has no public option to change that. So every flag accepts any text and
any number of values, which `_Flag.read` then checks, and tyro returns unknown flags instead of refusing them.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import itertools
import textwrap
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from ti_jax.config.defaults import config_path
from ti_jax.config.fields import setting_of
from ti_jax.config.rates import RATE
from ti_jax.config.row_norm import NORM
from ti_jax.config.yaml import NUMBER_OR_TEXT, expected, item_hints, load_yaml, nearest, strip_optional
from ti_jax.errors import InputError

Config = TypeVar("Config")

# Flags of diffusers' textual_inversion.py without a counterpart here, and why.
NO_COUNTERPART = {
    "allow_tf32": "bf16, the default on a GPU that has it, is faster than TF32; --mixed_precision no is float32",
    "dataloader_num_workers": "the few pictures are stored on the device, so there is no data loader",
    "enable_xformers_memory_efficient_attention": "XLA compiles the attention; --gradient_checkpointing saves memory",
    "local_rank": "JAX detects the devices by itself",
    "no_safe_serialization": "embeddings are always .safetensors, which every tool reads",
    "save_as_full_pipeline": "the base model does not change, load the embedding into it",
    "tokenizer_name": "the tokenizer is the model's own",
    "validation_epochs": "validation is scheduled in steps, with --validation_steps",
}

CONFIG_DOC = (
    "YAML file with any of the settings below, or sd15, sd21 or sdxl, which come with ti_jax; flags override it."
)


class _Refused(Exception):
    """Passes through tyro, which catches a ValueError (so also an `InputError`) and prints it in a box."""


@dataclass(frozen=True)
class _Flag:
    """One field of a config as a flag."""

    name: str
    hint: Any
    doc: str
    default: Any
    switch: tuple[str, str] | None = None
    """The values of ``--name`` without a value and of ``--no_name``, for a flag that allows these forms."""

    def annotation(self) -> Any:
        """The field's type for tyro."""
        base, _ = strip_optional(self.hint)
        # The doc of a field that can be None explains what None means.
        note = "" if self.default in (None, (), False) else f"(default: {self._text(self.default)})"
        about = tyro.conf.arg(help=self.doc, help_behavior_hint=note)
        if base is bool:
            return Annotated[bool, about]
        spec: PrimitiveConstructorSpec = PrimitiveConstructorSpec(
            nargs="*",
            metavar=self._metavar(base),
            instance_from_str=self.read,
            is_instance=lambda value: True,
            str_from_instance=lambda value: [self._text(value)],
        )
        return Annotated[self.hint, spec, about]

    def read(self, words: list[str]) -> Any:
        """Parse the ``words`` after the flag; "None" is None if the field can be None."""
        base, optional = strip_optional(self.hint)
        if optional and words == ["None"]:
            return None
        if typing.get_origin(base) is tuple:
            return self._read_several(base, words)
        if self.switch is not None and not words:
            return self.switch[0]
        if len(words) != 1:
            given = f"it has {len(words)}: {' '.join(words)} (quote text that has spaces)" if words else "it has none"
            raise _Refused(f"--{self.name} takes one value, {expected(base)}; {given}")
        try:
            return self._convert(base, words[0])
        except ValueError:
            raise _Refused(f"--{self.name} {words[0]}: must be {expected(base)}") from None

    def _read_several(self, base: Any, words: list[str]) -> tuple[Any, ...]:
        hints = item_hints(base, len(words))
        if hints is None:
            given = f"it has {len(words)}: {' '.join(words)}" if words else "it has none"
            raise _Refused(f"--{self.name} takes {expected(base)}; {given}")
        values = []
        for hint, word in zip(hints, words, strict=True):
            try:
                values.append(self._convert(hint, word))
            except ValueError:
                which = f"{word} " if len(words) > 1 else ""
                raise _Refused(f"--{self.name} {' '.join(words)}: {which}must be {expected(hint)}") from None
        return tuple(values)

    def _convert(self, base: Any, word: str) -> Any:
        if typing.get_origin(base) is Literal:
            if word not in typing.get_args(base):
                raise ValueError
            return word
        if base in NUMBER_OR_TEXT:
            with contextlib.suppress(ValueError):
                return float(word)
            return NUMBER_OR_TEXT[base](word)
        return base(word)

    @staticmethod
    def _metavar(base: Any) -> str:
        if typing.get_origin(base) is Literal:
            return "{" + ",".join(typing.get_args(base)) + "}"
        if typing.get_origin(base) is tuple:
            first, *others = typing.get_args(base)
            one = _Flag._metavar(first)
            return f"{one} [{one} ...]" if others == [...] else " ".join(map(_Flag._metavar, (first, *others)))
        return {str: "TEXT", int: "INT", float: "FLOAT", RATE: "FLOAT", NORM: "NAME|FLOAT"}[base]

    @staticmethod
    def _text(value: Any) -> str:
        return " ".join(map(repr, value)) if isinstance(value, tuple) else str(value)


def parse(
    cls: type[Config],
    args: Sequence[str],
    *,
    prog: str,
    examples: str,
    config_file: bool = True,
    no_counterpart: Mapping[str, str] | None = None,
) -> Config:
    """Parse flags, one per field, into a config of the class ``cls``; they override the YAML file of ``--config``.

    Flags may be written with underscores or hyphens. ``--help`` prints the fields in their order with their docs, then
    ``examples``.

    Args:
      config_file: whether there is a ``--config`` flag.
      no_counterpart: flags of other trainers that do not exist here, with the reason.

    Raises:
      InputError: an unknown flag, an invalid value, or a fault in the YAML file.
      SystemExit: with status 0, after ``--help``.
    """

    def run(from_file: dict[str, Any]) -> dict[str, Any]:
        hints, docs = typing.get_type_hints(cls), field_docs(cls)  # type: ignore[arg-type]  # a class is hashable
        flags = [_Flag("config", str | None, CONFIG_DOC, None)] if config_file else []
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        for field in sorted(fields, key=lambda field: not setting_of(field).first):
            default = from_file.get(field.name, field.default)
            flags.append(_Flag(field.name, hints[field.name], docs[field.name], default, setting_of(field).switch))
        return _run_tyro(flags, args, prog, cls.__doc__, examples, no_counterpart or {})

    values = run({})
    if values.get("config") is not None:
        values = run(load_yaml(config_path(values["config"]), cls))
    return cls(**{name: value for name, value in values.items() if name != "config"})


def _run_tyro(
    flags: Sequence[_Flag],
    args: Sequence[str],
    prog: str,
    description: str | None,
    examples: str,
    no_counterpart: Mapping[str, str],
) -> dict[str, Any]:
    """Values of all flags by name, including defaults."""
    fields = [(flag.name, flag.annotation(), dataclasses.field(default=flag.default)) for flag in flags]
    parsed: Any
    try:
        parsed, unknown = tyro.cli(
            dataclasses.make_dataclass("Flags", fields),
            args=_together(_without_no(args, flags), flags),
            prog=prog,
            description=description,
            use_underscores=True,
            return_unknown_args=True,
        )
    except _Refused as error:
        raise InputError(str(error)) from None
    except SystemExit as stop:
        if not stop.code:
            print(examples)
        raise
    if unknown:
        raise InputError(_unknown(unknown, {flag.name: flag for flag in flags}, prog, no_counterpart))
    return {flag.name: getattr(parsed, flag.name) for flag in flags}


def _without_no(args: Sequence[str], flags: Sequence[_Flag]) -> list[str]:
    """The command line with ``--no_name``, of a flag with a `switch`, replaced by ``--name=VALUE``."""
    offs = {f"no_{flag.name}": f"--{flag.name}={flag.switch[1]}" for flag in flags if flag.switch is not None}
    return [offs.get(word[2:].replace("-", "_"), word) if word.startswith("--") else word for word in args]


def _together(args: Sequence[str], flags: Sequence[_Flag]) -> list[str]:
    """The command line where a list's flag that is given several times stands once, with the values of all."""
    lists = {flag.name for flag in flags if typing.get_origin(strip_optional(flag.hint)[0]) is tuple}
    parts: list[tuple[str, list[str]]] = [("", [])]  # each flag's name, and its words
    for word in args:
        if word.startswith("--"):
            parts.append((word[2:].partition("=")[0].replace("-", "_"), [word]))
        else:
            parts[-1][1].append(word)
    times = Counter(name for name, _ in parts)
    lines: list[list[str]] = []
    first: dict[str, list[str]] = {}
    for name, (flag, *values) in ((name, words) for name, words in parts if words):
        if name not in lists or times[name] == 1:
            lines.append([flag, *values])
            continue
        if name not in first:
            first[name] = [f"--{name}"]
            lines.append(first[name])
        _, equals, value = flag.partition("=")
        first[name] += [value, *values] if equals else values
    return [word for line in lines for word in line]


def _unknown(words: Sequence[str], flags: Mapping[str, _Flag], prog: str, no_counterpart: Mapping[str, str]) -> str:
    """The error message for the first argument that belongs to no flag."""
    word = next((word for word in words if word.startswith("--") and word != "--"), words[0])
    if word.lower() in ("true", "false"):
        return f"{word!r} belongs to no flag; a switch has no value: --name is on, --no_name is off"
    if not word.startswith("-"):
        return f"{word!r} belongs to no flag; a flag is written --name value (quote text that has spaces)"
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    plain = name.removeprefix("no_")
    if plain in flags and (flags[plain].switch is not None or strip_optional(flags[plain].hint)[0] is bool):
        return f"{word}: --no_{plain} takes no value; write --{plain} or --no_{plain}"
    if plain in flags:
        return f"{word}: --{plain} has a value and no --no_ form; write --{plain} and its value, or leave it out"
    if name in no_counterpart:
        return f"--{name} has no counterpart here ({no_counterpart[name]}); leave it out"
    return f"unknown flag {word.partition('=')[0]}; " + nearest(name, flags, "did you mean --{}?", f"see {prog} --help")


@functools.cache
def field_docs(cls: type) -> Mapping[str, str]:
    """The docstring below each field of a dataclass, on one line, bases first; every field must have one."""
    docs: dict[str, str] = {}
    for base in cls.__bases__:
        if dataclasses.is_dataclass(base):
            docs |= field_docs(base)
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    for field, doc in itertools.pairwise(tree.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant), f"{field.target.id} has no doc"
            docs[field.target.id] = " ".join(str(doc.value.value).split())
    return docs
