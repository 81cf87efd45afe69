"""A LoRA trained with PyTorch, diffusers and peft, to compare with a word; and LoRAs merged into a model.

The setup is that of diffusers' ``train_dreambooth_lora.py``: rank 4 in the queries, keys, values and outputs of all
attention of the UNet and, if asked for, of the text encoder; scale 1, Gaussian initial values, AdamW, gradients clipped
to norm 1; and a rare word of the vocabulary stands for the concept in the prompts. Unlike the script it encodes the
pictures once, as `StrongLoop` does, which is to its advantage.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch_loops import StockLoop, StrongLoop
from transformers import CLIPTextConfig, CLIPTextModel

KINDS = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
# Linear layers that get a LoRA, by the ends of their names.
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
}
# diffusers' script's.
LEARNING_RATE, MAX_GRAD_NORM = 5e-4, 1.0


def layers_of(part: str, rank: int) -> LoraConfig:
    """Which layers of a network get a LoRA, and of which kind."""
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS[part])


@dataclass
class LoraLoop(StrongLoop):
    """Train a LoRA for what `token`, a word that the vocabulary has, stands for.

    Attributes:
      rank: of each layer's change. parts: the networks that get a LoRA, of `KINDS`.
    """

    learning_rate: float = LEARNING_RATE
    rank: int = 4
    parts: Sequence[str] = ("unet",)

    def add_word(self) -> None:
        """The vocabulary stays as it is."""
        for name, tokenizer in self.tokenizers.items():
            ids = tokenizer.encode(self.token, add_special_tokens=False)
            if len(ids) != 1:
                raise ValueError(f"{self.token}: {len(ids)} tokens of {name}, not one")

    def prepare(self) -> None:
        """Cache the moments, add the LoRA's layers."""
        self.cache_moments()
        self.unet = self.unet.to(memory_format=torch.channels_last)
        networks = {"unet": self.unet, **self.text_encoders}
        generator = torch.get_rng_state()
        torch.manual_seed(self.seed)  # peft draws from the global one
        self.trained = {}
        for part in self.parts:
            inject_adapter_in_model(layers_of(part, self.rank), networks[part])
            self.trained |= {
                f"{part}.{name.replace('.default', '')}": parameter
                for name, parameter in networks[part].named_parameters()
                if parameter.requires_grad
            }
        torch.set_rng_state(generator)
        self.make_optimizer()

    def update(self) -> None:
        """AdamW on the LoRA's matrices."""
        torch.nn.utils.clip_grad_norm_(self.trained.values(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, path: Path) -> None:
        """Write the matrices as diffusers names them, a file that its pipelines read."""
        save_file({name: parameter.detach().contiguous() for name, parameter in self.trained.items()}, path)


def write_merged(model: Path, loras: Sequence[Path], folder: Path) -> None:
    """Write the diffusers folder `model` with all `loras` added to its weights, in float32, as the new `folder`.

    Args:
      loras: files that `LoraLoop.save` has written; each is added with weight 1.
    """
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns(*KINDS))
    matrices = [load_file(path) for path in loras]
    for part, kind in KINDS.items():
        network = kind.from_pretrained(model / part).float()
        weights = network.state_dict()
        for each in matrices:
            for name, down in each.items():
                if name.startswith(f"{part}.") and (layer := name.removesuffix(".lora_A.weight")) != name:
                    weights[f"{layer.removeprefix(f'{part}.')}.weight"] += each[f"{layer}.lora_B.weight"] @ down
        network.load_state_dict(weights)
        network.save_pretrained(folder / part)


def learn(loop: str, pixels: str, steps: int, settings: dict[str, Any]) -> StockLoop:
    """What a process does that is started to see how much memory a training takes.

    Args:
      loop: "StockLoop" or "LoraLoop".
      pixels: a file of float32 [N, 3, H, W].
      steps: updates. settings: the loop's other arguments.
    """
    kind = {"StockLoop": StockLoop, "LoraLoop": LoraLoop}[loop]
    pictures = torch.from_numpy(np.load(pixels)).contiguous()
    trained = kind(pixels=pictures, **{**settings, "model": Path(settings["model"])})
    trained.run(steps)
    return trained


def numbers(configs: Mapping[str, Mapping[str, Any]], rank: int = 4) -> dict[str, tuple[int, int]]:
    """How many numbers networks with these configurations have, and how many a LoRA of them has; none are made."""
    found = {}
    for part, config in configs.items():
        with torch.device("meta"):
            network = (
                KINDS[part](CLIPTextConfig(**config)) if part == "text_encoder" else KINDS[part].from_config(config)
            )
            own = sum(each.numel() for each in network.parameters())
            inject_adapter_in_model(layers_of(part, rank), network)
        found[part] = own, sum(each.numel() for each in network.parameters()) - own
    return found
