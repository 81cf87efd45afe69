"""How programs load a learned word: which file to put where, and what to write in the prompt."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

from ti_jax.config import TrainConfig
from ti_jax.config.concepts import slug
from ti_jax.embeddings import Embedding
from ti_jax.embeddings.embedding import NEGATIVE_CLASS
from ti_jax.embeddings.families import family_of
from ti_jax.embeddings.warn import capital_fault
from ti_jax.remote import place_of
from ti_jax.training.run_folder import EMBEDDING_FILE, ONE_FILE
from ti_jax.words import fill

SECOND_FILE = "learned_embeds_2.safetensors"  # the second text encoder's rows of an SDXL word, for diffusers


@dataclass(frozen=True)
class Use:
    """How one program takes a word.

    Attributes:
      files: those of the run's folder that it reads. place: where it looks for the file, and under which name; None:
        the file stays where it is.
      prompt: an example. negative_prompt: None: the word is not for the negative prompt.
      code: a command line or Python code, for programs that are used so. note: what else matters there.
    """

    program: str
    files: tuple[str, ...]
    place: str | None
    prompt: str
    negative_prompt: str | None
    code: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Base:
    """The base model, as code is to name it: a hub id or a path; ``None`` is the embedded one.

    Attributes:
      single_file: whether it is a single-file checkpoint. clip_skip: counted as diffusers does.
    """

    name: str | None
    single_file: bool = False
    clip_skip: int = 0


def base_of(config: TrainConfig, public_name: str) -> Base:
    """The base model of a run; ``public_name`` stands for it where it is a path of this machine."""
    model = config.pretrained_model_name_or_path
    if model is None:
        return Base(None, clip_skip=config.clip_skip)
    place = place_of(model)
    name = f"path/to/{public_name}" if place.exists() else public_name
    return Base(name, place.is_file(), config.clip_skip)


def example_prompt(config: TrainConfig) -> str:
    """A prompt to try a run's word with; ``{}`` stands for it."""
    return (config.overview_prompts or ("a picture of {}",))[0]


def uses(embedding: Embedding, prompt: str, source: str, base: Base) -> list[Use]:
    """How each program that knows the word's family of models takes it.

    Args:
      prompt: an example with ``{}`` in the word's place. source: the run's folder, as code is to name it.
    """
    subject = embedding.metadata.get(NEGATIVE_CLASS)

    def written(name: str) -> tuple[str, str | None]:
        return (fill(prompt, name), None) if subject is None else (fill(prompt, subject), name)

    sdxl, skip = len(embedding.vectors) > 1, base.clip_skip
    files, here = (EMBEDDING_FILE, SECOND_FILE) if sdxl else (EMBEDDING_FILE,), written(embedding.token)
    family, own = family_of(embedding.dims), None
    if family is None:
        numbers = " and ".join(map(str, embedding.dims.values()))
        own = f"AUTOMATIC1111, Forge and ComfyUI have no model whose words have {numbers} numbers a vector."
    found = [
        Use("ti_jax", files, None, *here, code=_command(embedding, here, source, base), note=own),
        Use(
            "diffusers", files, None, *here,
            code=diffusers_code(embedding, here[0], source, base),
            note=capital_fault(embedding.token, embedding.num_vectors),
        ),
    ]  # fmt: skip
    if family is None:
        return found
    file, name = ONE_FILE if sdxl else EMBEDDING_FILE, slug(embedding.token)
    # Both take the word from the file's name, and count the layers that are skipped in their own ways.
    automatic = f"Clip skip is to be {skip + 1} there." if skip else None
    comfy = f"CLIP Set Last Layer is to be -{skip + 1} there." if skip else None
    return [
        *found,
        Use("AUTOMATIC1111, Forge", (file,), f"embeddings/{name}.safetensors", *written(name), note=automatic),
        Use("ComfyUI", (file,), f"models/embeddings/{name}.safetensors", *written(f"embedding:{name}"), note=comfy),
    ]


def _command(embedding: Embedding, written: tuple[str, str | None], source: str, base: Base) -> str:
    prompt, negative = written
    flags = ["ti-jax infer --embedding " + shlex.quote(f"{source}/{EMBEDDING_FILE}")]
    if base.name is not None:
        flags.append("--pretrained_model_name_or_path " + shlex.quote(base.name))
    flags.append("--prompt " + shlex.quote(prompt))
    if negative is not None:
        flags.append("--negative_prompt " + shlex.quote(negative))
    if base.clip_skip:
        flags.append(f"--clip_skip {base.clip_skip}")
    return " \\\n    ".join(flags)


def diffusers_code(embedding: Embedding, prompt: str, source: str, base: Base) -> str:
    """Python code that loads a word into diffusers and draws with it.

    Args:
      prompt: with the word; of a word of the negative prompt, with what stands in its place. source: the repository or
        folder with the run's files.
    """
    sdxl = len(embedding.vectors) > 1
    kind = "StableDiffusionXLPipeline" if sdxl else "StableDiffusionPipeline"
    loader = "from_single_file" if base.single_file else "from_pretrained"
    lines = [
        f"from diffusers import {kind}",
        "",
        f"pipe = {kind}.{loader}({_quoted(base.name or 'path/to/mini-sd')})",
        f"pipe.load_textual_inversion({_quoted(source)}, weight_name={_quoted(EMBEDDING_FILE)})",
    ]
    if sdxl:
        lines += [
            "pipe.load_textual_inversion(",
            f"    {_quoted(source)},",
            f"    weight_name={_quoted(SECOND_FILE)},",
            "    text_encoder=pipe.text_encoder_2,",
            "    tokenizer=pipe.tokenizer_2,",
            ")",
        ]
    negative = f", negative_prompt={_quoted(embedding.token)}" if NEGATIVE_CLASS in embedding.metadata else ""
    skip = f", clip_skip={base.clip_skip}" if base.clip_skip else ""
    return "\n".join([*lines, f'pipe({_quoted(prompt)}{negative}{skip}).images[0].save("out.png")'])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
