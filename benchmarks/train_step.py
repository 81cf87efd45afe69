"""Speed of a training step compared with PyTorch. Contenders run alternately; only the ratios are meaningful.

    python benchmarks/train_step.py                                  # the embedded model, batch 8
    python benchmarks/train_step.py --size 137m --batch_size 2       # a UNet of 137M parameters at 256 px
    python benchmarks/train_step.py --size sd15 --batch_size 8 --dtype bfloat16      # on a GPU
    python benchmarks/train_step.py --size sdxl --batch_size 4 --dtype bfloat16      # the same, at 1024 px
    python benchmarks/train_step.py --size sd15 --batch_size 1 --contenders ours --gradient_checkpointing policy

    ours     ti_jax's training loop
    stock    PyTorch, like diffusers' script (benchmarks/torch_loops.py)
    strong   the fastest PyTorch loop that we could write; compiled with --torch_compile, with CUDA graphs with
             --torch_compile reduce-overhead

All models but the embedded one have random weights. Each contender has its own process and sleeps while another runs.
Before anything is measured, the losses and row gradients of all contenders on the same random numbers must agree.
Compile time is reported separately, with an empty compile cache and with a filled one. A single contender compiles only
once and skips the comparison, so that its peak memory is that of a training run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
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

from ti_jax.config import ASSETS, TrainConfig  # noqa: E402

CONTENDERS = ("ours", "stock", "strong")
CONCEPT = ASSETS / "concepts" / "cleo"
TEMPLATES = ASSETS / "demo_templates.txt"
TOKEN, INITIALIZER = "<cleo>", "person"
# Tolerance for float32 sums in another order, through the whole UNet and back.
AGREEMENT = 1e-3


@dataclass(frozen=True)
class Setting:
    """The settings of a measurement.

    Attributes:
      model: a diffusers folder. resolution: side of the pictures in pixels, None: the model's.
      batch_size: pictures per step. dtype: of the frozen networks. torch_compile: mode of the strong loop, None: eager.
      profile: folder for a trace of ours, None: no trace. gradient_checkpointing: of ours.
      alone: there is only one contender. deterministic: ours is compiled so.
    """

    model: Path
    resolution: int | None
    batch_size: int
    dtype: str
    torch_compile: str | None = None
    profile: str | None = None
    gradient_checkpointing: str = "none"
    alone: bool = False
    deterministic: bool = False

    def config(self) -> TrainConfig:
        """The same settings as a `TrainConfig`."""
        return TrainConfig(
            pretrained_model_name_or_path=str(self.model), train_data_dir=str(CONCEPT), placeholder_token=TOKEN,
            initializer_token=INITIALIZER, templates=str(TEMPLATES), resolution=self.resolution, learning_rate=1e-3,
            train_batch_size=self.batch_size, mixed_precision="bf16" if self.dtype == "bfloat16" else "no",
        )  # fmt: skip


def draws(setting: Setting, latent_shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """A common batch: latents and noise [B, h, w, c], timesteps [B], and template indices [B]."""
    random = np.random.default_rng(0)
    shape = (setting.batch_size, *latent_shape)
    return {
        "latents": random.standard_normal(shape).astype(np.float32),
        "noise": random.standard_normal(shape).astype(np.float32),
        "timesteps": random.integers(0, 1000, setting.batch_size),
        "prompts": np.arange(setting.batch_size) % len(TEMPLATES.read_text().split("\n")[:-1]),
    }


class Ours:
    """ti_jax."""

    def __init__(self, setting: Setting):
        import jax

        from ti_jax.config import resolve
        from ti_jax.data.dataset import make_dataset
        from ti_jax.pipeline import StableDiffusion
        from ti_jax.training.cpu_devices import use_cores
        from ti_jax.training.job import prepare_concept
        from ti_jax.training.optimizer import make_optimizer
        from ti_jax.training.parallel import make_mesh, replicate, without_copies
        from ti_jax.training.step import StepInputs, TrainState

        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        config = resolve(setting.config())
        cores = use_cores(config) or 1
        self.setting = setting
        self.mesh = make_mesh(jax.devices()[: cores if jax.default_backend() == "cpu" else 1])
        sd = StableDiffusion.from_config(config)
        networks = sd.networks.with_gradient_checkpointing(setting.gradient_checkpointing)
        self.sd = dataclasses.replace(sd, networks=networks)
        self.concept = prepare_concept(config, self.sd, print)
        self.optimizer, _ = make_optimizer(config, 1, setting.batch_size)
        params = without_copies({name: tree for name, tree in self.sd.params.items() if name != "vae"})
        masks = {name: jax.numpy.asarray(mask) for name, mask in self.concept.row_mask.items()}
        dataset = make_dataset(config, self.sd, [self.concept])
        self.frozen = replicate(StepInputs(params, self.sd.schedule, dataset, masks, jax.random.key(0)), self.mesh)
        rows = {name: jax.numpy.asarray(value) for name, value in self.concept.rows.items()}
        state = TrainState(rows, self.optimizer.init(rows), jax.numpy.int32(0), jax.numpy.bool_(True))
        self.state = replicate(state, self.mesh)
        height, width = self.concept.pictures.pixels.shape[1:3]
        self.latent_shape = self.sd.latent_shape(height, width)

    def compile(self, warm_up: bool = True) -> dict[str, float]:
        """Compile cold and, unless alone, from the cache; then run one step to warm up."""
        import jax

        from ti_jax.training.compile import StepBuilder

        builder = StepBuilder(
            self.sd.networks, self.optimizer, self.mesh, batch_size=self.setting.batch_size // self.mesh.size,
            accumulation=1, longest_chunk=1000, deterministic=self.setting.deterministic,
        )  # fmt: skip
        seconds = {}
        with tempfile.TemporaryDirectory() as cache:
            jax.config.update("jax_compilation_cache_dir", cache)
            for kind in ("cold",) if self.setting.alone else ("cold", "cached"):
                start = time.perf_counter()
                lowered = builder.lower(self.frozen, self.state, self.setting.gradient_checkpointing)
                self.run_steps = lowered.compile()
                seconds[kind] = time.perf_counter() - start
            jax.config.update("jax_compilation_cache_dir", None)
        if warm_up:
            self.run(1)
        return seconds

    def check(self) -> tuple[float, np.ndarray]:
        """See `Contender`."""
        import jax

        from ti_jax.training.step import Batch, diffusion_loss

        drawn = draws(self.setting, self.latent_shape)
        ids = {name: np.asarray(ids)[drawn["prompts"]] for name, ids in self.frozen.dataset.ids.items()}
        times = np.asarray(self.frozen.dataset.time_ids)[np.zeros(self.setting.batch_size, int), 0]
        timesteps, prompts = (drawn[name].astype(np.int32) for name in ("timesteps", "prompts"))
        batch = Batch(drawn["latents"], drawn["noise"], timesteps, ids, times, prompts)
        gradient = jax.jit(jax.value_and_grad(lambda rows: diffusion_loss(self.sd.networks, self.frozen, rows, batch)))
        loss, rows = gradient(self.state.rows)
        return float(loss), np.concatenate([np.asarray(each)[0] for each in rows.values()])

    def run(self, steps: int) -> float:
        """See `Contender`."""
        import contextlib

        import jax

        trace = jax.profiler.trace(self.setting.profile) if self.setting.profile else contextlib.nullcontext()
        start = time.perf_counter()
        with trace:
            self.state, losses = self.run_steps(self.frozen, self.state, jax.numpy.int32(steps))
            jax.block_until_ready(losses)
        return time.perf_counter() - start


class Torch:
    """A loop on PyTorch."""

    def __init__(self, setting: Setting, strong: bool):
        import torch
        from torch_loops import StockLoop, StrongLoop

        from ti_jax.data.dataset import time_ids
        from ti_jax.data.folder import load_images
        from ti_jax.text.templates import for_captions, load_templates

        self.setting, self.torch = setting, torch
        model_index = json.loads((setting.model / "unet" / "config.json").read_text())
        pictures = load_images(str(CONCEPT), setting.resolution or 8 * model_index["sample_size"])
        StrongLoop.compiled = setting.torch_compile
        self.loop = (StrongLoop if strong else StockLoop)(
            setting.model, torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2).contiguous(),
            for_captions(load_templates("object", str(TEMPLATES)), "object")[0], TOKEN, INITIALIZER, learning_rate=1e-3,
            batch_size=setting.batch_size, device="cuda" if torch.cuda.is_available() else "cpu",
            dtype=getattr(torch, setting.dtype), time_ids=time_ids(pictures)[0, 0].tolist(),
        )  # fmt: skip

    def compile(self) -> dict[str, float]:
        """Run the first step, in which PyTorch compiles, if at all."""
        start = time.perf_counter()
        self.run(1)
        first = time.perf_counter() - start
        if self.setting.torch_compile == "reduce-overhead":
            self.run(4)  # in which PyTorch records its graphs
        return {"first step": first}

    def check(self) -> tuple[float, np.ndarray]:
        """See `Contender`."""
        loop, torch = self.loop, self.torch
        height, width = (side // 8 for side in loop.pixels.shape[2:])
        drawn = draws(self.setting, (height, width, 4))
        texts = [loop.templates[number].replace("{}", TOKEN) for number in drawn["prompts"]]
        latents, noise = (torch.from_numpy(drawn[name]).permute(0, 3, 1, 2) for name in ("latents", "noise"))
        arguments = (latents, noise, torch.from_numpy(drawn["timesteps"]))
        loss = loop.loss(*(each.to(loop.device) for each in arguments), loop.tokenize(texts))
        loss.backward()
        gradient = np.concatenate([each[0] for each in loop.row_gradients.values()])
        loop.optimizer.zero_grad()
        return float(loss.detach()), gradient

    def run(self, steps: int) -> float:
        """See `Contender`."""
        return self.loop.run(steps)


def make(name: str, setting: Setting) -> Contender:
    """A contender, in its own process."""
    return Ours(setting) if name == "ours" else Torch(setting, strong=name == "strong")


def agree(answers: Mapping[str, tuple[float, np.ndarray]], setting: Setting) -> None:
    """End the program unless losses and row gradients equal those of the first; only in float32."""
    first, *others = answers
    loss, gradient = answers[first]
    print(f"{first}: loss {loss:.6f}", flush=True)
    for name in others:
        other, its_gradient = answers[name]
        difference = np.linalg.norm(its_gradient - gradient) / np.linalg.norm(gradient)
        print(f"{name}: loss {other:.6f}, row gradient off by {difference:.1e}", flush=True)
        if setting.dtype == "float32" and (abs(other - loss) > AGREEMENT * loss or difference > AGREEMENT):
            raise SystemExit(f"{name} computes something else")


def report(results: Mapping[str, Any], batch_size: int, flops: float, peak: float | None) -> None:
    """Print a table; ratios are medians over the rounds, with the smallest and the largest.

    Args:
      flops: minimum work of a step. peak: the device's published FLOP/s, for MFU; None: unknown.
    """
    least = "MFU" if peak else "GFLOP/s of the least work"
    print(f"| | s/step | samples/s | {least} | peak memory | ready after | ours is faster by |")
    print("|---|---|---|---|---|---|---|")
    for name, result in results.items():
        median = float(np.median(result["seconds"]))
        ratio = faster_by(result, results["ours"]) if "ours" in results and name != "ours" else ""
        rate = f"{flops / median / peak:.1%}" if peak else f"{flops / median / 1e9:.0f}"
        print(
            f"| {name} | {median:.4f} | {batch_size / median:.2f} | {rate} | "
            f"{result['memory'] / 1e9:.2f} GB | {ready_after(result)} | {ratio} |"
        )


def least_work(setting: Setting) -> float:
    """Minimum number of floating-point operations of a step."""
    import jax.numpy as jnp

    from ti_jax.config import PlanConfig, resolve_plan
    from ti_jax.training.plan import Planner

    config = PlanConfig(pretrained_model_name_or_path=str(setting.model), resolution=setting.resolution)
    return Planner(resolve_plan(config), jnp.float32).least_flops(setting.batch_size)


def published_peak(setting: Setting) -> float | None:
    """Published bfloat16 FLOP/s of this machine's device; None for other devices, and for float32."""
    import jax

    from ti_jax.training.chips import peak_flops

    return peak_flops(jax.local_devices()[0].device_kind, setting.dtype)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="mini", help="the model")
    parser.add_argument("--model", type=Path, default=None, help="a diffusers folder instead")
    parser.add_argument("--resolution", type=int, default=None, help="in pixels (default: the model's)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen networks")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="a round")
    parser.add_argument(
        "--torch_compile", nargs="?", const="default", choices=("default", "reduce-overhead"), default=None,
        help="the strong loop is compiled, in this mode",
    )  # fmt: skip
    parser.add_argument(
        "--gradient_checkpointing", choices=("none", "policy", "full"), default="none", help="of ours (default: none)"
    )
    parser.add_argument("--deterministic", action="store_true", help="ours as train.py compiles it with this flag")
    parser.add_argument("--profile", default=None, help="folder for a trace of ours")
    arguments = parser.parse_args()

    folder = Path(tempfile.mkdtemp())
    try:
        model = arguments.model or make_model(arguments.size, folder)
        setting = Setting(
            model, arguments.resolution, arguments.batch_size, arguments.dtype, arguments.torch_compile,
            arguments.profile, arguments.gradient_checkpointing, alone=len(arguments.contenders) == 1,
            deterministic=arguments.deterministic,
        )  # fmt: skip
        print(f"{model.name if arguments.size == 'mini' else arguments.size}, batch {arguments.batch_size}, "
              f"{arguments.dtype}, {len(os.sched_getaffinity(0))} cores", flush=True)  # fmt: skip
        results = compare(
            make,
            arguments.contenders,
            setting,
            partial(agree, setting=setting),
            arguments.rounds,
            arguments.steps,
            "step",
        )
        report(results, arguments.batch_size, least_work(setting), published_peak(setting))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
