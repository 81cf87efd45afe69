"""What is to be settled about other libraries before they are imported."""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from ti_jax.errors import one_line

GOOGLE = "0x1ae0"  # the vendor of a TPU's PCI device


def avoid_missing_tpu() -> None:
    """Keep JAX from looking for a TPU if libtpu is installed (for ``ti-jax plan``) but there is no TPU.

    JAX would otherwise print several lines of errors. Does nothing if JAX_PLATFORMS is set, or if a plugin for another
    accelerator is installed. Call it before JAX is imported.
    """
    if "JAX_PLATFORMS" in os.environ or not installed("libtpu") or has_tpu():
        return
    if not installed("jax_plugins") and not any(importlib.metadata.entry_points(group="jax_plugins")):
        os.environ["JAX_PLATFORMS"] = "cpu"


def _without_traceback(record: logging.LogRecord) -> bool:
    """Leave of an exception's traceback the first line of its message; keep the record."""
    if record.exc_info and record.exc_info[1]:
        record.msg = f"{record.getMessage()}: {one_line(record.exc_info[1])} (ti-jax doctor has more)"
        record.args, record.exc_info = (), None
    return True


def shorten_plugin_errors() -> None:
    """Have JAX say in one line, not in thirty, that it cannot use a plug-in, as CUDA's without a driver."""
    logging.getLogger("jax._src.xla_bridge").addFilter(_without_traceback)  # the same one a second time does nothing


@contextlib.contextmanager
def without(module: str) -> Iterator[None]:
    """Context in which importing a module fails as if it were not installed; one that is imported already stays."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def installed(module: str) -> bool:
    """Whether a module, maybe one of a package, could be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package
        return False


def version_of(package: str) -> str | None:
    """The version of an installed package, which is not imported; None: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_tpu_device(dev: Path = Path("/dev")) -> bool:
    """Whether the folder of device files has a TPU chip's."""
    return any(next(dev.glob(pattern), None) is not None for pattern in ("accel[0-9]*", "vfio/[0-9]*"))


def has_tpu() -> bool:
    """Whether the machine has a TPU."""
    if has_tpu_device():
        return True
    return any(Path(vendor).read_text().strip() == GOOGLE for vendor in glob.glob("/sys/bus/pci/devices/*/vendor"))
