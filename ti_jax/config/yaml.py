"""Strict YAML for configs: every key known, every value of its field's type, every fault one line with its place.

Scalars are read as YAML 1.2 reads them, which is what people expect them to be: ``5e-4`` is a number, and ``no``,
``on``, ``1:30`` and ``2024-01-01`` are text. PyYAML itself keeps to YAML 1.1, where the first is text and the others
are not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml

from ti_jax.config.fields import setting_of
from ti_jax.config.rates import RATE, Rates
from ti_jax.config.row_norm import NORM, RowNorm
from ti_jax.errors import InputError
from ti_jax.remote import local_copy

_CORE_SCALARS = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
)


# Types of fields that are a number or text, with the class of the text.
NUMBER_OR_TEXT: dict[Any, type[Rates] | type[RowNorm]] = {RATE: Rates, NORM: RowNorm}


class _Loader(yaml.SafeLoader):
    """Safe, with the scalars of YAML 1.2, and a key may stand only once in a mapping."""

    yaml_implicit_resolvers: dict[str, list] = {}  # noqa: RUF012  PyYAML's own name and type

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """As the base class, but a repeated key is an error and not the last one's silent victory."""
        seen: dict[Any, yaml.Node] = {}
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                first = seen[key].start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    problem=f"{key!r} is given twice, first on line {first}", problem_mark=key_node.start_mark
                )
            seen[key] = key_node
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or `_Loader` would take for something else."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Lists are indented under their key."""
        super().increase_indent(flow, False)


