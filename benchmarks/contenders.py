"""Shared by the benchmarks: models, and contenders that run alternately in their own processes."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ti_jax.config import ASSETS

SIZES = ("mini", "137m", "sd15", "sdxl")


class Contender(Protocol):
    """A program to measure."""

    def check(self) -> Any:
        """Its result for the common input, compared with the others' before anything is measured."""

    def compile(self) -> Mapping[str, float]:
        """Compile and warm up; returns seconds by kind."""

    def run(self, count: int) -> float:
        """Seconds for `count` units (steps or pictures)."""


def peak_memory() -> int:
    """Peak memory of this process in bytes: of the GPU if it has used one, else of the host."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch and torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return peak
    if jax and (stats := jax.local_devices()[0].memory_stats()):
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _work(make: Callable[[str, Any], Contender], name: str, setting: Any, alone: bool, pipe: Connection) -> None:
    """A contender's process: for each count received, sends back the seconds taken and the peak memory in bytes."""
    contender = make(name, setting)
    if not alone:
        pipe.send(contender.check())
    pipe.send(contender.compile())
    while count := pipe.recv():
        seconds = contender.run(count)
        pipe.send((seconds, peak_memory()))


def compare(
    make: Callable[[str, Any], Contender],
    names: Sequence[str],
    setting: Any,
    agree: Callable[[Mapping[str, Any]], None],
    rounds: int,
    count: int,
    unit: str,
) -> dict[str, dict[str, Any]]:
    """Run all contenders alternately, each in its own process that sleeps while another runs.

    Args:
      make: makes the contender of a name; called in its process.
      setting: further argument of `make`.
      agree: compares the contenders' `check` results and ends the program if they differ. Not called for one alone.
      count: number of `unit`s in a round.

    Returns:
      By contender: "seconds" per `unit` in each round, peak "memory" in bytes, and seconds of "compile" by kind.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    results: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in names}
    answers, alone = {}, len(names) == 1
    for name in names:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=_work, args=(make, name, setting, alone, theirs), daemon=True))
        processes[-1].start()
        if not alone:
            answers[name] = pipes[name].recv()
        results[name]["compile"] = pipes[name].recv()
        print(f"{name}: {results[name]['compile']}", flush=True)
    if not alone:
        agree(answers)
    for number in range(rounds):
        for name in names:
            pipes[name].send(count)
            seconds, memory = pipes[name].recv()
            results[name]["seconds"].append(seconds / count)
            results[name]["memory"] = memory
            print(f"round {number}: {name} {seconds / count * 1e3:.1f} ms a {unit}", flush=True)
    for pipe in pipes.values():
        pipe.send(0)
    for process in processes:
        process.join()
    return results


def ready_after(result: Mapping[str, Any]) -> str:
    """Compile seconds as text, for a table."""
    return ", ".join(f"{value:.1f} s {kind}" for kind, value in result["compile"].items())


def faster_by(result: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Time of a contender divided by ours: median, smallest and largest over the rounds."""
    ratios = np.array(result["seconds"]) / np.array(ours["seconds"])
    return f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"


def make_model(size: str, folder: Path, dtype: str | None = None) -> Path:
    """A diffusers folder of a published size with random weights, or the embedded model itself.

    Args:
      dtype: of the files; None: float32, for SDXL bfloat16.
    """
    import torch

    if size == "mini":
        return ASSETS / "mini-sd"
    torch.manual_seed(0)
    # Half precision: half the time and disk for SDXL's 3.5 billion parameters.
    torch.set_default_dtype(getattr(torch, dtype or ("bfloat16" if size == "sdxl" else "float32")))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        pipeline = _pipeline(size)
    torch.set_default_dtype(torch.float32)
    pipeline.save_pretrained(folder)
    return folder


def _pipeline(size: str) -> Any:
    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from ti_jax.weights.reference_configs import SD15, SDXL
    from ti_jax.weights.tokenizers import clip_tokenizer

    configs = {name: dict(config) for name, config in (SDXL if size == "sdxl" else SD15).items()}
    if size == "137m":
        configs["unet"] |= {"block_out_channels": [128, 256, 512, 512], "sample_size": 32}

    def text_config(name: str) -> CLIPTextConfig:
        return CLIPTextConfig(vocab_size=49408, eos_token_id=49407, **configs[name])

    parts = {
        "vae": AutoencoderKL(**configs["vae"]),
        "text_encoder": CLIPTextModel(text_config("text_encoder")),
        "tokenizer": clip_tokenizer("<|endoftext|>"),
        "unet": UNet2DConditionModel(**configs["unet"]),
        "scheduler": DDPMScheduler(**configs["scheduler"]),
    }
    if size == "sdxl":
        second = CLIPTextModelWithProjection(text_config("text_encoder_2"))
        return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=clip_tokenizer("!"))
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
