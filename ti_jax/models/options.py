"""Read a component's ``config.json`` into a dataclass whose fields are the implemented options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, Self

from ti_jax.errors import InputError

SILU = ("silu", "swish")  # two names of one function

# Entries in every diffusers config that do not change what a network computes.
DIFFUSERS_METADATA = frozenset(
    {"_class_name", "_diffusers_version", "_name_or_path", "_use_default_values", "_commit_hash"}
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Base class of configurations: fields are named as in ``config.json``, lists become tuples.

    Attributes:
      FILE: name of the file in errors.
      METADATA: options that do not change what the network computes.
      NEUTRAL: for options that are not implemented, values with no effect. None and False have no effect for any of
        them.
    """

    FILE: ClassVar[str]
    METADATA: ClassVar[frozenset[str]]
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @classmethod
    def read(cls, config: Mapping[str, Any], **others: Any) -> Self:
        """From the contents of a ``config.json``; ``others`` are fields that are not read from it.

        Raises:
          InputError: an option or value that is not implemented, or inconsistent sizes; names option and value.
        """
        options = {field.name for field in dataclasses.fields(cls)} - set(others)
        for option, value in config.items():
            off = value is None or value is False or value in cls.NEUTRAL.get(option, ())
            if option not in options and option not in cls.METADATA and not off:
                raise InputError(f"{cls.FILE}: option {option} = {value!r} is not implemented")
        parsed = cls(**{name: _as_tuple(value) for name, value in config.items() if name in options}, **others)
        parsed.check()
        return parsed

    def check(self) -> None:
        """Raise InputError unless all values are implemented and consistent."""
        raise NotImplementedError

    def refuse(self, option: str, expected: str) -> NoReturn:
        """Raise an InputError that names an option, its value and what was expected."""
        raise InputError(f"{self.FILE}: {option} is {getattr(self, option)!r}; {expected}")

    def require_positive(self, *options: str) -> None:
        """Refuse an option that is not a positive integer."""
        for option in options:
            if not is_positive(getattr(self, option)):
                self.refuse(option, "expected a positive integer")

    def require_switches(self, *options: str) -> None:
        """Refuse an option that is neither true nor false."""
        for option in options:
            if not isinstance(getattr(self, option), bool):
                self.refuse(option, "expected true or false")


def is_positive(value: Any, least: int = 1) -> bool:
    """Whether a value is an integer of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list | tuple) else value
