"""``ti-jax verify``: compare the encoding of a prompt with a learned word with that of diffusers on PyTorch."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ti_jax.embeddings import diffusers_format
from ti_jax.embeddings.comfyui_format import KEYS
from ti_jax.embeddings.containers import PICKLE_SUFFIXES, read_content
from ti_jax.embeddings.embedding import Embedding, check_fits
from ti_jax.embeddings.formats import word_file
from ti_jax.embeddings.warn import capital_fault
from ti_jax.errors import InputError, one_line
from ti_jax.pipeline import StableDiffusion
from ti_jax.text import tokens
from ti_jax.words import fill, is_word

LIMIT = 1e-5


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`.

    Attributes:
      rows_equal: the rows in the token tables of diffusers' pipeline are those of the file, bit for bit.
      max_difference: largest absolute difference of the encoded prompts (float32; for SDXL also of the pooled text).
      relative_difference: that divided by the largest absolute value of the encoded prompt; for SDXL the larger of two.
      against: names and versions of the libraries compared with.
    """

    path: Path
    token: str
    num_vectors: int
    model: str
    prompt: str
    rows_equal: bool
    max_difference: float
    relative_difference: float
    against: str

    @property
    def ok(self) -> bool:
        """The rows are equal, and the relative difference is within 1e-5."""
        return self.rows_equal and self.relative_difference <= LIMIT

    def summary(self) -> str:
        """The result on one line."""
        count = "1 vector" if self.num_vectors == 1 else f"{self.num_vectors} vectors"
        rows = "its rows are equal" if self.rows_equal else "its rows DIFFER"
        fault = None if self.ok else capital_fault(self.token, self.num_vectors)
        return (
            f"{self.path}: {'ok' if self.ok else 'FAILED'}: {self.token} ({count}) with {self.model} in "
            f"{self.against}: {rows}; {self.prompt!r} encoded differs by at most {self.max_difference:.1e}, relative "
            f"{self.relative_difference:.1e} (limit {LIMIT:.0e})" + (f"; {fault}" if fault is not None else "")
        )

    def __str__(self) -> str:
        return self.summary()


def verify(
    embedding_path: str | Path, model_path: str | Path | None = None, prompt: str | None = None, clip_skip: int = 0
) -> VerifyReport:
    """Load a word's file into diffusers on PyTorch, encode a prompt with both libraries in float32, and compare.

    diffusers reads the file itself (``load_textual_inversion``) and encodes with its own ``encode_prompt``, with the
    model's own tokenizers and text encoders. For an SDXL file with the keys ``clip_l`` and ``clip_g`` it is passed the
    two tensors, as its documentation recommends.

    Args:
      model_path: a diffusers folder or a hub id; None: the embedded default.
      prompt: contains the word, or ``{}`` in its place; None: the word alone.
      clip_skip: last layers of the text encoders to leave out, in both libraries.

    Raises:
      InputError: PyTorch or diffusers is missing; the file or the model cannot be read, or they do not fit each other;
        the prompt does not contain the word; diffusers does not load the file.
    """
    _check_installed()
    if model_path is not None and Path(model_path).expanduser().is_file():
        raise InputError(
            f"{model_path}: a single file, for which diffusers would download the configuration; to verify, give the "
            "model as a diffusers folder (diffusers' from_single_file(...).save_pretrained(...) converts it)"
        )
    path = word_file(embedding_path)
    embedding = Embedding.load(path)
    if embedding.stored_name is not None and is_word(embedding.stored_name):
        embedding = replace(embedding, token=embedding.stored_name)  # the name that diffusers uses
    model = None if model_path is None else str(model_path)
    sd = StableDiffusion.from_pretrained(model, dtype=jnp.float32, clip_skip=clip_skip)
    check_fits(embedding, sd.embedding_dims, path)
    for tokenizer in sd.tokenizers.values():
        tokens.check_new_word(tokenizer, embedding.token)
    prompt = fill(prompt or "{}", embedding.token)
    words, rows = tokens.combine([embedding])
    ids = sd.tokenize([prompt], words)
    for name, row in ids.items():
        if not np.isin(sd.vocab_sizes[name] + np.arange(embedding.num_vectors), row).all():
            raise InputError(f"--prompt {prompt!r} does not hold the word {embedding.token!r} of {path}; put it in")
    condition = sd.encode_text(ids, rows)
    ours = [np.asarray(part) for part in (condition.context, condition.pooled) if part is not None]

    import diffusers
    import torch

    with _quiet(), torch.no_grad():
        pipeline = _text_pipeline(sd)
        _load(pipeline, path, embedding)
        encoded = pipeline.encode_prompt(
            prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False,
            clip_skip=clip_skip or None,
        )  # fmt: skip
        # SDXL's result has the pooled text third, after the negative prompt's embeddings.
        theirs = [part.numpy() for part in (encoded[0], *encoded[2:3])]
        rows_equal = all(
            np.array_equal(_rows(pipeline, name, embedding), vectors) for name, vectors in embedding.vectors.items()
        )
    differences = [float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True)]
    relative = [d / float(np.abs(b).max()) for d, b in zip(differences, theirs, strict=True)]
    return VerifyReport(
        path=path,
        token=embedding.token,
        num_vectors=embedding.num_vectors,
        model=sd.name,
        prompt=prompt,
        rows_equal=rows_equal,
        max_difference=max(differences),
        relative_difference=max(relative),
        against=f"diffusers {diffusers.__version__} on PyTorch {torch.__version__}",
    )


