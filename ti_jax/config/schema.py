"""What a run is: frozen dataclasses whose field docs are the command line's help. No jax in here.

A field that is ``None`` means "what suits the model": `resolve` fills it in, from ``assets/demo.yaml`` for the embedded
default and from `STABLE_DIFFUSION_DEFAULTS` (the values of diffusers' ``textual_inversion.py``) for any other model.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ti_jax.config.checks import check_evaluate, check_infer, check_train
from ti_jax.config.yaml import dump_yaml, load_yaml, switched
from ti_jax.errors import InputError

__all__ = [
    "EvaluateConfig", "InferConfig", "TrainConfig", "dump_yaml", "load_yaml", "resolve", "resolve_evaluate",
    "resolve_infer",
]  # fmt: skip

ASSETS = Path(__file__).parents[1] / "assets"
DEMO_CONFIG = ASSETS / "demo.yaml"

PAPER_STEPS, EMBEDDED_STEPS = 50, 25  # of the sampler, when a word is measured

LearnableProperty = Literal["object", "style"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
PredictionType = Literal["epsilon", "v_prediction"]
Checkpointing = Literal["none", "policy", "full"]
SamplerName = Literal["ddim", "euler", "euler_a", "dpm++"]
VaeTiling = Literal["auto", "always", "never"]
Measure = Literal["identity", "editability", "clip_i", "clip_t"]

STABLE_DIFFUSION_DEFAULTS: dict[str, Any] = {
    "train_batch_size": 16,
    "learning_rate": 1e-4,
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


def input_path(default: Any = None) -> Any:
    """A field that names files to read: in a YAML file they may be given relative to that file."""
    return dataclasses.field(default=default, metadata={"input_path": True})


def of_this_process() -> Any:
    """A field that other processes of the run have otherwise: not kept in the run's ``config.yaml``."""
    return dataclasses.field(default=None, metadata={"of_this_process": True})


