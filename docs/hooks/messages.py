"""Every message for the user in a package, read from its source: errors, warnings and notes.

A message is put together from literals, f-strings, constants, local names, what callers give and what other functions
return. Here all that is followed, without running anything, as far as it is text; what is only known in a run is a
`Slot` with a name.
"""

from __future__ import annotations

import ast
import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ERRORS = {"InputError", "OutOfStep", "_Refused"}
REMARKS = ("warning: ", "note: ")
MOST = 24  # ways in which one message can be put together
PARTS = 4  # and a part of it; with more the part is a slot
SHORT = 12  # letters; parts with fewer are a slot where there are several
DEPTH = 6  # names, callers and functions that are followed from one message


class Slot(str):
    """The name of what stands in a message when it is printed."""


Text = tuple[str, ...]
"""Literals and slots, in their order."""


@dataclass(frozen=True)
class Message:
    """One message: where it is raised or printed, what kind it is, and its parts."""

    module: str
    line: int
    kind: str
    text: Text

    @property
    def literal(self) -> str:
        """The message without its slots."""
        return "".join(part for part in self.text if not isinstance(part, Slot))


@dataclass(frozen=True)
class _Place:
    """Where an expression stands: its module, the functions around it, the innermost last, and what they are given."""

    module: str
    functions: tuple[ast.FunctionDef, ...] = ()
    given: tuple[tuple[str, tuple[Text, ...]], ...] = ()
    depth: int = 0
    through: frozenset[str] = frozenset()
    """Functions that were followed to come here."""

    def deeper(self) -> _Place:
        return replace(self, depth=self.depth + 1)

    def moved(self, module: str, *functions: ast.FunctionDef, via: str = "", **more: Any) -> _Place:
        return _Place(module, functions, depth=self.depth + 1, through=self.through | {via}, **more)


def messages(package: Path) -> list[Message]:
    """The messages of all modules below a package's folder, each once, in the order of the files."""
    return _Reader(package).messages()


