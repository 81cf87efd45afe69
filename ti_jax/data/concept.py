"""The concepts of a run, each from its config: words, prompts, pictures and initial rows.

Checks run in order of cost: first those that need no model (`ti_jax.data.inputs`), then those that need its
configuration and tokenizers (`check_concepts`, `check_pictures_to_draw`), and only then its weights
(`load_model_and_concepts`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ti_jax.config import TrainConfig
from ti_jax.data.inputs import Inputs, LogLine, load_pictures
from ti_jax.data.picture_files import repeats_of
from ti_jax.data.pictures import Pictures
from ti_jax.data.prompt_checks import check_holds, check_room, fits
from ti_jax.data.prompts import picture_prompts, with_placeholder
from ti_jax.embeddings import Embedding, check_fits
from ti_jax.embeddings.embedding import NEGATIVE_CLASS
from ti_jax.errors import InputError, listed
from ti_jax.files import as_url
from ti_jax.models.networks import Rows
from ti_jax.pipeline import StableDiffusion
from ti_jax.pipeline.model_description import ModelDescription
from ti_jax.text import tokens
from ti_jax.text.templates import for_captions
from ti_jax.text.text_encoders import encode
from ti_jax.words import fill, same_word, without_word


@dataclass(frozen=True)
class CheckedConcept:
    """A concept to learn and its data, checked without the model's weights.

    Attributes:
      config: its settings; ``output_dir`` is the folder of its own results.
      token: the placeholder. words: of the run, in the order of the rows: the placeholders of all its concepts, then
        the other learned words; with their numbers of vectors.
      others: learned words that are not trained.
      start: the learned word that initialises the rows, under another name; None: they are initialised from a token.
      templates: those without ``{caption}``, with ``{}`` in the word's place. pictures: from `load_images`.
      prompts: all that are learned with, with the word filled in. prompts_of: each picture's equally likely prompts,
        indices into ``prompts``, int32 [N, K]; -1 fills up the rows of pictures that have fewer than others.
      overview_prompts, validation_prompts: to draw, with the word filled in.
      initializer: text of the tokens that initialise the rows, unless there is a ``start``.
    """

    config: TrainConfig
    token: str
    words: dict[str, int]
    others: tuple[Embedding, ...]
    start: Embedding | None
    templates: list[str]
    prompts: list[str]
    prompts_of: np.ndarray
    overview_prompts: list[str]
    validation_prompts: list[str]
    pictures: Pictures
    initializer: str | None

    @property
    def folder(self) -> Path:
        """Of its results."""
        return Path(self.config.output_dir)

    @property
    def own(self) -> slice:
        """Its rows among those of the run."""
        names = list(self.words)
        first = sum(self.words[name] for name in names[: names.index(self.token)])
        return slice(first, first + self.words[self.token])

    @property
    def learned_with(self) -> list[str]:
        """All prompts that its rows depend on."""
        return [*self.prompts, *(self.overview_prompts if self.config.context_loss else ())]

    @property
    def embeddings(self) -> list[Embedding]:
        """The learned words that prompts may use besides the placeholder."""
        return [*self.others, *([self.start] if self.start is not None else [])]

    @property
    def negative_class(self) -> str | None:
        """For a word of the negative prompt: what stands in its place in prompts. None for any other word."""
        return self.config.negative_class if self.config.learn_negative else None

    @property
    def negative_prompt(self) -> str | None:
        """What its pictures are drawn with; a word of the negative prompt is in it."""
        given = self.config.validation_negative_prompt
        return given if self.negative_class is None else fill(given or "{}", self.token)

    @property
    def negative_prompt_before_training(self) -> str | None:
        """`negative_prompt` without the word, if it would be in it."""
        if self.negative_class is None:
            return self.negative_prompt
        return without_word(str(self.negative_prompt), self.token, self.words[self.token], "").strip(" ,") or None

    def in_prompts(self, prompt: str) -> str:
        """A prompt with the word as it is drawn and learned: a word of the negative prompt is its class there."""
        if self.negative_class is None:
            return prompt
        return without_word(prompt, self.token, self.words[self.token], self.negative_class)

    @property
    def entries(self) -> np.ndarray:
        """The pictures that an epoch shows, int32 [M]; a repeated one is in it several times."""
        names = self.pictures.names
        return np.repeat(np.arange(len(names), dtype=np.int32), [repeats_of(name) for name in names])

    @property
    def first_prompt(self) -> str:
        """The first training prompt that has no caption."""
        return fill(self.templates[0], self.token)

    @property
    def first_prompt_before_training(self) -> str:
        """`first_prompt` with the initializer in the word's place."""
        before = self.start.token if self.start else str(self.initializer)
        return fill(self.templates[0], self.negative_class or before)


