"""Periodic actions of a run. A new one is a class here and a line in `make_actions`."""

from __future__ import annotations

import abc
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from ti_jax.training import run_folder, validation
from ti_jax.training.job import Job
from ti_jax.training.progress import ProgressSheet
from ti_jax.training.report import Reporter
from ti_jax.training.rows import row_figures
from ti_jax.training.run_page import page_of
from ti_jax.training.step import TrainState
from ti_jax.training.validation import DRAWING_FAULTS


class Action(abc.ABC):
    """A periodic action, run on the leader process; see `make_actions`.

    Attributes:
      every: steps between two calls. None: whenever the run stops for another action.
    """

    def __init__(self, job: Job, every: int | None):
        self.job, self.every = job, every

    @abc.abstractmethod
    def __call__(self, step: int, state: TrainState, reporter: Reporter) -> None:
        """Run the action for the state after ``step`` updates.

        Raises:
          InputError: the run cannot go on. Failures that do not affect the learned rows only warn.
        """

    def done(self, step: int) -> bool:
        """Whether the action has run at ``step``; asked on resuming there, as the run may have stopped within it."""
        return True


def make_actions(job: Job) -> Sequence[Action]:
    """The run's actions, in the order in which they are called at a step.

    They are the same on every process, so that all stop at the same steps. The checkpoint comes last: a run killed
    within an action resumes from an earlier step, and repeats all actions of this one.
    """
    config = job.config
    actions: list[Action] = [LogRows(job), SaveEmbedding(job)]
    if config.validation_prompt is not None:
        actions.append(Validate(job))
    if config.keep_best is not None:
        actions.append(Measure(job))
    return [*actions, ShowReport(job), SaveCheckpoint(job)]


