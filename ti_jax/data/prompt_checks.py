"""Whether the text encoders read all of a prompt, and find the word in it."""

from __future__ import annotations

from collections.abc import Mapping

from ti_jax.config import TrainConfig
from ti_jax.errors import InputError
from ti_jax.pipeline.model_description import ModelDescription
from ti_jax.text import tokens
from ti_jax.words import find_words


def fits(model: ModelDescription, prompt: str, words: Mapping[str, int]) -> bool:
    """Whether the text encoders read all of a prompt."""
    return all(
        # No token is shorter than a letter.
        (prompt.isascii() and len(prompt) * max(words.values()) <= reader.max_length - 2)
        or len(tokens.prompt_ids(reader.tokenizer, prompt, words, reader.vocab_size)) <= reader.max_length - 2
        for reader in model.prompt_tokenizers.readers().values()
    )


def check_room(config: TrainConfig, model: ModelDescription, prompts: list[str], words: Mapping[str, int]) -> None:
    """Raise InputError if a prompt with the word's vectors is longer than the text encoder reads."""
    token, count = str(config.placeholder_token), config.num_vectors
    for reader in model.prompt_tokenizers.readers().values():
        room = reader.max_length - 2  # start and end
        for prompt in prompts:
            taken = len(tokens.prompt_ids(reader.tokenizer, prompt, words, reader.vocab_size))
            occurrences = sum(found.word == token and len(found.rows) == count for found in find_words(prompt, words))
            others = taken - occurrences * count
            if taken > room and occurrences and others + occurrences <= room:
                raise InputError(
                    f"--num_vectors {count}: the prompt {prompt!r} is then {taken} tokens long, and the text encoder "
                    f"reads {room}; give at most {(room - others) // occurrences}, or shorter --templates"
                )


def check_holds(
    model: ModelDescription, prompts: list[str], words: Mapping[str, int], token: str, weighted: bool
) -> None:
    """Raise InputError unless every prompt contains all rows of the word: from others nothing would be learned."""
    for prompt in model.prompt_tokenizers.without(token, prompts, words, weighted):
        raise InputError(
            f"prompt {prompt!r} does not hold the new word {token!r} once it is cut into tokens; set it apart "
            f"with spaces, or choose a word with its own brackets like <{token.strip('<>')}>"
        )
