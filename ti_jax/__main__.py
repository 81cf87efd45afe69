"""Entry point of ``ti-jax``, ``python -m ti_jax``, ``train.py`` and ``infer.py``."""

from __future__ import annotations

import sys

from ti_jax import interrupts

REMEDY = "pip install -e . in the folder of train.py installs all that is needed"


def run(prog: str = "ti-jax", *command: str) -> None:
    """Run ``command`` with the flags of this process, and exit."""
    interrupts.listen(prog)
    try:
        from ti_jax.cli.main import main

        status = main([*command, *sys.argv[1:]], prog=prog)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "ti_jax":
            raise
        print(f"{prog}: error: {error.name} is not installed: {REMEDY}", file=sys.stderr)
        status = 2
    interrupts.leave(status)


if __name__ == "__main__":
    run()