@dataclass(frozen=True)
class Concept(CheckedConcept):
    """A checked concept with the run's initial rows.

    Attributes:
      rows: initial values of all rows of the run, float32 [n, D] for each text encoder. row_mask: bool [n], true for
        rows that are trained. Both are the same for all concepts of a run.
      metadata: origin of the word, to be saved in its file.
      class_rows: as ``rows``, with the initializer's own tokens in the place of each concept, for ``context_loss``;
        None: it is not asked for.
    """

    rows: dict[str, np.ndarray]
    row_mask: dict[str, np.ndarray]
    metadata: dict[str, str]
    class_rows: dict[str, np.ndarray] | None = None

    def embedding(self, rows: Rows, step: int) -> Embedding:
        """The word with the run's rows of ``step``, as an `Embedding` to save or draw with."""
        vectors = {name: np.asarray(value)[self.own].astype(np.float32) for name, value in rows.items()}
        return Embedding(self.token, vectors, {**self.metadata, "steps": str(step)})


def check_concepts(
    configs: Sequence[TrainConfig], model: ModelDescription, inputs: Sequence[Inputs], log: LogLine
) -> list[CheckedConcept]:
    """`check_concept` for all concepts of a run, whose prompts may have each other's words.

    Raises:
      InputError: as `check_concept`.
    """
    others, _ = tokens.combine(inputs[0].others)
    for config in configs:
        if same_word(str(config.placeholder_token), others):
            raise InputError(
                f"placeholder {config.placeholder_token!r} is also the word of one of --embeddings; choose another"
            )
    words = {str(config.placeholder_token): config.num_vectors for config in configs} | others
    return [check_concept(config, model, each, words, log) for config, each in zip(configs, inputs, strict=True)]


def check_concept(
    config: TrainConfig, model: ModelDescription, inputs: Inputs, words: dict[str, int], log: LogLine
) -> CheckedConcept:
    """Check words, initializer, templates, prompts and pictures against a model's configuration and tokenizers.

    Args:
      words: of the run, see `CheckedConcept`.

    Raises:
      InputError: one of them is wrong.
    """
    assert config.placeholder_token and config.overview_prompts is not None, "the config is resolved"
    token = config.placeholder_token
    for path, other in zip(config.embeddings, inputs.others, strict=True):
        check_fits(other, model.embedding_dims, path)
    for name, tokenizer in model.tokenizers.items():
        tokens.check_new_word(tokenizer, token)
        if inputs.start is None:
            assert config.initializer_token is not None, f"the config is resolved, {name} starts from a token"
            tokens.initializer_ids(tokenizer, config.initializer_token)
    start = inputs.start
    if start is not None:
        check_fits(start, model.embedding_dims, f"--initializer_embedding {config.initializer_embedding}")
        start = Embedding(_name_of_start(token, words), start.vectors, start.metadata)

    size = config.resolution or model.default_resolution
    pictures = inputs.pictures or load_pictures(config, inputs.folder, size, log)
    plain, captioned = for_captions(inputs.templates, config.learnable_property)
    captions = [inputs.captions.get(name) for name in pictures.names]
    made = picture_prompts(
        [None if caption is None else with_placeholder(caption, token, words) for caption in captions],
        plain, captioned, config, fits=lambda template: fits(model, fill(template, token), words),
    )  # fmt: skip
    if made.cut:
        log(
            f"captions: {len(made.cut)} longer than the text encoder reads, and cut at the end, tag by tag: "
            f"{listed([pictures.names[index] for index in made.cut], 3)}"
        )
    prompts = [fill(template, token) for template in made.templates]
    check_room(config, model, prompts, words)
    check_holds(model, prompts, words, token, weighted=False)
    checked = CheckedConcept(
        config=replace(config, resolution=pictures.pixels.shape[1]),
        token=token,
        words=words,
        others=inputs.others,
        start=start,
        templates=plain,
        prompts=prompts,
        prompts_of=made.prompts_of,
        overview_prompts=[fill(prompt, token) for prompt in config.overview_prompts],
        validation_prompts=[fill(prompt, token) for prompt in config.validation_prompt or ()],
        pictures=pictures,
        initializer=config.initializer_token,
    )
    if checked.negative_class is None:
        return checked
    model.tokenize([token, *map(checked.in_prompts, prompts)], words)  # of which none may be too long
    return replace(
        checked,
        overview_prompts=[checked.in_prompts(prompt) for prompt in checked.overview_prompts],
        validation_prompts=[checked.in_prompts(prompt) for prompt in checked.validation_prompts],
    )


def _name_of_start(token: str, words: Mapping[str, int]) -> str:
    """A name that is not in ``words``, for the word that initialises the rows."""
    name = f"{token}-start"
    while same_word(name, words):
        name += "-"
    return name


