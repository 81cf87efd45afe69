"""The settings of a training run, and of planning one. A field's doc is its flag's help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ti_jax.config.fields import setting
from ti_jax.config.model import ModelSettings, SamplerName
from ti_jax.config.rates import Rates
from ti_jax.config.row_norm import RowNorm
from ti_jax.config.rules import (
    ADDRESS,
    CHANCE,
    COUNT,
    DECAY,
    LEARNING_RATE,
    NOT_NEGATIVE,
    NOT_ONE,
    PNG,
    POSITIVE,
    RANGE,
    RATIO,
    ROW_NORM,
    SEED,
    SIDE,
    SOME_TEXTS,
    TEXT,
    TEXTS,
    WHOLE,
    WORD,
)

LearnableProperty = Literal["object", "style"]
Optimizer = Literal["adamw", "prodigy", "schedule_free", "dti"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
Checkpointing = Literal["none", "policy", "full"]
Measure = Literal["identity", "editability", "clip_i", "clip_t"]


@dataclass(frozen=True)
class TrainConfig(ModelSettings):
    """Learn a new word for a frozen Stable Diffusion from a few pictures."""

    # -- the pictures and the word
    train_data_dir: str | None = setting(None, TEXT, path="input", first=True)
    """Folder with the pictures of the concept, 3 to 5 are enough; or a URL of one (gs://bucket/cat, with the extra
    `gcs`); or, if there is no such folder, the id of a dataset on the Hugging Face hub (owner/name), as --dataset_name.
    Left out with the embedded model: its own example."""
    placeholder_token: str | None = setting(None, WORD, first=True)
    """The new word, e.g. <cat-toy>. It must not be a word that the model has already. Left out with the embedded model:
    the name of the pictures' folder, like <cleo>."""
    initializer_token: str | None = setting(None, TEXT, fingerprint=True, first=True)
    """One or several words that the model knows and that come near the concept, e.g. toy. The rows start from them.
    Left out with the embedded model: in the and style, which says nothing there."""
    initializer_output: bool = setting(False, fingerprint=True)
    """CrossInit: the rows start from what the text encoder makes of --initializer_token as a prompt (its last layer's
    output at those tokens), which is nearer to learned rows than the tokens' own; and 1e-5 times their distance to it
    is added to the loss."""
    initializer_embedding: str | None = setting(None, TEXT, path="input")
    """File of a learned word, in any known format, whose vectors the rows start from instead of --initializer_token. It
    must be for the model's family and have --num_vectors vectors."""
    num_vectors: int = setting(1, COUNT)
    """How many rows of the token-embedding table the new word takes."""
    learnable_property: LearnableProperty = "object"
    """What the pictures share: chooses the list of prompt templates."""
    templates: str | None = setting(None, TEXT, path="input")
    """Text file that replaces the prompt templates: one a line, {} stands for the new word."""
    embeddings: tuple[str, ...] = setting((), TEXTS, path="input")
    """Files of other learned words that the templates may use. Their rows stay as they are. FILE=word
    reads a file under a word of your own."""
    resolution: int | None = setting(None, SIDE)
    """Side in pixels of the square that the pictures are cropped to; divisible by 8. Left out: the model's own."""
    center_crop: bool = False
    """Crop to the pixel as diffusers' script does under this flag: the largest centred square, then resize. Otherwise
    the picture is scaled to cover the square, aspect ratio kept, and the overhang is cut on both sides alike."""
    flip_probability: float = setting(0.5, CHANCE, fingerprint=True)
    """Chance that a picture is mirrored when it is drawn; 0 for subjects that have a left and a right."""
    skip_bad_images: bool = False
    """Go on without pictures that cannot be read, naming each, instead of stopping."""
    augment: bool = setting(False, fingerprint=True)
    """Learn from eight views of each picture, the plain one and seven that are cropped a little and have slightly other
    brightness, contrast and colour. Against learning a picture's frame and light with the concept."""

    # -- shapes
    aspect_ratio_buckets: bool = setting(False, fingerprint=True)
    """Learn from pictures in about their own shapes instead of squares. Each goes to the bucket with the nearest aspect
    ratio, is scaled to cover it, and the overhang is cut; every batch comes from one bucket, and buckets take turns in
    proportion to their pictures. No bucket has more pixels than the square of --resolution. One program is compiled
    for each bucket that has pictures."""
    bucket_step: int | None = setting(None, SIDE)
    """With --aspect_ratio_buckets: the sides of buckets are multiples of this many pixels; divisible by 8. Small
    models need less than 64: the embedded one, which has 64 pixels, 8 or 16. Left out: 64."""
    max_aspect_ratio: float | None = setting(None, RATIO)
    """With --aspect_ratio_buckets: largest ratio of a bucket's long side to its short one. Of longer pictures the ends
    are cut off. Left out: 2."""

    # -- masks: white is learned from; NAME.mask.png or NAME-masklabel.png beside a picture NAME is used if it is there
    mask_dir: str | None = setting(None, TEXT, path="input")
    """Folder with masks: NAME.png for a picture NAME."""
    alpha_mask: bool = False
    """Take the pictures' own alpha channels as masks, where there is no file with one."""
    auto_mask: bool = False
    """Cut out the subjects of pictures without a mask; needs the extra `rembg`, which fetches its model once."""
    unmasked_weight: float = setting(0.0, CHANCE, fingerprint=True)
    """Weight of the loss outside the masks, from 0 to 1, where it has 1 inside. A little lets the word keep a sense of
    the whole picture."""

    # -- captions
    recursive: bool = False
    """Also read the pictures in sub-folders. Those in a sub-folder like 10_name are shown ten times as often, as
    kohya's scripts do."""
    dataset_name: str | None = setting(None, TEXT, path="model")
    """Instead of --train_data_dir: a dataset with pictures on the Hugging Face hub, or a folder or parquet file of one;
    needs the extra `datasets`. Its split "train" is read."""
    image_column: str | None = setting(None, TEXT)
    """The column of --dataset_name with the pictures. Left out: image."""
    caption_column: str | None = setting(None, TEXT)
    """The column of --dataset_name, or the key in metadata.jsonl, with the captions. Left out: text."""
    no_captions: bool = False
    """Ignore captions. Otherwise they are used: NAME.txt or NAME.caption beside a picture, or metadata.jsonl with
    file_name and text. A caption with the new word (or {} in its place) is the prompt; any other is put into a template
    that has {caption}: one of --templates, or "a photo of {}, {caption}" ("{caption}, in the style of {}")."""
    shuffle_tags: bool = False
    """Show the parts of a caption between its commas in ever other order. What is random about captions is settled
    before the first step: each picture has 32 variants of its prompt to draw from (of more than 1250 pictures
    fewer)."""
    keep_tags: int = setting(0, WHOLE)
    """How many tags at the start of a caption neither --shuffle_tags nor --tag_dropout touches."""
    tag_dropout: float = setting(0.0, CHANCE)
    """Chance that a tag of a caption is left out. The new word never is."""
    caption_dropout: float = setting(0.0, CHANCE)
    """Share of the prompts that have no caption, but are a plain template, so that the word alone carries the concept,
    too."""

    # -- concepts
    concepts: str | None = setting(None, TEXT, path="input")
    """Several words in one run, instead of --train_data_dir: a folder with a sub-folder of pictures for each (ana/ is
    the word <ana>), or a YAML file with a list of entries, each with its train_data_dir and any of placeholder_token,
    initializer_token, num_vectors, learnable_property and templates; what an entry leaves out is the run's. Captions
    and templates may have several of the words. A word's results are in --output_dir, in a folder of its name."""
    concepts_per_batch: int | None = setting(None, COUNT, fingerprint=True)
    """How many of the concepts a batch has, with as many samples each; the next batch has the next ones. Left out: 2;
    with more, a word's updates are more and of fewer samples each, and need a lower --learning_rate."""

    # -- a word for the negative prompt
    learn_negative: bool = setting(False, fingerprint=True)
    """Learn a word for the negative prompt: used there, it keeps pictures away from those in --train_data_dir, for
    instance of bad hands. The loss goes through classifier-free guidance, with the word alone on the unconditional side
    and the prompt, which has --negative_class in the word's place, on the other. Pictures of the run are drawn with
    the word in the negative prompt; {} in their prompts is --negative_class."""
    negative_class: str | None = setting(None, TEXT, fingerprint=True)
    """With --learn_negative: what the pictures show, in the model's own words and without what is to be avoided, e.g. a
    hand. Left out: --initializer_token (the embedded model: a person)."""
    negative_guidance_scale: float | None = setting(None, NOT_ONE, fingerprint=True)
    """With --learn_negative: the guidance scale in the loss. Below 1 the word learns what the pictures have and the
    prompt lacks, so that it leads away from them in a negative prompt; the nearer to 1, the more of the difference.
    Above 1, as in DreamArtist, guidance away from the word must give the pictures, so that it leads towards them.
    Left out: 0.5."""

    # -- the run
    output_dir: str = setting("output", TEXT, path="output")
    """Folder for the learned embedding, checkpoints, samples, logs and the resolved config; or a URL of one
    (gs://bucket/cat), to which files are sent whole after each save, so that a run goes on on another machine."""
    seed: int = setting(0, SEED, fingerprint=True)
    """Seed of everything random; the same seed gives the same rows on one machine (on a GPU: see --deterministic)."""
    deterministic: bool = setting(False, fingerprint=True)
    """The same rows to the bit from the same seed, and from a resumed run, also on a GPU: sums have a fixed order, and
    XLA takes the first kernel that fits, not the one that it measured to be the fastest, so that a step takes longer.
    On a CPU and a TPU, where this is so anyway, only the rows' gradient is summed in another form."""
    train_batch_size: int | None = setting(None, COUNT)
    """Pictures per step on each device; all cores of a CPU are one. Left out: 16 (the embedded model: see
    configs/demo.yaml)."""
    gradient_accumulation_steps: int = setting(1, COUNT, fingerprint=True)
    """Batches whose gradients are averaged for one update."""
    max_train_steps: int | None = setting(None, COUNT)
    """Updates in all; overrides --num_train_epochs. Left out: 5000 (the embedded model: see configs/demo.yaml), for
    each of --concepts."""
    num_train_epochs: int | None = setting(None, COUNT)
    """Passes over the pictures, each pass showing every picture --repeats times; used where --max_train_steps is
    left out."""
    repeats: int = setting(100, COUNT)
    """How often one epoch shows each picture."""
    # A switch as in diffusers' script; of the fingerprint, because the same sums in another order have other bits.
    gradient_checkpointing: Checkpointing | None = setting(None, fingerprint=True, switch=("full", "none"))
    """What the UNet keeps for the backward pass: all (none), what convolutions and dense layers make (policy; the rest
    is cheap to make again), or the inputs of its blocks alone (full, or no value; --no_gradient_checkpointing is none).
    Left out: the first of the three that fits the device's memory."""

    # -- several machines: the same command on each; batches are shared by all their devices, the first one writes
    distributed: Literal["auto", "always", "never"] = "auto"
    """Whether this is one of several processes. auto: with --coordinator_address, under torchrun or accelerate launch,
    as one of several tasks of Slurm or Open MPI, and on a TPU slice of several hosts; each process must see the
    pictures and the model under the same paths."""
    coordinator_address: str | None = setting(None, ADDRESS, of_this_process=True)
    """HOST:PORT of the first process, which the others find it by. Left out: JAX_COORDINATOR_ADDRESS; a TPU pod, Slurm
    and Open MPI tell by themselves, also what follows."""
    num_processes: int | None = setting(None, COUNT, of_this_process=True)
    """Processes in all. Left out: JAX_NUM_PROCESSES."""
    process_id: int | None = setting(None, WHOLE, of_this_process=True)
    """Number of this process, from 0. Left out: JAX_PROCESS_ID."""

    early_stop: bool = setting(False, fingerprint=True)
    """End a word before --max_train_steps, where it has stopped learning: its loss on a few samples that stay the same
    is computed four times in --early_stop_window, and once these four differ too little, its rows stay as they are.
    Every one of --concepts ends by itself, and the run with the last of them."""
    early_stop_window: int | None = setting(None, COUNT, fingerprint=True)
    """With --early_stop: updates of a word over which the loss is looked at; nothing ends before that. Left out: 310,
    as in the paper (the embedded model: 40)."""
    early_stop_threshold: float | None = setting(None, POSITIVE, fingerprint=True)
    """With --early_stop: a word ends where the variance of the loss in the window is below this share of its variance
    since the start. Left out: 0.15, as in the paper (the embedded model: 0.005)."""

    # -- the optimizer
    optimizer: Optimizer = setting("adamw", fingerprint=True)
    """adamw, as in diffusers' script; prodigy, which finds the step size by itself, for each row its own;
    schedule_free, AdamW whose rows are averaged as they learn, so that no schedule has to end: the average is what is
    saved, drawn and measured; dti, Directional Textual Inversion: every update turns a row by the angle --learning_rate
    (in radians, nearly), and its norm stays at --row_norm, where free is vocabulary. All keep what they know of a row
    with that row."""
    learning_rate: float | Rates | None = setting(None, LEARNING_RATE, fingerprint=True)
    """The optimizer's step size. Or several, as AUTOMATIC1111 writes them: "5e-3:200, 1e-3:1000, 2e-4" is 5e-3 until
    update 200, 1e-3 until update 1000, then 2e-4. Left out: 1e-4 (prodigy: 1, a factor of the size that it finds; dti:
    1e-2; the embedded model: see configs/demo.yaml)."""
    scale_lr: bool = setting(False, fingerprint=True)
    """Multiply the learning rate by accumulation steps, batch size per device, and devices."""
    lr_scheduler: Schedule = setting("constant", fingerprint=True)
    """How the learning rate goes over the run."""
    lr_warmup_steps: int = setting(500, WHOLE)
    """Updates during which the learning rate rises from 0; the constant schedule has none."""
    lr_num_cycles: int = setting(1, COUNT)
    """Hard restarts of cosine_with_restarts."""
    adam_beta1: float | None = setting(None, DECAY, fingerprint=True)
    """Decay of the first moment; of schedule_free, how much of the average the gradient is taken at. Left out: 0.9
    (adamw on the embedded model: see configs/demo.yaml)."""
    adam_beta2: float | None = setting(None, DECAY, fingerprint=True)
    """Decay of the second moment. Left out: 0.999 (adamw on the embedded model: see configs/demo.yaml)."""
    adam_weight_decay: float = setting(0.0, NOT_NEGATIVE, fingerprint=True)
    """Weight decay of the new rows. diffusers has 1e-2, which only shrinks them; 0 here."""
    adam_epsilon: float = setting(1e-8, POSITIVE, fingerprint=True)
    """Added to the root of the second moment."""
    max_grad_norm: float | None = setting(None, POSITIVE, fingerprint=True)
    """Longest gradient of one row, in each text encoder; a longer one is shortened to it. (Over one row and not, as in
    diffusers' scripts, over all, so that the words of a run do not depend on each other.) Left out: any."""
    row_norm: float | RowNorm = setting(RowNorm("free"), ROW_NORM, fingerprint=True)
    """Norm that each row starts with and is set to after every update, so that only its direction is learned: free,
    any; initial, the row's own at the start; vocabulary, the mean of the norms of its text encoder's known tokens; or a
    number. Averages (--ema_decay, schedule_free) are of rows of this norm, and are set to it where they are saved."""
    ema_decay: float | None = setting(None, DECAY, fingerprint=True)
    """Save, draw and measure a moving average of the rows, of which this share stays at an update, e.g. 0.99; it rises
    to that from 0 as in diffusers' EMAModel. Training goes on from the rows themselves. Left out: no average."""

    # -- the loss
    loss: Literal["l2", "huber"] = setting("l2", fingerprint=True)
    """l2: the mean squared error of the UNet's prediction. huber: kohya's, 2c (sqrt(d^2 + c^2) - c) of each difference
    d, like l2 for small ones and linear in large ones, so that a picture unlike the others counts for less."""
    huber_c: float | None = setting(None, POSITIVE, fingerprint=True)
    """The c of --loss huber, the same at all timesteps (kohya's --huber_schedule constant). Left out: 0.1."""
    snr_gamma: float | None = setting(None, POSITIVE, fingerprint=True)
    """Min-SNR weighting: a sample counts at most as if its signal-to-noise ratio were this, so that timesteps of little
    noise, of which the word learns little, count less; 5 in the paper. Left out: all timesteps count the same."""
    context_loss: float = setting(0.0, NOT_NEGATIVE, fingerprint=True)
    """Weight of CoRe's text term, 1.5e-4 in the paper: in --overview_prompts, the mean of 1 - cosine between the text
    encoder's outputs at the other tokens with the new word and with --initializer_token in its place, which should be
    the concept's class. It keeps the rest of a prompt as clear as beside the class word. 0: none."""
    noise_offset: float = setting(0.0, NOT_NEGATIVE, fingerprint=True)
    """Also shift the noise of each latent channel as a whole, by a normal number times this, e.g. 0.05 to 0.1: the word
    may then change how dark or bright a picture is."""
    timestep_range: tuple[int, int] | None = setting(None, RANGE, fingerprint=True)
    """LOW HIGH: train on timesteps from LOW to HIGH - 1 only. 0 500, of 1000, is little noise, in which a picture's
    details are drawn, 500 1000 much noise, in which it begins. Left out: all."""

    # -- looking at it
    validation_prompt: tuple[str, ...] | None = setting(None, SOME_TEXTS, one=True)
    """Prompts with the new word (or {} in its place) that are drawn every --validation_steps updates, with the same
    seeds each time; read as infer.py reads a prompt, with weights such as (word:1.3). progress.png has a column for
    each."""
    validation_negative_prompt: str | None = None
    """What validation and overview pictures should not show."""
    num_validation_images: int = setting(4, COUNT)
    """Pictures of each prompt per validation."""
    validation_steps: int = setting(100, COUNT)
    """Updates between two validations."""
    validation_guidance_scale: float | None = setting(None, NOT_NEGATIVE)
    """Classifier-free guidance of validation and overview pictures. Left out: 7.5 (embedded model: 3)."""
    validation_inference_steps: int | None = setting(None, COUNT)
    """Sampler steps of validation and overview pictures. Left out: 30 (embedded model: 25)."""
    scheduler: SamplerName | None = None
    """The sampler of validation, overview and measured pictures. Left out: the one that comes with the model; where
    that is not implemented ddim (SDXL: euler)."""
    overview_prompts: tuple[str, ...] | None = setting(None, SOME_TEXTS)
    """Prompts, {} for the word, of the overview picture that the run ends with; read as infer.py reads a prompt."""
    evaluate: bool = False
    """Measure the word at the end, as `ti-jax evaluate` does: scores.json and a line on the screen."""
    evaluation_clip: str | None = setting(None, TEXT, path="input")
    """Folder of a CLIP model (hf download openai/clip-vit-large-patch14 --local-dir ...) to measure with. Left out: the
    judge that comes with the model, if it has one, as the embedded model has."""
    evaluation_images: int | None = setting(None, COUNT)
    """Pictures of each prompt that the word is measured with. Left out: 64 with a CLIP model, as in the paper; 4 with a
    judge."""
    keep_best: Measure | None = None
    """Measure the word every --evaluation_steps updates and end with the one that is best by this measure, not with the
    last; clip_i and clip_t need --evaluation_clip."""
    evaluation_steps: int = setting(50, COUNT)
    """Updates between two measurements for --keep_best."""
    report_to: tuple[Literal["tensorboard", "wandb", "none"], ...] = setting(("tensorboard",), one=True)
    """Where curves and pictures go besides metrics.jsonl: one or several of these; none stands alone. wandb is Weights
    & Biases (pip install 'ti_jax[wandb]'; WANDB_MODE=offline keeps the run in --logging_dir, to be sent later)."""
    logging_dir: str = setting("logs", TEXT, path="output")
    """Folder of the TensorBoard logs, inside --output_dir unless absolute."""
    profile_steps: tuple[int, int] | None = setting(None, RANGE)
    """A B: trace the updates after A up to B, of this machine's devices and of the host around them, into
    --logging_dir, for XProf or TensorBoard (pip install xprof). The first few of a run are slower than the rest: 20 25
    is a good choice."""
    logging_steps: int = setting(10, COUNT)
    """Updates after which loss and speed are shown and logged, as their mean; they are logged where a checkpoint is
    saved, too. It is also the most updates in one dispatch to the device."""

    # -- keeping it
    save_steps: int = setting(500, COUNT)
    """Updates between two copies of the embedding, learned_embeds-steps-N.safetensors."""
    checkpointing_steps: int = setting(500, COUNT)
    """Updates between two checkpoints to resume from (a few kilobytes each)."""
    checkpoints_total_limit: int | None = setting(None, COUNT)
    """Keep only this many of the newest checkpoints. Left out: all."""
    resume_from_checkpoint: str | None = setting(None, TEXT, path="output")
    """"latest", or the path of a checkpoint folder: go on from there. On a CPU or a TPU the result is bit for bit
    that of a run that was never interrupted; on a GPU with --deterministic, or sums differ in their last digits."""
    push_to_hub: bool = False
    """Upload the result to the Hugging Face Hub at the end."""
    hub_model_id: str | None = setting(None, TEXT)
    """Hub repository to push to. Left out: the name of --output_dir."""
    hub_license: str | None = setting(None, TEXT)
    """License of the word on the hub, as its model card names it, e.g. cc-by-4.0. Left out: none is named."""
    hub_token: str | None = setting(None, TEXT, secret=True)
    """Token for the hub: to push, and to download a gated model. Left out: HF_TOKEN, or the one that `hf auth login`
    has stored."""

    @property
    def kept_norm(self) -> float | str:
        """``row_norm`` as the optimizer has it: free for none but those that need a norm."""
        return "vocabulary" if self.optimizer == "dti" and self.row_norm == "free" else self.row_norm


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """What will a training run need? Its step is compiled, here or for a TPU slice or GPUs that need not be there, and
    its memory, work and traffic between devices are read off. Takes the settings of train.py; nothing is trained."""

    topology: str | None = setting(None, TEXT)
    """Devices to compile for that need not be there: a TPU slice, e.g. v5e:2x4, with libtpu (pip install
    'ti_jax[plan]'), or NVIDIA GPUs, e.g. h100:1 or rtx4090:1, with XLA's compiler for them (pip install
    'ti_jax[plan-gpu]'). Left out: this machine's devices."""
    largest_batch: bool = False
    """Also look for the largest --train_batch_size that fits, with --gradient_checkpointing full where that is left
    out; this compiles the step several times."""


@dataclass(frozen=True)
class DataConfig(TrainConfig):
    """What would a training run see? A table of the pictures with size, crop, caption, mask and problems, and a contact
    sheet. Takes the settings of train.py, of which those about pictures count; no model is read."""

    contact_sheet: str = setting("contact_sheet.png", PNG, path="output")
    """Where the contact sheet is written, a .png file."""
