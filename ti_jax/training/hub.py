"""Upload of a finished run to the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from ti_jax.config import TrainConfig
from ti_jax.config.concepts import slug
from ti_jax.embeddings import Embedding
from ti_jax.embeddings.embedding import NEGATIVE_CLASS
from ti_jax.embeddings.families import family_of
from ti_jax.embeddings.formats import render
from ti_jax.errors import InputError, one_line, utf8
from ti_jax.files import as_url, write_atomically
from ti_jax.training.run_folder import ONE_FILE
from ti_jax.training.uses import Base, base_of, diffusers_code, example_prompt, uses
from ti_jax.training.validation import OVERVIEW_COLUMNS
from ti_jax.words import fill

# Not config.yaml, which has the paths of this machine.
_UPLOADED = (
    "learned_embeds*.safetensors", "overview.png", "progress.png", "samples/*.png", "report.html", "scores.json",
    "README.md",
)  # fmt: skip
# Named by the word, which AUTOMATIC1111 and ComfyUI take from the file's name.
_ALSO = {".safetensors": "comfyui", ".pt": "a1111", ".png": "card"}


def open_repository(config: TrainConfig) -> Callable[[Path, Embedding], None]:
    """Create the repository before training starts, so that a wrong token is found at once.

    Returns:
      ``push(folder, embedding)``, which writes a model card and uploads the folder.

    Raises:
      InputError: no token, no right to the repository, or no network.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,  # of the HTTP library that huggingface_hub uses
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    refusals = (HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError)
    api = HfApi(token=config.hub_token)
    name = config.hub_model_id or Path(config.output_dir).absolute().name
    try:
        repository = api.create_repo(name, exist_ok=True).repo_id
    except refusals as error:
        raise InputError(
            f"--push_to_hub: cannot open the repository {name!r} ({one_line(error)}); check "
            f"--hub_token (or `hf auth login`), --hub_model_id and the network"
        ) from error

    def push(folder: Path, embedding: Embedding) -> None:
        card = model_card(config, embedding, repository, folder)
        write_atomically(folder / "README.md", utf8(card).encode())
        try:
            api.create_commit(
                repo_id=repository,
                operations=[CommitOperationAdd(name, content) for name, content in _files(folder, embedding).items()],
                commit_message=f"{embedding.token}: {embedding.metadata['steps']} steps",
            )
        except refusals as error:
            raise InputError(
                f"--push_to_hub: the upload to {repository} failed ({one_line(error)}); the result is "
                f"whole in {folder}, upload it with `hf upload {repository} {folder}`"
            ) from error

    return push


def _files(folder: Path, embedding: Embedding) -> dict[str, Path | bytes]:
    """What is uploaded, by its name in the repository: files of the run, and the word in the other formats."""
    found = (path for pattern in _UPLOADED for path in sorted(folder.glob(pattern)) if path.is_file())
    files: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in found}
    return files | in_all_formats(embedding)


def in_all_formats(embedding: Embedding) -> dict[str, bytes]:
    """Files of a word that AUTOMATIC1111 and ComfyUI know by its own name; none for a model that they do not know.

    ``.pt`` needs PyTorch, and is left out without it; SDXL has no other format than ``.safetensors``.
    """
    files: dict[str, bytes] = {}
    if family_of(embedding.dims) is None:
        return files
    for suffix, form in _ALSO.items():
        with contextlib.suppress(InputError):
            rendered = render(embedding, Path(f"{slug(embedding.token)}{suffix}"), form)
            files |= {path.name: content for path, content in rendered.items()}
    return files


def _in_other_programs(embedding: Embedding, base: Base) -> str:
    """The card's lines on programs that read a file from a folder of theirs; none for a model that they do not know."""
    others = [(PurePosixPath(use.place), use) for use in uses(embedding, "{}", "", base) if use.place is not None]
    if not others:
        return ""
    where = "the prompt" if NEGATIVE_CLASS not in embedding.metadata else "the negative prompt"
    lines = [
        f"| program | put `{others[0][0].name}` into | write in {where} |",
        "|---|---|---|",
        *(f"| {use.program} | `{place.parent}/` | `{use.negative_prompt or use.prompt}` |" for place, use in others),
    ]
    return "\n".join(["", *lines, ""])


def model_card(config: TrainConfig, embedding: Embedding, repository: str, folder: Path) -> str:
    """The README.md of a pushed word, with the hub's front matter.

    Args:
      repository: hub id of the word's own repository, used in the card's example code.
      folder: the run's folder, whose pictures the card shows.
    """
    base = embedding.metadata["base_model"]
    model = config.pretrained_model_name_or_path
    is_local = model is None or as_url(model) is not None or Path(model).exists()
    start = embedding.metadata.get("initializer_token")
    start = (
        f'"{start}"' if start else f"another learned word, `{Path(embedding.metadata['initializer_embedding']).name}`"
    )
    sdxl = len(embedding.vectors) > 1
    subject = embedding.metadata.get(NEGATIVE_CLASS)
    example = fill(example_prompt(config), subject or embedding.token)
    named = base_of(config, base)
    code = diffusers_code(embedding, example, repository, named)
    kind_of_word = "word" if subject is None else "word for negative prompts"
    one_file = f"\nAUTOMATIC1111 and ComfyUI read `{ONE_FILE}` instead of the two.\n"
    return f"""---
{_front_matter(config, embedding, None if is_local else base, sdxl, folder)}---

# `{embedding.token}`

A {kind_of_word} for Stable Diffusion ({base}), learned with Textual Inversion: {embedding.metadata["steps"]} steps on
{embedding.num_vectors} row(s) of the token-embedding table, starting from {start}.

```python
{code}
```
{one_file if sdxl else ""}{_in_other_programs(embedding, named)}
![what the word draws](overview.png)
"""


def _front_matter(config: TrainConfig, embedding: Embedding, base: str | None, sdxl: bool, folder: Path) -> str:
    """The card's metadata as YAML. Texts are JSON strings, which are valid YAML."""

    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    lines = ["library_name: diffusers"]
    lines += [f"license: {quoted(config.hub_license)}"] if config.hub_license is not None else []
    lines += [f"base_model: {quoted(base)}"] if base is not None else []
    lines += [f"instance_prompt: {quoted(embedding.token)}", "pipeline_tag: text-to-image"]
    lines += ["tags:", "- textual_inversion", f"- {'stable-diffusion-xl' if sdxl else 'stable-diffusion'}"]
    lines += ["- text-to-image"]
    subject = embedding.metadata.get(NEGATIVE_CLASS)
    widgets = [
        (fill(prompt, subject or embedding.token), f"samples/overview-{OVERVIEW_COLUMNS * (row + 1):02d}.png")
        for row, prompt in enumerate(config.overview_prompts or ())
    ]
    widgets = [(prompt, picture) for prompt, picture in widgets if (folder / picture).is_file()]
    lines += ["widget:"] if widgets else []
    for prompt, picture in widgets:
        lines += [f"- text: {quoted(prompt)}"]
        lines += ["  parameters:", f"    negative_prompt: {quoted(embedding.token)}"] if subject is not None else []
        lines += ["  output:", f"    url: {picture}"]
    return "\n".join([*lines, ""])
