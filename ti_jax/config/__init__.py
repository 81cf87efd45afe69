"""What a run is: the settings as frozen dataclasses, their rules, and strict YAML. No jax in here.

A setting is one field: its default, rule and more in `setting`, its help under it. `rules` has the rules, `checks` what
must hold between fields, `defaults` what suits the model.
"""

from ti_jax.config.checks import check_fields
from ti_jax.config.concepts import concept_configs
from ti_jax.config.defaults import (
    ASSETS,
    DEMO_CONFIG,
    EMBEDDED_STEPS,
    PAPER_STEPS,
    STABLE_DIFFUSION_DEFAULTS,
    config_path,
    resolve,
    resolve_data,
    resolve_evaluate,
    resolve_infer,
    resolve_plan,
)
from ti_jax.config.evaluate import EvaluateConfig
from ti_jax.config.infer import InferConfig, VaeTiling
from ti_jax.config.model import ModelSettings, ModelSource
from ti_jax.config.train import Checkpointing, DataConfig, PlanConfig, TrainConfig
from ti_jax.config.yaml import dump_yaml, load_yaml

__all__ = [
    "ASSETS",
    "DEMO_CONFIG",
    "EMBEDDED_STEPS",
    "PAPER_STEPS",
    "STABLE_DIFFUSION_DEFAULTS",
    "Checkpointing",
    "DataConfig",
    "EvaluateConfig",
    "InferConfig",
    "ModelSettings",
    "ModelSource",
    "PlanConfig",
    "TrainConfig",
    "VaeTiling",
    "check_fields",
    "concept_configs",
    "config_path",
    "dump_yaml",
    "load_yaml",
    "resolve",
    "resolve_data",
    "resolve_evaluate",
    "resolve_infer",
    "resolve_plan",
]
