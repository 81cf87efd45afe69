"""Find a model: the embedded default, a folder or file, or a Hugging Face Hub repository, which is downloaded."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ti_jax.config import ASSETS
from ti_jax.errors import InputError, one_line
from ti_jax.files import as_url, disk_fault
from ti_jax.remote import local_copy
from ti_jax.weights.config_files import MODEL_INDEX, config_name, pipeline_components, read_component_config, read_json
from ti_jax.weights.files import choose_file, weight_files
from ti_jax.weights.tokenizers import TOKENIZER_FILES

logger = logging.getLogger(__name__)

# No repository has such a name; it is the name of a file, and the hub is not asked.
CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt")

EMBEDDED_DEFAULT = ASSETS / "mini-sd"


def resolve(
    path_or_hub_id: str | None, revision: str | None = None, variant: str | None = None, token: str | None = None
) -> Path:
    """Local diffusers folder or single-file checkpoint of a model, downloaded first if it is on the Hugging Face Hub.

    Only what ti_jax reads is downloaded from a repository: the components' configurations, tokenizers, and one set of
    weight files, preferably safetensors. It stays in the hub's cache, and is read from there if the hub cannot be
    reached (``HF_HUB_OFFLINE=1``, no network, a proxy or a login page in between).

    Args:
      path_or_hub_id: a folder or a file; else a hub id (``stable-diffusion-v1-5/stable-diffusion-v1-5``); None: the
        embedded default.
      revision: branch, tag or commit of the hub repository.
      variant: of the weight files, e.g. ``fp16``.
      token: for the hub. None: HF_TOKEN, or the one that ``hf auth login`` has stored.

    Raises:
      InputError: not found, no access, no network and no copy in the cache, or another kind of model.
    """
    if path_or_hub_id is None:
        return EMBEDDED_DEFAULT
    if not path_or_hub_id.strip():
        raise InputError("the model's name is empty; give a diffusers folder, a checkpoint or a hub id (owner/name)")
    if (url := as_url(path_or_hub_id)) is not None:
        return _copied(url, revision, variant)
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
                "(or the file, for a single-file checkpoint)"
            )
        pipeline_components(read_component_config(folder, None), folder)
        return folder
    return download(path_or_hub_id, revision, variant, token)


def _copied(url: str, revision: str | None, variant: str | None) -> Path:
    """A copy of what ti_jax reads of a folder or file behind a URL.

    Raises:
      InputError: as `resolve`.
    """

    def chosen(names: list[str]) -> list[str]:
        if MODEL_INDEX not in names:
            raise InputError(
                f"{url}: a folder without {MODEL_INDEX}, so not a diffusers model; give the one that has it (or the "
                f"file, for a single-file checkpoint)"
            )
        index = local_copy(f"{url}/{MODEL_INDEX}")
        return wanted(names, pipeline_components(read_json(index), url), variant, url) + [
            name for name in names if name.startswith("judge/")
        ]

    return resolve(str(local_copy(url, chosen)), revision, variant)


class HubError(Exception):
    """The hub, or its client on this machine, failed; the ``__cause__`` says why."""


class Fault(NamedTuple):
    """What is wrong with the hub and what to do; `answered`: the hub itself replied so."""

    what: str
    remedy: str
    answered: bool = False


LOG_IN = "log in with  hf auth login  (or set HF_TOKEN; train.py also takes --hub_token)"


def download(repo_id: str, revision: str | None, variant: str | None, token: str | None) -> Path:
    """Snapshot of a hub repository in the hub's cache; see `resolve`.

    If the hub fails in any way and the cache has a complete copy, that is used, with a warning.
    """
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError

    where = repo_id if revision is None else f"{repo_id} at revision {revision}"
    try:
        return from_hub(repo_id, revision, variant, token, where)
    except HubError as failed:
        error = failed.__cause__
        assert error is not None, "it is raised from one"
        if isinstance(error, HFValidationError):
            raise InputError(
                f"{repo_id}: no such folder, and not a hub id either (owner/name); check the path"
            ) from error
        if isinstance(error, RevisionNotFoundError):
            raise InputError(f"{where}: the hub repository has no such branch, tag or commit") from error
        fault = describe(error, repo_id)
        if not is_cached(repo_id, revision):
            absent = "" if fault.answered else "no such folder, not in the hub's cache either, and "
            raise InputError(f"{where}: {absent}{fault.what}; {fault.remedy}") from error
        folder = cached(repo_id, revision, variant, where, fault)
        if not isinstance(error, OfflineModeIsEnabled):  # offline mode is the user's choice
            logger.warning("%s: %s; going on with the copy in the cache", where, fault.what)
        return folder


def from_hub(repo_id: str, revision: str | None, variant: str | None, token: str | None, where: str) -> Path:
    """As `download`, without the cache: HubError if the hub fails, InputError if it has no model that we read."""
    from huggingface_hub import HfApi, constants, snapshot_download

    def ask(function: Callable[..., Any], **arguments: Any) -> Any:
        try:
            return function(repo_id, revision=revision, token=token, **arguments)
        # More than HTTP errors: ImportError of a SOCKS proxy without its package, KeyError of unexpected JSON, invalid
        # URLs. None is a bug of ours: the arguments are an id and names of files.
        except Exception as error:
            raise HubError from error

    # Not list_repo_files, which retries for half a minute without network. This one has no timeout by default.
    info = ask(HfApi().model_info, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    names = [file.rfilename for file in info.siblings or ()]
    if MODEL_INDEX not in names:
        raise InputError(f"{where}: no {MODEL_INDEX} on the hub, so not a diffusers model; give the id of one")
    # First, because it decides whether the gigabytes of weights are of any use.
    index = Path(ask(snapshot_download, allow_patterns=[MODEL_INDEX])) / MODEL_INDEX
    components = pipeline_components(read_json(index), where)
    return Path(ask(snapshot_download, allow_patterns=wanted(names, components, variant, where)))


def describe(error: BaseException, repo_id: str) -> Fault:
    """Classify an exception of the hub's client."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        FileMetadataError,
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,  # of the HTTP library that huggingface_hub uses
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        conditions = f"accept its conditions at https://huggingface.co/{repo_id} and {LOG_IN}"
        return Fault("gated", conditions, answered=True)
    if isinstance(error, RepositoryNotFoundError):
        what = "no such folder, and no such repository on the hub"
        return Fault(what, f"check the spelling, and if it is private {LOG_IN}", answered=True)
    said = one_line(error)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return Fault(f"the hub refuses access ({said})", f"check the token, or {LOG_IN}", answered=True)
        if status == 429:
            return Fault(f"too many requests for the hub ({said})", f"try again later, or {LOG_IN}", answered=True)
        if status < 500:
            return Fault(f"the download failed ({said})", "try again", answered=True)
    if isinstance(error, ImportError):
        proxies = "install that package, or unset the proxy (ALL_PROXY, HTTPS_PROXY)"
        return Fault(f"the hub cannot be reached ({said})", proxies)
    if isinstance(error, FileMetadataError) or not isinstance(error, HTTPError | OSError):
        what = f"{constants.ENDPOINT} does not answer as the hub does ({said})"
        return Fault(what, "log in to the network if it has a login page, or check HF_ENDPOINT and the proxy")
    if isinstance(error, LocalEntryNotFoundError):
        return Fault(f"the download failed ({said})", "try again", answered=True)
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, OfflineModeIsEnabled):
        return Fault(f"cannot be stored in the hub's cache ({disk_fault(error)})", "see HF_HOME", answered=True)
    return Fault(f"the hub cannot be reached ({said})", "check the spelling, or go online")


