"""Compiled programs kept on disk, so that the second run of a command starts in seconds."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def enable_compilation_cache() -> None:
    """Keep compiled programs in ``~/.cache/ti_jax/xla``, unless JAX_COMPILATION_CACHE_DIR names another place.

    For programs only (the command line calls it): a library has no business in its caller's JAX settings.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ti_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