@dataclass(frozen=True)
class TrainConfig:
    """Learn a new word for a frozen Stable Diffusion from a few pictures."""

    # -- the model
    pretrained_model_name_or_path: str | None = None
    """A diffusers folder, a Hugging Face Hub id, e.g. stable-diffusion-v1-5/stable-diffusion-v1-5, or a single
    .safetensors or .ckpt checkpoint. Left out: the small model that comes with ti_jax."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    variant: str | None = None
    """Variant of the weight files, e.g. fp16."""
    prediction_type: PredictionType | None = None
    """What the UNet predicts, for a single checkpoint that does not say it. Left out: what the model says; else epsilon
    (noise), but an SD2.x file must be told."""
    vae: str | None = input_path()
    """Folder of another autoencoder in diffusers' layout (config.json and weights), instead of the model's own."""
    mixed_precision: Literal["no", "bf16"] | None = None
    """Precision of the frozen weights and their activations; rows, loss and optimizer are always float32. Left out:
    bf16 on TPU and on GPUs that have it (NVIDIA's from Ampere on), else no (float32, and no TF32); on a CPU with
    AVX512_BF16, too, bf16 is faster."""

    # -- the pictures and the word
    train_data_dir: str | None = input_path()
    """Folder with the pictures of the concept, 3 to 5 are enough. Left out with the embedded model: its own example."""
    placeholder_token: str | None = None
    """The new word, e.g. <cat-toy>. It must not be a word that the model has already. Left out with the embedded model:
    the name of the pictures' folder, like <cleo>."""
    initializer_token: str | None = None
    """One or several words that the model knows and that come near the concept, e.g. toy. The rows start from them.
    Left out with the embedded model: in, which says nothing there."""
    initializer_embedding: str | None = input_path()
    """File of a learned word, in any known format, whose vectors the rows start from instead of --initializer_token. It
    must be for the model's family and have --num_vectors vectors."""
    num_vectors: int = 1
    """How many rows of the token-embedding table the new word takes."""
    learnable_property: LearnableProperty = "object"
    """What the pictures share: chooses the list of prompt templates."""
    templates: str | None = input_path()
    """Text file that replaces the prompt templates: one a line, {} stands for the new word."""
    embeddings: tuple[str, ...] = input_path(())
    """Files of other learned words that the templates may use. Their rows stay as they are. FILE=word
    reads a file under a word of your own."""
    resolution: int | None = None
    """Side in pixels of the square that the pictures are cropped to; divisible by 8. Left out: the model's own."""
    center_crop: bool = False
    """Crop to the pixel as diffusers' script does under this flag: the largest centred square, then resize. Otherwise
    the picture is scaled to cover the square, aspect ratio kept, and the overhang is cut on both sides alike."""
    flip_probability: float = 0.5
    """Chance that a picture is mirrored when it is drawn; 0 for subjects that have a left and a right."""
    skip_bad_images: bool = False
    """Go on without pictures that cannot be read, naming each, instead of stopping."""

    # -- the run
    output_dir: str = "output"
    """Folder for the learned embedding, checkpoints, samples, logs and the resolved config."""
    seed: int = 0
    """Seed of everything random; the same seed gives the same rows on one machine."""
    train_batch_size: int | None = None
    """Pictures per step on each device; all cores of a CPU are one. Left out: 16 (the embedded model: see
    configs/demo.yaml)."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are averaged for one update."""
    max_train_steps: int | None = None
    """Updates in all; overrides --num_train_epochs. Left out: 5000 (the embedded model: see configs/demo.yaml)."""
    num_train_epochs: int | None = None
    """Passes over the pictures, each pass showing every picture --repeats times; used where --max_train_steps is
    left out."""
    repeats: int = 100
    """How often one epoch shows each picture."""
    gradient_checkpointing: Checkpointing | None = dataclasses.field(
        default=None,
        metadata={"switch": ("full", "none")},  # diffusers' flag: alone it is on, and --no_ in front of it is off
    )
    """What the UNet keeps for the backward pass: all (none), what convolutions and dense layers make (policy; the rest
    is cheap to make again), or the inputs of its blocks alone (full, or no value; --no_gradient_checkpointing is none).
    Left out: the first of the three that fits the device's memory."""

    # -- several machines: the same command on each; batches are shared by all their devices, the first one writes
    distributed: Literal["auto", "always", "never"] = "auto"
    """Whether this is one of several processes. auto: with --coordinator_address, under torchrun or accelerate launch,
    as one of several tasks of Slurm or Open MPI, and on a TPU slice of several hosts; each process must see the
    pictures and the model under the same paths."""
    coordinator_address: str | None = of_this_process()
    """HOST:PORT of the first process, which the others find it by. Left out: JAX_COORDINATOR_ADDRESS; a TPU pod, Slurm
    and Open MPI tell by themselves, also what follows."""
    num_processes: int | None = of_this_process()
    """Processes in all. Left out: JAX_NUM_PROCESSES."""
    process_id: int | None = of_this_process()
    """Number of this process, from 0. Left out: JAX_PROCESS_ID."""

    # -- the optimizer
    learning_rate: float | None = None
    """AdamW's step size. Left out: 1e-4 (the embedded model: see configs/demo.yaml)."""
    scale_lr: bool = False
    """Multiply the learning rate by accumulation steps, batch size per device, and devices."""
    lr_scheduler: Schedule = "constant"
    """How the learning rate goes over the run."""
    lr_warmup_steps: int = 500
    """Updates during which the learning rate rises from 0; the constant schedule has none."""
    lr_num_cycles: int = 1
    """Hard restarts of cosine_with_restarts."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.999
    """Decay of AdamW's second moment."""
    adam_weight_decay: float = 0.0
    """Weight decay of the new rows. diffusers has 1e-2, which only shrinks them; 0 here."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""

    # -- looking at it
    validation_prompt: str | None = None
    """Prompt with the new word (or {} in its place) that is drawn every --validation_steps updates; read as infer.py
    reads a prompt, with weights such as (word:1.3)."""
    validation_negative_prompt: str | None = None
    """What validation and overview pictures should not show."""
    num_validation_images: int = 4
    """Pictures per validation."""
    validation_steps: int = 100
    """Updates between two validations."""
    validation_guidance_scale: float | None = None
    """Classifier-free guidance of validation and overview pictures. Left out: 7.5 (embedded model: 3)."""
    validation_inference_steps: int | None = None
    """Sampler steps of validation and overview pictures. Left out: 30 (embedded model: 25)."""
    scheduler: SamplerName | None = None
    """The sampler of validation, overview and measured pictures. Left out: the one that comes with the model; where
    that is not implemented ddim (SDXL: euler)."""
    overview_prompts: tuple[str, ...] | None = None
    """Prompts, {} for the word, of the overview picture that the run ends with; read as infer.py reads a prompt."""
    evaluate: bool = False
    """Measure the word at the end, as `ti-jax evaluate` does: scores.json and a line on the screen."""
    evaluation_clip: str | None = input_path()
    """Folder of a CLIP model (hf download openai/clip-vit-large-patch14 --local-dir ...) to measure with. Left out: the
    judge that comes with the model, if it has one, as the embedded model has."""
    evaluation_images: int | None = None
    """Pictures of each prompt that the word is measured with. Left out: 64 with a CLIP model, as in the paper; 4 with a
    judge."""
    keep_best: Measure | None = None
    """Measure the word every --evaluation_steps updates and end with the one that is best by this measure, not with the
    last; clip_i and clip_t need --evaluation_clip."""
    evaluation_steps: int = 50
    """Updates between two measurements for --keep_best."""
    report_to: Literal["tensorboard", "none"] = "tensorboard"
    """Where curves go besides metrics.jsonl."""
    logging_dir: str = "logs"
    """Folder of the TensorBoard logs, inside --output_dir unless absolute."""
    logging_steps: int = 10
    """Updates in one dispatch to the device, after which loss and speed are shown and logged."""

    # -- keeping it
    save_steps: int = 500
    """Updates between two copies of the embedding, learned_embeds-steps-N.safetensors."""
    checkpointing_steps: int = 500
    """Updates between two checkpoints to resume from (a few kilobytes each)."""
    checkpoints_total_limit: int | None = None
    """Keep only this many of the newest checkpoints. Left out: all."""
    resume_from_checkpoint: str | None = None
    """"latest", or the path of a checkpoint folder: go on from there. On a CPU or a TPU the result is bit for bit
    that of a run that was never interrupted; on a GPU sums differ in their last digits from run to run."""
    push_to_hub: bool = False
    """Upload the result to the Hugging Face Hub at the end."""
    hub_model_id: str | None = None
    """Hub repository to push to. Left out: the name of --output_dir."""
    hub_license: str | None = None
    """License of the word on the hub, as its model card names it, e.g. cc-by-4.0. Left out: none is named."""
    hub_token: str | None = dataclasses.field(default=None, repr=False, metadata={"secret": True})
    """Token for the hub: to push, and to download a gated model. Left out: HF_TOKEN, or the one that `hf auth login`
    has stored."""


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """What will a training run need? Its step is compiled, here or for a TPU slice that need not be there, and its
    memory, work and traffic between devices are read off. Takes the settings of train.py; nothing is trained."""

    topology: str | None = None
    """TPU slice to compile for, e.g. v5e:2x4, with libtpu (pip install 'ti_jax[plan]'). Left out: this machine's
    devices."""
    largest_batch: bool = False
    """Also look for the largest --train_batch_size that fits, with --gradient_checkpointing full where that is left
    out; this compiles the step several times."""


@dataclass(frozen=True)
class InferConfig:
    """Draw pictures of prompts, with learned words in them."""

    prompt: tuple[str, ...] = ()
    """What to draw; each in quotes, one or several. A learned word stands where the thing is named, e.g.
    "a portrait of <cleo> wearing a red jacket"."""
    embedding: tuple[str, ...] = input_path(())
    """Files of the learned words that the prompts use, in any known format. FILE=word reads one under a word of
    your own."""

    # -- the model
    pretrained_model_name_or_path: str | None = None
    """The model that the words were learned for: a diffusers folder, a Hugging Face Hub id, or a single .safetensors or
    .ckpt checkpoint. Left out: the small model that comes with ti_jax."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    variant: str | None = None
    """Variant of the weight files, e.g. fp16."""
    prediction_type: PredictionType | None = None
    """What the UNet predicts, for a single checkpoint that does not say it. Left out: what the model says; else epsilon
    (noise), but an SD2.x file must be told."""
    vae: str | None = input_path()
    """Folder of another autoencoder in diffusers' layout (config.json and weights), instead of the model's own."""
    mixed_precision: Literal["no", "bf16"] | None = None
    """Precision of the weights and activations. Left out: bf16 on TPU and on GPUs that have it, else no (float32)."""

    # -- the pictures
    negative_prompt: str | None = None
    """What the pictures should not show."""
    plain_prompts: bool = False
    """Take every character of a prompt as text. Otherwise prompts are read as AUTOMATIC1111 does: (word) and (word:1.3)
    weigh more, [word] less, BREAK starts a new chunk, \\( is a bracket, and a prompt may be of any length."""
    num_inference_steps: int | None = None
    """Steps of the sampler. Left out: 30 (embedded model: 25)."""
    guidance_scale: float | None = None
    """Classifier-free guidance: how closely the prompt is followed; 1 is none. Left out: 7.5 (embedded model: 3)."""
    scheduler: SamplerName | None = None
    """The sampler. Left out: the one that comes with the model; where that is not implemented ddim (SDXL: euler)."""
    num_images: int = 1
    """Pictures of each prompt."""
    height: int | None = None
    """Height in pixels, divisible by 8. Left out: the model's own."""
    width: int | None = None
    """Width in pixels, divisible by 8. Left out: the model's own."""
    seed: int = 0
    """Seed of the noise that the first picture starts from; the next has seed + 1, and so on."""
    batch_size: int = 4
    """Pictures drawn at once: more is faster, less needs less memory."""
    vae_tiling: VaeTiling = "auto"
    """Decode pictures in overlapping tiles, as large as those that the model was trained on: needs far less memory, and
    changes large pictures a little. auto: only where the free memory is too little for them whole."""
    output: str = "out.png"
    """Where the picture goes. Several go into numbered files beside it, out-0.png and so on, and together into
    out-grid.png."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a learned word: is the concept there (identity), and does the prompt rule the rest (editability)?"""

    train_data_dir: str | None = input_path()
    """Folder with pictures of the concept, best some that the word was not trained on."""
    distractors: str | None = input_path()
    """Folder with a folder of pictures for each of some other concepts, among which the word should find its own."""
    evaluation_clip: str | None = input_path()
    """Folder of a CLIP model (hf download openai/clip-vit-large-patch14 --local-dir ...): CLIP-I and CLIP-T as in the
    textual inversion paper. Left out: the judge that comes with the model, if it has one, as the embedded model has."""
    evaluation_images: int | None = None
    """Pictures of each prompt. Left out: 64 with a CLIP model, as in the paper; 4 with a judge."""

    # -- the model
    pretrained_model_name_or_path: str | None = None
    """The model that the word was learned for: a diffusers folder or a Hugging Face Hub id. Left out: the small model
    that comes with ti_jax."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    variant: str | None = None
    """Variant of the weight files, e.g. fp16."""
    prediction_type: PredictionType | None = None
    """What the UNet predicts, for a single checkpoint that does not say it. Left out: what the model says; else epsilon
    (noise), but an SD2.x file must be told."""
    vae: str | None = input_path()
    """Folder of another autoencoder in diffusers' layout (config.json and weights), instead of the model's own."""
    mixed_precision: Literal["no", "bf16"] | None = None
    """Precision of the weights and activations. Left out: bf16 on TPU and on GPUs that have it, else no (float32)."""

    # -- the pictures
    num_inference_steps: int | None = None
    """Steps of the sampler. Left out: 50, as in the paper (embedded model: 25)."""
    guidance_scale: float | None = None
    """Classifier-free guidance. Left out: 7.5 (embedded model: 3)."""
    scheduler: SamplerName | None = None
    """The sampler. Left out: the one that comes with the model; where that is not implemented ddim (SDXL: euler)."""
    seed: int = 0
    """Seed of the noise that the first picture of each prompt starts from; the next has seed + 1, and so on."""
    batch_size: int = 8
    """Pictures drawn at once: more is faster, less needs less memory."""
    output: str | None = None
    """File for the scores, .json. Left out: they are only printed."""


def resolve_evaluate(config: EvaluateConfig) -> EvaluateConfig:
    """As `resolve`, for measuring.

    Raises:
      InputError: a value that cannot be, or no pictures.
    """
    steps = EMBEDDED_STEPS if config.pretrained_model_name_or_path is None else PAPER_STEPS
    scale = _model_defaults(config.pretrained_model_name_or_path)["validation_guidance_scale"]
    config = dataclasses.replace(
        config,
        num_inference_steps=steps if config.num_inference_steps is None else config.num_inference_steps,
        guidance_scale=scale if config.guidance_scale is None else config.guidance_scale,
    )
    paths = ("pretrained_model_name_or_path", "vae", "train_data_dir", "distractors", "evaluation_clip", "output")
    config = _plain_paths(config, *paths)
    check_evaluate(config)
    return config


def resolve(config: TrainConfig) -> TrainConfig:
    """Check a config and fill in what it leaves to the model; a resolved config comes back as it is.

    Four fields may stay None: ``resolution``, ``mixed_precision`` and ``gradient_checkpointing``, which the model and
    the device decide, and ``max_train_steps`` where ``num_train_epochs`` is given.

    Raises:
      InputError: a value that cannot be, or something that only the user can tell is missing.
    """
    defaults = _model_defaults(config.pretrained_model_name_or_path)
    if config.pretrained_model_name_or_path is None and config.train_data_dir is not None:
        # The user's own pictures deserve a word of their own, not the example's.
        defaults["placeholder_token"] = f"<{_slug(Path(config.train_data_dir).expanduser().resolve().name)}>"
    if config.initializer_embedding is not None:
        defaults.pop("initializer_token", None)
    if config.num_train_epochs is not None:
        del defaults["max_train_steps"]
    config = dataclasses.replace(
        config, **{name: value for name, value in defaults.items() if getattr(config, name) is None}
    )
    start = () if config.initializer_embedding is not None else ("initializer_token",)
    _require(config, "train_data_dir", "placeholder_token", *start)
    paths = ("pretrained_model_name_or_path", "train_data_dir", "initializer_embedding", "templates", "embeddings")
    config = _plain_switches(_plain_paths(config, *paths, "vae", "output_dir", "logging_dir", "evaluation_clip"))
    check_train(config)
    return config


def resolve_plan(config: PlanConfig) -> PlanConfig:
    """As `resolve`, for planning: neither pictures nor words are needed.

    Raises:
      InputError: a value that cannot be.
    """
    defaults = _model_defaults(config.pretrained_model_name_or_path)
    left_out = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **left_out)
    config = _plain_switches(_plain_paths(config, "pretrained_model_name_or_path", "vae", "templates"))
    check_train(config)
    return config


def resolve_infer(config: InferConfig) -> InferConfig:
    """As `resolve`, for drawing: ``height``, ``width``, ``scheduler`` and ``mixed_precision`` stay as they are.

    Raises:
      InputError: a value that cannot be, or no prompt.
    """
    defaults = _model_defaults(config.pretrained_model_name_or_path)
    steps, scale = defaults["validation_inference_steps"], defaults["validation_guidance_scale"]
    config = dataclasses.replace(
        config,
        num_inference_steps=steps if config.num_inference_steps is None else config.num_inference_steps,
        guidance_scale=scale if config.guidance_scale is None else config.guidance_scale,
    )
    config = _plain_paths(config, "pretrained_model_name_or_path", "vae", "embedding", "output")
    check_infer(config)
    return config


@functools.cache
def _demo_settings() -> dict[str, Any]:
    return load_yaml(DEMO_CONFIG, TrainConfig)


def _model_defaults(model: str | None) -> dict[str, Any]:
    return dict(_demo_settings() if model is None else STABLE_DIFFUSION_DEFAULTS)


def _slug(name: str) -> str:
    """A folder's name as a word: letters, digits and hyphens."""
    return re.sub(r"[\W_]+", "-", name.lower()).strip("-") or "concept"


def _require(config: TrainConfig, *names: str) -> None:
    missing = [f"--{name}" for name in names if getattr(config, name) is None]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} must be given with --pretrained_model_name_or_path: only the embedded model has "
            f"an example (for instance --train_data_dir cat/ --placeholder_token '<cat-toy>' --initializer_token toy)"
        )


def _plain_switches(config: Any) -> Any:
    """True and False as the words that they stand for: a config made in Python has been through no parser."""
    fields = dataclasses.fields(config)
    return dataclasses.replace(config, **{field.name: switched(getattr(config, field.name), field) for field in fields})


def _plain_paths(config: Any, *names: str) -> Any:
    """Paths as text, ``~`` expanded: a shell expands it in ``--flag ~/x``, not in ``--flag=~/x`` and not in YAML."""

    def plain(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(plain(item) for item in value)
        return os.path.expanduser(os.fspath(value)) if isinstance(value, (str, os.PathLike)) else value

    return dataclasses.replace(config, **{name: plain(getattr(config, name)) for name in names})
