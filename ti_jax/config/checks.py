"""Which values a config can have: one rule a field, and each error names the flag, the value and what is allowed."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ti_jax.config.yaml import from_yaml
from ti_jax.errors import InputError, is_utf8
from ti_jax.words import contains_word, is_word

if TYPE_CHECKING:
    from ti_jax.config.schema import EvaluateConfig, InferConfig, TrainConfig

# What is allowed, in words, and the test of it.
Rule = tuple[str, Callable[[Any], bool]]

COUNT: Rule = ("1 or more", lambda value: value >= 1)
WHOLE: Rule = ("0 or more", lambda value: value >= 0)
SEED: Rule = ("from 0 to 4294967295", lambda value: 0 <= value < 2**32)
SIDE: Rule = ("8 or more pixels and divisible by 8", lambda value: value >= 8 and value % 8 == 0)
POSITIVE: Rule = ("above 0 and finite", lambda value: value > 0 and math.isfinite(value))
NOT_NEGATIVE: Rule = ("0 or more and finite", lambda value: value >= 0 and math.isfinite(value))
CHANCE: Rule = ("from 0 to 1", lambda value: 0 <= value <= 1)
DECAY: Rule = ("0 or more and below 1", lambda value: 0 <= value < 1)
TEXT: Rule = ("text that is not empty", lambda value: bool(value.strip()))
TEXTS: Rule = ("texts that are not empty", lambda value: all(item.strip() for item in value))
SOME_TEXTS: Rule = ("one text or more, none empty", lambda value: bool(value) and all(item.strip() for item in value))
WORD: Rule = ("one word without spaces, like <cat-toy>", is_word)
ADDRESS: Rule = ("HOST:PORT, like 10.0.0.1:1234", lambda value: re.fullmatch(r"\S+:\d+", value) is not None)
PNG: Rule = ("the path of a .png file", lambda value: value.lower().endswith(".png"))
JSON: Rule = ("the path of a .json file", lambda value: value.lower().endswith(".json"))

# Fields that are not here can have any value of their type.
TRAIN_RULES: dict[str, Rule] = {
    "pretrained_model_name_or_path": TEXT,
    "revision": TEXT,
    "variant": TEXT,
    "vae": TEXT,
    "train_data_dir": TEXT,
    "placeholder_token": WORD,
    "initializer_token": TEXT,
    "initializer_embedding": TEXT,
    "num_vectors": COUNT,
    "templates": TEXT,
    "embeddings": TEXTS,
    "resolution": SIDE,
    "flip_probability": CHANCE,
    "output_dir": TEXT,
    "seed": SEED,
    "train_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "max_train_steps": COUNT,
    "num_train_epochs": COUNT,
    "repeats": COUNT,
    "coordinator_address": ADDRESS,
    "num_processes": COUNT,
    "process_id": WHOLE,
    "learning_rate": POSITIVE,
    "lr_warmup_steps": WHOLE,
    "lr_num_cycles": COUNT,
    "adam_beta1": DECAY,
    "adam_beta2": DECAY,
    "adam_weight_decay": NOT_NEGATIVE,
    "adam_epsilon": POSITIVE,
    "validation_prompt": TEXT,
    "num_validation_images": COUNT,
    "validation_steps": COUNT,
    "validation_guidance_scale": NOT_NEGATIVE,
    "validation_inference_steps": COUNT,
    "overview_prompts": SOME_TEXTS,
    "evaluation_clip": TEXT,
    "evaluation_images": COUNT,
    "evaluation_steps": COUNT,
    "logging_dir": TEXT,
    "logging_steps": COUNT,
    "save_steps": COUNT,
    "checkpointing_steps": COUNT,
    "checkpoints_total_limit": COUNT,
    "resume_from_checkpoint": TEXT,
    "hub_model_id": TEXT,
    "hub_license": TEXT,
    "hub_token": TEXT,
}

INFER_RULES: dict[str, Rule] = {
    "prompt": SOME_TEXTS,
    "embedding": TEXTS,
    "pretrained_model_name_or_path": TEXT,
    "revision": TEXT,
    "variant": TEXT,
    "vae": TEXT,
    "num_inference_steps": COUNT,
    "guidance_scale": NOT_NEGATIVE,
    "num_images": COUNT,
    "height": SIDE,
    "width": SIDE,
    "seed": SEED,
    "batch_size": COUNT,
    "output": PNG,
}

EVALUATE_RULES: dict[str, Rule] = {
    "train_data_dir": TEXT,
    "distractors": TEXT,
    "evaluation_clip": TEXT,
    "evaluation_images": COUNT,
    "pretrained_model_name_or_path": TEXT,
    "revision": TEXT,
    "variant": TEXT,
    "vae": TEXT,
    "num_inference_steps": COUNT,
    "guidance_scale": NOT_NEGATIVE,
    "seed": SEED,
    "batch_size": COUNT,
    "output": JSON,
}


# Fields that can hold a path, whose bytes need not be UTF-8.
_PATHS = {
    "pretrained_model_name_or_path", "train_data_dir", "initializer_embedding", "templates", "embeddings", "output_dir",
    "logging_dir", "resume_from_checkpoint", "evaluation_clip", "embedding", "distractors", "output",
}  # fmt: skip


def check_train(config: TrainConfig) -> None:
    """Check a `TrainConfig` whose model defaults are filled in.

    Raises:
      InputError: the first value that cannot be.
    """
    _check_fields(config, TRAIN_RULES)
    if not is_utf8(os.path.abspath(config.output_dir)):  # which TensorStore, that writes checkpoints, does not take
        raise InputError(f"--output_dir {config.output_dir!r}: not a path in UTF-8; choose another place")
    _check_model(config)
    if config.initializer_token is not None and config.initializer_embedding is not None:
        raise InputError(
            f"--initializer_token {config.initializer_token!r} and --initializer_embedding "
            f"{config.initializer_embedding!r}: the rows start from one of them; leave one out (--initializer_token "
            f"None undoes the one of a config file)"
        )
    if config.process_id is not None and config.num_processes is not None and config.process_id >= config.num_processes:
        raise InputError(
            f"--process_id {config.process_id}: must be from 0 to {config.num_processes - 1}, one below --num_processes"
        )
    scale = config.validation_guidance_scale
    if config.validation_negative_prompt is not None and scale is not None and scale <= 1:
        raise InputError(
            f"--validation_negative_prompt: does nothing with --validation_guidance_scale {scale:g}; give one above 1, "
            f"or leave the negative prompt out"
        )
    prompts = [("overview_prompts", prompt) for prompt in config.overview_prompts or ()]
    if config.validation_prompt is not None:
        prompts.insert(0, ("validation_prompt", config.validation_prompt))
    if config.keep_best in ("clip_i", "clip_t") and config.evaluation_clip is None:
        raise InputError(f"--keep_best {config.keep_best}: needs a CLIP model; give its folder with --evaluation_clip")
    word = config.placeholder_token or ""
    for name, prompt in prompts:
        if "{}" not in prompt and not contains_word(prompt, word):
            raise InputError(
                f"--{name} {prompt!r}: the new word {word} is not in it; write it, or {{}} in its place (in a shell, "
                f"quote the prompt: < and > mean something there)"
            )


def check_infer(config: InferConfig) -> None:
    """Check an `InferConfig` whose model defaults are filled in.

    Raises:
      InputError: the first value that cannot be.
    """
    if not config.prompt:
        raise InputError("--prompt is missing: say what to draw, e.g. --prompt 'a portrait of a person'")
    _check_fields(config, INFER_RULES)
    _check_model(config)
    if config.negative_prompt is not None and config.guidance_scale is not None and config.guidance_scale <= 1:
        raise InputError(
            f"--negative_prompt: does nothing with --guidance_scale {config.guidance_scale:g}; give one above 1, or "
            f"leave the negative prompt out"
        )


def check_evaluate(config: EvaluateConfig) -> None:
    """Check an `EvaluateConfig` whose model defaults are filled in.

    Raises:
      InputError: the first value that cannot be.
    """
    if config.train_data_dir is None:
        raise InputError("--train_data_dir is missing: the folder with pictures of the concept to compare with")
    _check_fields(config, EVALUATE_RULES)
    _check_model(config)


def _check_fields(config: Any, rules: dict[str, Rule]) -> None:
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        try:
            # A config made in Python has been through no parser yet.
            from_yaml(list(value) if isinstance(value, tuple) else value, hints[field.name])
            if field.name not in _PATHS and not all(map(is_utf8, value if isinstance(value, tuple) else [str(value)])):
                raise ValueError("text in UTF-8; the terminal sends another encoding")
            if value is not None and field.name in rules:
                allowed, holds = rules[field.name]
                if not holds(value):
                    raise ValueError(allowed)
        except ValueError as error:
            shown = " ".join(map(repr, value)) if isinstance(value, tuple) else repr(value)
            raise InputError(f"--{field.name} {shown}: must be {error}") from error


def _check_model(config: TrainConfig | InferConfig | EvaluateConfig) -> None:
    if config.pretrained_model_name_or_path is None:
        for name in ("revision", "variant", "prediction_type"):
            if getattr(config, name) is not None:
                raise InputError(
                    f"--{name} {getattr(config, name)}: the embedded model has only one; leave it out, or give the "
                    f"model that it is meant for with --pretrained_model_name_or_path"
                )