class Timetable:
    """The steps at which the host is needed: at every action's interval, and every ``longest`` updates to log losses.

    Also every ``watched`` steps (None: never), and at ``stops``.

    It depends on the actions and the config only, so that it is the same on every process.
    """

    def __init__(
        self,
        actions: Sequence[Action],
        longest: int,
        total: int,
        stops: Sequence[int] = (),
        watched: int | None = None,
    ):
        self._actions, self._longest, self._total, self._stops = actions, longest, total, stops
        self._intervals = [longest, *(every for every in (watched, *(each.every for each in actions)) if every)]

    def next(self, step: int) -> int:
        """The first such step after ``step``, at most the last step of the run."""
        stops = (stop for stop in self._stops if stop > step)
        return min(self._total, *((step // every + 1) * every for every in self._intervals), *stops)

    def logs(self, step: int) -> bool:
        """Whether the losses since the last such step are logged: every ``longest`` updates, at the end, and where the
        run may be resumed, so that none are missing then.
        """
        return step % self._longest == 0 or step == self._total or bool(self.due(step))

    def due(self, step: int) -> list[Action]:
        """The actions to call at ``step``, in order; empty if only losses are logged there."""
        if not any(action.every is not None and step % action.every == 0 for action in self._actions):
            return []
        return [action for action in self._actions if action.every is None or step % action.every == 0]


class LogRows(Action):
    """Logs each row's distance and cosine to its start, and its norm: enough for a curve, and whenever the run stops.

    Its own stops are some of those at which the losses are logged, so that they split no dispatch.
    """

    POINTS = 50

    def __init__(self, job: Job):
        longest = job.builder.longest_chunk
        super().__init__(job, every=longest * max(1, job.total // (self.POINTS * longest)))

    def __call__(self, step: int, state: TrainState, reporter: Reporter) -> None:
        """See `Action`."""
        for concept in self.job.concepts:
            for row in row_figures(concept, state.shown_rows, self.job.usual_norms):
                name = f"{self.job.prefix(concept)}{row['encoder']}/row_{row['row']}"
                reporter.rows(step, {f"{name}/{key}": row[key] for key in ("distance", "cosine", "norm")})


class SaveEmbedding(Action):
    """Saves a copy of each word, named after the step."""

    def __init__(self, job: Job):
        super().__init__(job, every=job.config.save_steps)

    def __call__(self, step: int, state: TrainState, reporter: Reporter) -> None:
        """See `Action`."""
        for concept, embedding in zip(self.job.concepts, self.job.embeddings(state), strict=True):
            run_folder.save_embedding(embedding, concept.folder, step)

    def done(self, step: int) -> bool:
        """See `Action`."""
        return all((concept.folder / run_folder.copy_name(step)).exists() for concept in self.job.concepts)


class Validate(Action):
    """Draws the validation prompts of each word, and adds them to the sheet of its progress."""

    def __init__(self, job: Job):
        super().__init__(job, every=job.config.validation_steps)
        self._sheets = [ProgressSheet(concept) for concept in job.concepts]

    def __call__(self, step: int, state: TrainState, reporter: Reporter) -> None:
        """See `Action`; a picture that cannot be drawn is a warning."""
        job = self.job
        learned = job.embeddings(state)
        for concept, sheet in zip(job.concepts, self._sheets, strict=True):
            with job.clock.phase("pictures"):
                draw = partial(validation.save_validation, job.sd, concept, learned, step)
                pictures = or_warn(f"the validation picture of {concept.token}", draw) or []
                or_warn(f"the progress of {concept.token}", partial(sheet.save, step))
            for number, picture in enumerate(pictures):
                end = "" if len(pictures) == 1 else f"/{number}"
                reporter.picture(f"{job.prefix(concept)}validation{end}", picture, step)

    def done(self, step: int) -> bool:
        """See `Action`."""
        return all(path.exists() for each in self.job.concepts for path in validation.validation_paths(each, step))


class Measure(Action):
    """Measures each word, and keeps it if it is its best so far."""

    def __init__(self, job: Job):
        super().__init__(job, every=job.config.evaluation_steps)

    def __call__(self, step: int, state: TrainState, reporter: Reporter) -> None:
        """See `Action`; a failed measurement is a warning."""
        job = self.job
        for concept, embedding, tracker in zip(job.concepts, job.embeddings(state), job.trackers, strict=True):
            measure = partial(tracker.measure, job.sd, embedding, step)
            with job.clock.phase("measure"):
                scores = or_warn(f"{concept.token} at step {step}", measure, "measured")
            if scores is not None:
                word = f", {concept.token}" if len(job.concepts) > 1 else ""
                reporter.print_line(f"step {step}{word}: {scores}")

    def done(self, step: int) -> bool:
        """See `Action`."""
        return all(tracker.last is not None and tracker.last[0] == step for tracker in self.job.trackers)


class ShowReport(Action):
    """Shows the words of now in ``report.html``, whenever the run stops for something else."""

    def __init__(self, job: Job):
        super().__init__(job, every=None)

    def __call__(self, step: int, state: TrainState, reporter: Reporter) -> None:
        """See `Action`; a page that cannot be made is a warning."""
        page = page_of(self.job)
        page.seen(self.job.embeddings(state))
        page.refresh(step)


class SaveCheckpoint(Action):
    """Saves the words and the state to resume from."""

    def __init__(self, job: Job):
        super().__init__(job, every=job.config.checkpointing_steps)

    def __call__(self, step: int, state: TrainState, reporter: Reporter) -> None:
        """See `Action`."""
        save_state(self.job, state)


def save_state(job: Job, state: TrainState) -> None:
    """Save the words, then a checkpoint; on the leader process only. If the disk fills up, the words matter more."""
    assert job.checkpoints is not None, "only the leader process has them"
    job.save_words(state)
    job.checkpoints.save(state)


def or_warn(what: str, make: Callable[[], Any], done: str = "drawn") -> Any:
    """What ``make`` returns; if it fails, warn and return None: a failed picture never ends a run."""
    try:
        return make()
    except DRAWING_FAULTS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        tqdm.write(f"warning: {what} could not be {done}: {reason}", file=sys.stderr)
        return None
