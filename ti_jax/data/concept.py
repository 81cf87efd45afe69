"""From a config to what the loop needs: the model, the words, the rows, and the data on the devices.

Checks run in order of cost: what needs no model (`read_inputs`), what needs its configuration and tokenizers
(`check_concept`, `check_pictures_to_draw`), and only then its weights (`load_model_and_concept`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ti_jax.config import TrainConfig
from ti_jax.data.folder import Pictures, load_images, picture_paths
from ti_jax.embeddings import Embedding, check_fits
from ti_jax.embeddings.naming import load_given
from ti_jax.embeddings.warn import capital_fault
from ti_jax.errors import InputError
from ti_jax.models.networks import Rows
from ti_jax.pipeline import StableDiffusion
from ti_jax.pipeline.model_description import ModelDescription
from ti_jax.text import tokens
from ti_jax.text.templates import load_templates
from ti_jax.weights.hub import is_cached
from ti_jax.words import fill, find_words, same_word

LogLine = Callable[[str], None]


@dataclass(frozen=True)
class Inputs:
    """What a run reads that does not depend on its model.

    Attributes:
      templates: with ``{}`` where the word goes. others: learned words that stay as they are.
      start: the word whose vectors the rows start from, or None if they start from a token of the model.
      pictures: as `load_images` gives them; None if their size is the model's own.
    """

    templates: list[str]
    others: tuple[Embedding, ...]
    start: Embedding | None
    pictures: Pictures | None


@dataclass(frozen=True)
class CheckedConcept:
    """What is to be learned, and from what; made without the model's weights.

    Attributes:
      token: the placeholder; its rows come first. words: it and the other learned words, with their numbers of vectors.
      others: learned words that stay as they are.
      start: the learned word that the rows start from, under a name of its own; None if they start from a token.
      templates: with ``{}`` where the word goes. prompts: with the word in them. pictures: as `load_images` gives them.
      overview_prompts, validation_prompt: what is drawn, with the word in it; the latter may be None.
      initializer: the words of the model that the rows start from, unless there is a ``start``.
    """

    token: str
    words: dict[str, int]
    others: tuple[Embedding, ...]
    start: Embedding | None
    templates: list[str]
    prompts: list[str]
    overview_prompts: list[str]
    validation_prompt: str | None
    pictures: Pictures
    initializer: str | None

    @property
    def embeddings(self) -> list[Embedding]:
        """The learned words that prompts may use besides the one that is learned."""
        return [*self.others, *([self.start] if self.start is not None else [])]

    @property
    def first_prompt_before_training(self) -> str:
        """The first training prompt with what the rows start from in the place of the word."""
        return fill(self.templates[0], self.start.token if self.start else str(self.initializer))


@dataclass(frozen=True)
class Concept(CheckedConcept):
    """What is to be learned, with the rows to start from.

    Attributes:
      rows: start values, float32 [n, D] for each text encoder. row_mask: bool [n], true where they train.
      metadata: what the learned word's file says of its origin.
    """

    rows: dict[str, np.ndarray]
    row_mask: dict[str, np.ndarray]
    metadata: dict[str, str]

    def embedding(self, rows: Rows, step: int) -> Embedding:
        """The word as it is at ``step``, to be saved."""
        count = self.words[self.token]
        vectors = {name: np.asarray(value)[:count].astype(np.float32) for name, value in rows.items()}
        return Embedding(self.token, vectors, {**self.metadata, "steps": str(step)})


def read_inputs(config: TrainConfig, log: LogLine) -> Inputs:
    """Read templates, learned words and pictures.

    Where the pictures' size is the model's own, and the model is still to be downloaded, they are read once here in any
    size: whether they can be read should not be found out after gigabytes.

    Raises:
      InputError: one of the files is missing or wrong.
    """
    assert config.train_data_dir is not None, "the config is resolved"
    picture_paths(config.train_data_dir)
    templates = load_templates(config.learnable_property, config.templates)
    others = tuple(load_given(config.embeddings))
    for path, other in zip(config.embeddings, others, strict=True):
        for remark in other.remarks:
            log(f"note: {path}: {remark}")
    fault = capital_fault(str(config.placeholder_token), config.num_vectors)
    if fault is not None:
        log(f"warning: {fault}")
    start = _load_start(config, log)
    if config.resolution is not None:
        return Inputs(templates, others, start, _load_pictures(config, config.resolution, log))
    model = config.pretrained_model_name_or_path
    if model is not None and not Path(model).exists() and not is_cached(model, config.revision):
        _load_pictures(config, 8, lambda line: None)
    return Inputs(templates, others, start, None)


def _load_pictures(config: TrainConfig, resolution: int, log: LogLine) -> Pictures:
    assert config.train_data_dir is not None, "the config is resolved"
    return load_images(
        config.train_data_dir,
        resolution,
        center_crop=config.center_crop,
        skip_bad=config.skip_bad_images,
        on_skip=log,
    )


def _load_start(config: TrainConfig, log: LogLine) -> Embedding | None:
    """The word of ``--initializer_embedding``.

    Raises:
      InputError: no such file, not a word, or another number of vectors.
    """
    if config.initializer_embedding is None:
        return None
    # The file need not say a name that can be one here; "my cat.pt" has none.
    start = Embedding.load(config.initializer_embedding, token=config.placeholder_token)
    where = f"--initializer_embedding {config.initializer_embedding}"
    if start.num_vectors != config.num_vectors:
        raise InputError(
            f"{where}: the word has {start.num_vectors} vectors and --num_vectors is {config.num_vectors}; give "
            f"--num_vectors {start.num_vectors}, or another file (ti-jax embedding prune makes a word shorter)"
        )
    if start.caveat:
        log(f"note: {where}: read as {start.caveat}")
    return start


def check_concept(config: TrainConfig, model: ModelDescription, inputs: Inputs, log: LogLine) -> CheckedConcept:
    """Check words, initializer, templates, prompts and pictures against a model's configuration and tokenizers.

    Raises:
      InputError: whatever is wrong with one of them.
    """
    assert config.placeholder_token and config.overview_prompts is not None, "the config is resolved"
    token, count = config.placeholder_token, config.num_vectors
    for path, other in zip(config.embeddings, inputs.others, strict=True):
        check_fits(other, model.embedding_dims, path)
    words, _ = tokens.combine(inputs.others)
    if same_word(token, words):
        raise InputError(f"placeholder {token!r} is also the word of one of --embeddings; choose another")
    words = {token: count, **words}
    for name, tokenizer in model.tokenizers.items():
        tokens.check_new_word(tokenizer, token)
        if inputs.start is None:
            assert config.initializer_token is not None, f"the config is resolved, {name} starts from a token"
            tokens.initializer_ids(tokenizer, config.initializer_token)
    start = inputs.start
    if start is not None:
        check_fits(start, model.embedding_dims, f"--initializer_embedding {config.initializer_embedding}")
        start = Embedding(_name_of_start(token, words), start.vectors, start.metadata)

    prompts = [fill(template, token) for template in inputs.templates]
    _check_room(config, model, prompts, words)
    check_holds(model, prompts, words, token, weighted=False)
    validation_prompt = config.validation_prompt
    return CheckedConcept(
        token=token,
        words=words,
        others=inputs.others,
        start=start,
        templates=inputs.templates,
        prompts=prompts,
        overview_prompts=[fill(prompt, token) for prompt in config.overview_prompts],
        validation_prompt=None if validation_prompt is None else fill(validation_prompt, token),
        pictures=inputs.pictures or _load_pictures(config, config.resolution or model.default_resolution, log),
        initializer=config.initializer_token,
    )


def _name_of_start(token: str, words: Mapping[str, int]) -> str:
    """A name for the word that the rows start from which none of ``words`` has."""
    name = f"{token}-start"
    while same_word(name, words):
        name += "-"
    return name


def _check_room(config: TrainConfig, model: ModelDescription, prompts: list[str], words: Mapping[str, int]) -> None:
    """Raise InputError if the word's vectors do not fit into a prompt beside its other tokens."""
    token, count = str(config.placeholder_token), config.num_vectors
    for reader in model.prompt_tokenizers.readers().values():
        room = reader.max_length - 2  # start and end
        for prompt in prompts:
            taken = len(tokens.prompt_ids(reader.tokenizer, prompt, words, reader.vocab_size))
            occurrences = sum(found.word == token and len(found.rows) == count for found in find_words(prompt, words))
            others = taken - occurrences * count
            if taken > room and occurrences and others + occurrences <= room:
                raise InputError(
                    f"--num_vectors {count}: the prompt {prompt!r} takes {taken} tokens with so many where the text "
                    f"encoder reads {room}; give at most {(room - others) // occurrences}, or shorter --templates"
                )


