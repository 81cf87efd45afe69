"""Processes that tests start."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def environment(devices=1):
    """This process' own, for so many CPU devices: a child compiles as the test does, and shares what is compiled."""
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    return os.environ | {"XLA_FLAGS": flags, "JAX_NUM_CPU_DEVICES": str(devices)}


FORKING = """
import contextlib, gc, importlib, json, os, sys, traceback
code, *modules = sys.argv[1:]
code = compile(code, "<forked>", "exec")
for name in modules:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
gc.freeze()
for request in sys.stdin:
    arguments, environment, *files = json.loads(request)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    status = 0
    try:
        exec(code)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # at once: to take all modules down takes longer than what most tests do
"""


@contextlib.contextmanager
def forked(code, *modules):
    """``run(arguments, environment)``: the code in a process of its own, as `subprocess.run` with its output.

    What takes long to import is imported once, and each process is forked from the one that has done so.

    Args:
      modules: that are imported before; one that is not installed is left out.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, "-c", FORKING, code, *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as parent,
    ):
        out, err = Path(folder, "out"), Path(folder, "err")

        def run(arguments, environment):
            print(json.dumps([arguments, environment, str(out), str(err)]), file=parent.stdin, flush=True)
            status = int(parent.stdout.readline())
            return subprocess.CompletedProcess(arguments, status, out.read_text(), err.read_text())

        yield run
        parent.stdin.close()
