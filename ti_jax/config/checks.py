"""Whether a config can be: each value by the rule of its field, and what must hold between fields.

Each error names the flag, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Sequence
from typing import Any

from ti_jax.config.evaluate import EvaluateConfig
from ti_jax.config.fields import setting_of
from ti_jax.config.infer import InferConfig
from ti_jax.config.model import ModelSettings
from ti_jax.config.train import TrainConfig
from ti_jax.config.yaml import from_yaml
from ti_jax.errors import InputError, is_utf8
from ti_jax.files import as_url
from ti_jax.words import contains_word


def check_fields(config: Any) -> None:
    """Check each value of a config by its field's type and rule.

    Raises:
      InputError: the first value that cannot be.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, about = getattr(config, field.name), setting_of(field)
        try:
            # A config made in Python has been through no parser yet.
            from_yaml(list(value) if isinstance(value, tuple) else value, hints[field.name])
            items = value if isinstance(value, tuple) else (value,)
            if about.path is None and not all(is_utf8(str(item)) for item in items):
                raise ValueError("text in UTF-8; the terminal sends another encoding")
            if value is not None and about.rule is not None and not about.rule.holds(value):
                raise ValueError(about.rule.allowed)
        except ValueError as error:
            shown = " ".join(map(repr, value)) if isinstance(value, tuple) else repr(value)
            raise InputError(f"--{field.name} {shown}: must be {error}") from error


def check_train(config: TrainConfig) -> None:
    """Check a `TrainConfig` whose model defaults are filled in.

    Raises:
      InputError: the first value that cannot be.
    """
    check_fields(config)
    if not is_utf8(os.path.abspath(config.output_dir)):  # which TensorStore, that writes checkpoints, does not take
        raise InputError(f"--output_dir {config.output_dir!r}: not a path in UTF-8; choose another place")
    if as_url(config.logging_dir):
        raise InputError(
            f"--logging_dir {config.logging_dir}: a folder in --output_dir, with which it is sent; give its name alone"
        )
    _check_model(config)
    if config.initializer_token is not None and config.initializer_embedding is not None:
        raise InputError(
            f"--initializer_token {config.initializer_token!r} and --initializer_embedding "
            f"{config.initializer_embedding!r}: the rows start from one of them; leave one out (--initializer_token "
            f"None undoes the one of a config file)"
        )
    if config.initializer_embedding is not None:
        for name, what in (("initializer_output", "start from"), ("context_loss", "compare with")):
            if value := getattr(config, name):
                raise InputError(
                    f"--{name} {value}: needs the words of --initializer_token to {what}, and the rows start from "
                    f"--initializer_embedding; leave one of the two out"
                )
    if config.context_loss and config.learn_negative:
        raise InputError(
            f"--context_loss {config.context_loss:g}: prompts do not have the word of --learn_negative, so that it "
            f"changes nothing in them; leave one of the two out"
        )
    if isinstance(config.learning_rate, str) and config.lr_scheduler != "constant":
        raise InputError(
            f"--learning_rate {config.learning_rate!r}: has its own schedule, so --lr_scheduler {config.lr_scheduler} "
            f"does not go with it; give one rate, or leave the scheduler out"
        )
    if config.optimizer == "schedule_free":
        if config.ema_decay is not None:
            raise InputError(
                f"--ema_decay {config.ema_decay:g}: --optimizer schedule_free averages the rows itself; leave one out"
            )
        if config.adam_beta1 == 0:
            raise InputError("--adam_beta1 0: must be above 0 with --optimizer schedule_free, whose average it weighs")
    if config.optimizer == "dti":
        for name in ("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm"):
            if (value := getattr(config, name)) != getattr(TrainConfig, name):
                raise InputError(
                    f"--{name} {value:g}: does nothing with --optimizer dti, whose updates have the length of the "
                    f"learning rate; leave it out"
                )
    if config.huber_c is not None and config.loss != "huber":
        raise InputError(f"--huber_c {config.huber_c:g}: does nothing without --loss huber; give both or neither")
    check_pictures(config)
    if not config.early_stop:
        for name in ("early_stop_window", "early_stop_threshold"):
            if (value := getattr(config, name)) is not None:
                raise InputError(f"--{name} {value:g}: does nothing without --early_stop; give both or neither")
    if config.process_id is not None and config.num_processes is not None and config.process_id >= config.num_processes:
        raise InputError(
            f"--process_id {config.process_id}: must be from 0 to {config.num_processes - 1}, one below --num_processes"
        )
    _check_captions(config)
    _check_negative_prompt(config, "validation_negative_prompt", "validation_guidance_scale")
    prompts = [("overview_prompts", prompt) for prompt in config.overview_prompts or ()]
    prompts = [*(("validation_prompt", prompt) for prompt in config.validation_prompt or ()), *prompts]
    _check_negative(config)
    _check_report_to(config.report_to)
    if config.profile_steps is not None and config.max_train_steps is not None:
        first, last = config.profile_steps
        if last > config.max_train_steps:
            raise InputError(
                f"--profile_steps {first} {last}: the run ends after {config.max_train_steps} updates "
                f"(--max_train_steps); give earlier ones"
            )
    if config.keep_best in ("clip_i", "clip_t") and config.evaluation_clip is None:
        raise InputError(f"--keep_best {config.keep_best}: needs a CLIP model; give its folder with --evaluation_clip")
    if config.concepts_per_batch is not None and config.concepts is None:
        raise InputError(
            f"--concepts_per_batch {config.concepts_per_batch}: there is one concept; give several with --concepts, or "
            f"leave it out"
        )
    if config.concepts is not None:
        return  # each prompt is checked for each word
    word = config.placeholder_token or ""
    for name, prompt in prompts:
        if "{}" not in prompt and not contains_word(prompt, word):
            raise InputError(
                f"--{name} {prompt!r}: the new word {word} is not in it; write it, or {{}} in its place (in a shell, "
                f"quote the prompt: < and > mean something there)"
            )


