"""What a run reads before its model: templates, learned words, captions and pictures of each concept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ti_jax.config import TrainConfig
from ti_jax.data.buckets import shapes_of
from ti_jax.data.captions import read_captions, report_captions
from ti_jax.data.folder import load_images
from ti_jax.data.hub_dataset import as_folder
from ti_jax.data.masks import make_mask_reader
from ti_jax.data.picture_files import name_in, picture_paths, report_repeats
from ti_jax.data.pictures import Pictures
from ti_jax.embeddings import Embedding
from ti_jax.embeddings.naming import load_given
from ti_jax.embeddings.warn import capital_fault
from ti_jax.errors import InputError
from ti_jax.files import as_url
from ti_jax.remote import local_copy, place_of
from ti_jax.text.templates import CAPTION, load_templates
from ti_jax.weights.hub import is_cached

LogLine = Callable[[str], None]


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run that do not depend on its model.

    Attributes:
      folder: of the pictures. captions: of pictures that have one, by the pictures' names.
      templates: prompts with ``{}`` in the word's place. others: learned words that are not trained.
      start: the word whose vectors initialise the rows; None: they are initialised from a token.
      pictures: from `load_images`; None if their size is the model's default.
    """

    folder: Path
    captions: dict[str, str]
    templates: list[str]
    others: tuple[Embedding, ...]
    start: Embedding | None
    pictures: Pictures | None


def read_inputs(config: TrainConfig, log: LogLine) -> Inputs:
    """Read templates, learned words, captions and pictures.

    If the pictures' size is the model's default and the model is yet to be downloaded, they are read here once at a
    small size, so that an unreadable one is reported before gigabytes are downloaded.

    Raises:
      InputError: one of the files is missing or wrong.
    """
    folder = _folder(config)
    picture_names = [name_in(folder, path) for path in picture_paths(folder, config.recursive)]
    report_repeats(picture_names, log)
    captions = {}
    if not config.no_captions:
        captions = read_captions(folder, config.recursive, config.caption_column, _beside(config.templates))
    report_captions(config, folder, captions, picture_names, log)
    templates = load_templates(config.learnable_property, config.templates)
    if not captions and all(CAPTION in template for template in templates):
        raise InputError(
            f"--templates {config.templates}: each template has {CAPTION}, and no picture has a caption; add a "
            f"template without it, or captions"
        )
    others = tuple(load_given(config.embeddings))
    for path, other in zip(config.embeddings, others, strict=True):
        for remark in other.remarks:
            log(f"note: {path}: {remark}")
    fault = capital_fault(str(config.placeholder_token), config.num_vectors)
    if fault is not None:
        log(f"warning: {fault}")
    start = _load_start(config, log)
    if config.resolution is not None:
        pictures = load_pictures(config, folder, config.resolution, log)
        return Inputs(folder, captions, templates, others, start, pictures)
    model = config.pretrained_model_name_or_path
    if model is not None and (as_url(model) or not (Path(model).exists() or is_cached(model, config.revision))):
        load_pictures(replace(config, aspect_ratio_buckets=False), folder, 8, lambda line: None)
    return Inputs(folder, captions, templates, others, start, None)


def read_all_inputs(configs: Sequence[TrainConfig], log: LogLine) -> list[Inputs]:
    """`read_inputs` of all concepts of a run; what holds for several of them is said once.

    Raises:
      InputError: as `read_inputs`; it names the concept.
    """
    said: set[str] = set()

    def log_once(line: str) -> None:
        if line not in said:
            log(line)
        said.add(line)

    inputs = []
    for config in configs:
        try:
            inputs.append(read_inputs(config, log_once))
        except InputError as error:
            if len(configs) == 1:
                raise
            raise InputError(f"{config.placeholder_token}: {error}") from error
    return inputs


def _folder(config: TrainConfig) -> Path:
    """The folder with the pictures: the user's, or that of a dataset of the hub."""
    if config.dataset_name is not None:
        return as_folder(config)
    assert config.train_data_dir is not None, "the config is resolved"
    return local_copy(config.train_data_dir)


def _beside(templates: str | None) -> Path | None:
    """Where the file of templates is if it is in the folder of the pictures."""
    return None if templates is None else place_of(templates)


def load_pictures(config: TrainConfig, folder: Path, resolution: int, log: LogLine) -> Pictures:
    """The pictures of a folder as a config wants them.

    Args:
      resolution: side of the squares in pixels.

    Raises:
      InputError: as `ti_jax.data.folder.load_images`, `shapes_of` and `make_mask_reader`.
    """
    paths = picture_paths(folder, config.recursive)
    pictures = load_images(
        folder,
        resolution,
        center_crop=config.center_crop,
        skip_bad=config.skip_bad_images,
        on_skip=log,
        shapes=shapes_of(config, resolution),
        masks=make_mask_reader(config, folder, paths),
        augment=config.seed if config.augment else None,
        recursive=config.recursive,
    )
    if config.unmasked_weight and all(each.masks is None for each in pictures.learned_from):
        log(f"note: --unmasked_weight {config.unmasked_weight:g} does nothing, because no picture has a mask")
    return pictures


def _load_start(config: TrainConfig, log: LogLine) -> Embedding | None:
    """The word of ``--initializer_embedding``.

    Raises:
      InputError: no such file, not a learned word, or another number of vectors than ``--num_vectors``.
    """
    if config.initializer_embedding is None:
        return None
    # The name in the file may be no valid placeholder (that of "my cat.pt" is not), so use ours.
    start = Embedding.load(config.initializer_embedding, token=config.placeholder_token)
    where = f"--initializer_embedding {config.initializer_embedding}"
    if start.num_vectors != config.num_vectors:
        raise InputError(
            f"{where}: the word has {start.num_vectors} vectors and --num_vectors is {config.num_vectors}; give "
            f"--num_vectors {start.num_vectors}, or another file (ti-jax embedding prune makes a word shorter)"
        )
    if start.caveat:
        log(f"note: {where}: read as {start.caveat}")
    return start