def check_holds(
    model: ModelDescription, prompts: list[str], words: Mapping[str, int], token: str, weighted: bool
) -> None:
    """Every prompt must hold all rows of the word, or nothing is learned from it without a sign of it."""
    for prompt in model.prompt_tokenizers.without(token, prompts, words, weighted):
        raise InputError(
            f"prompt {prompt!r} does not hold the new word {token!r} once it is cut into tokens; set it apart "
            f"with spaces, or choose a word with its own brackets like <{token.strip('<>')}>"
        )


def with_rows(config: TrainConfig, checked: CheckedConcept, inputs: Inputs, sd: StableDiffusion) -> Concept:
    """The concept with its start values, which are rows of the model's token table unless they come from a file."""
    count = checked.words[checked.token]
    _, other_rows = tokens.combine(inputs.others)
    rows, row_mask = {}, {}
    for name, tokenizer in sd.tokenizers.items():
        if checked.start is not None:
            start = checked.start.vectors[name]
        else:
            ids = tokens.initializer_ids(tokenizer, str(checked.initializer))
            start = tokens.initial_rows(sd.token_table(name), ids, count)
        rows[name] = np.concatenate([start, other_rows[name]]) if inputs.others else start
        row_mask[name] = np.arange(len(rows[name])) < count
    metadata = {
        "base_model": public_name(sd.name),
        "base_model_hash": sd.identity,
        "token": checked.token,
        **_start_metadata(config, checked.start),
        "num_vectors": str(count),
        "learnable_property": config.learnable_property,
    }
    known = {field.name: getattr(checked, field.name) for field in fields(CheckedConcept)}
    return Concept(**known, rows=rows, row_mask=row_mask, metadata=metadata)


def public_name(model: str) -> str:
    """A model's hub id, or of a local folder or file the name alone: the path is nobody else's business."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() or path.is_absolute() else model


def _start_metadata(config: TrainConfig, start: Embedding | None) -> dict[str, str]:
    """What a learned word says of where it started; a file is told by its name and the hash of its numbers."""
    if start is None:
        return {"initializer_token": str(config.initializer_token)}
    digest = hashlib.sha256(b"".join(vectors.tobytes() for vectors in start.vectors.values()))
    return {
        "initializer_embedding": Path(str(config.initializer_embedding)).name,
        "initializer_embedding_hash": digest.hexdigest()[:16],
    }
