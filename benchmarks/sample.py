"""Sampling speed compared with diffusers' StableDiffusionPipeline on PyTorch, run alternately.

    python benchmarks/sample.py                                        # the embedded model, 4 pictures, 25 steps
    python benchmarks/sample.py --size 137m --batch_size 1 --num_inference_steps 5   # a UNet of 137M parameters, 256 px
    python benchmarks/sample.py --size sd15 --mixed_precision bf16 --torch_compile   # on a GPU

Same weights, prompts, initial latents, DDIM steps and guidance. Measured from prompt to pictures in memory, including
text encoder and autoencoder. Before anything is measured, the pictures of both must agree. All models but the embedded
one have random weights. Each contender has its own process and sleeps while the other runs. Compile time is reported
separately, with an empty compile cache and with a filled one. Seconds per step are the total divided by the number of
steps.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from contenders import SIZES, Contender, compare, faster_by, make_model, ready_after  # noqa: E402

PROMPTS = (
    "a portrait of a person with red hair on a blue background",
    "a drawing of a person",
    "a portrait of a person wearing glasses",
    "a person with black hair on a yellow background",
)
SEED = 0
# Tolerance in levels of 255. In float32 the maximum: the fifth digit can change how a level is rounded, and guidance
# amplifies it. In bfloat16 the mean, as every step rounds to three digits.
AGREEMENT = {"no": 2.0, "bf16": 8.0}


@dataclass(frozen=True)
class Setting:
    """The settings of a measurement.

    Attributes:
      model: a diffusers folder. resolution: side of the pictures in pixels.
      batch_size: pictures at once. steps: of the sampler. guidance_scale: 1 is none.
      mixed_precision: "no" or "bf16", of all networks. torch_compile: of diffusers' UNet.
      latents: starting noise float32 [B, h, w, c].
    """

    model: Path
    resolution: int
    batch_size: int
    steps: int
    guidance_scale: float
    mixed_precision: str
    torch_compile: bool
    latents: np.ndarray

    @property
    def prompts(self) -> list[str]:
        """One prompt for each picture."""
        return [PROMPTS[number % len(PROMPTS)] for number in range(self.batch_size)]


class Drawer:
    """Base class of both contenders."""

    def draw(self) -> np.ndarray:
        """Pictures uint8 [B, H, W, 3], in the machine's memory."""
        raise NotImplementedError

    def check(self) -> np.ndarray:
        """See `Contender`."""
        start = time.perf_counter()
        pictures = self.draw()
        self.first = time.perf_counter() - start
        return pictures

    def run(self, count: int) -> float:
        """See `Contender`."""
        start = time.perf_counter()
        for _ in range(count):
            self.draw()
        return time.perf_counter() - start


class Ours(Drawer):
    """ti_jax."""

    def __init__(self, setting: Setting):
        import jax

        from ti_jax.pipeline import StableDiffusion

        # Before anything is compiled: JAX reads its cache settings only once.
        self.cache = tempfile.TemporaryDirectory()
        jax.config.update("jax_compilation_cache_dir", self.cache.name)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        self.setting = setting
        dtype = {"no": jax.numpy.float32, "bf16": jax.numpy.bfloat16}[setting.mixed_precision]
        self.sd = StableDiffusion.from_pretrained(setting.model, dtype)

    def draw(self) -> np.ndarray:
        """Pictures uint8 [B, H, W, 3]."""
        setting = self.setting
        pictures = self.sd.generate(
            setting.prompts, num_inference_steps=setting.steps, guidance_scale=setting.guidance_scale,
            scheduler="ddim", height=setting.resolution, width=setting.resolution, seed=SEED,
            batch_size=setting.batch_size,
        )  # fmt: skip
        return np.stack(pictures)

    def compile(self) -> dict[str, float]:
        """Compile time: first call minus a later call. "cold" is that of `check`."""
        import jax

        jax.clear_caches()
        cached, warm = self.run(1), self.run(1)
        return {"cold": self.first - warm, "cached": cached - warm}


