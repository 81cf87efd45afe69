"""Draw pictures with learned words: ``python infer.py --help``. The same as ``ti-jax infer``."""

from ti_jax.__main__ import run

if __name__ == "__main__":
    run("infer.py", "infer")
