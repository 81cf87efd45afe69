"""What we are measured against: the loop of diffusers' ``textual_inversion.py``, on PyTorch.

The step is that script's, in our words: every step draws latents from the autoencoder again, AdamW moves the whole
token table, and the rows that are not new are put back. Reading pictures from disk and cropping them is left out, which
is to the rival's advantage.
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

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        self.tokenizer = CLIPTokenizer.from_pretrained(self.model / "tokenizer")
        self.vae = AutoencoderKL.from_pretrained(self.model / "vae").requires_grad_(False)
        self.unet = UNet2DConditionModel.from_pretrained(self.model / "unet").requires_grad_(False)
        self.text_encoder = CLIPTextModel.from_pretrained(self.model / "text_encoder").requires_grad_(False)
        self.schedule = DDPMScheduler.from_pretrained(self.model / "scheduler")
        # The files hold half precision; the script trains in float32 unless it is told otherwise.
        for network in (self.vae, self.unet, self.text_encoder):
            network.float()
        self.tokenizer.add_tokens(self.token)
        self.id = self.tokenizer.convert_tokens_to_ids(self.token)
        self.text_encoder.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        self.table = self.text_encoder.get_input_embeddings().weight.requires_grad_(True)
        (start,) = self.tokenizer.encode(self.initializer, add_special_tokens=False)
        with torch.no_grad():
            self.table[self.id] = self.table[start]
        self.original = self.table.detach().clone()
        self.optimizer = torch.optim.AdamW([self.table], lr=self.learning_rate, weight_decay=self.weight_decay)
        self.order: list[int] = []

    @property
    def row(self) -> np.ndarray:
        """The new row, float32 [1, D]."""
        return self.table[self.id : self.id + 1].detach().numpy().copy()

    def run(self, steps: int) -> float:
        """Train; returns the seconds that it took."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step(*self.draw())
        return time.perf_counter() - start

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [B, 3, H, W], some mirrored, and token ids [B, L]."""
        while len(self.order) < self.batch_size:
            self.order += torch.randperm(len(self.pixels), generator=self.random).tolist()
        chosen, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        mirrored = torch.rand(self.batch_size, generator=self.random) < 0.5
        pixels = torch.where(mirrored[:, None, None, None], self.pixels[chosen].flip(-1), self.pixels[chosen])
        numbers = torch.randint(len(self.templates), (self.batch_size,), generator=self.random)
        texts = [self.templates[number].replace("{}", self.token) for number in numbers]
        ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return pixels, ids

    def step(self, pixels: torch.Tensor, ids: torch.Tensor) -> None:
        """One update."""
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.sample(generator=self.random) * self.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=self.random)
        timesteps = torch.randint(self.schedule.config.num_train_timesteps, (len(latents),), generator=self.random)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        if self.schedule.config.prediction_type == "v_prediction":
            target = self.schedule.get_velocity(latents, noise, timesteps)
        else:
            target = noise
        context = self.text_encoder(ids)[0]
        mse_loss(self.unet(noisy, timesteps, context).sample, target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.table[: self.id] = self.original[: self.id]
            self.table[self.id + 1 :] = self.original[self.id + 1 :]
