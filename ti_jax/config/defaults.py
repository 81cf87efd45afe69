"""What a config leaves open is filled in for its model, and the whole is checked.

A field that is ``None`` means "what suits the model": `resolve` fills it in, from ``assets/demo.yaml`` for the embedded
default and from `STABLE_DIFFUSION_DEFAULTS` (the values of diffusers' ``textual_inversion.py``) for any other model.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ti_jax.config.checks import check_evaluate, check_fields, check_infer, check_pictures, check_train
from ti_jax.config.concepts import concept_configs, slug
from ti_jax.config.evaluate import EvaluateConfig
from ti_jax.config.fields import setting_of
from ti_jax.config.infer import InferConfig
from ti_jax.config.train import DataConfig, PlanConfig, TrainConfig
from ti_jax.config.yaml import load_yaml, switched
from ti_jax.errors import InputError

Config = TypeVar("Config")

ASSETS = Path(__file__).parents[1] / "assets"
DEMO_CONFIG = ASSETS / "demo.yaml"

# What everybody in the pictures of the embedded model is called.
EMBEDDED_CLASS = "a person"
# Half way between the prompt and the pictures: twice their difference is what the word learns. On the embedded model 0,
# which is no guidance at all, was as good; 3, the scale that it draws with, led towards the pictures.
NEGATIVE_GUIDANCE_SCALE = 0.5

# Of --early_stop, where left out: those of its paper; for the embedded model measured (recipes/mini_sd/NOTES.md).
PAPER_STOP = {"early_stop_window": 310, "early_stop_threshold": 0.15}
EMBEDDED_STOP = {"early_stop_window": 40, "early_stop_threshold": 0.005}

PAPER_STEPS, EMBEDDED_STEPS = 50, 25  # of the sampler, when a word is measured

ADAM_DEFAULTS = {"adam_beta1": 0.9, "adam_beta2": 0.999}

STABLE_DIFFUSION_DEFAULTS: dict[str, Any] = {
    "train_batch_size": 16,
    "learning_rate": 1e-4,
    **ADAM_DEFAULTS,
    "max_train_steps": 5000,
    "validation_guidance_scale": 7.5,
    "validation_inference_steps": 30,
    "overview_prompts": (
        "a photo of {} on a beach",
        "a photo of {} in the snow",
        "an oil painting of {}",
        "a pencil drawing of {}",
    ),
}


def config_path(given: str) -> str | Path:
    """The path of a config file; for ``configs/sd15.yaml`` and ``sd15``, if there is no such file, that of ours."""
    name = re.fullmatch(r"configs/(\w+)\.yaml|(\w+)", given)
    if name is None or os.path.exists(given):
        return given
    ours = ASSETS / f"{name[1] or name[2]}.yaml"
    return ours if ours.is_file() else given


def resolve(config: TrainConfig) -> TrainConfig:
    """Check a config and fill in what it leaves to the model; a resolved config comes back as it is.

    Four fields may stay None: ``resolution``, ``mixed_precision`` and ``gradient_checkpointing``, which the model and
    the device decide, and ``max_train_steps`` where ``num_train_epochs`` is given.

    Raises:
      InputError: a value that cannot be, or something that only the user can tell is missing.
    """
    config = _with_dataset(config)
    defaults = _training_defaults(config)
    if config.early_stop:
        defaults |= EMBEDDED_STOP if config.pretrained_model_name_or_path is None else PAPER_STOP
    if config.concepts is not None:
        return _resolve_several(_plain(config), defaults)
    own = config.train_data_dir or config.dataset_name
    if config.pretrained_model_name_or_path is None and own is not None:
        # The user's own pictures deserve a word of their own, not the example's.
        defaults["placeholder_token"] = f"<{slug(Path(own).expanduser().resolve().name)}>"
    if config.dataset_name is not None:
        defaults.pop("train_data_dir", None)
    if config.initializer_embedding is not None:
        defaults.pop("initializer_token", None)
    if config.num_train_epochs is not None:
        del defaults["max_train_steps"]
    if config.learn_negative:
        embedded = config.pretrained_model_name_or_path is None
        defaults["negative_class"] = EMBEDDED_CLASS if embedded else config.initializer_token
        defaults["negative_guidance_scale"] = NEGATIVE_GUIDANCE_SCALE
    config = _filled(config, defaults)
    if config.learn_negative:
        _require(config, "negative_class")
    start = () if config.initializer_embedding is not None else ("initializer_token",)
    pictures = () if config.dataset_name is not None else ("train_data_dir",)
    _require(config, *pictures, "placeholder_token", *start)
    config = _plain(config)
    check_train(config)
    return config


def _resolve_several(config: TrainConfig, defaults: dict[str, Any]) -> TrainConfig:
    """`resolve` for a run with ``--concepts``: each concept is resolved as if it were alone."""
    check_fields(config)
    for name in ("train_data_dir", "placeholder_token"):
        if getattr(config, name) is not None:
            raise InputError(
                f"--concepts {config.concepts} and --{name} {getattr(config, name)}: the concepts have their own; "
                f"leave one out (--{name} None undoes the one of a config file)"
            )
        defaults.pop(name, None)
    if config.initializer_embedding is not None:
        defaults.pop("initializer_token", None)
    count = len(concept_configs(config))
    if config.num_train_epochs is not None:
        del defaults["max_train_steps"]
    else:  # as many samples of each word as in a run of its own
        defaults["max_train_steps"] *= count
    config = _filled(config, defaults)
    for concept in concept_configs(config):
        try:
            resolve(concept)
        except InputError as error:
            raise InputError(f"--concepts {config.concepts}, {concept.placeholder_token}: {error}") from error
    check_train(config)
    return config


def differing(config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The settings of a resolved config that are not what they would be if they were left out.

    Returns:
      By name, value and default; None where there is no default, as for the pictures of a model that is not the
      embedded one. Secrets are left out, and what another process of the same run has otherwise.
    """
    found = {}
    for field in dataclasses.fields(config):
        value, about = getattr(config, field.name), setting_of(field)
        if value == field.default or about.secret or about.of_this_process:
            continue
        try:
            left_out: dict[str, Any] = {field.name: field.default}
            default = getattr(resolve(dataclasses.replace(config, **left_out)), field.name)
        except InputError:  # it has to be given
            default = None
        if value != default:
            found[field.name] = (value, default)
    return found


