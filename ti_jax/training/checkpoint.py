"""Checkpoints to resume from: step, rows and optimizer state, with a fingerprint of everything that they depend on.

Orbax writes one folder per step, atomically. The frozen model is not saved, only its hash. With several processes only
the leader reads and writes, so that the hosts need no shared disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ti_jax.config import TrainConfig
from ti_jax.config.fields import setting_of
from ti_jax.errors import InputError, one_line
from ti_jax.files import disk_errors
from ti_jax.interrupts import whole
from ti_jax.remote import local_copy
from ti_jax.training.optimizer import state_with_counts, state_with_one_count
from ti_jax.training.step import TrainState

Fingerprint = dict[str, Any]

# Settings that are entries of a fingerprint under their names, with the values that they have by default.
FIELDS = {field.name: field.default for field in dataclasses.fields(TrainConfig) if setting_of(field).fingerprint}

# The entry "adam" of older checkpoints.
ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay")

# Entries of a fingerprint that the first checkpoints do not have.
ADDED_LATER = (
    "prediction_type",
    "initializer_embedding",
    "gradient_checkpointing",
    "draws",
    "embeddings",
    "counts",
    "bucket_step",
    "max_aspect_ratio",
)

# The rule by which `ti_jax.training.step.draw_sample` draws pictures, prompts, noise and timesteps. It goes up whenever
# the same seed gives another batch: 1 drew each timestep by itself, 2 spreads an update's over the schedule. 3 differs
# from it only where the pictures' numbers of prompts have a least common multiple of more than 2**16: 2 drew a number
# below that, of which all others follow, but above 2**16 JAX's random integers are not quite uniform.
DRAWS, DRAWS_OF_MANY_LENGTHS, MANY = 2, 3, 2**16

# A word of 64 vectors for SDXL, with its moments, takes 1.6 MB.
ROOM_FOR_A_CHECKPOINT = 2 * 2**20


def fingerprint(
    config: TrainConfig,
    *,
    model_identity: str,
    prediction_type: str,
    dtype: Any,
    pictures: str,
    masks: str | None,
    prompts: Sequence[str],
    prompt_counts: Iterable[int],
    words: Mapping[str, int],
    initializer_embedding: str | None,
    embeddings: str | None,
    global_batch: int,
    total_steps: int,
    concepts: Sequence[Sequence[Any]] = (),
    shown: str | None = None,
) -> Fingerprint:
    """What the rows at a step depend on, as JSON values. The number of devices and the schedule of saves are not in it.

    A setting on which they depend as it is has ``fingerprint=True`` beside it; here is what is made of several, or
    counts only with others.
    ``pictures`` and ``masks`` are hashes of all of them, None without masks. ``prompt_counts``: the different numbers
    of prompts that pictures have.
    ``initializer_embedding`` is a hash of the rows that the word starts from, or None if it starts from a token;
    ``shown`` one of which picture has which prompts and how often an epoch shows it, or None if all are alike;
    ``embeddings`` one of the vectors of the other words that the prompts may use, or None if there are none.
    ``gradient_checkpointing`` is None until the memory has decided it.
    ``concepts``, where there are several, has for each what of the above belongs to it.
    ``total_steps`` counts only where the learning rate depends on it, so that a constant-rate run can be made longer.
    """
    constant = config.lr_scheduler in ("constant", "constant_with_warmup")
    return {
        "base model": model_identity,
        "prediction_type": prediction_type,  # which a single-file checkpoint may not say, and the user does
        "precision": np.dtype(dtype).name,
        "pictures": pictures,
        "masks": masks,
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "captions": shown,
        "words": [[word, count] for word, count in words.items()],
        "initializer_embedding": initializer_embedding,
        "embeddings": embeddings,
        "batch size on all devices": global_batch,
        **{name: getattr(config, name) for name in FIELDS},
        "bucket_step": config.bucket_step,  # None without buckets
        "max_aspect_ratio": config.max_aspect_ratio,
        "lr_warmup_steps": None if config.lr_scheduler == "constant" else config.lr_warmup_steps,
        "lr_num_cycles": config.lr_num_cycles if config.lr_scheduler == "cosine_with_restarts" else None,
        "max_train_steps": None if constant else total_steps,
        "draws": DRAWS if math.lcm(*prompt_counts) <= MANY else DRAWS_OF_MANY_LENGTHS,
        "counts": "by row",  # of updates, in the optimizer's state; older checkpoints have one for all rows
        **({"concepts": [list(each) for each in concepts]} if len(concepts) > 1 else {}),
    }


class _Unreadable(InputError):
    """A checkpoint that is damaged, or a folder that is no checkpoint."""


class Checkpoints:
    """The checkpoints of one run, in ``folder``/<step>/.

    Attributes:
      identity: the run's fingerprint, which is saved with a checkpoint and compared when one is read.
    """

    def __init__(self, folder: Path, limit: int | None):
        """Nothing is read or made before the first use.

        Args:
          limit: checkpoints to keep; None: all.
        """
        self.folder = folder
        self.identity: Fingerprint = {}
        self._limit = limit

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        return ocp.CheckpointManager(self.folder.absolute(), options=_options(self._limit))

    def save(self, state: TrainState) -> None:
        """Write the state under its step; the oldest checkpoints beyond the limit are deleted.

        Raises:
          InputError: the disk is full or cannot be written. Earlier checkpoints stay complete.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        contents = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.device_get(_parts(state))), identity=ocp.args.JsonSave(self.identity)
        )
        with disk_errors(self.folder), whole():
            # Orbax's threads print tracebacks if the disk is full, so check before they start.
            room = max(ROOM_FOR_A_CHECKPOINT, 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            if shutil.disk_usage(self.folder).free < room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            try:
                saved = self._manager.save(step, args=contents)
            except ValueError as error:  # raised by its storage library for disk errors
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        if not saved:  # Orbax silently skips a step before the latest one
            raise InputError(
                f"the checkpoint of step {step} was not saved: {self.folder} has later ones "
                f"({', '.join(map(str, sorted(self._manager.all_steps())))}); move them away"
            )

    def restore(self, wanted: str, like: TrainState) -> TrainState | None:
        """The state at "latest" (None if there is no checkpoint yet) or in the checkpoint folder ``wanted``.

        "latest" is the newest one that can be read; a line on stderr names those that cannot. If the run has not chosen
        its ``gradient_checkpointing`` yet, `identity` takes over the checkpoint's.

        Args:
          like: a state with the expected shapes and dtypes, as NumPy arrays.

        Raises:
          InputError: no such checkpoint, one that cannot be read, or one of another model, concept or setting.
        """
        if wanted != "latest":
            return self._read(self._checkpoint_folder(wanted), like)
        steps = self._steps()
        for step in reversed(steps):
            try:
                return self._read(self.folder / str(step), like)
            except _Unreadable as error:
                if step == steps[0]:
                    raise
                print(f"warning: {error}", file=sys.stderr)
        return None

    def _steps(self) -> list[int]:
        """The steps of the existing checkpoints, ascending."""
        return sorted(int(path.name) for path in self.folder.glob("[0-9]*") if path.name.isdigit() and path.is_dir())

    def _checkpoint_folder(self, wanted: str) -> Path:
        folder = local_copy(wanted)
        if folder.name.isdigit() and folder.is_dir():
            return folder.absolute()
        found = self._steps()
        steps = f"this run has {', '.join(map(str, found))} in {self.folder}" if found else "this run has none yet"
        raise InputError(
            f"--resume_from_checkpoint {wanted}: not a checkpoint folder (one is named by its step, "
            f"like {self.folder / '500'}); {steps}"
        )

    def _read(self, where: Path, like: TrainState) -> TrainState:
        folder, options = where.parent.absolute(), _options(None, read_only=True)
        with _errors_only(), ocp.CheckpointManager(folder, options=options) as manager:
            try:
                saved = manager.restore(int(where.name), args=ocp.args.Composite(identity=ocp.args.JsonRestore()))
                found = dict(saved["identity"])
                self._compare(where, found)
                wanted = like = jax.device_get(like)
                if "counts" not in found:
                    wanted = like._replace(opt_state=state_with_one_count(like.opt_state))
                shapes = ocp.args.StandardRestore(_parts(wanted))
                state = TrainState(**manager.restore(int(where.name), args=ocp.args.Composite(state=shapes))["state"])
                if "counts" not in found:
                    state = state._replace(opt_state=state_with_counts(state.opt_state, like.opt_state))
            except (OSError, ValueError, KeyError, TypeError) as error:
                if isinstance(error, InputError):
                    raise
                raise _Unreadable(
                    f"checkpoint {where} cannot be read ({one_line(error)}); resume from another one"
                ) from error
        return state

    def _compare(self, where: Path, found: Fingerprint) -> None:
        """Compare a checkpoint's fingerprint with the run's.

        Raises:
          InputError: names the entries that differ.
        """
        wanted = json.loads(json.dumps(self.identity))
        found |= dict(zip(ADAM, found.pop("adam", ()), strict=False))
        # What an older checkpoint does not have: a setting was as it is by default, and an entry added later cannot
        # differ.
        found = FIELDS | {"masks": None, "captions": None} | {name: wanted.get(name) for name in ADDED_LATER} | found
        if wanted.get("gradient_checkpointing") is None:
            wanted["gradient_checkpointing"] = found["gradient_checkpointing"]
        different = [name for name in wanted if found.get(name) != wanted[name]]
        if different:
            details = ", ".join(_difference(name, found.get(name), wanted[name]) for name in different)
            raise InputError(
                f"checkpoint {where} belongs to another run ({details}); use the settings that it was made with, or "
                f"another --output_dir"
            )
        self.identity["gradient_checkpointing"] = wanted["gradient_checkpointing"]

    def close(self) -> None:
        """Close Orbax's manager."""
        if "_manager" in vars(self):
            self._manager.close()


def _parts(state: TrainState) -> dict[str, Any]:
    """What is saved of a state: a part that a run does not have is in no checkpoint of it."""
    return {name: part for name, part in state._asdict().items() if part is not None}


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Without orbax's warnings, which say of reading alone that a folder is read-only."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _options(limit: int | None, read_only: bool = False) -> ocp.CheckpointManagerOptions:
    """Orbax's options for a single process that reads and writes, however many processes the run has."""
    return ocp.CheckpointManagerOptions(
        max_to_keep=limit,
        enable_async_checkpointing=False,
        create=False,
        read_only=read_only,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={0}, barrier_sync_key_prefix="first"
        ),
    )


def _difference(name: str, found: Any, wanted: Any) -> str:
    if name in ("base model", "pictures", "masks", "prompts"):
        return f"other {name}"
    return f"{name} {found} there, {wanted} here"
