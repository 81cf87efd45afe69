"""Prompt templates: the sentences in which a new word is shown to the model while it is learned."""

from __future__ import annotations

import re
from pathlib import Path

from ti_jax.errors import InputError
from ti_jax.remote import local_copy

PLACEHOLDER, CAPTION = "{}", "{caption}"

# AUTOMATIC1111's names for the same.
_A1111 = {"[name]": PLACEHOLDER, "[filewords]": CAPTION}

# Many framings of one thing, so that the word learns what all pictures share and not what differs. They describe the
# picture (light, distance, place, medium) and hardly the thing itself, whose properties the word is to learn.
OBJECT_TEMPLATES = (
    "a picture of {}",
    "a photograph of {}",
    "a photograph of a {}",
    "one photograph showing the {}",
    "a snapshot of {}",
    "a snapshot of the {} at home",
    "a detailed photograph of a {}",
    "a simple picture of one {}",
    "a sharp picture of the {}",
    "a slightly blurred picture of a {}",
    "a photograph of {} from nearby",
    "a photograph of the {} from far away",
    "a photograph of {} from above",
    "a photograph of the {} from the side",
    "a {} in the middle of the picture",
    "a picture that shows all of the {}",
    "a picture that shows a part of the {}",
    "a well lit photograph of {}",
    "a photograph of a {} in dim light",
    "a {} in daylight",
    "the {} on a plain background",
    "the {} in front of a busy background",
    "an outdoor photograph of {}",
    "an indoor photograph of the {}",
    "a product photograph of a {}",
    "an amateur photograph of my {}",
    "an image of the same {} again",
    "an illustration of a {}",
)

STYLE_TEMPLATES = (
    "a picture in the style of {}",
    "an artwork in the style of {}",
    "an image made in the style of {}",
    "a drawing in {} style",
    "a canvas in the style of {}",
    "an illustration in {} style",
    "a portrait in the style of {}",
    "a landscape in the style of {}",
    "a street scene in the style of {}",
    "a still life in the style of {}",
    "an interior in the style of {}",
    "an animal drawn in the style of {}",
    "a building in the style of {}",
    "a detail of a picture in {} style",
    "a sketch in the style of {}",
    "a large work in the style of {}",
    "a colourful picture in the style of {}",
    "a dim picture in the style of {}",
    "a typical piece in {} style",
    "a scene rendered in the style of {}",
)

TEMPLATES = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES}
CAPTION_TEMPLATES = {"object": "a photo of {}, {caption}", "style": "{caption}, in the style of {}"}


def load_templates(learnable_property: str, templates_file: str | Path | None = None) -> list[str]:
    """The templates of a run, with ``{}`` for the new word (`ti_jax.words.fill` replaces it; other braces are text).

    Args:
      learnable_property: "object" or "style" selects one of our lists. Each has as many sentences as that of diffusers'
        ``textual_inversion.py``, with other wording.
      templates_file: a text file that replaces the list: UTF-8, one template per line; blank lines and lines that start
        with # are skipped. ``{caption}`` stands for a picture's caption; AUTOMATIC1111's ``[name]`` and
        ``[filewords]`` are read, too.

    Raises:
      InputError: an unknown property; a file that cannot be read, is not UTF-8, or holds no template; a line without
        ``{}`` (given by its number), from which the word could not learn.
    """
    if templates_file is not None:
        return _read_templates(local_copy(templates_file))
    if learnable_property not in TEMPLATES:
        raise InputError(f"learnable_property {learnable_property!r}: it must be {' or '.join(TEMPLATES)}")
    return list(TEMPLATES[learnable_property])


def for_captions(templates: list[str], learnable_property: str) -> tuple[list[str], list[str]]:
    """The templates for pictures without and with a caption; what a list does not have is ours."""
    plain = [template for template in templates if CAPTION not in template]
    captioned = [template for template in templates if CAPTION in template]
    return plain or list(TEMPLATES[learnable_property]), captioned or [CAPTION_TEMPLATES[learnable_property]]


def _read_templates(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"templates {path}: no such file; give a text file with one prompt a line") from error
    except OSError as error:
        raise InputError(f"templates {path}: cannot be read ({error.strerror}); give a text file") from error
    try:
        text = content.decode("utf-8-sig")  # Windows editors write a byte order mark
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"templates {path}, line {number}: not UTF-8 text; save the file as UTF-8") from error
    templates = []
    # Not splitlines, which also splits at characters that may be inside a sentence.
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        template = line.strip()
        if not template or template.startswith("#"):
            continue
        for theirs, ours in _A1111.items():
            template = template.replace(theirs, ours)
        if PLACEHOLDER not in template:
            shown = template if len(template) <= 60 else template[:57] + "..."
            raise InputError(f"templates {path}, line {number}: no {{}} for the new word in {shown!r}; put it in")
        templates.append(template)
    if not templates:
        raise InputError(f"templates {path}: no template in it; write one prompt a line, with {{}} for the new word")
    return templates
