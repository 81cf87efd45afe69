"""All that only a GPU can tell, in five minutes on an H100 with 16 cores.

    python benchmarks/gpu.py --out results          # on a GPU
    python benchmarks/gpu.py --only sd15 draw       # some groups, or contenders such as sd15-ours
    python benchmarks/gpu.py --size mini --no_torch_compile --dtype float32 --rounds 2     # in small, on a CPU

All contenders are prepared at the same time, each in its own process, on all cores. Whoever is ready is measured while
every other process is stopped (SIGSTOP), so that nothing runs beside it; when all of a group are ready, they are timed
by turns. What is measured (`JOBS` in benchmarks/gpu_jobs.py):

    sd15       a training step of 8 on SD1.5: ours; without CUDA graphs, and with graphs over loops and branches, too;
               with --deterministic; stock and strong PyTorch loops, strong with CUDA graphs (benchmarks/torch_loops.py)
    sdxl       a training step of 4 on SDXL
    mini       a training step of 8 on the embedded model
    draw       4 pictures of 25 steps against diffusers' compiled pipeline
    demo       train.py --evaluate, with an empty compile cache (beside the others), then with a full one, alone
    attention  its tests on this device
    repeat     how far the rows of two equal runs, and of a resumed one, are apart, also with --deterministic

Each result is a line of JSON in OUT/results.jsonl and on stdout as soon as it is known: the machine may go at any time.
The first table of kernels is of our step. What is not installed is named first, and the rest runs without it. SD1.5 and
SDXL have random weights. Needs  pip install -e '.[cuda13,torch]' pytest pytest-xdist  and PyTorch with CUDA.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_jobs import JOBS, Job, Options, work  # noqa: E402

# Shares of the time: when a group is timed with those who are ready; when the rest of the jobs is ended.
GROUP_DEADLINE = 0.75
END = 0.98
MINI_STEPS = 20  # a step of the embedded model is that much shorter
LARGE = ("sd15", "sdxl")
MODEL_BYTES = 12e9


class Log:
    """Lines of JSON, on stdout and in a file, as soon as they are known."""

    def __init__(self, file: TextIO):
        self.start, self.file = time.perf_counter(), file

    def __call__(self, what: str, **figures: Any) -> None:
        """One line; "at" is in seconds since the start."""
        line = json.dumps({"at": round(self.seconds, 1), "what": what, **figures})
        print(line, flush=True)
        print(line, file=self.file, flush=True)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.start


class Worker:
    """A job's process, seen from outside. `state`: preparing, ready, measured, or gone."""

    def __init__(self, job: Job, options: Options):
        context = multiprocessing.get_context("spawn")
        self.job, self.state, self.stopped = job, "preparing", 0.0
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(job, options, theirs), daemon=False)
        self.process.start()
        theirs.close()

    @property
    def gigabytes(self) -> float:
        """Estimated memory of the GPU that it takes. While it only compiles, that can be less than when it runs."""
        if self.state == "preparing":
            return self.job.preparing or self.job.gigabytes
        return 0.0 if self.state == "gone" else self.job.gigabytes

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """Its next answer; if it has died or does not answer in time, what is known of that."""
        try:
            if not self.pipe.poll(timeout):
                return {"what": "failed", "error": f"no answer in {timeout:.0f} s"}
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            return {"what": "failed", "error": f"exit status {self.process.exitcode}"}

    def ask(self, command: int | str, timeout: float) -> dict[str, Any]:
        """Send a command, and wait for the answer."""
        try:
            self.pipe.send(command)
        except OSError:
            return {"what": "failed", "error": "it has ended"}
        return self.receive(timeout)

    def end(self) -> None:
        """End its process with all that it has started."""
        self.state = "gone"
        for each in family(self.process.pid) if self.process.is_alive() else []:
            send(each, signal.SIGKILL)
        self.process.join()
        self.pipe.close()


