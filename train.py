"""Learn a new word for a Stable Diffusion: ``python train.py --help``. The same as ``ti-jax train``."""

import sys

from ti_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], prog="train.py"))
