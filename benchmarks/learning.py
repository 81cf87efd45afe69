"""Does training learn a word, and better than diffusers' method? Measured on people unknown to the embedded model.

    python benchmarks/learning.py --split dev --seeds 1     # for choosing settings
    python benchmarks/learning.py --split test --seeds 3    # once, for the table of docs/benchmarks.md
    python benchmarks/learning.py --split test-style --seeds 3    # styles that the model has never seen
    python benchmarks/learning.py --split test-pairs --seeds 3    # a learned person in a learned style
    python benchmarks/learning.py --table                   # table of all results so far
    python benchmarks/learning.py --split test --table --results benchmarks/learning.jsonl.gz     # that table

Each person's word is learned from four pictures by

    plain        no training: the words "a person"
    stock        diffusers' method (benchmarks/torch_loops.py) with its script's defaults
    stock-best   the same at STOCK_BEST_LEARNING_RATE, like that in STOCK_STEPS updates
    ours         ti_jax with its defaults
    together     the same for all people of the split in one run (--concepts); only if it is among --methods

all with ti_jax's default batch size. Upper bounds: the true description as the prompt
("described"), and the four pictures through the autoencoder ("autoencoder"). Lower bound: another person's word, scored
as if it were this person's. A judge network classifies the pictures drawn for the embedded model's probes, four of each
with the same seeds for all methods. *identity* is the share of the person's hair, hair colour, skin, beard and nose
that is right, *editability* the share of the prompt's other requests that is met.

A style's word is used where the model's own words for styles are ("a sepia outlined portrait of a person"); *identity*
is the share of palette, outline, frame and light that is right, and its probes ask for no colours, which a style may
hide. *whole* is the share of pictures in which all attributes of the person or style are right.

A pair draws a person with one word and a style with another, each learned by itself; the words are kept beside
--results. Of the person counts what the style shows. The table has the figures of the same words alone, over the same
attributes.

Every measurement is a line in --results and is not repeated, so the benchmark can be stopped at any time. Seconds are
those of the training only, without loading and compiling; for these run it on an idle machine. If only the pictures
matter, one process per core is much faster, each with its own --people:

    taskset -c 0 python benchmarks/learning.py --split test --people test00 test01 ... &
    taskset -c 1 python benchmarks/learning.py --split test --people test08 test09 ...

Each line has its number of cores; the table uses the seconds of the lines with the most cores.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes" / "mini_sd")]

import torch  # noqa: E402
import world  # noqa: E402
from subjects import SPLITS, STYLE_TOKEN, TOKEN, Person, description, people, probes_for  # noqa: E402
from torch_loops import StockLoop  # noqa: E402

from ti_jax import Embedding, StableDiffusion, TrainConfig, train  # noqa: E402
from ti_jax.batches import in_batches  # noqa: E402
from ti_jax.config import resolve  # noqa: E402
from ti_jax.data.folder import as_uint8, load_images  # noqa: E402
from ti_jax.evaluation.avatar_judge import Judge, Probe  # noqa: E402
from ti_jax.evaluation.scores import attribute_scores, mean_of  # noqa: E402
from ti_jax.machine import enable_compilation_cache  # noqa: E402
from ti_jax.text.templates import for_captions, load_templates  # noqa: E402
from ti_jax.training.cpu_devices import use_cores  # noqa: E402

IMAGES_A_PROBE = 4
INFERENCE_STEPS, GUIDANCE = 25, 3.0
# Chosen on the dev people (--methods stock --set learning_rate=...), like ours in configs/demo.yaml.
STOCK_BEST_LEARNING_RATE = 2.5e-3
STOCK_STEPS = 250
# The form of the model's captions with a style.
STYLE_TEMPLATES = ROOT / "ti_jax" / "assets" / "demo_style_templates.txt"
METHODS = ("plain", "described", "autoencoder", "stock", "stock-best", "ours")
TOGETHER = "together"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WITHOUT_SEED = ("plain", "described", "autoencoder")  # random only in the drawing, which is the same for all


class Bench:
    """The frozen model, its judge, and the measurements with them."""

    def __init__(self, strips: Path, everyone: list[Person], images: int = IMAGES_A_PROBE):
        use_cores(resolve(TrainConfig()))  # as `train.py` does, before anything is computed
        self.sd = StableDiffusion.from_pretrained()
        self.judge = Judge.load(self.sd.path)
        self.strips, self.all, self.images = strips, everyone, images

    def draw(self, prompts: list[str], *embeddings: Embedding) -> np.ndarray:
        """One picture for each prompt, uint8 [N, S, S, 3]; for each probe with seeds 0, 1, ..."""
        drawn = self.sd.generate(
            prompts, embeddings, num_inference_steps=INFERENCE_STEPS, guidance_scale=GUIDANCE,
            seed=[number % self.images for number in range(len(prompts))], batch_size=8,
        )  # fmt: skip
        return np.stack([np.asarray(image) for image in drawn])

    def pictures(self, method: str, person: Person, seed: int, changes: dict[str, Any]) -> tuple[np.ndarray, dict]:
        """The method's pictures for the probes, and its figures."""
        probes = probes_for(person.truth, self.judge, self.images)
        if method == "plain":
            return self.draw([person.prompt(probe, None) for probe in probes]), {}
        if method == "described":
            return self.draw([description(person, probe) for probe in probes]), {}
        if person.parts:
            words = [self.word(method, each, seed, changes) for each in person.parts]
            both = [replace(word, token=token) for (word, _), token in zip(words, (TOKEN, STYLE_TOKEN), strict=True)]
            return self.draw([person.prompt(probe, TOKEN) for probe in probes], *both), {}
        if method == "autoencoder":
            pixels = load_images(person.folder, self.sd.default_resolution).pixels
            mean, _ = np.split(in_batches(self.sd.encode_image, pixels, 4), 2, axis=-1)
            scaled = mean * self.sd.networks.vae.config.scaling_factor
            return as_uint8(np.clip(in_batches(self.sd.decode_latents, scaled, 4), -1.0, 1.0)), {}
        embedding, figures = self.word(method, person, seed, changes)
        norms = np.linalg.norm(embedding.vectors["text_encoder"], axis=-1)
        figures["norms"] = [round(float(norm), 3) for norm in norms]
        return self.draw([person.prompt(probe, TOKEN) for probe in probes], embedding), figures

    def word(self, method: str, person: Person, seed: int, changes: dict[str, Any]) -> tuple[Embedding, dict[str, Any]]:
        """The method's word, learned unless one of the same settings is kept from before, and its figures."""
        # Settings of another method, or of a run of several words, are none of this run's; they are in the file's name.
        config = resolve(self.config(person, seed, changes if method == "ours" else {}))
        said = [method, person.name, str(seed), *(f"{name}={value}" for name, value in changes.items())]
        said.append(digest_of(config, STOCK_BEST_LEARNING_RATE, STOCK_STEPS))
        file = self.strips.parent / "words" / f"{'-'.join(said)}.safetensors"
        if file.exists():
            return Embedding.load(file, token=TOKEN), json.loads(file.with_suffix(".json").read_text())
        learn = {"ours": self.learn_ours, TOGETHER: self.learn_together}.get(method, self.learn_stock)
        embedding, figures = learn(method, person, seed, changes)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".json").write_text(json.dumps(figures))
        embedding.save(file)
        return embedding, figures

    def config(self, person: Person, seed: int, changes: dict[str, Any]) -> TrainConfig:
        """ti_jax's defaults for the embedded model, with `changes`."""
        config = TrainConfig(
            train_data_dir=str(person.folder), placeholder_token=TOKEN, seed=seed,
            overview_prompts=("a portrait of {}",), report_to="none",
        )  # fmt: skip
        if person.is_style:
            # Light from the left is no longer that in a mirrored picture.
            config = replace(config, templates=str(STYLE_TEMPLATES), learnable_property="style", flip_probability=0.0)
        return replace(config, **changes)

    def learn_ours(
        self, method: str, person: Person, seed: int, changes: dict[str, Any]
    ) -> tuple[Embedding, dict[str, Any]]:
        """Learn the word with ti_jax."""
        config = self.config(person, seed, changes)
        with TemporaryDirectory() as folder:
            result = train(replace(config, output_dir=folder))
        seconds = result.seconds
        return result.embedding, {
            "seconds": round(seconds["encode"] + seconds["train"], 2),
            "compile": round(seconds["compile"], 2),
            "steps": int(result.embedding.metadata["steps"]),
        }

    def learn_together(
        self, method: str, person: Person, seed: int, changes: dict[str, Any]
    ) -> tuple[Embedding, dict[str, Any]]:
        """Learn the words of all people in one run, unless it is done; it is kept, and this is a person's of them."""
        said = "-".join([str(seed), str(CORES), *(f"{name}={value}" for name, value in changes.items())])
        folder = self.strips.parent / "together" / said
        figures = folder / "figures.json"
        if not figures.exists():
            folder.mkdir(parents=True, exist_ok=True)
            entries = [{"train_data_dir": str(each.folder), "placeholder_token": f"<{each.name}>"} for each in self.all]
            file = folder / "concepts.yaml"
            file.write_text(json.dumps(entries))  # which is YAML, too
            config = TrainConfig(
                concepts=str(file), seed=seed, overview_prompts=("a portrait of {}",), report_to="none",
                output_dir=str(folder),
            )  # fmt: skip
            seconds = train(replace(config, **changes)).seconds
            each = (seconds["encode"] + seconds["train"]) / len(self.all)
            figures.write_text(json.dumps({"seconds": round(each, 2), "words": len(self.all)}))
        embedding = Embedding.load(folder / person.name / "learned_embeds.safetensors", token=TOKEN)
        return embedding, json.loads(figures.read_text())

    def learn_stock(
        self, method: str, person: Person, seed: int, changes: dict[str, Any]
    ) -> tuple[Embedding, dict[str, Any]]:
        """Learn the word with diffusers' method and ti_jax's batch."""
        settings = {"max_train_steps": STOCK_STEPS, **changes}
        steps = settings.pop("max_train_steps")
        loop = self.stock_loop(method, person, seed, settings)
        seconds = loop.run(steps)
        return Embedding(TOKEN, loop.rows), {"seconds": round(seconds, 2), "steps": steps}

    def stock_loop(self, method: str, person: Person, seed: int, changes: dict[str, Any]) -> StockLoop:
        """diffusers' method with ti_jax's batch. It starts from one token: our first."""
        config = resolve(self.config(person, seed, {}))
        pixels = torch.from_numpy(load_images(person.folder, self.sd.default_resolution).pixels).permute(0, 3, 1, 2)
        settings: dict[str, Any] = {"learning_rate": STOCK_BEST_LEARNING_RATE} if method == "stock-best" else {}
        return StockLoop(
            self.sd.path, pixels.contiguous(), plain_templates(config), TOKEN,
            str(config.initializer_token).split()[0], batch_size=config.train_batch_size,
            flip_probability=config.flip_probability, seed=seed, **(settings | changes),
        )  # fmt: skip

    def measure(self, method: str, person: Person, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
        """A line of the results."""
        drawn, figures = self.pictures(method, person, seed, changes)
        if seed == 0 and not changes:
            strip = np.concatenate(list(drawn[:: self.images] if method != "autoencoder" else drawn), axis=1)
            Image.fromarray(strip).save(self.strips / f"{person.name}-{method}.png")
        return {
            "method": method, "person": person.name, "seed": seed, "changes": changes, "cores": CORES, **figures,
            "readings": self.judge.read(drawn),
        }  # fmt: skip


def plain_templates(config: TrainConfig) -> list[str]:
    """The templates for pictures without captions."""
    return for_captions(load_templates(config.learnable_property, config.templates), config.learnable_property)[0]


def digest_of(*settings: Any) -> str:
    """A part of a kept file's name: defaults change, and what is learned with them."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:8]


def scores(line: Mapping[str, Any], truth: Mapping[str, str], judge: Judge) -> dict[str, float]:
    """Identity, editability and their parts, of a line of the results scored against `truth`."""
    seen = line["readings"]
    if line["method"] == "autoencoder":
        probes = [Probe("")] * len(seen)
    else:  # as many pictures of each as the line has
        probes = probes_for(truth, judge, len(seen) // len(probes_for(truth, judge, 1)))
    shares = attribute_scores(seen, probes, truth)
    whole = [
        all(reading[name] == word for name, word in truth.items() if name not in dict(probe.expects))
        for reading, probe in zip(seen, probes, strict=True)
    ]
    means = {kind: mean_of(shares, kind) for kind in ("identity", "editability")} | {"whole": float(np.mean(whole))}
    for kind, names in (("person", world.IDENTITY), ("style", world.STYLE)):
        if world.IDENTITY[0] in truth and world.STYLE[0] in truth:
            means[kind] = float(np.mean([shares[f"identity/{name}"] for name in names if name in truth]))
    return {**shares, **{kind: value for kind, value in means.items() if value is not None}}


def plain_ours(line: Mapping[str, Any]) -> bool:
    """Whether it is one of ti_jax's with its defaults."""
    return line["method"] == "ours" and not line["changes"]


def alone(of_pair: Person, lines: Mapping[str, Mapping[str, Any]], judge: Judge) -> dict[str, float]:
    """What the two words of a pair have by themselves, over the attributes that count in the pair.

    `lines` are those of people and styles by name, as far as they were measured.
    """
    found = {}
    for each, kind in zip(of_pair.parts, ("person", "style"), strict=True):
        if each.name in lines:
            shown = {name: word for name, word in each.truth.items() if name in of_pair.truth}
            found[kind] = scores(lines[each.name], shown, judge)["identity"]
    return found


def open_results(path: Path, mode: str) -> IO[str]:
    """The results file, opened with gzip if its name ends in ``.gz``."""
    return gzip.open(path, f"{mode}t") if path.suffix == ".gz" else path.open(mode)


def read_results(path: Path) -> list[dict[str, Any]]:
    """All lines of the results so far."""
    if not path.exists():
        return []
    with open_results(path, "r") as file:
        return [json.loads(line) for line in file]


def key(line: Mapping[str, Any]) -> tuple:
    """Identifies a measurement: it is not repeated for the same key."""
    return line["method"], line["person"], line["seed"], line["cores"], json.dumps(line["changes"], sort_keys=True)


def label(line: Mapping[str, Any]) -> str:
    """Name of method and changed settings."""
    return " ".join([line["method"], *(f"{name}={value}" for name, value in line["changes"].items())])


def table(lines: list[dict[str, Any]], everyone: list[Person], judge: Judge) -> Iterator[str]:
    """Print means over people and seeds, and differences paired by both with their standard errors."""
    known = {person.name: person for person in everyone}
    by_label: dict[str, dict[tuple[str, int], dict[str, float]]] = defaultdict(dict)
    most = max((line["cores"] for line in lines), default=1)
    for line in sorted(lines, key=lambda line: line["cores"]):
        if line["person"] in known:
            cell = (line["person"], line["seed"])
            by_label[label(line)][cell] = scores(line, known[line["person"]].truth, judge)
            if "seconds" in line and line["cores"] == most:
                by_label[label(line)][cell]["seconds"] = line["seconds"]
            if line["method"] == "ours" and not line["changes"] and len(everyone) > 1 and not everyone[0].parts:
                following = everyone[([*known].index(line["person"]) + 1) % len(everyone)]
                by_label["another's word"][(following.name, line["seed"])] = scores(line, following.truth, judge)
    for person in everyone:
        for seed in {line["seed"] for line in lines} if person.parts else ():
            own = {line["person"]: line for line in lines if plain_ours(line) and line["seed"] == seed}
            by_label["each word alone"][(person.name, seed)] = alone(person, own, judge)
    found = {column for cells in by_label.values() for cell in cells.values() for column in cell}
    kinds = [f"identity/{name}" for name in (*world.IDENTITY, *world.STYLE)]
    edits = [f"editability/{name}" for name in world.ATTRIBUTES]
    order = ["identity", "person", "style", *kinds, "whole", "editability", *edits, "seconds"]
    columns = [column for column in order if column in found]
    yield "| method | runs | " + " | ".join(name.split("/")[-1].replace("_", " ") for name in columns) + " |"
    yield "|---" * (len(columns) + 2) + "|"
    for name, cells in by_label.items():
        row = []
        for column in columns:
            values = [cell[column] for cell in cells.values() if column in cell]
            if not values:
                row.append("")
                continue
            spread = f" ± {np.std(values):.2f}" if column in ("identity", "person", "style", "editability") else ""
            digits = 1 if column == "seconds" else 2
            row.append(f"{np.mean(values):.{digits}f}{spread}")
        yield f"| {name} | {len(cells)} | " + " | ".join(row) + " |"
    yield ""
    for other in [name for name in by_label if name.startswith(("stock", TOGETHER))]:
        for kind in ("identity", "whole", "editability", "seconds"):
            ours, theirs = by_label.get("ours", {}), by_label.get(other, {})
            both = [cell for cell in ours if kind in ours[cell] and kind in theirs.get(cell, {})]
            paired = [ours[cell][kind] - theirs[cell][kind] for cell in both]
            if len(paired) > 1:
                error = np.std(paired, ddof=1) / len(paired) ** 0.5
                mean = f"{np.mean(paired):+.3f} ± {error:.3f}"
                yield f"ours - {other}, {kind}: {mean} (standard error, {len(paired)} pairs)"


def sheet(strips: Path, chosen: list[Person], methods: list[str]) -> Image.Image:
    """For each person, the training pictures and a strip for each method, below each other."""
    lines = []
    for person in chosen:
        own = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(person.folder.glob("*.png"))]
        found = [strips / f"{person.name}-{method}.png" for method in methods]
        lines += [np.concatenate(own, axis=1), *(np.asarray(Image.open(path)) for path in found if path.exists())]
        lines.append(np.full((8, 1, 3), 255, np.uint8))
    width = max(line.shape[1] for line in lines)
    padded = [np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255) for line in lines]
    return Image.fromarray(np.concatenate(padded))