class Diffusers(Drawer):
    """diffusers' pipeline on PyTorch."""

    def __init__(self, setting: Setting):
        import diffusers
        import torch

        # By default PyTorch uses all cores of the machine, not only those of this process.
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.setting, self.torch = setting, torch
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = {"no": torch.float32, "bf16": torch.bfloat16}[setting.mixed_precision]
        self.pipe = diffusers.StableDiffusionPipeline.from_pretrained(setting.model, dtype=dtype).to(device)
        self.pipe.scheduler = diffusers.DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)
        if device == "cuda":
            self.pipe.unet.to(memory_format=torch.channels_last)
            self.pipe.vae.to(memory_format=torch.channels_last)
        if setting.torch_compile:
            self.pipe.unet = torch.compile(self.pipe.unet)
        self.latents = torch.from_numpy(setting.latents.transpose(0, 3, 1, 2).copy()).to(device, dtype)

    def draw(self) -> np.ndarray:
        """Pictures uint8 [B, H, W, 3], in the machine's memory."""
        setting = self.setting
        pictures = self.pipe(
            setting.prompts, num_inference_steps=setting.steps, guidance_scale=setting.guidance_scale,
            height=setting.resolution, width=setting.resolution, latents=self.latents,
        ).images  # fmt: skip
        return np.stack(pictures)

    def compile(self) -> dict[str, float]:
        """First call minus a later call; PyTorch compiles in the first, if at all."""
        return {"in the first": max(0.0, self.first - self.run(1))}


def make(name: str, setting: Setting) -> Contender:
    """A contender, in its own process."""
    return Ours(setting) if name == "ours" else Diffusers(setting)


def agree(pictures: Mapping[str, np.ndarray], setting: Setting) -> None:
    """End the program unless the pictures of both are equal up to rounding."""
    ours, theirs = (pictures[name].astype(int) for name in ("ours", "diffusers"))
    off = np.abs(ours - theirs)
    print(
        f"pictures: {off.max()} levels of 255 apart at most, {off.mean():.4f} on average; "
        f"their standard deviation is {theirs.std():.1f}",
        flush=True,
    )
    measure = off.max() if setting.mixed_precision == "no" else off.mean()
    if measure > AGREEMENT[setting.mixed_precision] or theirs.std() < AGREEMENT[setting.mixed_precision]:
        raise SystemExit("the pictures are not the same, or there is nothing in them")


def starting_latents(model: Path, resolution: int | None, batch_size: int) -> tuple[np.ndarray, int]:
    """Our initial noise, float32 [B, h, w, c], and the side of the pictures in pixels."""
    import jax

    from ti_jax.models.networks import make_networks
    from ti_jax.pipeline.sampling import image_keys, image_noise, image_seeds
    from ti_jax.weights.sources import open_source

    # This process only makes the noise; the GPU is for the contenders.
    jax.config.update("jax_platforms", "cpu")
    with open_source(model, None, None) as source:
        networks = make_networks(source.configs, jax.numpy.float32)
    resolution = resolution or networks.unet.config.sample_size * networks.latent_factor
    side = resolution // networks.latent_factor
    keys = image_keys(jax.numpy.asarray(image_seeds(SEED, batch_size)))
    return np.asarray(image_noise(keys, 0, (side, side, networks.vae.config.latent_channels))), resolution


def report(results: Mapping[str, Any], setting: Setting) -> None:
    """Print a table of medians over the rounds; ratios also with the smallest and the largest."""
    print("| | s/picture | pictures/s | s/step | peak memory | compiling | ours is faster by |")
    print("|---|---|---|---|---|---|---|")
    for name, result in results.items():
        median = float(np.median(result["seconds"]))
        ratio = faster_by(result, results["ours"]) if name != "ours" else ""
        print(
            f"| {name} | {median / setting.batch_size:.4f} | {setting.batch_size / median:.3f} | "
            f"{median / setting.steps:.4f} | {result['memory'] / 1e9:.2f} GB | {ready_after(result)} | {ratio} |"
        )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="mini", help="the model")
    parser.add_argument("--model", type=Path, default=None, help="a diffusers folder instead")
    parser.add_argument("--resolution", type=int, default=None, help="in pixels (default: the model's)")
    parser.add_argument("--batch_size", type=int, default=4, help="pictures at once")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no", help="of all networks")
    parser.add_argument("--rounds", type=int, default=5, help="in each, both draw a batch")
    parser.add_argument("--torch_compile", action="store_true", help="diffusers' UNet is compiled")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or make_model(arguments.size, Path(folder))
        latents, resolution = starting_latents(model, arguments.resolution, arguments.batch_size)
        setting = Setting(
            model, resolution, arguments.batch_size, arguments.num_inference_steps, arguments.guidance_scale,
            arguments.mixed_precision, arguments.torch_compile, latents,
        )  # fmt: skip
        print(
            f"{arguments.model or arguments.size}, {resolution} px, batch {setting.batch_size}, {setting.steps} steps, "
            f"mixed_precision {setting.mixed_precision}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores",
            flush=True,
        )
        names = ("ours", "diffusers")
        results = compare(make, names, setting, partial(agree, setting=setting), arguments.rounds, 1, "batch")
        report(results, setting)


if __name__ == "__main__":
    main()
