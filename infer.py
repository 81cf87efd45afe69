"""Draw pictures with learned words: ``python infer.py --help``. The same as ``ti-jax infer``."""

import sys

from ti_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["infer", *sys.argv[1:]], prog="infer.py"))
