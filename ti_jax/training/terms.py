"""Terms that may be added to the diffusion loss; they need the text encoders alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ti_jax.data.concept import Concept
from ti_jax.models.networks import Networks, Params, Rows
from ti_jax.pipeline import StableDiffusion
from ti_jax.text import prompt_weights

# The authors' weight of `distance_to`.
DISTANCE_WEIGHT = 1e-5


class Anchor(NamedTuple):
    """What `distance_to` keeps the rows near."""

    rows: Rows  # float32 [n, D] for each text encoder
    weights: Mapping[str, jax.Array]  # float32 [n]: 1 / the number of vectors of the row's word; 0: a frozen row


class Context(NamedTuple):
    """What `context_distance` keeps the outputs at other tokens near; for each text encoder."""

    ids: Mapping[str, jax.Array]  # int32 [P, L]: prompts with the words
    weights: Mapping[str, jax.Array]  # float32 [P, L]: of each token; 0: of a trained word, or padding
    of_class: Mapping[str, jax.Array]  # float32 [P, L, D]: the outputs with the class words in the words' places


class Terms(NamedTuple):
    """Constant inputs of the terms; None: there is no such term."""

    share: jax.Array  # float32 scalar: 1 / the number of words; the loss that is shown is their mean
    anchor: Anchor | None = None
    context: Context | None = None

    @classmethod
    def of(cls, concepts: Sequence[Concept], sd: StableDiffusion) -> Terms | None:
        """Those of a run's concepts; None if it has none."""
        config = concepts[0].config
        anchor = anchor_of(concepts) if config.initializer_output else None
        context = context_of(concepts, sd) if config.context_loss else None
        if anchor is None and context is None:
            return None
        return cls(jnp.float32(1 / len(concepts)), anchor, context)


def anchor_of(concepts: Sequence[Concept]) -> Anchor:
    """The rows that a run starts from."""
    rows = concepts[0].rows
    weights = np.zeros(len(next(iter(rows.values()))), np.float32)
    for concept in concepts:
        weights[concept.own] = 1 / concept.words[concept.token]
    shares = jnp.asarray(weights)
    return Anchor({name: jnp.asarray(table) for name, table in rows.items()}, dict.fromkeys(rows, shares))


def context_of(concepts: Sequence[Concept], sd: StableDiffusion) -> Context:
    """The overview prompts of a run's concepts, without the weights of their words; a long one is several."""
    ids: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for name, reader in sd.prompt_tokenizers.readers().items():
        found = []
        for concept in concepts:
            chunks = [
                chunk.ids
                for prompt in concept.overview_prompts
                for chunk in prompt_weights.chunks(reader.tokenizer, prompt, concept.words, *reader[1:])
            ]
            numbers = np.stack(chunks) - reader.vocab_size
            trained = (numbers >= 0) & concept.row_mask[name][np.maximum(numbers, 0)]
            ends = np.argmax(np.stack(chunks) == reader.tokenizer.eos_token_id, axis=1)
            others = ~trained & (np.arange(reader.max_length) <= ends[:, None])
            others = (others / others.sum(axis=1, keepdims=True))[trained.any(axis=1)]
            found.append((np.stack(chunks)[trained.any(axis=1)], others / len(others) / len(sd.tokenizers)))
        ids[name] = jnp.concatenate([jnp.asarray(each) for each, _ in found])
        weights[name] = concepts[0].config.context_loss * jnp.concatenate([jnp.float32(each) for _, each in found])
    class_rows = jax.tree.map(jnp.asarray, concepts[0].class_rows)
    params = {name: sd.params[name] for name in ids}
    of_class = jax.jit(outputs, static_argnums=0)(sd.networks, params, ids, class_rows)
    return Context(ids, weights, of_class)


def outputs(networks: Networks, params: Params, ids: Mapping[str, jax.Array], rows: Rows) -> dict[str, jax.Array]:
    """What each text encoder tells the UNet of ids int32 [P, L], float32 [P, L, D]."""
    states, _ = networks.text_states(params, ids, rows)
    return {name: state.astype(jnp.float32) for name, state in states.items()}


def added_loss(networks: Networks, params: Params, terms: Terms, rows: Rows) -> jax.Array:
    """The terms, float32 scalar. Of several words it is their sum, so that each learns as if alone."""
    total = jnp.float32(0)
    if terms.anchor is not None:
        total += distance_to(terms.anchor, rows)
    if terms.context is not None:
        total += context_distance(terms.context, outputs(networks, params, terms.context.ids, rows))
    return total


def distance_to(anchor: Anchor, rows: Rows) -> jax.Array:
    """`DISTANCE_WEIGHT` times the distance of each word's rows to the anchor's, summed over words and text encoders.

    The distance of a word of several vectors is their mean. It is Euclidean, not squared, and has PyTorch's 1e-6 added
    to each difference, as in the authors' code (``F.pairwise_distance``), so that there is a gradient at the start
    (CrossInit, Pang et al. 2023, arXiv 2312.15905).
    """
    total = jnp.float32(0)
    for name, weights in anchor.weights.items():
        total += jnp.sum(weights * jnp.linalg.norm(rows[name] - anchor.rows[name] + 1e-6, axis=-1))
    return DISTANCE_WEIGHT * total


def context_distance(context: Context, told: Mapping[str, jax.Array]) -> jax.Array:
    """The weighted mean of 1 - cosine between the outputs at a prompt's other tokens, with a word and with its class.

    It is the text term of CoRe (Wu et al. 2024, arXiv 2408.15914). The other tokens are all but trained words' and
    padding: those before the word, which cannot see it, and the first end-of-text token are among them. So that a word
    and its class are as long, the class' tokens are laid out on the word's vectors as `initial_rows` does. The mean is
    over tokens, then prompts and text encoders.

    Args:
      told: the `outputs` with the rows, [P, L, D].
    """
    total = jnp.float32(0)
    for name, weights in context.weights.items():
        ours, theirs = told[name], context.of_class[name]
        lengths = jnp.linalg.norm(ours, axis=-1) * jnp.linalg.norm(theirs, axis=-1)
        total += jnp.sum(weights * (1.0 - jnp.sum(ours * theirs, axis=-1) / jnp.maximum(lengths, 1e-8)))
    return total