def resolve_plan(config: PlanConfig) -> PlanConfig:
    """As `resolve`, for planning: neither pictures nor words are needed.

    Raises:
      InputError: a value that cannot be.
    """
    defaults = _training_defaults(config)
    config = _plain(_filled(config, defaults))
    check_train(config)
    return config


def resolve_data(config: DataConfig) -> DataConfig:
    """As `resolve`, for looking at pictures: neither model nor words are needed. A resolution that is left out is the
    embedded model's, or with another model 512.

    Raises:
      InputError: a value that cannot be.
    """
    resolution = 64 if config.pretrained_model_name_or_path is None else 512
    config = _plain(_filled(config, {"resolution": resolution} | _bucket_defaults(config)))
    check_fields(config)
    check_pictures(config)
    return config


def resolve_infer(config: InferConfig) -> InferConfig:
    """As `resolve`, for drawing: ``height``, ``width``, ``scheduler`` and ``mixed_precision`` stay as they are.

    Raises:
      InputError: a value that cannot be, or no prompt.
    """
    defaults = _model_defaults(config.pretrained_model_name_or_path)
    steps, scale = defaults["validation_inference_steps"], defaults["validation_guidance_scale"]
    config = _plain(_filled(config, {"num_inference_steps": steps, "guidance_scale": scale}))
    check_infer(config)
    return config


def resolve_evaluate(config: EvaluateConfig) -> EvaluateConfig:
    """As `resolve`, for measuring.

    Raises:
      InputError: a value that cannot be, or no pictures.
    """
    steps = EMBEDDED_STEPS if config.pretrained_model_name_or_path is None else PAPER_STEPS
    scale = _model_defaults(config.pretrained_model_name_or_path)["validation_guidance_scale"]
    config = _plain(_filled(config, {"num_inference_steps": steps, "guidance_scale": scale}))
    check_evaluate(config)
    return config


@functools.cache
def _demo_settings() -> dict[str, Any]:
    return load_yaml(DEMO_CONFIG, TrainConfig)


def _model_defaults(model: str | None) -> dict[str, Any]:
    return dict(_demo_settings() if model is None else STABLE_DIFFUSION_DEFAULTS)


def _training_defaults(config: TrainConfig) -> dict[str, Any]:
    """Those of the model, but for what suits the optimizer more: Prodigy's rate multiplies the one that it finds, and
    that of dti is an angle (its authors' rate). The embedded model's decays are AdamW's; dti has none.
    """
    rate = {"prodigy": 1.0, "dti": 1e-2}.get(config.optimizer)
    own = {} if rate is None else {"learning_rate": rate}
    decays = {"adamw": {}, "dti": dict.fromkeys(ADAM_DEFAULTS)}.get(config.optimizer, ADAM_DEFAULTS)
    return _model_defaults(config.pretrained_model_name_or_path) | own | decays | _bucket_defaults(config)


def _bucket_defaults(config: TrainConfig) -> dict[str, Any]:
    return {"bucket_step": 64, "max_aspect_ratio": 2.0} if config.aspect_ratio_buckets else {}


def _filled(config: Config, defaults: Mapping[str, Any]) -> Config:
    """The config with ``defaults`` in the fields that are None."""
    left_out = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **left_out)  # type: ignore[type-var]


def _with_dataset(config: TrainConfig) -> TrainConfig:
    """With ``dataset_name`` where ``train_data_dir`` is the id of a dataset: owner/name, and no folder here."""
    given = config.train_data_dir
    if given is None or config.dataset_name is not None or os.path.exists(os.path.expanduser(os.fspath(given))):
        return config
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(given), re.ASCII) is None:
        return config
    return dataclasses.replace(config, dataset_name=str(given), train_data_dir=None)


def _require(config: TrainConfig, *names: str) -> None:
    missing = [f"--{name}" for name in names if getattr(config, name) is None]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} must be given with --pretrained_model_name_or_path: only the embedded model has "
            f"an example (for instance --train_data_dir cat/ --placeholder_token '<cat-toy>' --initializer_token toy)"
        )


def _plain(config: Config) -> Config:
    """Values as text where a config made in Python, which has been through no parser, may have another form.

    Paths become text, ``~`` expanded: a shell expands it in ``--flag ~/x``, not in ``--flag=~/x`` and not in YAML. True
    and False become the words that they stand for.
    """

    def plain(value: Any, field: dataclasses.Field) -> Any:
        if setting_of(field).path is None:
            return switched(value, field)
        if isinstance(value, (tuple, list)):
            return tuple(plain(item, field) for item in value)
        return os.path.expanduser(os.fspath(value)) if isinstance(value, (str, os.PathLike)) else value

    fields = dataclasses.fields(config)  # type: ignore[arg-type]
    values = {field.name: plain(getattr(config, field.name), field) for field in fields}
    return dataclasses.replace(config, **values)  # type: ignore[type-var]
