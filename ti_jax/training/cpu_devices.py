"""One JAX device per CPU core, which share a batch.

XLA:CPU runs one operation at a time and splits each over the cores, which then synchronise thousands of times a step.
With one device per core, every core runs its shard of the batch from start to end: on two cores a step of the embedded
model took 0.08 s instead of 0.13 s.
"""

from __future__ import annotations

import math
import os
import sys

import jax

from ti_jax.config import TrainConfig
from ti_jax.training.multihost import has_others

_made = 1  # number of CPU devices that `use_cores` has configured


def use_cores(config: TrainConfig) -> int | None:
    """Configure one JAX CPU device per core, as many as divide the batch evenly.

    Call it before anything is computed: after that JAX's devices are fixed. Does nothing if the environment sets their
    number (XLA_FLAGS, JAX_NUM_CPU_DEVICES), or in one of several processes.

    Returns:
      The number of CPU devices that share each batch; None if nothing was done. `train` ignores it on a GPU or TPU.
    """
    global _made
    given = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ
    if given or has_others(config):
        return None
    assert config.train_batch_size is not None, "the config is resolved"
    cores = max(count for count in range(1, _cores() + 1) if config.train_batch_size % count == 0)
    try:
        jax.config.update("jax_num_cpu_devices", cores)
        _made = cores
    except RuntimeError:  # JAX has created its devices already, perhaps for an earlier call
        if cores > 1 and jax.default_backend() == "cpu" and jax.device_count() == 1:
            print(
                f"note: JAX was used before training and has one CPU device, so that the {cores} cores are used less "
                f"efficiently; train first, or set JAX_NUM_CPU_DEVICES={cores}",
                file=sys.stderr,
            )
    return math.gcd(config.train_batch_size, _made)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
