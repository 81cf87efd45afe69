"""Whom and what benchmarks learn: people and styles that the embedded model has never seen, and pairs of both."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes" / "mini_sd")]

import styles  # noqa: E402
import world  # noqa: E402

from ti_jax.evaluation.avatar_judge import Judge, Probe  # noqa: E402

PEOPLE = Path(__file__).parent / "people"
# Those of the demos.
ASSETS = tuple(ROOT / "ti_jax" / "assets" / name for name in ("concepts", "styles"))
TOKEN, STYLE_TOKEN = "<someone>", "<style>"
# For a style and somebody.
PAIR_PROBES = (
    Probe("a {style} portrait of {}"),
    Probe(
        "a {style} drawing of {} with glasses on a striped background", (("eyes", "glasses"), ("pattern", "striped"))
    ),
    Probe("a {style} picture of {} wearing a jacket", (("clothes", "jacket"),)),
    Probe(
        "a {style} portrait of {} with sunglasses on a dotted background",
        (("eyes", "sunglasses"), ("pattern", "dotted")),
    ),
)
SPLITS = ("dev", "test", "dev-style", "test-style", "dev-pairs", "test-pairs")


@dataclass(frozen=True)
class Person:
    """A person or style to learn: name, folder of pictures, and true identity (attribute -> word).

    Or a pair of both, `parts`, whose words are learned apart.
    """

    name: str
    folder: Path
    truth: Mapping[str, str]
    parts: tuple[Person, ...] = ()

    @property
    def is_style(self) -> bool:
        """Whether it is a style alone."""
        return world.STYLE[0] in self.truth and not self.parts

    def prompt(self, probe: Probe, word: str | None) -> str:
        """The probe's prompt with the word in it, for a pair both; None: without any person's or style's word."""
        if not self.is_style:
            return probe.prompt.replace("{style} ", f"{STYLE_TOKEN} " if word else "").replace("{}", word or "a person")
        return probe.prompt.replace("{} ", f"{word} " if word else "")


def people(split: str) -> list[Person]:
    """The people or styles of a split, or pairs of them."""
    if split.endswith("-pairs"):
        own, styled = people(split.removesuffix("-pairs")), people(split.replace("-pairs", "-style"))
        return [pair(person, style) for person, style in zip(own, styled, strict=False)]
    found = []
    for name, facts in json.loads((PEOPLE / "people.json").read_text()).items():
        (folder,) = (place / name for place in (PEOPLE, *ASSETS) if (place / name).is_dir())
        if facts["split"] == split:
            said = (*world.IDENTITY, *world.STYLE)
            found.append(Person(name, folder, {key: facts[key] for key in said if facts.get(key) is not None}))
    return found


def pair(person: Person, style: Person) -> Person:
    """The person in the style; of the person only what that shows."""
    hidden = world.COLOURS if style.truth["palette"] != styles.NATURAL[0] else ()
    shown = {name: word for name, word in person.truth.items() if name not in hidden}
    return Person(f"{person.name}+{style.name}", style.folder, {**shown, **style.truth}, (person, style))


def probes_for(truth: Mapping[str, str], judge: Judge, images: int) -> list[Probe]:
    """What a person, a style or a pair of both is tested with; each probe `images` times."""
    person, style = world.IDENTITY[0] in truth, world.STYLE[0] in truth
    own = PAIR_PROBES if person and style else judge.config.concept("style" if style else "object")[1]
    return [probe for probe in own for _ in range(images)]


def description(person: Person, probe: Probe) -> str:
    """The probe's prompt with the true description of the person, the style or both in place of the words."""
    natural = dict(zip(world.STYLE, styles.NATURAL, strict=True))
    said = {**dict.fromkeys(world.ATTRIBUTES), **natural, **person.truth, **dict(probe.expects)}
    (medium,) = {"portrait", "drawing", "picture"} & set(probe.prompt.split())
    return world.caption(world.Scene(**said), medium=medium)