def _check_installed() -> None:
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"verifying needs PyTorch and diffusers, and {error.name or error} is missing: pip install 'ti_jax[torch]'"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context without the log output of transformers and diffusers: the command prints one line."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [logging.get_verbosity() for logging in (transformers_logging, diffusers_logging)]
    bar = transformers_logging.is_progress_bar_enabled()
    for logging in (transformers_logging, diffusers_logging):
        logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging, verbosity in zip((transformers_logging, diffusers_logging), before, strict=True):
            logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _text_pipeline(sd: StableDiffusion) -> Any:
    """diffusers' pipeline for the model, in float32, with only its text encoders and tokenizers."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    parts: dict[str, Any] = {"vae": None, "unet": None, "scheduler": None}
    for name in sd.tokenizers:
        kind = CLIPTextModel if name == "text_encoder" else CLIPTextModelWithProjection
        parts[name] = kind.from_pretrained(sd.path, subfolder=name).float().eval()
        if not hasattr(parts[name], "text_model"):
            # diffusers 0.42 looks there for the norm after clip_skip; transformers 5 has no such part any more. It is
            # not set as a PyTorch module, which would contain itself.
            object.__setattr__(parts[name], "text_model", parts[name])
        tokenizer = name.replace("text_encoder", "tokenizer")
        parts[tokenizer] = CLIPTokenizer.from_pretrained(sd.path, subfolder=tokenizer)
    if len(sd.tokenizers) > 1:
        return StableDiffusionXLPipeline(**parts)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def _load(pipeline: Any, path: Path, embedding: Embedding) -> None:
    """Load the file with diffusers, for each text encoder the part that belongs to it."""
    import safetensors.torch
    import torch

    content = read_content(path)
    halves = diffusers_format.halves_of(content)
    for name in embedding.vectors:
        source: Any = str(path)
        if halves is not None:
            source = str(halves[name][0])
        elif KEYS[name] in content.data:
            pickled = path.suffix in PICKLE_SUFFIXES
            tensors = torch.load(path, weights_only=True) if pickled else safetensors.torch.load_file(path)
            source = tensors[KEYS[name]]
        try:
            pipeline.load_textual_inversion(
                source,
                token=embedding.token,
                text_encoder=getattr(pipeline, name),
                tokenizer=getattr(pipeline, name.replace("text_encoder", "tokenizer")),
            )
        except (OSError, ValueError, LookupError, AttributeError, RuntimeError, pickle.UnpicklingError) as error:
            raise InputError(
                f"{path}: diffusers does not load it ({one_line(error)}); save it in diffusers' format first"
            ) from error


def _rows(pipeline: Any, name: str, embedding: Embedding) -> np.ndarray:
    """The word's rows in the token-embedding table of diffusers' pipeline, float32 [n, D]."""
    tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
    words = [embedding.token, *(f"{embedding.token}_{i}" for i in range(1, embedding.num_vectors))]
    return getattr(pipeline, name).get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(words)].numpy()
