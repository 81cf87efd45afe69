"""What we are measured against: loops on PyTorch.

`StockLoop` is the step of diffusers' ``textual_inversion.py``, in our words: every step draws latents from the
autoencoder again, AdamW moves the whole token table, and the rows that are not new are put back. Reading pictures from
disk and cropping them is left out, which is to the rival's advantage. `StrongLoop` is the best that we know to write.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch.nn.functional import mse_loss
from transformers import CLIPTextModel, CLIPTokenizer


@dataclass
class StockLoop:
    """Learns one row for `token` from pictures.

    Attributes:
      model: a diffusers folder.
      pixels: float32 [N, 3, H, W] in [-1, 1].
      templates: prompts with ``{}`` for the word.
      token, initializer: the new word, and the word that its row starts from.
      learning_rate, weight_decay: AdamW's; the script's defaults.
      batch_size: pictures a step.
      seed: of all draws.
      device, dtype: of the frozen autoencoder and UNet; the text encoder is float32, under autocast where they are not.
    """

    model: Path
    pixels: torch.Tensor
    templates: Sequence[str]
    token: str
    initializer: str
    learning_rate: float = 1e-4
    weight_decay: float = 1e-2
    batch_size: int = 8
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        self.tokenizer = CLIPTokenizer.from_pretrained(self.model / "tokenizer")
        self.vae = AutoencoderKL.from_pretrained(self.model / "vae").requires_grad_(False)
        self.unet = UNet2DConditionModel.from_pretrained(self.model / "unet").requires_grad_(False)
        self.text_encoder = CLIPTextModel.from_pretrained(self.model / "text_encoder").requires_grad_(False)
        self.schedule = DDPMScheduler.from_pretrained(self.model / "scheduler")
        # The files may hold half precision; the script trains in float32 unless it is told otherwise.
        for network, dtype in ((self.vae, self.dtype), (self.unet, self.dtype), (self.text_encoder, torch.float32)):
            network.to(self.device, dtype)
        self.tokenizer.add_tokens(self.token)
        self.id = self.tokenizer.convert_tokens_to_ids(self.token)
        self.text_encoder.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        (self.start,) = self.tokenizer.encode(self.initializer, add_special_tokens=False)
        self.order: list[int] = []
        self.prepare()

    def prepare(self) -> None:
        """Make what trains, and its optimizer."""
        self.table = self.text_encoder.get_input_embeddings().weight.requires_grad_(True)
        with torch.no_grad():
            self.table[self.id] = self.table[self.start]
        self.original = self.table.detach().clone()
        self.optimizer = torch.optim.AdamW([self.table], lr=self.learning_rate, weight_decay=self.weight_decay)

    @property
    def row(self) -> np.ndarray:
        """The new row, float32 [1, D]."""
        return self.table[self.id : self.id + 1].detach().cpu().numpy().copy()

    @property
    def row_gradient(self) -> np.ndarray:
        """The gradient that `loss(...).backward()` has left for the new row, float32 [1, D]."""
        assert self.table.grad is not None, "backward comes first"
        return self.table.grad[self.id : self.id + 1].cpu().numpy().copy()

    def run(self, steps: int) -> float:
        """Train; returns the seconds that it took."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def choose(self) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """Pictures of the next batch, which of them are mirrored [B], and token ids [B, L]."""
        while len(self.order) < self.batch_size:
            self.order += torch.randperm(len(self.pixels), generator=self.random).tolist()
        chosen, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        mirrored = torch.rand(self.batch_size, generator=self.random) < 0.5
        numbers = torch.randint(len(self.templates), (self.batch_size,), generator=self.random)
        texts = [self.templates[number].replace("{}", self.token) for number in numbers]
        ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return chosen, mirrored, ids.to(self.device)

    def latents(self, chosen: list[int], mirrored: torch.Tensor) -> torch.Tensor:
        """Latents [B, c, h, w] of pictures, drawn from what the autoencoder makes of them."""
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

    def loss(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared error of the UNet's prediction."""
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        if self.schedule.config.prediction_type == "v_prediction":
            target = self.schedule.get_velocity(latents, noise, timesteps)
        else:
            target = noise
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            context = self.text_encoder(ids)[0]
            predicted = self.unet(noisy.to(self.dtype), timesteps, context.to(self.dtype)).sample
        return mse_loss(predicted.float(), target.float())

    def update(self) -> None:
        """AdamW on the whole table; then all rows but the new one are put back."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.table[: self.id] = self.original[: self.id]
            self.table[self.id + 1 :] = self.original[self.id + 1 :]


class _WithNewRow(torch.nn.Module):
    """A token table in whose place a new row is read for the last id."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = table[:-1].detach()
        self.row = torch.nn.Parameter(table[-1:].detach().clone())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, L] -> [B, L, D]"""
        frozen = torch.nn.functional.embedding(ids.clamp(max=len(self.table) - 1), self.table)
        return torch.where((ids == len(self.table))[..., None], self.row, frozen)


class StrongLoop(StockLoop):
    """The same learning with all that makes it fast: latents from cached moments, no gradient but the row's,
    channels_last, and ``torch.compile`` if `compiled`. Attention is PyTorch's fused one in both loops.
    """

    compiled = False

    def prepare(self) -> None:
        """Encode all pictures and their mirror images, and let the autoencoder go."""
        with torch.no_grad():
            self.table = self.text_encoder.get_input_embeddings().weight
            self.table[self.id] = self.table[self.start]
            pictures = torch.stack([self.pixels, self.pixels.flip(-1)], dim=1).flatten(0, 1)
            posteriors = [self.vae.encode(each[None].to(self.device, self.dtype)).latent_dist for each in pictures]
        self.mean, self.deviation = (
            torch.cat([getattr(each, name) for each in posteriors]).unflatten(0, (-1, 2)) for name in ("mean", "std")
        )
        self.scaling_factor = self.vae.config.scaling_factor
        del self.vae
        self.rows = _WithNewRow(self.table)
        self.text_encoder.set_input_embeddings(self.rows)
        self.unet = self.unet.to(memory_format=torch.channels_last)
        if self.compiled:
            self.unet = torch.compile(self.unet)
            self.text_encoder = torch.compile(self.text_encoder)
        self.optimizer = torch.optim.AdamW([self.rows.row], lr=self.learning_rate, weight_decay=self.weight_decay)

    @property
    def row(self) -> np.ndarray:
        """The new row, float32 [1, D]."""
        return self.rows.row.detach().cpu().numpy().copy()

    @property
    def row_gradient(self) -> np.ndarray:
        """As `StockLoop.row_gradient`."""
        assert self.rows.row.grad is not None, "backward comes first"
        return self.rows.row.grad.cpu().numpy().copy()

    def latents(self, chosen: list[int], mirrored: torch.Tensor) -> torch.Tensor:
        """Latents [B, c, h, w] from the cached moments."""
        sides = mirrored.long()
        mean, deviation = self.mean[chosen, sides], self.deviation[chosen, sides]
        noise = torch.randn(mean.shape, generator=self.random).to(mean)
        return ((mean + deviation * noise) * self.scaling_factor).to(memory_format=torch.channels_last)

    def update(self) -> None:
        """AdamW on the row."""
        self.optimizer.step()
        self.optimizer.zero_grad()
