"""Processes that tests start."""

import os


def environment(devices=1):
    """This process' own, for so many CPU devices: a child compiles as the test does, and shares what is compiled."""
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    return os.environ | {"XLA_FLAGS": flags, "JAX_NUM_CPU_DEVICES": str(devices)}
