"""Textual Inversion for Stable Diffusion in JAX/Flax.

The names here are the public interface. They are imported on first use: ``ti-jax --help`` does not wait for JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Embedding", "InputError", "StableDiffusion", "TrainConfig", "TrainResult", "train"]

if TYPE_CHECKING:
    from ti_jax.config import TrainConfig
    from ti_jax.embeddings import Embedding
    from ti_jax.errors import InputError
    from ti_jax.pipeline import StableDiffusion
    from ti_jax.training.loop import TrainResult, train

_HOME = {
    "Embedding": ".embeddings",
    "InputError": ".errors",
    "StableDiffusion": ".pipeline",
    "TrainConfig": ".config",
    "TrainResult": ".training.loop",
    "train": ".training.loop",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