def check_pictures(config: TrainConfig) -> None:
    """Refuse settings of pictures that do nothing without another one.

    Raises:
      InputError: the first that is given alone.
    """
    for name in ("bucket_step", "max_aspect_ratio"):
        value = getattr(config, name)
        if value is not None and not config.aspect_ratio_buckets:
            raise InputError(f"--{name} {value:g}: does nothing without --aspect_ratio_buckets; give both or neither")
    if config.image_column is not None and config.dataset_name is None:
        raise InputError(
            f"--image_column {config.image_column!r}: does nothing without --dataset_name; give both or neither"
        )


def _check_negative(config: TrainConfig) -> None:
    """Check the settings of a word for the negative prompt."""
    if not config.learn_negative:
        for name in ("negative_class", "negative_guidance_scale"):
            if getattr(config, name) is not None:
                raise InputError(
                    f"--{name} {getattr(config, name)}: only a word for the negative prompt has it; give "
                    f"--learn_negative, too, or leave it out"
                )
        return
    if config.concepts is not None:
        raise InputError(
            f"--concepts {config.concepts} and --learn_negative: a word for the negative prompt is learned alone; "
            f"leave one of the two out"
        )
    if config.keep_best is not None:
        raise InputError(
            f"--keep_best {config.keep_best}: pictures with the word of --learn_negative should not be like those that "
            f"it is learned from, so that no score says which word is best; leave one of the two out"
        )
    scale = config.validation_guidance_scale
    if scale is not None and scale <= 1:
        raise InputError(
            f"--validation_guidance_scale {scale:g}: without guidance there is no negative prompt, which "
            f"--learn_negative learns a word for; give one above 1"
        )
    prompt = config.validation_negative_prompt
    if prompt is not None and "{}" not in prompt and not contains_word(prompt, config.placeholder_token or ""):
        raise InputError(
            f"--validation_negative_prompt {prompt!r}: the new word {config.placeholder_token} is not in it; write it, "
            f"or {{}} in its place, or leave the negative prompt out"
        )


def _check_report_to(places: Sequence[str]) -> None:
    if not places or len(set(places)) < len(places) or ("none" in places and len(places) > 1):
        raise InputError(f"--report_to {' '.join(places)}: must be none, or one or several of the others, each once")


def check_infer(config: InferConfig) -> None:
    """Check an `InferConfig` whose model defaults are filled in.

    Raises:
      InputError: the first value that cannot be.
    """
    if not config.prompt:
        raise InputError("--prompt is missing: say what to draw, e.g. --prompt 'a portrait of a person'")
    check_fields(config)
    _check_model(config)
    _check_negative_prompt(config, "negative_prompt", "guidance_scale")


def check_evaluate(config: EvaluateConfig) -> None:
    """Check an `EvaluateConfig` whose model defaults are filled in.

    Raises:
      InputError: the first value that cannot be.
    """
    if config.train_data_dir is None:
        raise InputError("--train_data_dir is missing: the folder with pictures of the concept to compare with")
    check_fields(config)
    _check_model(config)


def _check_captions(config: TrainConfig) -> None:
    if config.dataset_name is not None and config.train_data_dir is not None:
        raise InputError(
            f"--dataset_name {config.dataset_name} and --train_data_dir {config.train_data_dir}: pictures come from "
            f"one of them; leave one out (--train_data_dir None undoes the one of a config file)"
        )
    if config.keep_tags and not config.shuffle_tags and not config.tag_dropout:
        raise InputError(
            f"--keep_tags {config.keep_tags}: does nothing without --shuffle_tags or --tag_dropout; add one of them, "
            f"or leave it out"
        )


def _check_negative_prompt(config: ModelSettings, prompt: str, guidance_scale: str) -> None:
    """Refuse a negative prompt without guidance; the last two arguments are the names of the fields."""
    scale = getattr(config, guidance_scale)
    if getattr(config, prompt) is not None and scale is not None and scale <= 1:
        raise InputError(
            f"--{prompt}: does nothing with --{guidance_scale} {scale:g}; give one above 1, or leave the negative "
            f"prompt out"
        )


def _check_model(config: ModelSettings) -> None:
    if config.pretrained_model_name_or_path is None:
        for name in ("revision", "variant", "prediction_type"):
            if getattr(config, name) is not None:
                raise InputError(
                    f"--{name} {getattr(config, name)}: the embedded model has only one; leave it out, or give the "
                    f"model that it is meant for with --pretrained_model_name_or_path"
                )