def wanted(names: list[str], components: tuple[str, ...], variant: str | None, where: str) -> list[str]:
    """Files to download out of all `names` in a repository.

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
    """Whether a file name can be a shard of `index` (the variant is before or after the shard number)."""
    extension = "safetensors" if ".safetensors" in index else "bin"
    base, word = index.split(".")[0], "" if variant is None else re.escape(f".{variant}")
    return re.fullmatch(rf"{base}({word}-\d+-of-\d+|-\d+-of-\d+{word})\.{extension}", name) is not None


def is_cached(repo_id: str, revision: str | None) -> bool:
    """Whether the hub's cache has any file of a repository at this revision."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo_id, MODEL_INDEX, revision=revision), str)


def cached(repo_id: str, revision: str | None, variant: str | None, where: str, fault: Fault) -> Path:
    """Complete snapshot of a repository from the hub's cache; InputError if it is not complete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[MODEL_INDEX])
        )
        components = pipeline_components(read_component_config(folder, None), repo_id)
        for component in components:
            if component.startswith("tokenizer"):
                if not (folder / component).is_dir():
                    raise InputError(f"no {component}")
            else:
                read_component_config(folder, component)
                if component != "scheduler":
                    weight_files(folder / component, variant)
    except (InputError, LocalEntryNotFoundError) as error:
        lacks = str(error) if isinstance(error, InputError) else one_line(error)
        raise InputError(
            f"{where}: {fault.what}, and its copy in the cache is not complete: {lacks}; {fault.remedy}"
        ) from error
    return folder
