"""Does a word of --learn_negative lead away from the pictures that it is learned from? Measured on the embedded model.

    python benchmarks/negative.py --people ana ben cleo --seeds 3            # a line for each word in --results
    python benchmarks/negative.py --scales 0.5 3                             # other guidance scales in the loss
    python benchmarks/negative.py --table

For each dev person a word is learned with the defaults. "a person" is then drawn for the embedded model's probes, with
the same seeds: with nothing in the negative prompt ("none"), with the word, and with the word of the person measured
before ("another"). *identity* is the share of the person's hair, hair colour, skin, beard and nose that the judge
finds, *likeness* the mean cosine of the judge's features to the person's pictures, *editability* the share of the
prompts' other requests that is met. A word that works has less identity and likeness than "none" and "another".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from ti_jax import Embedding, StableDiffusion, TrainConfig, train  # noqa: E402
from ti_jax.config import resolve  # noqa: E402
from ti_jax.data.folder import as_uint8, load_images  # noqa: E402
from ti_jax.evaluation.avatar_judge import Judge  # noqa: E402
from ti_jax.evaluation.scores import attribute_scores, mean_of  # noqa: E402
from ti_jax.machine import enable_compilation_cache  # noqa: E402
from ti_jax.training.cpu_devices import use_cores  # noqa: E402
from ti_jax.words import fill  # noqa: E402

PEOPLE, CONCEPTS = Path(__file__).parent / "people", ROOT / "ti_jax" / "assets" / "concepts"
DEV = ("ana", "ben", "cleo", "dov", "eva", "finn", "gus", "hana")
IMAGES_A_PROBE, STEPS, GUIDANCE = 2, 25, 3.0


def learn(folder: Path, scale: float, seed: int) -> Embedding:
    """The word of a folder of pictures."""
    with TemporaryDirectory() as output:
        config = TrainConfig(
            train_data_dir=str(folder), placeholder_token="<unwanted>", learn_negative=True, seed=seed,
            negative_guidance_scale=scale, overview_prompts=("a portrait of {}",), report_to="none", output_dir=output,
        )  # fmt: skip
        return train(config).embedding


class Bench:
    """The model, its judge, and what is drawn with a word in the negative prompt."""

    def __init__(self) -> None:
        use_cores(resolve(TrainConfig()))
        enable_compilation_cache()
        self.sd = StableDiffusion.from_pretrained()
        self.judge = Judge.load(self.sd.path)
        self.probes = [probe for probe in self.judge.config.probes for _ in range(IMAGES_A_PROBE)]

    def measure(self, folder: Path, truth: dict[str, str], word: Embedding | None) -> dict[str, float]:
        """The scores against a person's pictures and description."""
        drawn = self.sd.generate(
            [fill(probe.prompt, "a person") for probe in self.probes], [word] if word else (),
            negative_prompt=word.token if word else None, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
            seed=[number % IMAGES_A_PROBE for number in range(len(self.probes))], batch_size=8,
        )  # fmt: skip
        pixels = np.stack([np.asarray(image) for image in drawn])
        shares = attribute_scores(self.judge.read(pixels), self.probes, truth)
        own = as_uint8(load_images(folder, self.sd.default_resolution).pixels)
        likeness = float(np.mean(self.judge.features(pixels) @ self.judge.features(own).T))
        return {
            "identity": mean_of(shares, "identity") or 0.0, "likeness": likeness,
            "editability": mean_of(shares, "editability") or 0.0,
        }  # fmt: skip


def table(path: Path) -> None:
    """Print means over people and seeds, and in how many of the runs a word led away."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    by_scale = defaultdict(list)
    for line in lines:
        by_scale[line["scale"]].append(line)
    print("| scale in the loss | runs | negative prompt | identity | likeness | editability |")
    print("|---|---|---|---|---|---|")
    for scale, runs in sorted(by_scale.items()):
        for kind in ("none", "word", "another"):
            found = [run[kind] for run in runs if run.get(kind)]
            if found:
                means = [np.mean([each[name] for each in found]) for name in ("identity", "likeness", "editability")]
                print(f"| {scale} | {len(found)} | {kind} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
        away = sum(run["word"]["likeness"] < run["none"]["likeness"] for run in runs)
        lower = sum(run["word"]["identity"] < run["none"]["identity"] for run in runs)
        print(f"scale {scale}: likeness is less with the word in {away} of {len(runs)} runs, identity in {lower}")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", nargs="+", default=list(DEV), choices=DEV)
    parser.add_argument("--seeds", type=int, default=1, help="0, 1, ... below this number")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.5])
    parser.add_argument("--results", type=Path, default=Path("negative.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print the table of --results")
    args = parser.parse_args()
    if args.table:
        return table(args.results)
    facts = json.loads((PEOPLE / "people.json").read_text())
    done = set()
    if args.results.exists():
        done = {(each["person"], each["seed"], each["scale"]) for each in map(json.loads, args.results.open())}
    bench = Bench()
    before = following = None
    for seed in range(args.seeds):
        for name in args.people:
            folder = PEOPLE / name if (PEOPLE / name).is_dir() else CONCEPTS / name
            truth = {key: facts[name][key] for key in bench.judge.config.identity}
            for scale in args.scales:
                if (name, seed, scale) in done:
                    continue
                word = learn(folder, scale, seed)
                line = {
                    "person": name, "seed": seed, "scale": scale, "none": bench.measure(folder, truth, None),
                    "word": bench.measure(folder, truth, word),
                    "another": bench.measure(folder, truth, before) if before is not None else None,
                }  # fmt: skip
                with args.results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
                if scale == args.scales[0]:
                    following = word
            before = following
    return None


if __name__ == "__main__":
    main()
