"""The norm that trained rows are held at."""

from __future__ import annotations


class RowNorm(str):
    """``free``, ``initial`` or ``vocabulary``.

    Raises:
      ValueError: other text.
    """

    NAMES = ("free", "initial", "vocabulary")
    EXPECTED = "free, initial, vocabulary or a number"

    def __new__(cls, text: str) -> RowNorm:
        """Check the text."""
        if text not in cls.NAMES:
            raise ValueError(text)
        return super().__new__(cls, text)


NORM = float | RowNorm
"""The type of a field that is a norm, or says which one."""
