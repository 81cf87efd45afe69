"""How many updates a dispatch has."""

from __future__ import annotations

import time

import jax

from ti_jax.training import multihost


class Pace:
    """Chooses the updates per dispatch, so that one takes about a second: a request to stop waits no longer.

    Results do not depend on how the updates are split into dispatches. Several processes use the slowest one's number.
    """

    SECONDS = 1.0

    def __init__(self, longest: int):
        self.steps, self._longest = 1, longest
        self._settled = False
        self._last_read = 0.0

    def measured(self, steps: int, dispatched: float) -> None:
        """Record that a chunk of ``steps`` is done; it began when it was ``dispatched``, or after the one before."""
        now = time.perf_counter()
        seconds = now - max(dispatched, self._last_read)
        self._last_read = now
        if self._settled:
            return
        wanted = min(max(1, int(steps * self.SECONDS / seconds)), 2 * self.steps, self._longest)
        agreed = int(multihost.smallest(wanted) or 1)
        # Agreeing costs the processes a round trip: stop once the number no longer grows.
        self._settled = jax.process_count() > 1 and (agreed <= self.steps or agreed == self._longest)
        self.steps = agreed
