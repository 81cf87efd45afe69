"""Where a model is: the embedded default, a folder, or a repository of the Hugging Face Hub brought to a folder."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ti_jax.config import ASSETS
from ti_jax.errors import InputError, one_line
from ti_jax.weights.config_files import MODEL_INDEX, config_name, pipeline_components, read_component_config, read_json
from ti_jax.weights.files import choose_file, weight_files
from ti_jax.weights.tokenizers import TOKENIZER_FILES

logger = logging.getLogger(__name__)

# No repository is called so; a name like this is that of a file, and the hub need not be asked for it.
CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt")

EMBEDDED_DEFAULT = ASSETS / "mini-sd"


def resolve(
    path_or_hub_id: str | None, revision: str | None = None, variant: str | None = None, token: str | None = None
) -> Path:
    """Local diffusers folder or single-file checkpoint of a model, downloaded first if it is on the Hugging Face Hub.

    Of a hub repository only what ti_jax reads comes down: the components' configurations, tokenizers, and one set of
    weight files, safetensors if there are any. It stays in the hub's cache, and is found there without network
    (``HF_HUB_OFFLINE=1``, or none to be had).

    Args:
      path_or_hub_id: a folder or a file; else a hub id (``stable-diffusion-v1-5/stable-diffusion-v1-5``); None: the
        embedded default.
      revision: branch, tag or commit of the hub repository.
      variant: of the weight files, e.g. ``fp16``.
      token: for the hub. None: the one that ``hf auth login`` has stored.

    Raises:
      InputError: nothing there, no access, no network and nothing in the cache, or another kind of model.
    """
    if path_or_hub_id is None:
        return EMBEDDED_DEFAULT
    if not path_or_hub_id.strip():
        raise InputError("the model's name is empty; give a diffusers folder, a checkpoint or a hub id (owner/name)")
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_file():
        for flag, value in (("revision", revision), ("variant", variant)):
            if value is not None:
                raise InputError(f"--{flag} {value}: {path_or_hub_id} is a single file and has only one; leave it out")
        return folder
    if folder.suffix.lower() in CHECKPOINT_SUFFIXES and not folder.is_dir():
        raise InputError(f"{path_or_hub_id}: no such file; check the path")
    if folder.is_dir():
        if not (folder / MODEL_INDEX).is_file():
            raise InputError(
                f"{path_or_hub_id}: a folder without {MODEL_INDEX}, so not a diffusers model; give the one that has it "
                "(or the file, if a single checkpoint lies in there)"
            )
        pipeline_components(read_component_config(folder, None), folder)
        return folder
    return download(path_or_hub_id, revision, variant, token)


def download(repo_id: str, revision: str | None, variant: str | None, token: str | None) -> Path:
    """Snapshot of a hub repository in the hub's cache; see `resolve`."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # of the HTTP library that huggingface_hub uses
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = repo_id if revision is None else f"{repo_id} at revision {revision}"

    def snapshot(patterns: list[str]) -> Path:
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns))

    try:
        try:
            # Not list_repo_files: without network that one tries for half a minute.
            info = HfApi().model_info(repo_id, revision=revision, token=token)
        except (OfflineModeIsEnabled, HTTPError) as error:
            if not isinstance(error, HfHubHTTPError) or error.response.status_code >= 500:
                return cached(repo_id, revision, variant, f"the hub cannot be reached ({one_line(error)})")
            if isinstance(error, RevisionNotFoundError) or not is_cached(repo_id, revision):
                raise
            # Taken down or made private since it was downloaded, as has happened to much used models.
            logger.warning("%s: the hub has it no more, or not for you; going on with the copy in the cache", where)
            return cached(repo_id, revision, variant, "the hub has it no more")
        names = [file.rfilename for file in info.siblings or ()]
        if MODEL_INDEX not in names:
            raise InputError(f"{where}: no {MODEL_INDEX} on the hub, so not a diffusers model; give the id of one")
        # Alone at first, because it says whether the gigabytes behind it are of any use.
        components = pipeline_components(read_json(snapshot([MODEL_INDEX]) / MODEL_INDEX), where)
        return snapshot(wanted(names, components, variant, where))
    except HFValidationError as error:
        raise InputError(f"{repo_id}: no such folder, and not a hub id either (owner/name); check the path") from error
    except GatedRepoError as error:
        raise InputError(
            f"{where}: gated; accept its conditions at https://huggingface.co/{repo_id} and log in with  hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{repo_id}: no such folder, and no such repository on the hub; check the spelling, and if it is private "
            "log in with  hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{where}: the hub repository has no such branch, tag or commit") from error
    except (LocalEntryNotFoundError, HTTPError) as error:
        raise InputError(f"{where}: the download failed ({one_line(error)}); try again") from error
    except OSError as error:  # of the disk; the hub's own are above
        raise InputError(f"{where}: cannot be stored in the hub's cache ({one_line(error)}); see HF_HOME") from error


def wanted(names: list[str], components: tuple[str, ...], variant: str | None, where: str) -> list[str]:
    """Which files of a repository to download, out of the `names` that it has.

    Raises:
      InputError: a component without weights, or without weights of this variant.
    """
    files = [MODEL_INDEX]
    for component in components:
        inside = [name.removeprefix(f"{component}/") for name in names if name.startswith(f"{component}/")]
        if component.startswith("tokenizer"):
            files += [f"{component}/{name}" for name in inside if name in TOKENIZER_FILES]
            continue
        files.append(config_name(component))
        if component == "scheduler":
            continue
        weights, is_index = choose_file(inside, variant, f"{where}: {component}")
        files.append(f"{component}/{weights}")
        if is_index:
            files += [f"{component}/{name}" for name in inside if is_shard(name, weights, variant)]
    return files


def is_shard(name: str, index: str, variant: str | None) -> bool:
    """Whether a file can be one of the shards of `index`, to judge by its name (the variant stands before or after)."""
    extension = "safetensors" if ".safetensors" in index else "bin"
    base, word = index.split(".")[0], "" if variant is None else re.escape(f".{variant}")
    return re.fullmatch(rf"{base}({word}-\d+-of-\d+|-\d+-of-\d+{word})\.{extension}", name) is not None


def is_cached(repo_id: str, revision: str | None) -> bool:
    """Whether the hub's cache has anything of a repository at this revision."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo_id, MODEL_INDEX, revision=revision), str)


def cached(repo_id: str, revision: str | None, variant: str | None, reason: str) -> Path:
    """Complete snapshot of a repository from the hub's cache, the hub being out of reach for the `reason`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[MODEL_INDEX])
        )
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{repo_id}: no such folder, not in the hub's cache either, and {reason}; check the spelling, or go online"
        ) from error
    components = pipeline_components(read_component_config(folder, None), repo_id)
    try:
        for component in components:
            if component.startswith("tokenizer"):
                if not (folder / component).is_dir():
                    raise InputError(f"no {component}")
            else:
                read_component_config(folder, component)
                if component != "scheduler":
                    weight_files(folder / component, variant)
    except InputError as error:
        raise InputError(f"{repo_id}: {reason}, and its copy in the cache is not complete: {error}") from error
    return folder
