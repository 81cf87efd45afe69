"""Textual Inversion for Stable Diffusion in JAX/Flax.

The names here are the public interface. They are imported on first use: ``ti-jax --help`` does not wait for JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Embedding", "InputError", "StableDiffusion", "TrainConfig", "TrainResult", "train"]

if TYPE_CHECKING:
    from .config import TrainConfig
    from .embeddings import Embedding
    from .errors import InputError
    from .pipeline import StableDiffusion
    from .training.loop import TrainResult, train

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
