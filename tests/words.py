"""Learned words for tests, and files of them as other programs write them."""

from dataclasses import replace

import numpy as np
import pytest

from ti_jax.embeddings import Embedding
from ti_jax.errors import InputError


def numbers(n, dim, seed=0):
    """Float32 numbers of many magnitudes, of which no bit may get lost: [n, dim]."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, dim)) * 10.0 ** rng.integers(-6, 3, (n, dim))).astype(np.float32)


def word(n=1, dim=768, token="<cat-toy>", metadata=None):
    return Embedding(token, {"text_encoder": numbers(n, dim)}, metadata or {})


def sdxl_word(n=1, dims=(768, 1280), token="<cat-toy>", metadata=None):
    vectors = {"text_encoder": numbers(n, dims[0]), "text_encoder_2": numbers(n, dims[1], seed=1)}
    return Embedding(token, vectors, metadata or {})


def as_read(embedding, path, form):
    """The word as it comes back from its file: AUTOMATIC1111's .pt goes by the file's name."""
    return replace(embedding, token=path.stem) if form == "a1111" else embedding


def assert_same(a, b):
    assert a.token == b.token and list(a.vectors) == list(b.vectors)
    for name in a.vectors:
        assert a.vectors[name].dtype == b.vectors[name].dtype == np.float32
        assert a.vectors[name].tobytes() == b.vectors[name].tobytes() and a.vectors[name].shape == b.vectors[name].shape


def refusal(path, **kwargs):
    with pytest.raises(InputError) as error:
        Embedding.load(path, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def a1111_file(tensor, **fields):
    """As AUTOMATIC1111's Embedding.save writes it."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": tensor},
        "name": "mein-stil",
        "step": 1999,
        "sd_checkpoint": "6ce0161689",
        "sd_checkpoint_name": "v1-5-pruned-emaonly",
        **fields,
    }
