"""A trace of some updates for XProf and TensorBoard (``--profile_steps``)."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import jax
from tqdm import tqdm


class Profiler:
    """Traces the updates after ``first`` up to ``last``: what the devices do, and the host around their dispatches.

    A resumed run traces those that are left. A fault of the profiler is a warning; the run does not need it.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        """Nothing is traced if ``steps`` (first, last) is None.

        Args:
          folder: of TensorBoard's logs; the trace is in its ``plugins/profile``.
        """
        self._first, self._last = steps or (0, 0)
        self._folder, self._running = folder, False

    def reached(self, step: int) -> None:
        """Stop before the last step's actions, which are not part of the updates: all dispatched work must be done."""
        if self._running and step >= self._last:
            self.close()

    def next_from(self, step: int) -> None:
        """Start before the first update is dispatched."""
        if self._running or not self._first <= step < self._last:
            return
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python functions would be most of the file, and slow the host
        with self._warning():
            jax.profiler.start_trace(str(self._folder), profiler_options=options)
            self._running = True

    def step(self, step: int) -> contextlib.AbstractContextManager:
        """The context to dispatch in: XProf shows a step for each. ``step`` is the number of updates before it."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def close(self) -> None:
        """Write the trace, also that of a run that was stopped within it."""
        if self._running:
            self._running = False
            with self._warning():
                jax.profiler.stop_trace()
                tqdm.write(f"the trace is in {self._folder}: tensorboard --logdir {self._folder}", file=sys.stderr)

    @contextlib.contextmanager
    def _warning(self):
        try:
            yield
        except (RuntimeError, OSError) as error:  # another trace is running, or the disk is full
            self._running, self._last = False, 0
            reason = " ".join(str(error).split())
            tqdm.write(f"warning: --profile_steps: nothing is traced: {reason}", file=sys.stderr)