def given_changes(items: Sequence[str]) -> dict[str, Any]:
    """Settings that a command line gives as ``NAME=VALUE``; a value is JSON or a plain string."""
    changes = {}
    for item in items:
        name, _, value = item.partition("=")
        try:
            changes[name] = json.loads(value)
        except json.JSONDecodeError:
            changes[name] = value
    return changes


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=SPLITS, default="dev", help="whom to learn")
    parser.add_argument("--seeds", type=int, default=1, help="runs for each person")
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, TOGETHER), default=METHODS, help="what to measure")
    parser.add_argument("--people", nargs="+", default=None, help="only these of them")
    parser.add_argument("--results", type=Path, default=ROOT / ".work" / "learning.jsonl", help="where lines are kept")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="settings other than the defaults, e.g. num_vectors=2",
    )
    parser.add_argument("--table", action="store_true", help="measure nothing; print the table, write the sheet")
    arguments = parser.parse_args()
    changes = given_changes(arguments.set)

    enable_compilation_cache()
    everyone = people(arguments.split)
    bench = Bench(arguments.results.parent / "strips", everyone)
    chosen = [person for person in everyone if arguments.people is None or person.name in arguments.people]
    lines = read_results(arguments.results)
    done = {key(line) for line in lines}
    if not arguments.table:
        bench.strips.mkdir(parents=True, exist_ok=True)
    for seed in range(0 if arguments.table else arguments.seeds):
        for person in chosen:
            for method in arguments.methods:
                wanted = {"method": method, "person": person.name, "seed": seed, "cores": CORES, "changes": changes}
                if key(wanted) in done or (seed and method in WITHOUT_SEED):
                    continue
                if person.parts and method == "autoencoder":
                    continue
                began = time.perf_counter()
                lines.append(bench.measure(method, person, seed, changes))
                with open_results(arguments.results, "a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
                shares = scores(lines[-1], person.truth, bench.judge)
                print(
                    f"{person.name} seed {seed} {label(wanted)}: identity {shares['identity']:.2f}, editability "
                    f"{shares.get('editability', float('nan')):.2f}, {time.perf_counter() - began:.0f} s in all",
                    flush=True,
                )
    print("\n".join(table(lines, everyone, bench.judge)))
    if not bench.strips.is_dir():  # results that came without pictures
        return
    drawn = sheet(bench.strips, chosen, arguments.methods)
    path = arguments.results.with_suffix(".png")
    drawn.resize((drawn.width * 2, drawn.height * 2), Image.Resampling.NEAREST).save(path)
    print(f"sheet: {path}")


if __name__ == "__main__":
    main()