class _Reader:
    def __init__(self, package: Path) -> None:
        self.trees = {
            path.relative_to(package).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
            for path in sorted(package.rglob("*.py"))
        }
        self.functions: dict[str, list[tuple[str, ast.FunctionDef]]] = defaultdict(list)
        self.constants: dict[str, list[tuple[str, ast.expr]]] = defaultdict(list)
        self.calls: dict[str, list[tuple[_Place, ast.Call]]] = defaultdict(list)
        self.nodes: list[tuple[_Place, ast.AST]] = []
        for module, tree in self.trees.items():
            self._index(_Place(module), tree)

    def _index(self, place: _Place, node: ast.AST) -> None:
        inner = place
        if isinstance(node, ast.FunctionDef):
            self.functions[node.name].append((place.module, node))
            inner = _Place(place.module, (*place.functions, node))
        elif isinstance(node, ast.Assign | ast.AnnAssign) and not place.functions and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    self.constants[target.id].append((place.module, node.value))
        elif isinstance(node, ast.Call):
            self.calls[_called(node)].append((place, node))
        self.nodes.append((place, node))
        for child in ast.iter_child_nodes(node):
            self._index(inner, child)

    def messages(self) -> list[Message]:
        found: dict[tuple[str, str, Text], Message] = {}
        seen: set[int] = set()
        for place, node in self.nodes:
            if isinstance(node, ast.Call) and _called(node) in ERRORS and node.args:
                source: ast.expr = node.args[0]
            elif isinstance(node, ast.expr) and id(node) not in seen and _starts(node).startswith(REMARKS):
                source = node
            else:
                continue
            seen.update(id(each) for each in ast.walk(source))
            for text in self._known(source, place)[:MOST]:
                kind = next((mark.strip(": ") for mark in REMARKS if text and text[0].startswith(mark)), "error")
                message = Message(place.module, source.lineno, kind, text)
                if _letters((message.literal.removeprefix(f"{kind}:"),)) >= 8:
                    found.setdefault((place.module, kind, text), message)
        return sorted(found.values(), key=lambda message: (message.module, message.line))

    def texts(self, node: ast.expr | None, place: _Place) -> list[Text]:
        """The texts that a part of a message can be; a slot where that is not known, or not worth telling apart."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [(node.value,) if node.value else ()]
        found = [text for text in dict.fromkeys(self._known(node, place)) if text]
        letters = [_letters(text) for text in found]
        if not found or len(found) > PARTS or max(letters) < (SHORT if len(found) > 1 else 1):
            return [(Slot(_label(node)),)]
        return found

    def _known(self, node: ast.expr | None, place: _Place) -> list[Text]:
        if place.depth > DEPTH:
            return []
        match node:
            case ast.Constant(value=str(value)):
                return [(value,)]
            case ast.JoinedStr() | ast.BinOp(op=ast.Add()):
                return self._joined(_parts(node), place)
            case ast.FormattedValue(value=value, conversion=conversion):
                quote = "'" if conversion == ord("r") else ""
                return [_merged((quote, *text, quote)) for text in self.texts(value, place)]
            case ast.IfExp(body=body, orelse=other):
                return self.texts(body, place) + self.texts(other, place)
            case ast.BoolOp(values=values):
                return [text for value in values for text in self.texts(value, place)]
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [text for item in items for text in self._known(item, place)]
            case ast.ListComp(elt=item) | ast.GeneratorExp(elt=item):
                return self._known(item, place)
            case ast.Subscript(value=ast.Name(id=name)) if name.isupper() or name.startswith("_"):
                return self._constant(name, place)
            case ast.Starred(value=value) | ast.NamedExpr(value=value):
                return self._known(value, place)
            case ast.Attribute(attr=name) if name.isupper():
                return self._constant(name, place)
            case ast.Name(id=name, lineno=line):
                return self._named(name, line, place)
            case ast.Call():
                return self._call(node, place)
        return []

    def _joined(self, parts: Sequence[ast.expr], place: _Place) -> list[Text]:
        names = [ast.unparse(part) for part in parts]  # the same name twice is the same text
        options = {name: self.texts(part, place) for name, part in zip(names, parts, strict=True)}
        ways = (dict(zip(options, way, strict=True)) for way in itertools.product(*options.values()))
        return [_merged(itertools.chain(*(way[name] for name in names))) for way in itertools.islice(ways, MOST)]

    def _constant(self, name: str, place: _Place) -> list[Text]:
        there = self.constants.get(name, [])
        there = [each for each in there if each[0] == place.module] or there
        if len(there) != 1:
            return []
        module, value = there[0]
        if isinstance(value, ast.Dict):
            return [(each.value,) for each in value.values if isinstance(each, ast.Constant) and _is_text(each.value)]
        return self._known(value, place.moved(module)) if isinstance(value, _LITERAL) else []

    def _named(self, name: str, line: int, place: _Place) -> list[Text]:
        if name in dict(place.given):
            return list(dict(place.given)[name])
        for function in reversed(place.functions):
            if values := _assigned(function, name, line):
                return [text for value in values for text in self._known(value, place.deeper())]
            arguments = _arguments(function)
            if name in arguments:
                return self._from_callers(function, name, place)
        return self._constant(name, place) if name.isupper() or name.lstrip("_").isupper() else []

    def _from_callers(self, function: ast.FunctionDef, name: str, place: _Place) -> list[Text]:
        """What the callers of a function give for an argument."""
        if len(self.functions[function.name]) != 1 or function.name in place.through:
            return []
        found: list[Text] = []
        for there, call in self.calls[function.name]:
            if (value := _argument(function, call, name)) is not None:
                found += self._known(value, place.moved(there.module, *there.functions, via=function.name))
        return found

    def _call(self, node: ast.Call, place: _Place) -> list[Text]:
        name = _called(node)
        if isinstance(node.func, ast.Attribute) and name == "join" and node.args:
            return [text for text in self._known(node.args[0], place) if _letters(text) >= SHORT]
        if isinstance(node.func, ast.Attribute) and name in ("format", "removesuffix", "rstrip", "lower"):
            slots = iter([_label(argument) for argument in [*node.args, *(each.value for each in node.keywords)]])
            return [
                _merged(_split(text, slots) if name == "format" else text)
                for text in self._known(node.func.value, place)
            ]
        there = self.functions.get(name, [])
        if len(there) != 1 or name in place.through:
            return []
        module, function = there[0]
        given = []
        for argument in _arguments(function):
            if (value := _argument(function, node, argument)) is not None:
                given.append((argument, tuple(self.texts(value, place.deeper()))))
        inner = place.moved(module, function, via=name, given=tuple(given))
        returned = [
            each.value for each in ast.walk(function) if isinstance(each, ast.Return | ast.Yield) and each.value
        ]
        return [text for value in returned for text in self._known(value, inner)]


_LITERAL = ast.Constant | ast.JoinedStr | ast.BinOp


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and " " in value


def _letters(text: Text) -> int:
    return sum(letter.isalpha() for part in text if not isinstance(part, Slot) for letter in part)


def _called(node: ast.Call) -> str:
    match node.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _parts(node: ast.expr) -> list[ast.expr]:
    """What an f-string or a sum of texts is joined from."""
    match node:
        case ast.JoinedStr(values=values):
            return values
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _parts(left) + _parts(right)
    return [node]


def _starts(node: ast.expr) -> str:
    """The literal that a text begins with."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=[first, *_]) | ast.BinOp(left=first):
            return _starts(first)
    return ""


