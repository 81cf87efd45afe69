"""PyTorch training loops to compare with.

`StockLoop` reimplements the step of diffusers' ``textual_inversion.py``, and for SDXL of ``textual_inversion_sdxl.py``:
every step encodes the pictures again, AdamW updates the whole token tables, and the old rows are restored. Reading and
cropping pictures is not included, which is to its advantage. `StrongLoop` is the fastest loop that we could write.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch.nn.functional import mse_loss
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

Ids = Mapping[str, torch.Tensor]  # token ids [B, L] by text encoder


@dataclass
class StockLoop:
    """Learn one row for `token`, in the table of each text encoder, from pictures.

    Attributes:
      model: a diffusers folder.
      pixels: float32 [N, 3, H, W] in [-1, 1].
      templates: prompts with ``{}`` for the word.
      token, initializer: the new word, and the word from which its row is initialised.
      learning_rate, weight_decay: AdamW's; the script's defaults.
      batch_size: pictures a step.
      flip_probability: how often a picture is mirrored; the script's.
      seed: of all random numbers.
      device, dtype: of the frozen autoencoder and UNet; text encoders are float32, under autocast if `dtype` is not.
      time_ids: SDXL's six numbers for sizes and crops, the same for all pictures.
    """

    model: Path
    pixels: torch.Tensor
    templates: Sequence[str]
    token: str
    initializer: str
    learning_rate: float = 1e-4
    weight_decay: float = 1e-2
    batch_size: int = 8
    flip_probability: float = 0.5
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    time_ids: Sequence[float] = ()

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        names = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
        self.tokenizers = {
            name: CLIPTokenizer.from_pretrained(self.model / tokenizer)
            for name, tokenizer in names.items()
            if (self.model / name).is_dir()
        }
        self.xl = len(self.tokenizers) == 2
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        self.text_encoders = {
            name: kinds[name].from_pretrained(self.model / name).requires_grad_(False) for name in self.tokenizers
        }
        self.vae = AutoencoderKL.from_pretrained(self.model / "vae").requires_grad_(False)
        self.unet = UNet2DConditionModel.from_pretrained(self.model / "unet").requires_grad_(False)
        self.schedule = DDPMScheduler.from_pretrained(self.model / "scheduler")
        # The files may be in half precision; the script trains in float32 by default.
        for network in (self.vae, self.unet):
            network.to(self.device, self.dtype)
        self.tables: dict[str, torch.Tensor] = {}
        for text_encoder in self.text_encoders.values():
            text_encoder.to(self.device, torch.float32)
        self.add_word()
        self.order: list[int] = []
        self.prepare()

    def add_word(self) -> None:
        """A row for the new word in each table."""
        for name, tokenizer in self.tokenizers.items():
            text_encoder = self.text_encoders[name]
            (start,) = tokenizer.encode(self.initializer, add_special_tokens=False)
            tokenizer.add_tokens(self.token)
            text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            self.tables[name] = text_encoder.get_input_embeddings().weight
            with torch.no_grad():
                self.tables[name][self.id(name)] = self.tables[name][start]

    def id(self, name: str) -> int:
        """The new word's id in the table of the text encoder `name`."""
        return self.tokenizers[name].convert_tokens_to_ids(self.token)

    def prepare(self) -> None:
        """Create the trained parameters and their optimizer."""
        self.original = {name: table.detach().clone() for name, table in self.tables.items()}
        self.trained = {name: table.requires_grad_(True) for name, table in self.tables.items()}
        self.make_optimizer()

    def make_optimizer(self) -> None:
        """AdamW over the trained parameters."""
        trained = self.trained.values()
        self.optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=self.weight_decay)

    def place(self, name: str) -> slice:
        """Index of the new row in the trained parameter of the text encoder `name`."""
        return slice(self.id(name), self.id(name) + 1)

    @property
    def rows(self) -> dict[str, np.ndarray]:
        """The new row in each table, float32 [1, D]."""
        return {name: each.detach()[self.place(name)].cpu().numpy().copy() for name, each in self.trained.items()}

    @property
    def row_gradients(self) -> dict[str, np.ndarray]:
        """The gradients of the new rows after `loss(...).backward()`, float32 [1, D]."""
        return {name: each.grad[self.place(name)].cpu().numpy().copy() for name, each in self.trained.items()}

    def run(self, steps: int) -> float:
        """Train; returns the seconds that it took."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def choose(self) -> tuple[list[int], torch.Tensor, Ids]:
        """Pictures of the next batch, which of them are mirrored [B], and token ids."""
        while len(self.order) < self.batch_size:
            self.order += torch.randperm(len(self.pixels), generator=self.random).tolist()
        chosen, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        mirrored = torch.rand(self.batch_size, generator=self.random) < self.flip_probability
        numbers = torch.randint(len(self.templates), (self.batch_size,), generator=self.random)
        texts = [self.templates[number].replace("{}", self.token) for number in numbers]
        return chosen, mirrored, self.tokenize(texts)

    def tokenize(self, texts: list[str]) -> Ids:
        """Token ids of prompts."""
        return {
            name: tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(self.device)
            for name, tokenizer in self.tokenizers.items()
        }

    def latents(self, chosen: list[int], mirrored: torch.Tensor) -> torch.Tensor:
        """Latents [B, c, h, w] of pictures, sampled from the autoencoder's moments."""
        pixels = torch.where(mirrored[:, None, None, None], self.pixels[chosen].flip(-1), self.pixels[chosen])
        posterior = self.vae.encode(pixels.to(self.device, self.dtype)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=self.random).to(posterior.mean)
        return (posterior.mean + posterior.std * noise) * self.vae.config.scaling_factor

    def step(self) -> None:
        """One update."""
        chosen, mirrored, ids = self.choose()
        latents = self.latents(chosen, mirrored)
        noise = torch.randn(latents.shape, generator=self.random).to(latents)
        count = self.schedule.config.num_train_timesteps
        timesteps = torch.randint(count, (len(latents),), generator=self.random).to(self.device)
        self.loss(latents, noise, timesteps, ids).backward()
        self.update()

    def condition(self, ids: Ids) -> dict[str, Any]:
        """Conditioning arguments of the UNet."""
        if not self.xl:
            return {"encoder_hidden_states": self.text_encoders["text_encoder"](ids["text_encoder"])[0].to(self.dtype)}
        answers = [self.text_encoders[name](each, output_hidden_states=True) for name, each in ids.items()]
        context = torch.cat([answer.hidden_states[-2] for answer in answers], dim=-1).to(self.dtype)
        times = torch.tensor(self.time_ids, device=self.device).expand(len(context), 6)
        added = {"text_embeds": answers[-1].text_embeds.to(self.dtype), "time_ids": times}
        return {"encoder_hidden_states": context, "added_cond_kwargs": added}

    def loss(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, ids: Ids) -> torch.Tensor:
        """Mean squared error of the UNet's prediction."""
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        if self.schedule.config.prediction_type == "v_prediction":
            target = self.schedule.get_velocity(latents, noise, timesteps)
        else:
            target = noise
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            predicted = self.unet(noisy.to(self.dtype), timesteps, **self.condition(ids)).sample
        return mse_loss(predicted.float(), target.float())

    def update(self) -> None:
        """AdamW on the whole tables; then all rows but the new ones are restored."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, table in self.tables.items():
                new, original = self.id(name), self.original[name]
                table[:new] = original[:new]
                table[new + 1 :] = original[new + 1 :]


class _WithNewRow(torch.nn.Module):
    """A token table with a separate trained row for the last id."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = table[:-1].detach()
        self.row = torch.nn.Parameter(table[-1:].detach().clone())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, L] -> [B, L, D]"""
        frozen = torch.nn.functional.embedding(ids.clamp(max=len(self.table) - 1), self.table)
        return torch.where((ids == len(self.table))[..., None], self.row, frozen)


class StrongLoop(StockLoop):
    """The same training, optimised: latents from cached moments, gradient of the row only, channels_last, and
    ``torch.compile`` with the mode `compiled` ("default", or "reduce-overhead": with CUDA graphs), None: eager. Both
    loops use PyTorch's fused attention.
    """

    compiled: str | None = None

    def cache_moments(self) -> None:
        """Encode all pictures and their mirror images, then free the autoencoder."""
        with torch.no_grad():
            pictures = torch.stack([self.pixels, self.pixels.flip(-1)], dim=1).flatten(0, 1)
            posteriors = [self.vae.encode(each[None].to(self.device, self.dtype)).latent_dist for each in pictures]
        self.mean, self.deviation = (
            torch.cat([getattr(each, name) for each in posteriors]).unflatten(0, (-1, 2)) for name in ("mean", "std")
        )
        self.scaling_factor = self.vae.config.scaling_factor
        del self.vae

    def prepare(self) -> None:
        """Cache the moments; the new row becomes a parameter of its own; compile."""
        self.cache_moments()
        self.trained = {}
        for name, text_encoder in self.text_encoders.items():
            embeddings = _WithNewRow(self.tables[name])
            text_encoder.set_input_embeddings(embeddings)
            self.trained[name] = embeddings.row
        self.unet = self.unet.to(memory_format=torch.channels_last)
        if self.compiled:
            compiled = functools.partial(torch.compile, mode=self.compiled)
            self.unet = compiled(self.unet)
            self.text_encoders = {name: compiled(each) for name, each in self.text_encoders.items()}
        self.make_optimizer()

    def place(self, name: str) -> slice:
        """The trained parameter is the new row only."""
        return slice(None)

    def step(self) -> None:
        """One update."""
        if self.compiled == "reduce-overhead":  # the graphs' buffers of the last step may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        super().step()

    def latents(self, chosen: list[int], mirrored: torch.Tensor) -> torch.Tensor:
        """Latents [B, c, h, w] sampled from the cached moments."""
        sides = mirrored.long()
        mean, deviation = self.mean[chosen, sides], self.deviation[chosen, sides]
        noise = torch.randn(mean.shape, generator=self.random).to(mean)
        return ((mean + deviation * noise) * self.scaling_factor).to(memory_format=torch.channels_last)

    def update(self) -> None:
        """AdamW on the row."""
        self.optimizer.step()
        self.optimizer.zero_grad()
