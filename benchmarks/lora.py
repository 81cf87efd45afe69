"""A word or a LoRA? Both learned from the same pictures on the embedded model, and what each does to everything else.

    python benchmarks/lora.py --rates 1e-4 1e-3 4e-3 --people ana ben cleo   # for choosing the LoRA's learning rate
    python benchmarks/lora.py                       # the dev people; the table of docs/lora.md
    python benchmarks/lora.py --split dev-style     # styles, if the model has any
    python benchmarks/lora.py --pairs               # two concepts in one picture: two words against two LoRAs
    python benchmarks/lora.py --memory              # peak memory of the training, each in a process of its own
    python benchmarks/lora.py --minutes 3           # a piece: no measurement begins after three minutes
    python benchmarks/lora.py --table               # measure nothing: all tables of --results

Each concept is learned as in benchmarks/learning.py, by

    plain        no training: the words "a person"
    described    no training: the true description as the prompt
    stock-best   a word with diffusers' method at its best learning rate
    ours         a word with ti_jax's defaults
    lora         a LoRA of the UNet's attention at rank 4 (benchmarks/torch_lora.py)
    lora+text    the same, and one of the text encoder's

with ti_jax's steps, batch size and templates. In a LoRA's prompts a rare word of the vocabulary stands for the concept,
as in DreamBooth: the embedded model has four words that no caption has. LoRAs are added to the weights, and all
pictures are drawn by ti_jax with the same seeds. Scores are those of benchmarks/learning.py; also drawn with a LoRA are

    others       the descriptions of other people: the share of their attributes that is right, and by how many of 255
                 levels these pictures differ from those of the model without it (mean of the absolute values)
    anyone       the prompts of "plain": the share of the concept's attributes that they now show

No prompt without the word is drawn differently when a word is learned. Every measurement is a line in --results and is
not repeated; what was learned is kept beside it. Lines of several models may be in one file. Seconds are those of the
training only, without loading and compiling, and a LoRA's pictures are encoded before; for these run it on an idle
machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from learning import (
    CORES,
    GUIDANCE,
    IMAGES_A_PROBE,
    INFERENCE_STEPS,
    ROOT,
    STOCK_BEST_LEARNING_RATE,
    TOKEN,
    WITHOUT_SEED,
    Bench,
    Person,
    description,
    digest_of,
    open_results,
    people,
    plain_templates,
    read_results,
)  # fmt: skip
from lora_tables import concept_table, memory_table, pair_table
from PIL import Image
from torch_lora import LoraLoop, write_merged

from ti_jax import Embedding, StableDiffusion, TrainConfig
from ti_jax.config import resolve
from ti_jax.data.folder import load_images
from ti_jax.evaluation.avatar_judge import Judge, Probe
from ti_jax.machine import enable_compilation_cache

PARTS = {"lora": ("unet",), "lora+text": ("unet", "text_encoder")}
WORDS = ("stock-best", "ours")
METHODS = ("plain", "described", *WORDS, *PARTS)
# Chosen on three dev people with --rates, see docs/lora.md.
LEARNING_RATES = {"lora": 2.5e-3, "lora+text": 1e-3}
# Words of the vocabulary that no caption has: two neighbours among the people never share one, so that they can be in
# one prompt. "and" is left for the prompts.
RARE_WORDS, RARE_STYLE_WORD = ("in", "the"), "style"
SECOND_TOKEN = "<second>"
# A picture shows one person: whom?
TWO_PEOPLE = (
    "a portrait of {0} and {1}", "a picture of {1} and {0}", "a drawing of {0} and {1} on a green background",
    "a portrait of {1} and {0} wearing a red jacket",
)  # fmt: skip
IN_STYLE = (
    "a {1} portrait of {0}", "a {1} picture of {0} wearing a jacket", "a {1} drawing of {0} on a striped background",
    "a {1} portrait of {0} on a dotted background",
)  # fmt: skip


class LoraBench(Bench):
    """Learns concepts in each of the ways, and draws with them.

    Attributes:
      folder: where what is learned and drawn is kept.
    """

    def __init__(self, folder: Path, everyone: list[Person], model: Path | None, steps: int | None):
        super().__init__(folder, everyone)
        self.folder, self.model, self.own_steps = folder, model, steps
        if model is not None:
            self.sd = StableDiffusion.from_pretrained(model)
            self.judge = Judge.load(self.sd.path)

    def config(self, person: Person, seed: int, changes: dict[str, Any]) -> TrainConfig:
        """The defaults of the embedded model, for `model`."""
        config = resolve(super().config(person, seed, changes))
        if self.own_steps is not None:
            config = replace(config, max_train_steps=self.own_steps)
        return config if self.model is None else replace(config, pretrained_model_name_or_path=str(self.model))

    @functools.cached_property
    def steps(self) -> int:
        """Updates of each training."""
        return int(self.config(self.all[0], 0, {}).max_train_steps)

    @property
    def setting(self) -> dict[str, Any]:
        """What the lines of one table have in common: the model and the updates."""
        return {"model": self.sd.identity[:8], "steps": self.steps}

    def probes_of(self, person: Person) -> list[Probe]:
        """What the person or style is tested with, each probe four times."""
        own = self.judge.config.style_probes if person.is_style else self.judge.config.probes
        return [probe for probe in own for _ in range(IMAGES_A_PROBE)]

    def rare_word(self, person: Person) -> str:
        """The word of the vocabulary that stands for the concept in a LoRA's prompts."""
        return RARE_STYLE_WORD if person.is_style else RARE_WORDS[self.all.index(person) % len(RARE_WORDS)]

    # -- learning

    def lora_loop(self, person: Person, seed: int, **settings: Any) -> LoraLoop:
        """A LoRA's training, with ti_jax's batch and templates."""
        config = self.config(person, seed, {})
        pixels = torch.from_numpy(load_images(person.folder, self.sd.default_resolution).pixels).permute(0, 3, 1, 2)
        return LoraLoop(
            self.sd.path, pixels.contiguous(), plain_templates(config),
            self.rare_word(person), "", batch_size=config.train_batch_size,
            flip_probability=config.flip_probability, seed=seed, **settings,
        )  # fmt: skip

    def learn(self, method: str, person: Person, seed: int, changes: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """The file of what is learned, unless it is kept from before, and its figures."""
        settings = {} if method in PARTS else {"max_train_steps": self.steps, **changes}
        said = [*self.setting.values(), method, person.name, seed, CORES, *changes.values()]
        said.append(digest_of(self.config(person, seed, settings), STOCK_BEST_LEARNING_RATE))
        path = self.folder / ("-".join(map(str, said)) + ".safetensors")
        figures = path.with_name(f"{path.name}.json")
        if not figures.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            if method in PARTS:
                loop = self.lora_loop(person, seed, parts=PARTS[method], **changes)
                found = {"seconds": round(loop.run(self.steps), 2)}
                loop.save(path)
            else:
                learn = self.learn_ours if method == "ours" else self.learn_stock
                embedding, found = learn(method, person, seed, settings)
                embedding.save(path)
            figures.write_text(json.dumps({**found, "bytes": path.stat().st_size}))
        return path, json.loads(figures.read_text())

    # -- drawing

    def with_loras(self, paths: Sequence[Path]) -> StableDiffusion:
        """The model with these LoRAs added."""
        with TemporaryDirectory() as folder:
            write_merged(Path(self.sd.path), paths, Path(folder) / "merged")
            return replace(self.sd, params=StableDiffusion.from_pretrained(Path(folder) / "merged").params)

    def draw_by(self, sd: StableDiffusion, prompts: list[str], *embeddings: Embedding) -> np.ndarray:
        """One picture for each prompt, uint8 [N, S, S, 3]; four in a row have seeds 0, 1, 2, 3."""
        drawn = sd.generate(
            prompts, embeddings, num_inference_steps=INFERENCE_STEPS, guidance_scale=GUIDANCE,
            seed=[number % IMAGES_A_PROBE for number in range(len(prompts))], batch_size=8,
        )  # fmt: skip
        return np.stack([np.asarray(image) for image in drawn])

    @functools.cached_property
    def others(self) -> list[tuple[str, dict[str, str]]]:
        """32 descriptions of people who are nobody's concept, and what their pictures must show."""
        found = []
        for number, other in enumerate(people("test")):
            for probe in [self.judge.config.probes[(number + more) % len(self.judge.config.probes)] for more in (0, 4)]:
                found.append((description(other, probe), {**other.truth, **dict(probe.expects)}))
        return found

    @functools.cached_property
    def others_untouched(self) -> np.ndarray:
        """Their pictures by the model as it is, uint8 [32, S, S, 3]."""
        return self.draw_by(self.sd, [prompt for prompt, _ in self.others])

    def measure_concept(self, method: str, person: Person, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
        """What is drawn by a method, as a line of the results."""
        probes = self.probes_of(person)
        plain = [person.prompt(probe, None) for probe in probes]
        line: dict[str, Any] = {}
        if method in PARTS:
            path, line = self.learn(method, person, seed, changes)
            sd = self.with_loras([path])
            drawn = self.draw_by(sd, [person.prompt(probe, self.rare_word(person)) for probe in probes])
            others = self.draw_by(sd, [prompt for prompt, _ in self.others])
            line["others"] = self.others_right(others)
            line["levels"] = float(np.abs(others.astype(float) - self.others_untouched).mean())
            line["anyone"] = self.judge.read(self.draw_by(sd, plain))
            self.keep(f"{person.name}-{method}-others", others, seed, changes)
        elif method in WORDS:
            path, line = self.learn(method, person, seed, changes)
            word = Embedding.load(path, token=TOKEN)
            drawn = self.draw_by(self.sd, [person.prompt(probe, TOKEN) for probe in probes], word)
        elif method == "described":
            drawn = self.draw_by(self.sd, [description(person, probe) for probe in probes])
        else:
            drawn = self.draw_by(self.sd, plain)
            line["others"], line["levels"] = self.others_right(self.others_untouched), 0.0
            self.keep(f"{person.name}-{method}-others", self.others_untouched, seed, changes)
        self.keep(f"{person.name}-{method}", drawn[::IMAGES_A_PROBE], seed, changes)
        return {**line, "readings": self.judge.read(drawn)}

    def keep(self, name: str, drawn: np.ndarray, seed: int, changes: dict[str, Any]) -> None:
        """Keep the first eight pictures as one strip, of the first seed and the chosen rate."""
        if seed == 0 and changes.get("learning_rate") in (None, *LEARNING_RATES.values()):
            folder = strips_of(self.folder, self.setting)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.concatenate(list(drawn[:8]), axis=1)).save(folder / f"{name}.png")

    def others_right(self, drawn: np.ndarray) -> float:
        """The share of the others' attributes that is right."""
        seen = zip(self.judge.read(drawn), self.others, strict=True)
        return float(np.mean([reading[name] == word for reading, (_, truth) in seen for name, word in truth.items()]))

    def measure_pair(self, method: str, pair: Sequence[Person], seed: int, changes: dict[str, Any]) -> dict[str, Any]:
        """Both concepts in one prompt; of LoRAs, which are both added, also the first one's own prompts."""
        paths = [self.learn(method, person, seed, changes)[0] for person in pair]
        first, second = pair
        prompts = [each for each in (IN_STYLE if second.is_style else TWO_PEOPLE) for _ in range(IMAGES_A_PROBE)]
        if method not in PARTS:
            words = [
                Embedding.load(path, token=token) for path, token in zip(paths, (TOKEN, SECOND_TOKEN), strict=True)
            ]
            drawn = self.draw_by(self.sd, [each.format(TOKEN, SECOND_TOKEN) for each in prompts], *words)
            return {"readings": self.judge.read(drawn)}
        sd, words = self.with_loras(paths), [self.rare_word(person) for person in pair]
        drawn = self.draw_by(sd, [each.format(*words) for each in prompts])
        own = self.draw_by(sd, [first.prompt(probe, words[0]) for probe in self.probes_of(first)])
        return {"readings": self.judge.read(drawn), "first": self.judge.read(own)}

    def measure_memory(self, method: str, person: Person, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
        """Peak memory of the training in a process of its own, in GB; ours with its overview and files."""
        config = self.config(person, seed, {})
        with TemporaryDirectory() as folder:
            if method == "ours":
                usual, own = asdict(TrainConfig()), asdict(replace(config, output_dir=folder))
                settings = {name: value for name, value in own.items() if value != usual[name]}
                (Path(folder) / "run.yaml").write_text(json.dumps(settings))  # which is YAML, too
                command = [sys.executable, str(ROOT / "train.py"), "--config", f"{folder}/run.yaml"]
            else:
                pixels = load_images(person.folder, self.sd.default_resolution).pixels
                np.save(f"{folder}/pixels.npy", pixels.transpose(0, 3, 1, 2))
                lora = {"parts": PARTS[method], **changes} if method in PARTS else {}
                settings = {
                    "model": str(self.sd.path), "token": self.rare_word(person) if lora else TOKEN, "seed": seed,
                    "templates": plain_templates(config),
                    "initializer": str(config.initializer_token).split()[0], "batch_size": config.train_batch_size,
                    "learning_rate": STOCK_BEST_LEARNING_RATE, **lora,
                }  # fmt: skip
                kind = "LoraLoop" if lora else "StockLoop"
                code = (
                    f"import torch_lora; torch_lora.learn('{kind}', '{folder}/pixels.npy', {self.steps}, {settings!r})"
                )
                command = [sys.executable, "-c", code]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
            child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            if child.returncode:
                raise SystemExit(f"{method}: {' '.join(command[:3])} ended with status {child.returncode}")
        return {"gigabytes": round(usage.ru_maxrss * 1024 / 1e9, 3)}  # Linux has it in units of 1024 bytes


def strips_of(folder: Path, setting: Mapping[str, Any]) -> Path:
    """Where pictures are kept."""
    return folder / "strips" / f"{setting['model']}-{setting['steps']}"


def key(line: Mapping[str, Any]) -> tuple:
    """Identifies a measurement: it is not repeated for the same key."""
    names = ("what", "model", "steps", "method", "person", "seed", "cores")
    return *(line[name] for name in names), json.dumps(line["changes"], sort_keys=True)


def pairs_of(everyone: Sequence[Person], styles: Sequence[Person]) -> dict[str, tuple[Person, Person]]:
    """Neighbours among the people, and people with styles."""
    pairs = [*zip(everyone[::2], everyone[1::2], strict=False), *zip(everyone, styles, strict=False)]
    return {f"{first.name}+{second.name}": (first, second) for first, second in pairs}


def kind_of(arguments: argparse.Namespace) -> str:
    """What a line of the results is about."""
    return "pair" if arguments.pairs else "memory" if arguments.memory else "concept"


def measurements(
    bench: LoraBench, arguments: argparse.Namespace, chosen: Sequence[Person], pairs: Mapping[str, Sequence[Person]]
) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """The beginnings of the lines that a command asks for, each with what measures the rest."""
    kind, methods = kind_of(arguments), arguments.methods
    subjects: dict[str, Any] = {person.name: person for person in chosen}
    if kind == "memory":
        subjects = {chosen[0].name: chosen[0]}
    elif kind == "pair":
        subjects = {name: pair for name, pair in pairs.items() if pair[0].name in subjects}
    if kind != "concept":
        methods = [method for method in methods if method in (*WORDS, *PARTS)]
    if arguments.rates:
        methods = [method for method in methods if method in PARTS]
    for seed in range(1 if kind == "memory" else arguments.seeds):
        for name, subject in subjects.items():
            for method in methods:
                if seed and method in WITHOUT_SEED:
                    continue
                rates = arguments.rates or [LEARNING_RATES[method]] if method in PARTS else ()
                for changes in [{"learning_rate": rate} for rate in rates] or [{}]:
                    line = {"what": kind, **bench.setting, "method": method, "person": name, "seed": seed}
                    measure = functools.partial(getattr(bench, f"measure_{kind}"), method, subject, seed, changes)
                    yield {**line, "cores": CORES, "changes": changes}, measure


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=None, help="a folder made by the recipe; default: the embedded one"
    )
    parser.add_argument("--split", default="dev", help="whom to learn, as in learning.py")
    parser.add_argument("--people", nargs="+", default=None, help="only these of them")
    parser.add_argument("--seeds", type=int, default=1, help="runs for each of them")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="what to measure")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=None, help="of the LoRAs, which alone are then learned"
    )
    parser.add_argument("--steps", type=int, default=None, help="updates of each training, for a trial")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no measurement begins after so many")
    parser.add_argument("--results", type=Path, default=ROOT / ".work" / "lora.jsonl", help="where lines are kept")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--pairs", action="store_true", help="two concepts at once")
    what.add_argument("--memory", action="store_true", help="peak memory, with the first of the people")
    what.add_argument("--table", action="store_true", help="measure nothing; print all tables")
    arguments = parser.parse_args()
    began = time.perf_counter()
    enable_compilation_cache()
    everyone = people(arguments.split)
    if not everyone:
        parser.error(f"--split {arguments.split}: there is nobody in it")
    chosen = [person for person in everyone if arguments.people is None or person.name in arguments.people]
    if arguments.model is not None and not (arguments.model / "model_index.json").is_file():
        parser.error(f"--model {arguments.model}: not a folder of a model, which has a model_index.json")
    bench = LoraBench(arguments.results.parent / "lora", everyone, arguments.model, arguments.steps)
    pairs = pairs_of(everyone, people(f"{arguments.split}-style"))
    lines = [line for line in read_results(arguments.results) if bench.setting.items() <= line.items()]
    done = {key(line) for line in lines}
    for wanted, measure in [] if arguments.table else measurements(bench, arguments, chosen, pairs):
        if key(wanted) in done:
            continue
        if time.perf_counter() - began > 60 * arguments.minutes:
            print("the minutes are over: start again to go on")
            break
        lines.append({**wanted, **measure()})
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        with open_results(arguments.results, "a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        print(", ".join(str(lines[-1][name]) for name in ("what", "method", "person", "seed", "changes")), flush=True)
    by_kind = {what: [line for line in lines if line["what"] == what] for what in ("concept", "pair", "memory")}
    tables = {
        "concept": concept_table(by_kind["concept"], everyone, bench.judge),
        "pair": pair_table(by_kind["pair"], by_kind["concept"], pairs),
        "memory": memory_table(by_kind["memory"]),
    }
    for what, table in tables.items():
        if arguments.table or what == kind_of(arguments):
            print("", *table, sep="\n")


if __name__ == "__main__":
    main()