def with_rows(checked: Sequence[CheckedConcept], sd: StableDiffusion) -> tuple[Concept, ...]:
    """Add the run's initial rows: those of each concept, from a learned word's file or the rows of its initializer's
    tokens, and those of the other learned words.
    """
    others = checked[0].others
    _, other_rows = tokens.combine(others)

    def of_run(rows_of: Callable[[CheckedConcept, str, StableDiffusion], np.ndarray]) -> dict[str, np.ndarray]:
        own = {name: [rows_of(concept, name, sd) for concept in checked] for name in sd.tokenizers}
        return {name: np.concatenate([*each, other_rows[name]] if others else each) for name, each in own.items()}

    rows = of_run(_start_of)
    trained = sum(concept.words[concept.token] for concept in checked)
    row_mask = {name: np.arange(len(table)) < trained for name, table in rows.items()}
    class_rows = of_run(_tokens_of) if checked[0].config.context_loss else None
    return tuple(
        Concept(
            **{field.name: getattr(concept, field.name) for field in fields(CheckedConcept)},
            rows=rows,
            row_mask=row_mask,
            class_rows=class_rows,
            metadata={
                "base_model": public_name(sd.name),
                "base_model_hash": sd.identity,
                "token": concept.token,
                **_start_metadata(concept.config, concept.start),
                "num_vectors": str(concept.words[concept.token]),
                "learnable_property": concept.config.learnable_property,
                **({"clip_skip": str(sd.clip_skip)} if sd.clip_skip else {}),
                **({} if concept.negative_class is None else {NEGATIVE_CLASS: concept.negative_class}),
            },
        )
        for concept in checked
    )


def _start_of(concept: CheckedConcept, encoder: str, sd: StableDiffusion) -> np.ndarray:
    """Initial values of a concept's own rows for a text encoder, float32 [n, D].

    Raises:
      InputError: they are to have a norm, and one of them is zero.
    """
    if concept.start is not None:
        rows = concept.start.vectors[encoder]
    else:
        rows = (_output_of if concept.config.initializer_output else _tokens_of)(concept, encoder, sd)
    wanted = concept.config.kept_norm
    if wanted == "free":
        return rows
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    if not norms.all():
        raise InputError(
            f"{concept.token}: a row starts from zeros in the {encoder}, which no norm can be given to (--row_norm, "
            f"--optimizer dti); start from another word"
        )
    if wanted == "initial":
        return rows
    if wanted == "vocabulary":
        wanted = float(np.linalg.norm(sd.token_table(encoder), axis=-1).mean())
    return np.asarray(rows * (float(wanted) / norms), np.float32)


def _tokens_of(concept: CheckedConcept, encoder: str, sd: StableDiffusion) -> np.ndarray:
    """The rows of the initializer's tokens for a text encoder, float32 [n, D], see `initial_rows`."""
    ids = tokens.initializer_ids(sd.tokenizers[encoder], str(concept.initializer))
    return tokens.initial_rows(sd.token_table(encoder), ids, concept.words[concept.token])


def _output_of(concept: CheckedConcept, encoder: str, sd: StableDiffusion) -> np.ndarray:
    """What a text encoder makes of the initializer's tokens, float32 [n, D].

    As in CrossInit (arXiv 2312.15905) and its code: the initializer is the whole prompt, and the states are those after
    the final layer norm, of SDXL's encoders too.
    """
    count = len(tokens.initializer_ids(sd.tokenizers[encoder], str(concept.initializer)))
    ids = jnp.asarray(sd.tokenize([str(concept.initializer)])[encoder])
    output = encode(dict(sd.networks.text_encoders)[encoder], sd.params[encoder], ids, None)
    states = np.asarray(output.last_hidden_state[0, 1 : 1 + count], np.float32)
    return tokens.initial_rows(states, range(count), concept.words[concept.token])


def public_name(model: str) -> str:
    """A model's hub id, or the bare name of a folder or file: paths are private."""
    if as_url(model) is not None:
        return Path(model).name
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() or path.is_absolute() else model


def _start_metadata(config: TrainConfig, start: Embedding | None) -> dict[str, str]:
    """The initialisation in a learned word's metadata: the token, or a file's name and a hash of its vectors."""
    if start is None:
        return {"initializer_token": str(config.initializer_token)}
    return {
        "initializer_embedding": Path(str(config.initializer_embedding)).name,
        "initializer_embedding_hash": str(hash_of_vectors([start])),
    }


def hash_of_vectors(embeddings: Sequence[Embedding]) -> str | None:
    """A hash of the vectors of learned words, 16 hexadecimal digits; None if there are no words."""
    if not embeddings:
        return None
    contents = (vectors.tobytes() for embedding in embeddings for vectors in embedding.vectors.values())
    return hashlib.sha256(b"".join(contents)).hexdigest()[:16]
