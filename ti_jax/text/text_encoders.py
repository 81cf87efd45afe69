"""A model's tokenizers and text encoders: enough for prompts and words, without loading the UNet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ti_jax.batches import in_batches
from ti_jax.embeddings.embedding import Embedding, check_fits
from ti_jax.embeddings.inspect import Vocabulary
from ti_jax.errors import InputError
from ti_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from ti_jax.models.shapes import param_shapes
from ti_jax.ops.matmul import exact_products
from ti_jax.text import prompt_weights, tokens
from ti_jax.weights.hub import resolve
from ti_jax.weights.identity import Identity
from ti_jax.weights.sources import open_source
from ti_jax.words import fill

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BATCH = 8  # prompts encoded at once; a fixed number, so that it compiles once


@partial(jax.jit, static_argnums=0)
def encode(module: CLIPTextModel, params: Any, ids: jax.Array, rows: jax.Array | None) -> Any:
    """The `CLIPTextOutput` of ids int32 [B, L] with new words' rows float32 [n, D], compiled once for each shape."""
    with exact_products(module.dtype):
        return module.apply({"params": params}, ids, rows)


@dataclass(frozen=True)
class PromptTokenizers:
    """Tokenizers and sizes of a model's text encoders, to check prompts before any weights are read.

    Attributes:
      modules, tokenizers: by text encoder: "text_encoder", and for SDXL "text_encoder_2".
    """

    modules: Mapping[str, CLIPTextModel]
    tokenizers: Mapping[str, CLIPTokenizer]

    @property
    def vocab_sizes(self) -> dict[str, int]:
        """Number of rows of each text encoder's frozen token table; ids from there on are trained rows."""
        return {name: module.config.vocab_size for name, module in self.modules.items()}

    @property
    def embedding_dims(self) -> dict[str, int]:
        """Token-embedding width, by text encoder."""
        return {name: module.config.hidden_size for name, module in self.modules.items()}

    @property
    def max_lengths(self) -> dict[str, int]:
        """Maximum length in tokens by text encoder, including start and end."""
        return {
            name: min(module.config.max_position_embeddings, self.tokenizers[name].model_max_length)
            for name, module in self.modules.items()
        }

    def tokenize(self, prompts: Sequence[str], words: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
        """Token ids int32 [B, L] for each text encoder; ``words`` are placeholders with their numbers of vectors.

        Raises:
          InputError: a prompt is longer than the text encoder's maximum.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return {
            name: tokens.tokenize(
                self.tokenizers[name], prompts, words or {}, self.vocab_sizes[name], self.max_lengths[name]
            )
            for name in self.modules
        }

    def readers(self) -> dict[str, prompt_weights.Reader]:
        """Tokenizer and sizes of each text encoder, for `prompt_weights`."""
        return {
            name: prompt_weights.Reader(tokenizer, self.vocab_sizes[name], self.max_lengths[name])
            for name, tokenizer in self.tokenizers.items()
        }

    def groups(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str] | None,
        words: Mapping[str, int],
        weighted: bool,
    ) -> Iterator[prompt_weights.Group]:
        """Prompts as ids, in groups that can be drawn together: a single group unless ``weighted``.

        Raises:
          InputError: a prompt is too long, or with ``weighted`` a word is.
        """
        if weighted:
            yield from prompt_weights.groups(self.readers(), prompts, negatives, words)
            return
        negative_ids = None if negatives is None else self.tokenize(negatives, words)
        yield prompt_weights.Group(list(range(len(prompts))), self.tokenize(prompts, words), negative_ids)

    def without(
        self, token: str, prompts: Sequence[str], words: Mapping[str, int], weighted: bool = False
    ) -> list[str]:
        """Prompts that, once tokenized, lack some vectors of ``token``, which is one of ``words``.

        Raises:
          InputError: as `groups`.
        """
        first = sum(count for word, count in list(words.items())[: list(words).index(token)])
        lacking: dict[str, None] = {}
        for group in self.groups(prompts, None, words, weighted):
            for name, value in group.ids.items():
                ids = value.ids if isinstance(value, prompt_weights.Chunk) else value
                wanted = self.vocab_sizes[name] + first + np.arange(words[token])
                for number, row in zip(group.numbers, ids, strict=True):
                    if not np.isin(wanted, row).all():
                        lacking[prompts[number]] = None
        return list(lacking)


@dataclass(frozen=True)
class TextEncoders(PromptTokenizers):
    """The text encoders of one Stable Diffusion with their tokenizers.

    Attributes:
      params: parameter tree by text encoder.
      name: the model as the user gave it, or "mini-sd" for the embedded default.
    """

    params: Mapping[str, Any]
    name: str

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | None = None, revision: str | None = None, variant: str | None = None
    ) -> TextEncoders:
        """Read them from a diffusers folder, hub repository or single file; ``None`` is the embedded default.

        Raises:
          InputError: as `StableDiffusion.from_pretrained`, for the text encoders.
        """
        path = resolve(path_or_hub_id, revision, variant)
        with open_source(path, variant, text_only=True) as source:
            modules = {
                name: CLIPTextModel(CLIPTextConfig.from_dict(source.configs[name]), jnp.float32)
                for name in source.text_encoders
            }
            ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
            shapes = {name: param_shapes(module, ids) for name, module in modules.items()}
            return cls(
                modules=modules,
                params=source.load(shapes, jnp.float32, Identity()),
                tokenizers={name: source.tokenizer(name) for name in source.text_encoders},
                name="mini-sd" if path_or_hub_id is None else path_or_hub_id,
            )

    def token_table(self, name: str) -> np.ndarray:
        """The frozen token-embedding table of one text encoder, float32 [vocab_size, D]."""
        return np.asarray(self.params[name]["embeddings"]["token_embedding"]["embedding"]).astype(np.float32)

    def vocabulary(self, name: str) -> Vocabulary:
        """Whole words of one text encoder (no pieces of words, no start and end tokens), with their rows."""
        table = self.token_table(name)
        tokenizer = self.tokenizers[name]
        words, numbers = [], []
        for token, number in tokenizer.get_vocab().items():
            if not token.endswith("</w>") or number >= len(table):
                continue
            word = str(tokenizer.decode([number])).strip()
            if word.isprintable() and word and "\ufffd" not in word:  # else a byte that is not a character
                words.append(word)
                numbers.append(number)
        usual = float(np.median(np.linalg.norm(table, axis=1)))
        return Vocabulary(self.name, words, table[numbers], usual)

    def end_states(
        self, prompt: str, embedding: Embedding, selections: Sequence[Sequence[int]]
    ) -> dict[str, np.ndarray]:
        """Encode a prompt with only some of a word's vectors, for several selections of them.

        Args:
          prompt: contains the word, or ``{}`` for it.
          selections: for each result, the indices of the vectors to keep.

        Returns:
          By text encoder, float32 [B, D]: the hidden state that is passed to the UNet, at the end-of-text token (of the
          last layer for SD1.x and SD2.x, of the penultimate one for SDXL).

        Raises:
          InputError: the word does not fit the model, is not in the prompt, or makes it too long.
        """
        check_fits(embedding, self.embedding_dims, embedding.token)
        prompt = fill(prompt, embedding.token)
        words = {embedding.token: embedding.num_vectors}
        if self.without(embedding.token, [prompt], words):
            raise InputError(f"--prompt {prompt!r}: the word {embedding.token} is not in it; write it, or {{}}")
        states = {}
        for name, ids in self.tokenize([prompt], words).items():
            tokenizer, vocab_size, longest = self.tokenizers[name], self.vocab_sizes[name], self.max_lengths[name]
            whole = ids[0]
            end = int(np.argmax(whole == tokenizer.eos_token_id))
            batch = np.full((len(selections), longest), tokenizer.pad_token_id, np.int32)
            ends = np.empty(len(selections), np.int64)
            for number, selection in enumerate(selections):
                staying = {vocab_size + row for row in selection}
                kept = [i for i in whole[: end + 1] if i < vocab_size or i in staying]
                batch[number, : len(kept)] = kept
                ends[number] = len(kept) - 1
            hidden = self._hidden(name, batch, embedding.vectors[name])
            states[name] = hidden[np.arange(len(batch)), ends]
        return states

    def _hidden(self, name: str, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Ids int32 [B, L] and rows [n, D] -> hidden states that are passed to the UNet, float32 [B, L, D]."""

        def encode_batch(batch: np.ndarray) -> jax.Array:
            output = encode(self.modules[name], self.params[name], jnp.asarray(batch), jnp.asarray(rows))
            return output.last_hidden_state if len(self.modules) == 1 else output.penultimate_hidden_state

        return in_batches(encode_batch, ids, BATCH)
