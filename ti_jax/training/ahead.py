"""Programs that a run needs later, compiled in a thread beside all that comes before its first picture."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import SingleDeviceSharding

from ti_jax import interrupts
from ti_jax.data.concept import Concept
from ti_jax.pipeline import StableDiffusion
from ti_jax.training import validation
from ti_jax.training.measure import ScoreTracker
from ti_jax.training.multihost import is_leader
from ti_jax.training.validation import DRAWING_FAULTS


def compile_pictures(
    sd: StableDiffusion, concepts: Sequence[Concept], trackers: Sequence[ScoreTracker], device: jax.Device
) -> None:
    """Start to compile what the run draws pictures with, in another thread; a picture that comes first waits for it.

    Until the training step is compiled the program waits for Python and the disk for half of its time. Whatever fails
    here fails again, and is reported, when a picture is drawn. Of several processes none compiles ahead: on GPUs they
    tune a program's kernels together.

    Args:
      sd: as it will draw; of its weights only the shapes are used. device: where those will be, the VAE's excepted,
        which are on the host.
    """
    if not is_leader() or jax.process_count() > 1:
        return
    sharding = SingleDeviceSharding(device)
    params = {
        name: tree
        if name == "vae"
        else jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
        for name, tree in sd.params.items()
    }
    sd = dataclasses.replace(sd, params=params)
    words = tuple(concept.embedding(concepts[0].rows, 0) for concept in concepts)

    def compile_all() -> None:
        for concept in concepts:
            with contextlib.suppress(*DRAWING_FAULTS):
                validation.compile_pictures(sd, concept, words)
        for word, tracker in zip(words, trackers, strict=bool(trackers)):
            with contextlib.suppress(*DRAWING_FAULTS):
                tracker.evaluator.compile(sd, word, tracker.others)

    interrupts.beside(compile_all)
