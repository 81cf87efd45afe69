"""Upload of a finished run to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..config import TrainConfig
from ..embeddings import Embedding
from ..errors import InputError, one_line, utf8
from ..files import write_atomically

_UPLOADED = ["learned_embeds*.safetensors", "overview.png", "samples/*.png", "config.yaml", "README.md"]


def open_repository(config: TrainConfig) -> Callable[[Path, Embedding], None]:
    """Create the repository before training starts, so that a wrong token costs a second and not a run.

    Returns:
      ``push(folder, embedding)``, which writes a model card and uploads the folder.

    Raises:
      InputError: no token, no right to the repository, or no network.
    """
    from huggingface_hub import HfApi
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
        write_atomically(folder / "README.md", utf8(model_card(config, embedding)).encode())
        try:
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                allow_patterns=_UPLOADED,
                commit_message=f"{embedding.token}: {embedding.metadata['steps']} steps",
            )
        except refusals as error:
            raise InputError(
                f"--push_to_hub: the upload to {repository} failed ({one_line(error)}); the result is "
                f"whole in {folder}, upload it with `hf upload {repository} {folder}`"
            ) from error

    return push


def model_card(config: TrainConfig, embedding: Embedding) -> str:
    """The README.md of a pushed word, with the hub's front matter."""
    base = embedding.metadata["base_model"]
    token = embedding.metadata.get("initializer_token")
    start = (
        f'"{token}"' if token else f"another learned word, `{Path(embedding.metadata['initializer_embedding']).name}`"
    )
    base_line = f"base_model: {base}\n" if config.pretrained_model_name_or_path and not Path(base).exists() else ""
    loader = "from_single_file" if Path(base).is_file() else "from_pretrained"
    return f"""---
{base_line}tags:
- textual_inversion
- stable-diffusion
- text-to-image
---

# `{embedding.token}`

A word for Stable Diffusion ({base}), learned with Textual Inversion: {embedding.metadata["steps"]} steps on
{embedding.num_vectors} row(s) of the token-embedding table, starting from {start}.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.{loader}("{base}")
pipe.load_textual_inversion("learned_embeds.safetensors")
pipe("a picture of {embedding.token}").images[0].save("out.png")
```

![what the word draws](overview.png)
"""
