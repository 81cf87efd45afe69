"""What `benchmarks/gpu.py` runs, each in a process of its own: contenders that are timed, and jobs that run once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

TORCH = ("torch", "diffusers", "transformers", "accelerate")
OURS = (
    "jax", "flax", "optax", "orbax.checkpoint", "transformers", "safetensors", "huggingface_hub", "PIL", "numpy",
    "yaml", "tqdm", "ml_dtypes",
)  # fmt: skip
COMMAND = (*OURS, "tyro", "tensorboardX")

# XLA records these into CUDA graphs (command buffers) when it is told to; the last two are a loop's and a branch's.
GRAPH_KINDS = (
    "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,DYNAMIC_SLICE_COPY_FUSION,WHILE,CONDITIONAL"
)
NO_GRAPHS = "--xla_gpu_enable_command_buffer="
REPEAT_STEPS = 60


@dataclass(frozen=True)
class Options:
    """How large everything is.

    Attributes:
      models: by size ("sd15", "sdxl", "mini"), the diffusers folder; it may still be made.
      out: folder of logs, traces and tables. dtype: "bfloat16" or "float32". torch_compile: whether PyTorch compiles.
      traced: updates in a trace. steps: of the sampler. batch: pictures an update instead of a job's own.
    """

    models: dict[str, Path]
    out: Path
    dtype: str = "bfloat16"
    torch_compile: bool = True
    traced: int = 4
    steps: int = 25
    batch: int | None = None


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
      group: contenders of a group are timed by turns. name: in the group.
      run: called as ``run(job, options, answer)`` in the process; see `serve`.
      needs: modules that must be installed. size: of the model.
      batch: pictures an update, or drawn at once. mode: ``torch.compile``'s. xla_flags: added to XLA_FLAGS.
      deterministic: ours with --deterministic. traced: a table of its kernels is wanted.
      gigabytes: of the GPU, once it runs. preparing: until then.
      nice: how far it stands back while all prepare.
    """

    group: str
    name: str
    run: Callable[[Job, Options, Connection], None]
    needs: tuple[str, ...]
    size: str = "sd15"
    batch: int = 8
    mode: str | None = None
    xla_flags: str = ""
    deterministic: bool = False
    traced: bool = False
    gigabytes: float = 9.0
    preparing: float | None = None
    nice: int = 0

    @property
    def key(self) -> str:
        """Its name in results and files: ``sd15-ours``."""
        return f"{self.group}-{self.name}"


def work(job: Job, options: Options, answer: Connection) -> None:
    """A job's process: its output goes to a file, an error is its last answer."""
    log = os.open(options.out / f"{job.key}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.nice(job.nice)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {job.xla_flags}".strip()
    os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    try:
        job.run(job, options, answer)
    except Exception as error:
        traceback.print_exc()
        message = str(error).strip().splitlines() or [""]
        answer.send({"what": "failed", "error": f"{type(error).__name__}: {message[0][:300]}"})


def serve(answer: Connection, contender: Any, trace: Callable[[], dict[str, Any]] | None) -> None:
    """Answer commands: a number of units to run, or "trace"; 0 ends."""
    from contenders import peak_memory

    while command := answer.recv():
        if command == "trace":
            assert trace is not None, "only asked of jobs that are traced"
            answer.send({"what": "kernels", **trace()})
        else:
            seconds = contender.run(command)
            answer.send({"ms": round(seconds / command * 1e3, 3), "memory_gb": round(peak_memory() / 1e9, 2)})


def model(options: Options, size: str) -> Path:
    """The model's folder, when it has been written."""
    folder = options.models[size]
    while not (folder / "model_index.json").exists() or (folder / "unfinished").exists():
        time.sleep(0.2)
    return folder


def make(job: Job, options: Options, answer: Connection) -> None:
    """Write a model with random weights in bfloat16; on a GPU within seconds."""
    from contenders import make_model

    folder = options.models[job.size]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "unfinished").touch()
    make_model(job.size, folder, "bfloat16")
    (folder / "unfinished").unlink()
    answer.send({"what": "done"})


def step_setting(job: Job, options: Options) -> Any:
    """The `train_step.Setting` of a job."""
    from train_step import Setting

    mode = job.mode if options.torch_compile else None
    batch = options.batch or job.batch
    return Setting(
        model(options, job.size), None, batch, options.dtype, mode, alone=True, deterministic=job.deterministic
    )


