"""Entry point of ``ti-jax``, ``python -m ti_jax``, ``train.py`` and ``infer.py``."""

from __future__ import annotations

import sys

from ti_jax import interrupts


def run(prog: str = "ti-jax", *command: str) -> None:
    """Run ``command`` with the flags of this process, and exit."""
    interrupts.listen(prog)
    from ti_jax.cli.main import main

    interrupts.leave(main([*command, *sys.argv[1:]], prog=prog))


if __name__ == "__main__":
    run()
