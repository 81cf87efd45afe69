"""Detect whether this process is one of several, and how it reaches the others.

Several processes that do not know of each other would be several runs in one folder, and a process that waits for
others that do not exist never starts. So "one of several" needs evidence: a flag, a launcher's environment variables,
or a TPU slice with more than one host.
"""

from __future__ import annotations

import functools
import http.client
import os
import queue
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ti_jax.config import TrainConfig
from ti_jax.errors import InputError
from ti_jax.startup import has_tpu_device, installed

# On a Google Cloud VM the metadata server answers in milliseconds. Elsewhere even the DNS lookup may time out.
METADATA_SECONDS = 5.0

# Ports above Linux's default ephemeral range; JAX's own detection of Slurm uses the same range.
_FIRST_PORT, _PORTS = 61440, 4096


@dataclass(frozen=True)
class Launch:
    """One process of several: arguments of ``jax.distributed.initialize``.

    Attributes:
      evidence: why there are several processes; used as the beginning of a message.
      coordinator_address: HOST:PORT. num_processes, process_id: as there. None: detected by JAX (Slurm, Open MPI, TPU
        slices).
      local_device_ids: indices of this process's GPUs on its host; None: all, or as detected by JAX.
      complete: JAX's own detection is not needed.
    """

    evidence: str
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None
    complete: bool = False


def find_launch(
    config: TrainConfig,
    environment: Mapping[str, str] = os.environ,
    dev: Path = Path("/dev"),
    metadata: Callable[[str], str | None] | None = None,
) -> Launch | None:
    """How this process is part of a run of several; None if it is alone.

    Args:
      config: its ``distributed``, ``coordinator_address``, ``num_processes`` and ``process_id`` are used.
      environment: environment variables. dev: folder of device files. metadata: default `read_metadata`.

    Raises:
      InputError: a variable is not a number, or a launcher's are incomplete.
    """
    if config.distributed == "never":
        return None
    count = _number(environment, "JAX_NUM_PROCESSES") if config.num_processes is None else config.num_processes
    own = _number(environment, "JAX_PROCESS_ID") if config.process_id is None else config.process_id
    address = config.coordinator_address or environment.get("JAX_COORDINATOR_ADDRESS")
    if address is not None:
        return Launch("--coordinator_address is given", address, count, own)
    launch = _of_torchrun(environment)
    if launch is not None:
        return launch
    for launcher, name in (("Slurm", "SLURM_STEP_NUM_TASKS"), ("Open MPI", "OMPI_COMM_WORLD_SIZE")):
        tasks = _number(environment, name) or 1
        if tasks > 1:
            return Launch(f"{launcher} has started {tasks} tasks", None, count, own)
    if config.distributed == "always":
        return Launch("--distributed is always", None, count, own)
    if not _on_tpu(environment, dev):
        return None
    hosts = _tpu_hosts(environment, metadata or read_metadata)
    return Launch(f"this TPU slice has {hosts} hosts", None, count, own) if hosts > 1 else None


def _number(environment: Mapping[str, str], variable: str) -> int | None:
    text = environment.get(variable)
    if text is not None and not text.isdecimal():
        raise InputError(f"the environment variable {variable} is {text!r}; it must be a whole number")
    return None if text is None else int(text)


def _of_torchrun(environment: Mapping[str, str]) -> Launch | None:
    """``torchrun`` and ``accelerate launch``: from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
    count, own = (_number(environment, name) for name in ("WORLD_SIZE", "RANK"))
    if count is None or count == 1 or own is None:
        return None
    host, port = environment.get("MASTER_ADDR"), _number(environment, "MASTER_PORT")
    if host is None or port is None:
        raise InputError(
            f"WORLD_SIZE is {count} and RANK is {own}, so this is one of several processes, but MASTER_ADDR and "
            f"MASTER_PORT do not say where they meet: start them with torchrun, give --coordinator_address HOST:PORT, "
            f"or unset RANK to train alone"
        )
    # The launcher itself listens at MASTER_PORT. All processes must derive the same other port without communicating.
    port = _number(environment, "JAX_COORDINATOR_PORT") or _FIRST_PORT + (port + 1) % _PORTS
    # As in PyTorch, each process has one GPU; a single process per host has all of them.
    local = _number(environment, "LOCAL_RANK") if environment.get("LOCAL_WORLD_SIZE") != "1" else None
    return Launch(
        f"torchrun or accelerate has started {count} processes",
        f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        count,
        own,
        None if local is None else (local,),
        complete=True,
    )


def _on_tpu(environment: Mapping[str, str], dev: Path) -> bool:
    """Whether this machine has TPU chips that JAX will use."""
    wanted = (environment.get("JAX_PLATFORMS") or "tpu").split(",")
    library = "TPU_LIBRARY_PATH" in environment or installed("libtpu")
    return has_tpu_device(dev) and "tpu" in wanted and library


def _tpu_hosts(environment: Mapping[str, str], metadata: Callable[[str], str | None]) -> int:
    """Number of hosts of this host's TPU slice or slices; 1 without evidence of more.

    Sources and their order are those of JAX's own detection (environment variables on Kubernetes, the metadata server
    on a Cloud TPU VM), which fails on a TPU that is not part of a described slice (Colab, Kaggle).
    """
    slices = environment.get("MEGASCALE_NUM_SLICES")
    workers = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    # JAX sets TPU_SKIP_MDS_QUERY where it has found no chips.
    if workers is None and "TPU_SKIP_MDS_QUERY" not in environment:
        workers, in_metadata = _described(metadata, slices is None)
        slices = in_metadata if slices is None else slices
    count = len([worker for worker in (workers or "").split(",") if worker.strip()])
    return max(count, 1) * (int(slices) if slices and slices.isdecimal() else 1)


def _slices_of(tpu_env: str) -> str | None:
    """The value of the line ``MEGASCALE_NUM_SLICES: '2'`` in the attribute ``tpu-env``."""
    for line in tpu_env.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "MEGASCALE_NUM_SLICES":
            return value.strip().strip("'\"")
    return None


@functools.cache
def _described(metadata: Callable[[str], str | None], with_slices: bool) -> tuple[str | None, str | None]:
    """Workers and number of slices in this TPU's metadata. Asked once a process: no answer takes seconds to notice."""
    workers = slices = None
    try:
        workers = metadata("worker-network-endpoints")
        if with_slices:
            slices = _slices_of(metadata("tpu-env") or "")
    except (OSError, http.client.HTTPException) as error:
        print(
            f"note: no answer from the metadata server ({error}), so it is not known whether this TPU is one of "
            f"several hosts: training with this host's devices alone (--distributed always joins the others)",
            file=sys.stderr,
        )
    return workers, slices


def read_metadata(name: str, seconds: float = METADATA_SECONDS) -> str | None:
    """The value of a metadata attribute of this Google Cloud VM; None if it has no such attribute.

    Raises:
      OSError: there is no metadata server, or it does not answer within `seconds`.
    """
    answers: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(_read_metadata(name, time.monotonic() + seconds))
        except (OSError, http.client.HTTPException) as error:
            answers.put(error)

    # In a thread, because a DNS lookup has no timeout.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"none within {seconds:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _read_metadata(name: str, end: float) -> str | None:
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would answer for its own machine
    while True:
        try:
            with opener.open(request, timeout=max(end - time.monotonic(), 0.1)) as response:
                if response.headers.get("Metadata-Flavor") != "Google":
                    raise OSError(f"{host} is another server")
                return str(response.read().decode(errors="replace"))
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            if error.code < 500 or time.monotonic() + 0.5 > end:
                raise
            time.sleep(0.5)