def family(process: int | None) -> list[int]:
    """A process and its living descendants, by /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [] if process is None else [process]
    for each in found:
        found += children.get(each, [])
    return found


def send(process: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(process, number)


class Benchmark:
    """Starts the jobs as memory allows, and measures whoever is ready."""

    def __init__(
        self, jobs: Sequence[Job], options: Options, log: Log, memory: float | None, limits: argparse.Namespace
    ):
        self.waiting, self.options, self.log, self.memory, self.limits = list(jobs), options, log, memory, limits
        self.workers: list[Worker] = []
        self.series: dict[str, list[float]] = {}

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.limits.seconds * END - self.log.seconds

    def run(self) -> None:
        """Until all is measured, or the time is over."""
        try:
            while self.left > 0:
                self.start()
                preparing = [worker for worker in self.workers if worker.state == "preparing"]
                if not preparing and not self.waiting:
                    break
                ready = wait([worker.pipe for worker in preparing], timeout=max(0.0, min(1.0, self.left)))
                for worker in preparing:
                    if worker.pipe in ready:
                        self.take(worker)
                for group in dict.fromkeys(worker.job.group for worker in self.workers):
                    self.time_group(group)
        finally:
            for worker in self.workers:
                if worker.state == "preparing":
                    self.log("unfinished", job=worker.job.key)
                if worker.state != "gone":
                    worker.end()
            for job in self.waiting:
                self.log("not started", job=job.key, needs_gb=job.gigabytes)

    def start(self) -> None:
        """Start all jobs that fit into the memory beside those that are there."""
        for job in list(self.waiting):
            taken = sum(worker.gigabytes for worker in self.workers)
            if self.memory is None or taken + (job.preparing or job.gigabytes) <= self.memory or not taken:
                self.waiting.remove(job)
                self.workers.append(Worker(job, self.options))

    def take(self, worker: Worker) -> None:
        """Take the first answer of a worker; if it is ready, have a first look at it."""
        answer = worker.receive()
        what = answer.pop("what")
        self.log(what, job=worker.job.key, stopped_s=round(worker.stopped, 1), **answer)
        if what != "ready":
            worker.end()
            return
        worker.state = "ready"
        if worker.job.group == "demo":
            return
        with self.alone(worker):
            first = worker.ask(self.count(worker.job), self.left)  # not counted: the first may allocate
            if "ms" in first and worker.job.traced:
                self.report(worker, worker.ask("trace", self.left))
            if "ms" in first:
                first = worker.ask(self.count(worker.job), self.left)
            self.report(worker, {"what": "first", **first} if "ms" in first else first)

    def report(self, worker: Worker, answer: dict[str, Any]) -> None:
        """Log an answer; a worker that failed is ended."""
        what = answer.pop("what")
        self.log(what, job=worker.job.key, **answer)
        if what == "failed":
            worker.end()

    def count(self, job: Job) -> int:
        """Units in a round."""
        if job.group in ("draw", "demo"):
            return 1
        return self.limits.steps * (MINI_STEPS if job.size == "mini" and self.limits.size == "full" else 1)

    def time_group(self, group: str) -> None:
        """Time a group by turns: when all of it are ready, or those who are when much of the time is over."""
        members = [worker for worker in self.workers if worker.job.group == group and worker.state != "gone"]
        preparing = any(worker.state == "preparing" for worker in members)
        # A member that waits for memory may start when another job ends.
        waiting = any(job.group == group for job in self.waiting)
        more = preparing or (waiting and any(worker.state == "preparing" for worker in self.workers))
        late = self.log.seconds > self.limits.seconds * GROUP_DEADLINE
        if not any(worker.state == "ready" for worker in members) or (more and not late):
            return
        timed = [worker for worker in members if worker.state != "preparing"]
        self.series |= {worker.job.key: [] for worker in timed}
        for _ in range(1 if group == "demo" else self.limits.rounds):
            for worker in timed:
                if worker.state == "gone" or self.left < 2:
                    continue
                with self.alone(worker):
                    answer = worker.ask(self.count(worker.job), self.left)
                if "ms" not in answer:
                    self.report(worker, answer)
                    continue
                self.series[worker.job.key].append(answer["ms"])
                self.log("round", job=worker.job.key, **answer)
        for worker in timed:
            self.summarise(worker.job)
            # Ours stays for a late member to be compared with.
            if worker.state != "gone" and not (preparing and worker.job.name == "ours"):
                worker.end()
            elif worker.state != "gone":
                worker.state = "measured"

    def summarise(self, job: Job) -> None:
        """Log the median of the rounds, and how many times longer than ours it took in the same round."""
        times, ours = self.series[job.key], self.series.get(f"{job.group}-ours", [])
        if times:
            ratios = [time / our for time, our in zip(times, ours, strict=False)]
            figures = {"ms": statistics.median(times), "least": min(times), "most": max(times), "rounds": len(times)}
            if ratios and job.name != "ours":
                figures |= {"ours_is_faster_by": round(statistics.median(ratios), 3)}
            self.log("times", job=job.key, **figures)

    @contextmanager
    def alone(self, worker: Worker) -> Iterator[None]:
        """While nothing else runs: all other jobs' processes are stopped."""
        others = [each for each in self.workers if each is not worker and each.state == "preparing"]
        families = [family(each.process.pid) for each in others]
        start = time.perf_counter()
        for each in (process for processes in families for process in processes):
            send(each, signal.SIGSTOP)
        try:
            yield
        finally:
            for each in (process for processes in families for process in processes):
                send(each, signal.SIGCONT)
            for each in others:
                each.stopped += time.perf_counter() - start


