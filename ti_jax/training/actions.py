"""What a run does every so many steps. A new periodic feature is a class here, and its line in `make_actions`."""

from __future__ import annotations

import abc
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from tqdm import tqdm

from ti_jax.errors import InputError
from ti_jax.training import run_folder, validation
from ti_jax.training.job import Job
from ti_jax.training.report import Reporter
from ti_jax.training.rows import row_figures
from ti_jax.training.step import TrainState

# What goes wrong where pictures are drawn or measured: a NaN, no memory on the device, a full disk.
DRAWING_FAULTS = (InputError, jax.errors.JaxRuntimeError, MemoryError)


class Action(abc.ABC):
    """Something that a run does now and then, in the process that writes; see `make_actions`.

    Attributes:
      every: steps between two calls. None: wherever the run stops for another action.
    """

    def __init__(self, job: Job, every: int | None):
        self.job, self.every = job, every

    @abc.abstractmethod
    def __call__(self, step: int, state: TrainState, reporter: Reporter) -> None:
        """Do it for the state after ``step`` updates.

        Raises:
          InputError: the run cannot go on. What may fail without harm to the learned rows only warns.
        """

    def done(self, step: int) -> bool:
        """Whether ``step`` needs no call any more, asked when a run resumes there: it may have been stopped in one."""
        return True


def make_actions(job: Job) -> Sequence[Action]:
    """The run's actions in the order in which they are called at a step.

    The same on every process, so that all stop at the same steps. The checkpoint comes last: a run that is killed
    within an action resumes from a step before it, and does all of that step's actions.
    """
    config = job.config
    actions: list[Action] = [LogRows(job), SaveEmbedding(job)]
    if config.validation_prompt is not None:
        actions.append(Validate(job))
    if config.keep_best is not None:
        actions.append(Measure(job))
    return [*actions, SaveCheckpoint(job)]


class Timetable:
    """The steps at which the host is needed: at every action's interval, and for what ``longest`` updates give to log.

    The actions and the config alone decide, and so it is the same on every process.
    """

    def __init__(self, actions: Sequence[Action], longest: int, total: int):
        self._actions, self._longest, self._total = actions, longest, total

    def next(self, step: int) -> int:
        """The first such step after ``step``; the last is the end of the run."""
        intervals = [self._longest, *(action.every for action in self._actions if action.every is not None)]
        return min(self._total, *((step // every + 1) * every for every in intervals))

    def due(self, step: int) -> list[Action]:
        """The actions to call at ``step``, in order; none where only losses are to be logged."""
        if not any(action.every is not None and step % action.every == 0 for action in self._actions):
            return []
        return [action for action in self._actions if action.every is None or step % action.every == 0]


class LogRows(Action):
    """Logs how far the rows have moved."""

    def __init__(self, job: Job):
        super().__init__(job, every=None)

    def __call__(self, step: int, state: TrainState, reporter: Reporter) -> None:
        """See `Action`."""
        for row in row_figures(self.job.concept, state.rows, self.job.usual_norms):
            name = f"{row['encoder']}/row_{row['row']}"
            reporter.rows(step, {f"{name}/{key}": row[key] for key in ("distance", "cosine", "norm")})


class SaveEmbedding(Action):
    """Saves a copy of the word under its step."""

    def __init__(self, job: Job):
        super().__init__(job, every=job.config.save_steps)

    def __call__(self, step: int, state: TrainState, reporter: Reporter) -> None:
        """See `Action`."""
        run_folder.save_embedding(self.job.concept.embedding(state.rows, step), self.job.folder, step)

    def done(self, step: int) -> bool:
        """See `Action`."""
        return (self.job.folder / run_folder.copy_name(step)).exists()


class Validate(Action):
    """Draws the validation prompt."""

    def __init__(self, job: Job):
        super().__init__(job, every=job.config.validation_steps)

    def __call__(self, step: int, state: TrainState, reporter: Reporter) -> None:
        """See `Action`; a picture that cannot be drawn is a warning."""
        job = self.job
        embedding = job.concept.embedding(state.rows, step)
        with job.clock.phase("pictures"):
            image = or_warn(
                "the validation picture",
                lambda: validation.save_validation(job.config, job.sd, job.concept, embedding, job.folder, step),
            )
        if image is not None:
            reporter.picture("validation", image, step)

    def done(self, step: int) -> bool:
        """See `Action`."""
        return validation.validation_path(self.job.folder, step).exists()


class Measure(Action):
    """Measures the word, and keeps it if it is the best so far."""

    def __init__(self, job: Job):
        super().__init__(job, every=job.config.evaluation_steps)

    def __call__(self, step: int, state: TrainState, reporter: Reporter) -> None:
        """See `Action`; what cannot be measured is a warning."""
        job = self.job
        assert job.tracker is not None, "the first process has it"
        measure, embedding = job.tracker.measure, job.concept.embedding(state.rows, step)
        with job.clock.phase("measure"):
            scores = or_warn(f"the word of step {step}", lambda: measure(job.sd, embedding, step), "measured")
        if scores is not None:
            reporter.print_line(f"step {step}: {scores}")

    def done(self, step: int) -> bool:
        """See `Action`."""
        tracker = self.job.tracker
        return tracker is not None and tracker.last is not None and tracker.last[0] == step


class SaveCheckpoint(Action):
    """Saves the state to resume from, and the word as it is: on a disk that is nearly full the word counts."""

    def __init__(self, job: Job):
        super().__init__(job, every=job.config.checkpointing_steps)

    def __call__(self, step: int, state: TrainState, reporter: Reporter) -> None:
        """See `Action`."""
        assert self.job.checkpoints is not None, "the first process has them"
        run_folder.save_embedding(self.job.concept.embedding(state.rows, step), self.job.folder)
        self.job.checkpoints.save(state)


def or_warn(what: str, make: Callable[[], Any], done: str = "drawn") -> Any:
    """What ``make`` returns; where it fails a warning and None: a picture is no reason to lose what was learned."""
    try:
        return make()
    except DRAWING_FAULTS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        tqdm.write(f"warning: {what} could not be {done}: {reason}", file=sys.stderr)
        return None
