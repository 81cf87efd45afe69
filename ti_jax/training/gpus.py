"""NVIDIA GPUs to compile for that need not be there: ``ti-jax plan --topology h100:1``.

XLA's CUDA plug-in holds the whole compiler and compiles on any Linux machine, without a GPU or its driver. All that it
is told of a card are the published figures below. What it cannot do is to run kernels, by which XLA chooses among
equivalent ones on a GPU: so no time can be told, and the memory of other kernels may differ.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from ti_jax.errors import InputError
from ti_jax.startup import installed

# cuDNN's version that programs are compiled for, as JAX and XLA write it: any from 9.12 on has the kernels.
CUDNN = (9, 12, 0)
# Share of a GPU's memory that JAX takes, if XLA_PYTHON_CLIENT_MEM_FRACTION does not say another.
TAKEN = 0.75

HOW = "it is written NAME:COUNT, for example h100:1"


@dataclass(frozen=True)
class Card:
    """What XLA's compiler asks of a GPU.

    Attributes:
      kind: JAX's ``device_kind``. capability: compute capability, (major, minor).
      memory: bytes that CUDA reports. bandwidth: of the memory, in bytes a second.
      cores: streaming multiprocessors. clock: boost, in GHz. cache: second-level, in bytes.
    """

    kind: str
    capability: tuple[int, int]
    memory: int
    bandwidth: float
    cores: int
    clock: float
    cache: int


_MB = 2**20

# From NVIDIA's data sheets and architecture white papers; memory as CUDA reports it, which is a little less.
CARDS = {
    "a100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 85_100_068_864, 2.039e12, 108, 1.41, 40 * _MB),
    "a100-40gb": Card("NVIDIA A100-SXM4-40GB", (8, 0), 42_331_013_120, 1.555e12, 108, 1.41, 40 * _MB),
    "a6000": Card("NVIDIA RTX A6000", (8, 6), 51_041_271_808, 768e9, 84, 1.80, 6 * _MB),
    "rtx3090": Card("NVIDIA GeForce RTX 3090", (8, 6), 25_300_000_000, 936e9, 82, 1.70, 6 * _MB),
    "rtx4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 25_300_000_000, 1.008e12, 128, 2.52, 72 * _MB),
    "l4": Card("NVIDIA L4", (8, 9), 23_600_000_000, 300e9, 58, 2.04, 48 * _MB),
    "l40s": Card("NVIDIA L40S", (8, 9), 47_700_000_000, 864e9, 142, 2.52, 96 * _MB),
    "h100": Card("NVIDIA H100 80GB HBM3", (9, 0), 84_942_979_072, 3.352e12, 132, 1.98, 50 * _MB),
    "h200": Card("NVIDIA H200", (9, 0), 150_000_000_000, 4.8e12, 132, 1.98, 50 * _MB),
}

# Shared memory in bytes, of a multiprocessor and at most of a block, its threads and float32 units, by capability.
_PER_CORE = {
    (8, 0): (167_936, 166_912, 2048, 64),
    (8, 6): (102_400, 101_376, 1536, 128),
    (8, 9): (102_400, 101_376, 1536, 128),
    (9, 0): (233_472, 232_448, 2048, 128),
}


def is_gpu(topology: str) -> bool:
    """Whether a topology's name is that of a GPU, known or not: TPUs are v2, v3, v4, v5e and so on."""
    return re.match(r"v\d", topology) is None


def parse(topology: str) -> tuple[Card, int]:
    """The card and the number of them in a topology such as ``h100:1``.

    Raises:
      InputError: no such card, or no number.
    """
    name, _, count = topology.lower().partition(":")
    if name not in CARDS:
        tpus = "TPU slices are written v5e:2x4, v6e:2x2, v5p:2x2x1 and so on"
        raise InputError(f"--topology {topology}: no such device; known GPUs are {', '.join(CARDS)}; {tpus}")
    if not re.fullmatch(r"[1-9]\d*", count):
        raise InputError(f"--topology {topology}: {HOW}")
    return CARDS[name], int(count)


def target_config(card: Card) -> str:
    """XLA's description of a GPU (``GpuTargetConfigProto``) as text."""
    major, minor = card.capability
    per_core, per_block, threads, units = _PER_CORE[card.capability]
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
          device_memory_size: {card.memory} memory_bandwidth: {card.bandwidth:.0f} l2_cache_size: {card.cache}
          core_count: {card.cores} fpus_per_core: {units} clock_rate_ghz: {card.clock}
          shared_memory_per_core: {per_core} shared_memory_per_block: 49152 shared_memory_per_block_optin: {per_block}
          threads_per_core_limit: {threads} threads_per_block_limit: 1024 threads_per_warp: 32
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          name: "{card.kind}" device_vendor: "NVIDIA Corporation" device_address_bits: 64
          dnn_version: "{".".join(map(str, CUDNN))}"
        }}
        platform_name: "CUDA"
        device_description_str: "{card.kind}"
    """


def available(card: Card) -> float:
    """Bytes of a card that a run would have: JAX takes a share of it when it starts."""
    given = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "")
    try:
        share = float(given) if given else TAKEN
    except ValueError:
        raise InputError(f"XLA_PYTHON_CLIENT_MEM_FRACTION={given}: it is a number, such as 0.9") from None
    return card.memory * share


def topology_devices(topology: str) -> Sequence[Any]:
    """Descriptions of a topology's GPUs. JAX must not have started; what little it computes then runs on the CPU.

    Raises:
      InputError: no such topology, or the plug-in is not installed or not of JAX's version.
    """
    from jax.experimental import topologies

    card, count = parse(topology)
    for package, module in (("jax-cuda13-plugin", "jax_plugins.xla_cuda13"), ("nvidia-nvvm", "nvidia.cu13")):
        if not installed(module):
            raise InputError(
                f"--topology {topology} needs XLA's compiler for NVIDIA GPUs, and {package} is not installed: "
                "pip install 'ti_jax[plan-gpu]' (Linux only)"
            )
    # Or the plug-in looks for a driver.
    jax.config.update("jax_platforms", "cpu")
    # XLA tries Triton's products on the GPU before it takes one.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_enable_triton_gemm" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_triton_gemm=false".strip()
    try:
        description = topologies.get_topology_desc(
            platform="cuda", target_config=target_config(card), topology=f"1x1x{count}"
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = f"is the plug-in that of jax {jax.__version__}?"
        raise InputError(f"--topology {topology}: XLA's CUDA plug-in: {reason.rstrip('. ')}; {remedy}") from error
    return description.devices


@contextlib.contextmanager
def tracing_for(card: Card | None) -> Iterator[None]:
    """While tracing for an absent card: JAX's rules for cuDNN's attention hold for that card. None changes nothing.

    JAX asks the local device and the installed cuDNN, in private functions, and has no way to be told of another.
    """
    if card is None:
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as rules

    answers = {
        "check_cudnn_version": lambda: CUDNN[0] * 10_000 + CUDNN[1] * 100 + CUDNN[2],
        "check_compute_capability": lambda capability: card.capability >= _numbers(capability),
        "is_cuda_compute_capability_equal": lambda capability: card.capability == _numbers(capability),
    }
    if unknown := [name for name in answers if not hasattr(rules, name)]:
        raise InputError(f"--topology: GPUs cannot be planned for with jax {jax.__version__}: it has no {unknown[0]}")
    saved = {name: getattr(rules, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(rules, name, answer)
        yield
    finally:
        for name, function in saved.items():
            setattr(rules, name, function)


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))
