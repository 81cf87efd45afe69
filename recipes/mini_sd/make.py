"""Make mini-sd from scratch: ``python recipes/mini_sd/make.py`` (see README.md beside this file).

Stages: data, judges, vae, decoder, base, export, measure. Each resumes after an interruption, and is skipped if its
result exists. ``--smoke`` runs everything in a minute or two, at sizes at which nothing is learned.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

# On CPU, one device per core with one thread each trains fastest: threads never wait for each other within a layer.
# Must be set before JAX starts.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={CORES} --xla_cpu_multi_thread_eigen=false")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import base  # noqa: E402
import data  # noqa: E402
import export  # noqa: E402
import judge  # noqa: E402
import measure  # noqa: E402
import numpy as np  # noqa: E402
import people  # noqa: E402
import tokenizer as bpe  # noqa: E402
import vae  # noqa: E402
import yaml  # noqa: E402
from flax import serialization  # noqa: E402

from ti_jax.evaluation.avatar_judge import FOLDER as JUDGE_FOLDER  # noqa: E402
from ti_jax.evaluation.avatar_judge import Judge  # noqa: E402
from ti_jax.files import write_atomically  # noqa: E402
from ti_jax.weights.load import load_component  # noqa: E402

HERE = Path(__file__).parent
SHIPPED = HERE.parents[1] / "ti_jax" / "assets" / "mini-sd"


@dataclass(frozen=True)
class Recipe:
    """The settings of all stages; ``config.yaml`` and ``smoke.yaml`` fill them in."""

    data: data.DataConfig = field(default_factory=data.DataConfig)
    critic: judge.JudgeTraining = field(default_factory=judge.JudgeTraining)
    judge: judge.JudgeTraining = field(default_factory=judge.JudgeTraining)
    decoder: vae.DecoderTraining = field(default_factory=vae.DecoderTraining)
    vae: vae.VAETraining = field(default_factory=vae.VAETraining)
    base: base.BaseTraining = field(default_factory=base.BaseTraining)
    measured_captions: int = 192


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file, with a section for each stage; missing values have defaults."""
    recipe = Recipe()
    for name, value in (yaml.safe_load(path.read_text()) or {}).items():
        current = getattr(recipe, name)
        if isinstance(value, dict):
            value = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
            value = replace(current, **value)
        recipe = replace(recipe, **{name: value})
    return recipe


def keep(path: Path, make) -> Any:
    """The tree in the file `path`, which is first made and written if it does not exist."""
    if not path.exists():
        write_atomically(path, serialization.msgpack_serialize(serialization.to_state_dict(make())))
    return serialization.msgpack_restore(path.read_bytes())


def make_all(recipe: Recipe, work: Path, out: Path, kept: bool) -> dict[str, Any]:
    """Run all stages; returns the figures, which are also saved in ``<work>/figures.json``.

    With `kept`, the judge and the autoencoder are those of the folder that ships instead of trained.
    """
    work.mkdir(parents=True, exist_ok=True)
    # Do not resume what was made with other settings.
    settings = work / "recipe.json"
    wanted = json.dumps({**asdict(recipe), "kept": kept}, indent=2)
    if settings.exists() and settings.read_text() != wanted:
        raise SystemExit(f"make.py: {work} holds a run with other settings; give another --work, or delete it")
    settings.write_text(wanted)

    data.make_data(recipe.data, work)
    people.write_people(recipe.data, work, work / "people")
    moments_file = work / "moments.npy"

    def encode(vae_params: Any) -> np.ndarray:
        if not moments_file.exists():
            np.save(moments_file, vae.encode(vae_params, np.load(work / "data" / "pixels.npy", mmap_mode="r")))
        return np.load(moments_file)

    if kept:
        reader = Judge.load(SHIPPED)
        vae_params = load_component(SHIPPED, "vae", vae.shapes(), np.float32)
        moments = encode(vae_params)
    else:
        critic = judge.train_judge(recipe.critic, work / "critic", work)
        reader = judge.train_judge(recipe.judge, work / "judge", work)
        vae_params = keep(work / "vae.msgpack", lambda: vae.train_vae(recipe.vae, critic, work / "vae", work))
        moments = encode(vae_params)
        vae_params = keep(
            work / "decoder.msgpack",
            lambda: vae.train_decoder(recipe.decoder, vae_params, moments, critic, work / "decoder", work),
        )
    if not (work / "base.msgpack").exists():  # what the base cannot draw any better, before the hour that it takes
        for kind, value in measure.measure_autoencoder(vae_params, reader, work).items():
            print(f"autoencoder: {kind}: {value}", flush=True)
    scaling_factor = round(float(1.0 / moments[..., :4].std()), export.SCALING_DIGITS)
    tokenizer = bpe.make_tokenizer(out / "tokenizer")
    params = keep(
        work / "base.msgpack",
        lambda: base.train_base(recipe.base, tokenizer, moments, scaling_factor, work / "base", work),
    )
    export.export(out, params, vae_params, scaling_factor, tokenizer)
    reader.save(out / JUDGE_FOLDER)
    figures = measure.measure(out, Judge.load(out), params["codes"], work, recipe.measured_captions)
    export.write_card(out, (HERE / "card.md").read_text(), figures)
    (work / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml", help="settings of the stages")
    parser.add_argument("--smoke", action="store_true", help="smoke.yaml: everything, tiny")
    parser.add_argument("--work", type=Path, default=Path(".work/mini_sd"), help="pictures, checkpoints, logs")
    parser.add_argument("--out", type=Path, default=None, help="the diffusers folder (default: <work>/mini-sd)")
    parser.add_argument(
        "--kept", action="store_true", help="take the judge and the autoencoder that ship: only the base is trained"
    )
    arguments = parser.parse_args()
    config = HERE / "smoke.yaml" if arguments.smoke else arguments.config
    figures = make_all(read_recipe(config), arguments.work, arguments.out or arguments.work / "mini-sd", arguments.kept)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
