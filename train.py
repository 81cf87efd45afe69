"""Learn a new word for a Stable Diffusion: ``python train.py --help``. The same as ``ti-jax train``."""

from ti_jax.__main__ import run

if __name__ == "__main__":
    run("train.py", "train")