def _arguments(function: ast.FunctionDef) -> list[str]:
    kinds = function.args
    return [argument.arg for argument in (*kinds.posonlyargs, *kinds.args, *kinds.kwonlyargs)]


def _argument(function: ast.FunctionDef, call: ast.Call, name: str) -> ast.expr | None:
    """The expression that a call gives for an argument, or the argument's default."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    if isinstance(call.func, ast.Attribute) and names[:1] in (["self"], ["cls"]):
        names = names[1:]
    if name in names and names.index(name) < len(call.args):
        return call.args[names.index(name)]
    defaults = dict(zip(reversed(names), reversed(function.args.defaults), strict=False))
    return defaults.get(name)


@functools.cache
def _assigned(function: ast.FunctionDef, name: str, line: int) -> Sequence[ast.expr]:
    """What a local name that is read in a line is set to, or gets appended."""
    return list(_assignments(function, name, line))


def _assignments(function: ast.FunctionDef, name: str, line: int) -> Iterator[ast.expr]:
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                yield value
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=value):
                for index, each in enumerate(targets):
                    if isinstance(each, ast.Name) and each.id == name:
                        options = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
                        yield from (way.elts[index] for way in options if isinstance(way, ast.Tuple))
            case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value) if target == name:
                yield value
            case ast.NamedExpr(target=ast.Name(id=target), value=value) if target == name:
                yield value
            case ast.For(target=ast.Name(id=target), iter=value) if target == name and _within(node, line):
                yield value
            case ast.Call(func=ast.Attribute(value=ast.Name(id=target), attr="append"), args=[value]) if target == name:
                yield value


def _within(node: ast.stmt, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)


def _split(text: Text, slots: Iterator[str]) -> Iterator[str]:
    """A text for ``format``, with slots in the place of its braces."""
    for part in text:
        if isinstance(part, Slot):
            yield part
            continue
        for piece in re.split(r"(\{\w*\})", part):
            name = piece[1:-1] if re.fullmatch(r"\{\w*\}", piece) else None
            yield piece if name is None else Slot(name or next(slots, "value"))


def _merged(parts: Iterable[str]) -> Text:
    merged: list[str] = []
    for part in parts:
        if merged and not isinstance(part, Slot) and not isinstance(merged[-1], Slot):
            merged[-1] += part
        elif part:
            merged.append(part)
    return tuple(merged)


def _label(node: ast.expr | None) -> str:
    """A name for what is only known in a run."""
    match node:
        case ast.Name(id=name):
            return name.strip("_").lower()
        case ast.Attribute(value=ast.Name(), attr="strerror"):
            return "reason"
        case ast.Attribute(attr=name):
            return name.strip("_").lower()
        case ast.Call(func=ast.Name(id="len")):
            return "number"
        case ast.Call(func=ast.Name(id="getattr")):
            return "value"
        case ast.Call(func=ast.Name(id="one_line" | "str"), args=[ast.Name(id="error")]):
            return "reason"
        case ast.Call(func=ast.Attribute(value=inner, attr="strip" | "rstrip" | "removesuffix" | "partition")):
            return _label(inner)
        case ast.Call(func=ast.Attribute(attr="join" | "get"), args=[inner, *_]):
            return _label(inner)
        case ast.Call(func=ast.Name(id="listed" | "list" | "str" | "map" | "sorted" | "tuple"), args=[*_, inner]):
            return _label(inner)
        case ast.Call():
            return _called(node).strip("_").lower() or "value"
        case ast.Subscript(value=value) | ast.Starred(value=value) | ast.FormattedValue(value=value):
            return _label(value)
        case ast.ListComp(elt=value) | ast.GeneratorExp(elt=value):
            return _label(value)
        case ast.BinOp(left=left, right=right):
            return "number" if isinstance(right, ast.Constant) else _label(left)
        case ast.List(elts=[first, *_]) | ast.Tuple(elts=[first, *_]):
            return _label(first)
    return "value"