for _tag, _pattern, _first in _CORE_SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def load_yaml(path: str | Path, cls: type) -> dict[str, Any]:
    """Read settings for the dataclass ``cls`` from a YAML file.

    Relative paths of input files (a field's `setting` has ``path="input"``) are looked for beside the file, links
    followed, and then in the working directory; those found beside it come back absolute.

    Returns:
      The settings that the file gives, by field name, with their fields' types. An empty file gives none.

    Raises:
      InputError: the file cannot be read or is not YAML, a key is unknown or doubled, or a value has the wrong type.
    """
    settings = _parse(Path(path))
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise InputError(f"{path}: expected lines of  key: value , found {_shown(settings)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    return _typed(settings, Path(path), str(path), cls, fields, "keys are the flags of --help without their hyphens")


def load_yaml_list(path: str | Path, cls: type, keys: Iterable[str], what: str) -> list[dict[str, Any]]:
    """Read a list of settings, each with some of the ``keys`` of the dataclass ``cls``; see `load_yaml`.

    Args:
      what: an entry of the list, in messages.

    Raises:
      InputError: as `load_yaml`, or it is no such list.
    """
    entries = _parse(Path(path))
    first = next(iter(keys))
    if not isinstance(entries, list) or not entries:
        found = "nothing in it" if not entries else f"found {_shown(entries)}"
        raise InputError(f"{path}: expected a list with an entry  - {first}: ...  for each {what}; {found}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name in keys}
    read = []
    for number, entry in enumerate(entries, start=1):
        where = f"{path}, {what} {number}"
        if not isinstance(entry, dict):
            raise InputError(f"{where}: expected lines of  key: value , found {_shown(entry)}")
        read.append(_typed(entry, Path(path), where, cls, fields, f"known are {', '.join(keys)}"))
    return read


def _typed(
    settings: dict[Any, Any], path: Path, where: str, cls: type, fields: dict[str, dataclasses.Field], otherwise: str
) -> dict[str, Any]:
    """Settings of a file with the types of their fields; ``otherwise`` helps where no known key is near."""
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in fields:
            raise InputError(
                f"{where}: unknown key {key!r}; {nearest(str(key), fields, 'did you mean {}?', otherwise)}"
            )
        try:
            values[key] = from_yaml(switched(value, fields[key]), hints[key])
        except ValueError as error:
            raise InputError(f"{where}: {key}: {_shown(value)} is not {error}") from error
        if setting_of(fields[key]).path == "input":
            values[key] = _beside(values[key], path, key)
    return values


def dump_yaml(config: Any) -> str:
    """A config dataclass as YAML that `load_yaml` reads back to the same values.

    Secrets are left out, and what another process of the same run has otherwise.

    Fields that are None are left out too: None is the default of every field that can be None.
    """
    values = {}
    for field in dataclasses.fields(config):
        value, about = getattr(config, field.name), setting_of(field)
        if value is not None and not (about.secret or about.of_this_process):
            plain = str(value) if isinstance(value, str) else value
            values[field.name] = list(value) if isinstance(value, tuple) else plain
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def from_yaml(value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint`` (a dataclass field's), or ValueError with a description of what is expected."""
    base, optional = strip_optional(hint)
    if value is None and optional:
        return None
    if typing.get_origin(base) is Literal:
        if isinstance(value, str) and value in typing.get_args(base):
            return value
    elif typing.get_origin(base) is tuple:
        hints = item_hints(base, len(value)) if isinstance(value, (list, tuple)) else None
        if hints is not None:
            with contextlib.suppress(ValueError):
                return tuple(from_yaml(item, hint) for item, hint in zip(value, hints, strict=True))
    elif base in NUMBER_OR_TEXT:
        with contextlib.suppress(ValueError):
            return NUMBER_OR_TEXT[base](value) if isinstance(value, str) else from_yaml(value, float)
    elif base is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, base) and (base is bool or not isinstance(value, bool)):
        return value
    quotes = "; put quotes around it" if base is str and isinstance(value, (int, float)) else ""
    raise ValueError(expected(base) + quotes)


def switched(value: Any, field: dataclasses.Field) -> Any:
    """``value``, or what it stands for: the word of a field's `switch` for True or False, a list for its `one` text."""
    about = setting_of(field)
    if about.one and isinstance(value, str):
        return (value,)
    return about.switch[0 if value else 1] if isinstance(value, bool) and about.switch is not None else value


def strip_optional(hint: Any) -> tuple[Any, bool]:
    """``X | None`` -> (X, True); any other type -> (itself, False)."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        for union in NUMBER_OR_TEXT:
            if hint in (union, union | None):
                return union, hint != union
        rest = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
        assert len(rest) == 1, f"a field's type is one type or None, not {hint}"
        return rest[0], True
    return hint, False


def item_hints(base: Any, count: int) -> list[Any] | None:
    """The types of ``count`` items of a tuple type ``base``; None if it has another number of items."""
    hints = typing.get_args(base)
    if hints[-1] is Ellipsis:
        return [hints[0]] * count
    return list(hints) if len(hints) == count else None


def expected(base: Any) -> str:
    """What a value of a field's type looks like, in words."""
    if typing.get_origin(base) is Literal:
        *others, last = typing.get_args(base)
        return f"one of {', '.join(others)} or {last}" if len(others) > 1 else f"{others[0]} or {last}"
    if typing.get_origin(base) is tuple:
        first, *others = typing.get_args(base)
        if first is str:
            return "a list of texts, like [one, two]"
        count = "a list" if others == [...] else f"{1 + len(others)} values"
        return f"{count}, each {expected(first)}"
    return {
        str: "text", int: "a whole number", float: "a number", bool: "true or false",
        **{union: text.EXPECTED for union, text in NUMBER_OR_TEXT.items()},
    }[base]  # fmt: skip


def nearest(word: str, known: Iterable[str], question: str, otherwise: str) -> str:
    """``question`` with the known word nearest to ``word`` in it, or ``otherwise`` when none is near."""
    near = difflib.get_close_matches(word.replace("-", "_").lower(), list(known), n=1, cutoff=0.6)
    return question.format(near[0]) if near else otherwise


def _parse(path: Path) -> Any:
    try:
        text = local_copy(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file in UTF-8 (byte {error.start}); save it as one") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read the config ({error.strerror}); check the path") from error
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise InputError(
            f"{path}, line {number}: a character that YAML does not allow (#x{error.character:04x})"
        ) from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply; a config is a flat list of  key: value") from error


def _beside(value: Any, yaml_file: Path, key: str) -> Any:
    """The path or paths of an input file, absolute where they lie beside the YAML file."""
    if isinstance(value, tuple):
        return tuple(_beside(item, yaml_file, key) for item in value)
    if not value or Path(value).is_absolute():
        return value
    beside = yaml_file.resolve().parent / value
    if not os.path.exists(beside):  # not Path.exists, which raises on a name that is too long
        return value
    if os.path.exists(value) and not os.path.samefile(value, beside):
        raise InputError(
            f"{yaml_file}: {key}: {value!r} is there both beside the file ({beside}) and in the working directory "
            f"({Path(value).absolute()}); write the whole path"
        )
    return str(beside)


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
