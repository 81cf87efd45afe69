"""The prompts of each picture: templates, captions, and the variants of a caption that are drawn from.

All variants are made here, before the first step, so that a step draws one by its number: the loop stays on the device,
and a step's prompts depend on nothing but the seed and its number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ti_jax.config import TrainConfig
from ti_jax.text.templates import CAPTION, PLACEHOLDER
from ti_jax.words import find_words

# Variants of a captioned picture's prompt, where something about it is random. Of many pictures each has fewer: all
# prompts of a run are tokenized before it starts, which takes a millisecond each.
VARIANTS, LEAST_VARIANTS, MOST_PROMPTS = 32, 4, 40_000


class PicturePrompts(NamedTuple):
    """The prompts of a concept's pictures.

    Attributes:
      templates: every distinct prompt, with ``{}`` in the word's place.
      prompts_of: int32 [N, K], each picture's equally likely prompts as indices into ``templates``; a picture that has
        fewer than K has -1 after them.
      cut: indices of the pictures whose captions are too long, so that they lose their end.
    """

    templates: list[str]
    prompts_of: np.ndarray
    cut: list[int]


def picture_prompts(
    captions: Sequence[str | None],
    plain: list[str],
    captioned: list[str],
    config: TrainConfig,
    fits: Callable[[str], bool],
) -> PicturePrompts:
    """The prompts of each picture.

    A caption that has ``{}`` is the prompt; any other is inserted into the ``captioned`` templates. Without captions
    all pictures have the ``plain`` ones.

    Args:
      captions: of each picture, ``{}`` in the word's place (`with_placeholder`); None: it has none.
      plain, captioned: templates with ``{}``; the latter also with ``{caption}``.
      config: for ``shuffle_tags``, ``keep_tags``, ``tag_dropout``, ``caption_dropout`` and the seed.
      fits: whether a prompt with ``{}`` in the word's place is short enough for the text encoders.
    """
    if not any(captions):
        return PicturePrompts(plain, np.tile(np.arange(len(plain), dtype=np.int32), (len(captions), 1)), [])
    count = max(LEAST_VARIANTS, min(VARIANTS, MOST_PROMPTS // len(captions)))
    described = 0
    table: dict[str, int] = {}
    rows, cut = [], []
    for index, caption in enumerate(captions):
        prompts = plain
        if caption is not None:
            if config.shuffle_tags or config.tag_dropout > 0 or config.caption_dropout > 0:
                # Of the variants of all pictures together, exactly the share that is asked for is without a caption.
                dropped = _dropped((described + 1) * count, config) - _dropped(described * count, config)
                pairs = _variants(caption, plain, captioned, config, index, count, dropped)
            else:
                pairs = [(caption, template) for template in _templates_for(caption, captioned)]
            described += 1
            prompts = [_prompt(*pair, fits) for pair in pairs]
            if prompts != [_insert(*pair) for pair in pairs]:
                cut.append(index)
        rows.append([table.setdefault(prompt, len(table)) for prompt in prompts])
    prompts_of = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for picture, row in enumerate(rows):
        prompts_of[picture, : len(row)] = row
    return PicturePrompts(list(table), prompts_of, cut)


def _dropped(variants: int, config: TrainConfig) -> int:
    """How many of so many variants are without their caption."""
    return math.ceil(variants * config.caption_dropout - 1e-6)  # 0.1 * 30 is a little above 3


def _variants(
    caption: str, plain: list[str], captioned: list[str], config: TrainConfig, picture: int, count: int, dropped: int
) -> list[tuple[str, str]]:
    """``count`` variants of a caption with their templates; in the first ``dropped`` of them it is left out."""
    rng = np.random.default_rng((config.seed, picture))
    templates = _templates_for(caption, captioned)
    first = int(rng.integers(len(plain)))
    variants = []
    for number in range(count):
        variant = "" if number < dropped else _variant(caption, config, rng)
        template = templates[number % len(templates)] if variant else plain[(first + number) % len(plain)]
        variants.append((variant, template))
    return variants


def _templates_for(caption: str, captioned: list[str]) -> list[str]:
    return [CAPTION] if PLACEHOLDER in caption else captioned


def with_placeholder(caption: str, token: str, words: Mapping[str, int]) -> str:
    """A caption with ``{}`` wherever it has the word ``token``, one of the run's ``words``, with all its vectors."""
    end, text = 0, ""
    for found in find_words(caption, words):
        if found.word == token and len(found.rows) == words[token]:
            text += caption[end : found.start] + PLACEHOLDER
            end = found.end
    return text + caption[end:]


def tags_of(caption: str) -> list[str]:
    """What is between a caption's commas."""
    return [tag.strip() for tag in caption.split(",") if tag.strip()]


def _insert(caption: str, template: str) -> str:
    prompt = template.replace(CAPTION, caption)
    return prompt if caption or CAPTION not in template else prompt.strip(" ,")


def _variant(caption: str, config: TrainConfig, rng: np.random.Generator) -> str:
    """A caption with tags in another order or left out; the first ``keep_tags``, and the word, always stay."""
    if not config.shuffle_tags and config.tag_dropout == 0:
        return caption
    tags = tags_of(caption)
    kept, others = tags[: config.keep_tags], tags[config.keep_tags :]
    stays = rng.random(len(others)) >= config.tag_dropout
    others = [tag for tag, stay in zip(others, stays, strict=True) if stay or PLACEHOLDER in tag]
    if config.shuffle_tags:
        others = [others[index] for index in rng.permutation(len(others))]
    return ", ".join([*kept, *others])


def _prompt(caption: str, template: str, fits: Callable[[str], bool]) -> str:
    """The prompt of a caption, without as many of its last tags as it takes to fit; of a single one, without its words.

    The word is never lost. If the prompt is too long even so, it comes back too long.
    """
    if fits(prompt := _insert(caption, template)):
        return prompt
    tags = tags_of(caption)
    while len(tags) > 1 and (last := _last_without_word(tags)) is not None:
        del tags[last]
        if fits(prompt := _insert(", ".join(tags), template)):
            return prompt
    words = ", ".join(tags).split()
    while (last := _last_without_word(words)) is not None:
        del words[last]
        if fits(_insert(" ".join(words), template)):
            break
    return _insert(" ".join(words), template)


def _last_without_word(parts: list[str]) -> int | None:
    return next((index for index in reversed(range(len(parts))) if PLACEHOLDER not in parts[index]), None)
