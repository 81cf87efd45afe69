"""Learned words in memory, and the file formats of the programs that use them."""

from ti_jax.embeddings.embedding import Embedding, check_fits

__all__ = ["Embedding", "check_fits"]
