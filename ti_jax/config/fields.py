"""What is known of a setting besides its name, type, default and doc: `setting` writes it beside the field."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

PathKind = Literal["input", "output", "model"]
"""What a path names: something to read, which in a YAML file may be relative to that file; something that a run writes,
relative to the working directory; a model, which may also be a hub id."""


@dataclass(frozen=True)
class Rule:
    """Which values are allowed.

    Attributes:
      allowed: in words, after "must be". holds: the test of a value of the field's type, never of None.
      good, bad: examples, at the bounds, which the tests try on every field that has the rule.
    """

    allowed: str
    holds: Callable[[Any], bool]
    good: tuple = ()
    bad: tuple = ()


@dataclass(frozen=True)
class Setting:
    """What `setting` says of a field.

    Attributes:
      rule: None: any value of the type.
      path: what kind of path it is, if it is one: ``~`` is expanded, and its bytes need not be UTF-8.
      fingerprint: the rows depend on the value itself, so a checkpoint is resumed only with the same one.
      of_this_process: other processes of the run have another value; not kept in the run's ``config.yaml``.
      secret: neither shown nor kept.
      switch: the words that ``--name`` without a value and ``--no_name`` stand for, where the flag may be given so.
      one: in YAML and Python one text may stand for a list of it, as before the field was a list.
      first: among the first in ``--help``.
    """

    rule: Rule | None = None
    path: PathKind | None = None
    fingerprint: bool = False
    of_this_process: bool = False
    secret: bool = False
    switch: tuple[str, str] | None = None
    one: bool = False
    first: bool = False


def setting(default: Any, rule: Rule | None = None, **about: Any) -> Any:
    """A dataclass field with its rule, and what else `Setting` has by keyword."""
    known = Setting(rule, **about)
    return dataclasses.field(default=default, repr=not known.secret, metadata={"setting": known})


def setting_of(field: dataclasses.Field) -> Setting:
    """What `setting` said of a field; a field with a bare default has nothing special."""
    return field.metadata.get("setting", Setting())


def settings_of(cls: Any) -> dict[str, Setting]:
    """`setting_of` every field of a dataclass or its instance, by name."""
    return {field.name: setting_of(field) for field in dataclasses.fields(cls)}
