"""``python -m ti_jax`` is ``ti-jax``; ``train.py`` and ``infer.py`` start here, too."""

from __future__ import annotations

import sys

from ti_jax import interrupts


def run(prog: str = "ti-jax", *command: str) -> None:
    """The program: ``command`` and the flags of this process."""
    interrupts.listen(prog)
    from ti_jax.cli.main import main

    interrupts.leave(main([*command, *sys.argv[1:]], prog=prog))


if __name__ == "__main__":
    run()