def step_of_ours(job: Job, options: Options, answer: Connection) -> None:
    """Our training step."""
    import train_step

    contender = train_step.Ours(step_setting(job, options))
    seconds = contender.compile(warm_up=False)
    sizes, text = contender.run_steps.memory_analysis(), contender.run_steps.as_text()
    (options.out / f"{job.key}.hlo.txt").write_text(text)
    answer.send({
        "what": "ready", "compile": seconds, "temporary_gb": round(sizes.temp_size_in_bytes / 1e9, 3),
        "arguments_gb": round(sizes.argument_size_in_bytes / 1e9, 3), "cudnn_attention": text.count("__cudnn$fmha"),
    })  # fmt: skip
    serve(answer, contender, lambda: trace_of_jax(job, options, lambda: contender.run(options.traced), text))


def step_of_torch(job: Job, options: Options, answer: Connection) -> None:
    """A training step on PyTorch."""
    import train_step

    contender = train_step.Torch(step_setting(job, options), strong=job.name != "stock")
    answer.send({"what": "ready", "compile": contender.compile()})
    serve(answer, contender, lambda: trace_of_torch(job, options, lambda: contender.run(options.traced)))


def drawing(job: Job, options: Options, answer: Connection) -> None:
    """Pictures by our sampler or diffusers' pipeline, from prompt to pixels."""
    import numpy as np
    import sample

    folder = model(options, job.size)
    side = json.loads((folder / "unet" / "config.json").read_text())["sample_size"]
    vae = json.loads((folder / "vae" / "config.json").read_text())
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    latents = (
        np.random.default_rng(0).standard_normal((job.batch, side, side, vae["latent_channels"])).astype(np.float32)
    )
    precision = "bf16" if options.dtype == "bfloat16" else "no"
    setting = sample.Setting(
        folder, side * factor, job.batch, options.steps, 3.0, precision, options.torch_compile, latents
    )
    contender = sample.Ours(setting) if job.name == "ours" else sample.Diffusers(setting)
    contender.check()
    answer.send({"what": "ready", "compile": {"first": round(contender.first, 1)}})
    serve(answer, contender, lambda: trace_of_jax(job, options, lambda: contender.run(1), "", 1))


def trace_of_jax(
    job: Job, options: Options, run: Callable[[], Any], program: str, steps: int | None = None
) -> dict[str, Any]:
    """The kernels of some steps of a JAX program; the whole table is a file."""
    import jax
    from kernel_table import events, table

    folder = options.out / f"{job.key}-trace"
    settings = jax.profiler.ProfileOptions()
    settings.python_tracer_level = 0  # calls of Python functions would be most of the file
    with jax.profiler.trace(str(folder), profiler_options=settings):
        run()
    return _shortened(job, options, table(events(folder), steps or options.traced, program))


def trace_of_torch(job: Job, options: Options, run: Callable[[], Any]) -> dict[str, Any]:
    """The kernels of some steps on PyTorch; on a CPU its operators."""
    import torch
    from kernel_table import table
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        run()
    wanted = DeviceType.CUDA if gpu else DeviceType.CPU
    kernels = (
        (event.name, "", 1e3 * _own_time(event, gpu)) for event in profiler.events() if event.device_type == wanted
    )
    return _shortened(job, options, table(kernels, options.traced))


def _own_time(event: Any, gpu: bool) -> float:
    """Microseconds of a PyTorch event, without those of the events in it."""
    return event.self_device_time_total if gpu else event.self_cpu_time_total


def _shortened(job: Job, options: Options, kernels: dict[str, Any]) -> dict[str, Any]:
    (options.out / f"{job.key}-kernels.json").write_text(json.dumps(kernels, indent=0))
    return kernels | {"kinds": kernels["kinds"][:25], "kernels": kernels["kernels"][:25]}


def demo(job: Job, options: Options, answer: Connection) -> None:
    """The embedded model learns its word, with scores: with an empty compile cache; later, alone, with a full one."""
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as folder:
        flags = ("train.py", "--evaluate", "--output_dir")
        cold = _command((*flags, f"{folder}/0"), cache)
        answer.send({"what": "ready", "cold_s": cold, "scores": json.loads(Path(folder, "0/scores.json").read_text())})
        for number in count(1):
            if not answer.recv():
                break
            answer.send({"ms": 1e3 * _command((*flags, f"{folder}/{number}"), cache)})


def attention(job: Job, options: Options, answer: Connection) -> None:
    """The tests of attention on this device, without TF32."""
    flags = ("-m", "pytest", "-q", "-n0", "--no-header", "-o", "filterwarnings=default", "-p", "no:cacheprovider")
    chosen = ("tests/test_attention.py", "-k", "output or float32")
    environment = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *flags, *chosen], cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    answer.send({
        "what": "done", "exit": done.returncode, "summary": lines[-1] if lines else "", "failed": failed[:30],
        "seconds": round(time.perf_counter() - start, 1),
    })  # fmt: skip