def gpu() -> dict[str, Any]:
    """Name, driver and memory in GB of the first NVIDIA GPU; {} if there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        return {}
    name, driver, mebibytes = done.stdout.splitlines()[0].split(", ")
    return {"gpu": name, "driver": driver, "gpu_gb": round(float(mebibytes) * 2**20 / 1e9, 1)}


def versions(*packages: str) -> dict[str, str]:
    """Installed versions."""
    from importlib import metadata

    return {name: metadata.version(name) for name in packages if importlib.util.find_spec(name)}


def installed(module: str) -> bool:
    """Whether a module can be found; nothing is imported but the packages that it is in."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def without_missing(jobs: Sequence[Job], log: Log) -> list[Job]:
    """The jobs whose modules are installed; one line says what is missing for which others."""
    modules = dict.fromkeys(module for job in jobs for module in job.needs)
    missing = {module for module in modules if not installed(module)}
    able = [job for job in jobs if not missing.intersection(job.needs)]
    if missing:
        left_out = [job.key for job in jobs if job not in able]
        log("missing", modules=sorted(missing), left_out=left_out)
    made = {job.name for job in able if job.group == "model"}
    return [job for job in able if job.size not in LARGE or job.size in made]


def chosen(arguments: argparse.Namespace) -> list[Job]:
    """The jobs that were asked for, and those that make their models."""
    wanted = [job for job in JOBS if not arguments.only or {job.group, job.key}.intersection(arguments.only)]
    wanted = [job for job in wanted if job.group != "model"]
    if arguments.size == "mini":  # in small: SD1.5 and SDXL are the embedded model
        return [replace(job, size="mini") for job in wanted]
    sizes = {job.size for job in wanted}
    return [job for job in JOBS if job in wanted or (job.group == "model" and job.size in sizes)]


def main() -> None:
    """Parse the command line."""
    groups = list(dict.fromkeys(name for job in JOBS for name in (job.group, job.key) if job.group != "model"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=295.0, help="in which all must be done")
    parser.add_argument("--only", nargs="+", choices=groups, metavar="NAME", help=f"of {', '.join(groups)}")
    parser.add_argument("--size", choices=("full", "mini"), default="full", help="mini: all with the embedded model")
    parser.add_argument("--model", type=Path, help="a diffusers folder instead of the embedded model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the frozen networks")
    parser.add_argument("--no_torch_compile", action="store_true", help="PyTorch compiles nothing")
    parser.add_argument("--batch", type=int, help="pictures an update, instead of each job's own")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="updates a round")
    parser.add_argument("--drawing_steps", type=int, default=25, help="of the sampler")
    arguments = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left, and none stopped
    arguments.out.mkdir(parents=True, exist_ok=True)
    memory_folder = Path("/dev/shm")
    roomy = memory_folder.is_dir() and shutil.disk_usage(memory_folder).free > MODEL_BYTES
    with (
        open(arguments.out / "results.jsonl", "w") as file,
        tempfile.TemporaryDirectory(dir=memory_folder if roomy else None) as models,
    ):
        log = Log(file)
        jobs = without_missing(chosen(arguments), log)
        about = gpu()
        log("machine", **about, cores=len(os.sched_getaffinity(0)), **versions("jax", "torch", "diffusers"))
        folders = {size: Path(models, size) for size in LARGE}
        folders["mini"] = arguments.model or ROOT / "ti_jax" / "assets" / "mini-sd"
        options = Options(
            folders, arguments.out.resolve(), arguments.dtype, not arguments.no_torch_compile,
            steps=arguments.drawing_steps, batch=arguments.batch,
        )  # fmt: skip
        Benchmark(jobs, options, log, about.get("gpu_gb"), arguments).run()
        log("end")


if __name__ == "__main__":
    main()
