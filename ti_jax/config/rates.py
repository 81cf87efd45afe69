"""Learning rates that change at given updates, as AUTOMATIC1111 writes them."""

from __future__ import annotations

import math


class Rates(str):
    """Text like ``5e-3:200, 1e-3:1000, 2e-4``: each rate with the update at which it ends, the last one without.

    Attributes:
      steps: (rate, update from which on the next one counts); None for the last, which goes on to the end of the run.

    Raises:
      ValueError: other text.
    """

    EXPECTED = (
        "a number, or rates with the updates where they end, in ascending order and the last without, like "
        "5e-3:200, 1e-3:1000, 2e-4"
    )

    steps: tuple[tuple[float, int | None], ...]

    def __new__(cls, text: str) -> Rates:
        """Parse the text."""
        *changing, (last, end) = [part.strip().partition(":")[::2] for part in text.split(",")]
        rates, ends = [float(rate) for rate, _ in (*changing, (last, end))], [int(until) for _, until in changing]
        rising = all(0 < before < after for before, after in zip([0.5, *ends], ends, strict=False))
        if end or not ends or not rising or not all(0 < rate < math.inf for rate in rates):
            raise ValueError(text)
        self = super().__new__(cls, text)
        self.steps = tuple(zip(rates, [*ends, None], strict=True))
        return self


RATE = float | Rates
"""The type of a field that is a learning rate."""