def repeat(job: Job, options: Options, answer: Connection) -> None:
    """How far the rows of the same run are apart: run twice, and resumed in its middle."""
    import numpy as np
    from safetensors.numpy import load_file

    common = ("--seed", "3", "--num_validation_images", "1", *(["--deterministic"] if job.deterministic else []))
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as folder:
        rows, speed = {}, {}
        for name in ("first", "second", "resumed"):
            half = str(REPEAT_STEPS // 2)
            resume = ("--resume_from_checkpoint", f"{folder}/first/checkpoints/{half}") if name == "resumed" else ()
            flags = ("--max_train_steps", str(REPEAT_STEPS), "--checkpointing_steps", half, *common, *resume)
            _command(("train.py", "--output_dir", f"{folder}/{name}", *flags), cache)
            rows[name] = np.concatenate(list(load_file(f"{folder}/{name}/learned_embeds.safetensors").values()))
            lines = Path(folder, name, "metrics.jsonl").read_text().splitlines()
            speed[name] = max(json.loads(line).get("steps_per_second", 0.0) for line in lines)
    off = {name: float(np.abs(rows[name] - rows["first"]).max()) for name in ("second", "resumed")}
    answer.send({"what": "done", "rows_off": off, "steps_per_second": speed})


def _command(flags: tuple[str, ...], cache: str) -> float:
    """Seconds of a Python program with that compile cache."""
    start = time.perf_counter()
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": str(ROOT) + _more_paths()}
    done = subprocess.run([sys.executable, *flags], cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"{' '.join(flags[:2])}: exit status {done.returncode}: {lines[-1]}")
    return round(time.perf_counter() - start, 2)


def _more_paths() -> str:
    return f":{os.environ['PYTHONPATH']}" if os.environ.get("PYTHONPATH") else ""


def _ours(group: str, name: str, **changes: Any) -> Job:
    return Job(group, name, step_of_ours, OURS, **changes)


def _torch(group: str, name: str, **changes: Any) -> Job:
    return Job(group, name, step_of_torch, (*TORCH, *OURS), **changes)


# In the order in which they are started: what takes longest to prepare, or is wanted first, comes first.
JOBS = (
    Job("model", "sd15", make, (*TORCH, *OURS), gigabytes=3.0),
    _ours("sd15", "ours", traced=True, preparing=2.5),
    _torch("sd15", "strong-graphs", mode="reduce-overhead"),
    _torch("sd15", "strong", mode="default", traced=True),
    Job("model", "sdxl", make, (*TORCH, *OURS), size="sdxl", gigabytes=8.0),
    _ours("sdxl", "ours", size="sdxl", batch=4, traced=True, gigabytes=32.0, preparing=8.0, nice=2),
    _torch("sd15", "stock", gigabytes=12.0),
    Job("draw", "ours", drawing, OURS, batch=4, traced=True),
    Job("draw", "diffusers", drawing, (*TORCH, *OURS), batch=4),
    Job("demo", "demo", demo, COMMAND, size="mini", gigabytes=2.0),
    Job("attention", "tests", attention, (*OURS, *TORCH, "pytest", "xdist"), size="mini", gigabytes=1.0),
    _ours("mini", "ours", size="mini", traced=True, gigabytes=1.0),
    _ours("sd15", "no-graphs", xla_flags=NO_GRAPHS, traced=True, preparing=2.5, nice=1),
    _ours("mini", "no-graphs", size="mini", xla_flags=NO_GRAPHS, traced=True, gigabytes=1.0, nice=1),
    _ours("mini", "all-graphs", size="mini", xla_flags=NO_GRAPHS + GRAPH_KINDS, gigabytes=1.0, nice=1),
    _ours("sd15", "all-graphs", xla_flags=NO_GRAPHS + GRAPH_KINDS, preparing=2.5, nice=1),
    _ours("sd15", "deterministic", deterministic=True, preparing=2.5, nice=1),
    _ours("mini", "deterministic", size="mini", deterministic=True, gigabytes=1.0, nice=1),
    Job("repeat", "usual", repeat, COMMAND, size="mini", gigabytes=2.0, nice=2),
    Job("repeat", "deterministic", repeat, COMMAND, size="mini", deterministic=True, gigabytes=2.0, nice=2),
    _torch("sdxl", "strong", size="sdxl", batch=4, mode="default", traced=True, gigabytes=45.0, nice=2),
    _torch("sdxl", "stock", size="sdxl", batch=4, gigabytes=55.0, nice=2),
    _torch("sdxl", "strong-graphs", size="sdxl", batch=4, mode="reduce-overhead", gigabytes=50.0, nice=3),
)
