"""The world that mini-sd draws: what a picture can show, and the words for it.

A `Scene` has everything that is in one picture: who, wearing what, on which background, and in which style (`styles`).
Captions are exact, because pictures are rendered from scenes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import styles

# word -> DiceBear's name; "personas" 9.4.3
HAIR = {
    "long hair": "long",
    "side shaved hair": "sideShave",
    "short hair": "shortCombover",
    "high top hair": "curlyHighTop",
    "bob hair": "bobCut",
    "curly hair": "curly",
    "pigtails": "pigtails",
    "curly bun": "curlyBun",
    "buzzcut": "buzzcut",
    "bangs": "bobBangs",
    "bald": "bald",
    "balding": "balding",
    "cap": "cap",
    "undercut bun": "bunUndercut",
    "fade": "fade",
    "beanie": "beanie",
    "bun": "straightBun",
    "very long hair": "extraLong",
    "sideburns": "shortComboverChops",
    "mohawk": "mohawk",
}
# The avatars' own reds, pinks, oranges and blonds are hard to tell apart at 64 pixels; these are not.
HAIR_COLOURS = {
    "black": "2b2233",
    "brown": "7a4a35",
    "red": "d92b3a",
    "pink": "f06fc8",
    "orange": "f28a2e",
    "blond": "f2cf6b",
    "white": "e6e9f7",
}
SKINS = {"light": ("eeb4a4",), "tan": ("d78774",), "brown": ("b16a5b", "92594b"), "dark": ("623d36",)}
EYES = {
    "open eyes": "open",
    "sleepy eyes": "sleep",
    "winking": "wink",
    "glasses": "glasses",
    "happy eyes": "happy",
    "sunglasses": "sunglasses",
}
MOUTHS = {
    "smile": "smile",
    "frown": "frown",
    "surprised": "surprise",
    "pacifier": "pacifier",
    "big smile": "bigSmile",
    "smirk": "smirk",
    "lips": "lips",
}
BEARDS = {
    "no beard": None,
    "beard": "beardMustache",
    "moustache": "pyramid",
    "walrus moustache": "walrus",
    "goatee": "goatee",
    "stubble": "shadow",
    "soul patch": "soulPatch",
}
# What hides what: a caption must not mention what is not visible. Hats have their own colours.
NO_HAIR_SEEN = ("bald", "cap", "beanie")
COLOURED_BEARDS = ("beard", "moustache", "walrus moustache", "goatee")
MOUTH_COVERING = ("beard",)
# What shows of a nose below a moustache differs by at most 28 levels in a dozen pixels.
NOSE_COVERING = ("beard", "moustache", "walrus moustache")
# The third nose is left out: at 64 pixels nobody can distinguish it from "round nose".
NOSES = {"round nose": "mediumRound", "wrinkles": "wrinkles"}
CLOTHES = {"jacket": "small", "sweater": "squared", "shirt": "rounded", "checkered shirt": "checkered"}
CLOTHES_COLOURS = {
    "blue": "456dff",
    "turquoise": "54d7c7",
    "purple": "7555ca",
    "green": "6dbb58",
    "red": "e24553",
    "yellow": "f3b63a",
    "pink": "f55d81",
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "red": (225, 60, 60),
    "orange": (245, 150, 50),
    "yellow": (250, 220, 60),
    "green": (90, 185, 90),
    "turquoise": (70, 205, 200),
    "blue": (60, 110, 230),
    "purple": (140, 90, 210),
    "pink": (250, 160, 190),
    "grey": (150, 150, 155),
}
PATTERNS = ("plain", "striped", "dotted")

# The judge's attributes and their classes. The first five identify a person.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "hair": tuple(HAIR),
    "hair_colour": tuple(HAIR_COLOURS),
    "skin": tuple(SKINS),
    "beard": tuple(BEARDS),
    "nose": tuple(NOSES),
    "eyes": tuple(EYES),
    "mouth": tuple(MOUTHS),
    "clothes": tuple(CLOTHES),
    "clothes_colour": tuple(CLOTHES_COLOURS),
    "background": tuple(BACKGROUNDS),
    "pattern": PATTERNS,
    **styles.ATTRIBUTES,
}
IDENTITY = ("hair", "hair_colour", "skin", "beard", "nose")
STYLE = tuple(styles.ATTRIBUTES)
# What only the natural palette shows.
COLOURS = ("hair_colour", "skin", "clothes_colour", "background")


@dataclass(frozen=True)
class Scene:
    """Everything in one picture, in the words of `ATTRIBUTES`; None for what it does not show.

    A nose is always drawn, and shows only if no beard hides it: `seen`.
    """

    hair: str
    hair_colour: str | None
    skin: str | None
    beard: str
    nose: str
    eyes: str
    mouth: str | None
    clothes: str
    clothes_colour: str | None
    background: str | None
    pattern: str
    palette: str = styles.NATURAL[0]
    outline: str = styles.NATURAL[1]
    frame: str = styles.NATURAL[2]
    light: str = styles.NATURAL[3]
    shade: int = 0  # which of the shades of `skin`

    @property
    def style(self) -> tuple[str, ...]:
        """How it is drawn, whoever is in it."""
        return tuple(getattr(self, name) for name in STYLE)

    @property
    def person(self) -> tuple[str | None, ...]:
        """What does not change with expression, glasses, clothes and background, and can be seen."""
        return visible(tuple(getattr(self, name) for name in IDENTITY))

    def seen(self, name: str) -> str | None:
        """The word for an attribute; None if the picture does not show it."""
        return dict(zip(IDENTITY, self.person, strict=True)).get(name, getattr(self, name))

    def labels(self) -> list[int]:
        """Class indices in the order of `ATTRIBUTES`; -1 if it is not visible in the picture."""
        numbers = []
        for name, words in ATTRIBUTES.items():
            word = self.seen(name)
            numbers.append(-1 if word is None else words.index(word))
        return numbers


def pick(rng: np.random.Generator, words) -> str:
    """A word, drawn uniformly."""
    words = tuple(words)
    return words[int(rng.integers(len(words)))]


def draw_person(rng: np.random.Generator) -> tuple[str, str | None, str, str, str]:
    """A random identity: hair, its colour (None if not visible), skin, beard, nose (even if it is not visible)."""
    hair = pick(rng, HAIR)
    beard = "no beard" if rng.random() < 0.5 else pick(rng, tuple(BEARDS)[1:])
    hidden = hair in NO_HAIR_SEEN and beard not in COLOURED_BEARDS
    hair_colour = None if hidden else pick(rng, HAIR_COLOURS)
    return hair, hair_colour, pick(rng, SKINS), beard, pick(rng, NOSES)


def visible(person: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """A random identity without what cannot be seen of it."""
    hair, hair_colour, skin, beard, nose = person
    return hair, hair_colour, skin, beard, None if beard in NOSE_COVERING else nose


def draw_surroundings(rng: np.random.Generator) -> dict[str, str | None]:
    """Random expression, clothes and background."""
    return {
        "eyes": pick(rng, EYES),
        "mouth": pick(rng, MOUTHS),
        "clothes": pick(rng, CLOTHES),
        "clothes_colour": pick(rng, CLOTHES_COLOURS),
        "background": pick(rng, BACKGROUNDS),
        "pattern": pick(rng, PATTERNS),
    }


def draw_scene(
    rng: np.random.Generator, person: tuple[str | None, ...] | None = None, style: tuple[str, ...] = styles.NATURAL
) -> Scene:
    """A scene with `person` or a random one, in a style."""
    identity = dict(zip(IDENTITY, person or draw_person(rng), strict=True))
    shade = int(rng.integers(len(SKINS[identity["skin"]])))
    surroundings = draw_surroundings(rng)
    if identity["beard"] in MOUTH_COVERING:
        surroundings["mouth"] = None
    scene = Scene(**identity, **surroundings, **dict(zip(STYLE, style, strict=True)), shade=shade)
    return scene if styles.PALETTES[scene.palette] is None else replace(scene, **dict.fromkeys(COLOURS))


def avatar_options(scene: Scene) -> dict[str, object]:
    """DiceBear's options for the scene, each with a single choice, so that the drawing is deterministic."""
    hair, skin, clothes = part_colours(scene)
    return {
        "seed": "mini-sd",
        "skinColor": [skin],
        "hairColor": [hair],
        "hair": [HAIR[scene.hair]],
        "eyes": [EYES[scene.eyes]],
        "mouth": [MOUTHS[scene.mouth or "smile"]],
        "nose": [NOSES[scene.nose]],
        "body": [CLOTHES[scene.clothes]],
        "clothingColor": [clothes],
        "facialHairProbability": 0 if scene.beard == "no beard" else 100,
        "facialHair": [BEARDS[scene.beard] or "goatee"],
    }


def part_colours(scene: Scene) -> tuple[str, str, str]:
    """Hexadecimal colours of hair, skin and clothes."""
    if (palette := styles.PALETTES[scene.palette]) is not None:
        return palette.hair, palette.skin, palette.clothes
    hair = HAIR_COLOURS[scene.hair_colour or "black"]
    return hair, SKINS[scene.skin][scene.shade], CLOTHES_COLOURS[scene.clothes_colour]


def caption(
    scene: Scene,
    *,
    subject: str = "a person",
    identity: bool = True,
    keep: set[str] | None = None,
    style: str | None = None,
    medium: str = "portrait",
) -> str:
    """The scene as a caption, with a fixed order of its parts.

    Args:
      scene: what is in the picture.
      subject: "a person", or a word for somebody.
      identity: whether to mention hair, skin, beard and nose.
      keep: the attributes to mention; None: all.
      style: a word for the style; None: its own words, which always say all of it.
      medium: "portrait", "drawing" or "picture".
    """

    def said(name: str) -> bool:
        return scene.seen(name) is not None and (keep is None or name in keep) and (identity or name not in IDENTITY)

    words = ["a", *([style] if style else styles.words(scene.style)), medium, "of", subject]
    details: list[str] = []
    colour = [str(scene.hair_colour)] if said("hair_colour") else []
    # The hair colour is mentioned with the part that shows it: a cap is not a "red cap" because the beard is red.
    shown_by = "beard" if scene.hair in NO_HAIR_SEEN else "hair"
    for name in ("hair", "skin", "eyes", "mouth", "beard", "nose"):
        if said(name):
            details += [*(colour if name == shown_by else []), str(getattr(scene, name))]
            details += ["skin"] if name == "skin" else []
    if details:
        words += ["with", *details]
    if said("clothes"):
        colour = [str(scene.clothes_colour)] if said("clothes_colour") else []
        words += ["wearing", "a", *colour, str(scene.clothes)]
    if said("background") or (scene.background is None and said("pattern")):
        pattern = [scene.pattern] if said("pattern") else []
        words += ["on", "a", *([scene.background] if scene.background else []), *pattern, "background"]
    return " ".join(words)


def vocabulary() -> list[str]:
    """Every word that captions can have, sorted, and a few that none has."""
    words = {"a", "portrait", "drawing", "picture", "of", "person", "with", "skin", "wearing", "on", "background"}
    words |= {"style", "in", "the", "and"}
    for name, group in ATTRIBUTES.items():
        said = group[1:] if name in STYLE else group
        words.update(word for phrase in said for word in phrase.split())
    return sorted(words)


# Prompts to test a learned word with: ``{}`` is the word, and the picture must show the rest.
PROBES: tuple[tuple[str, dict[str, str]], ...] = (
    ("a portrait of {}", {}),
    ("a portrait of {} on a green background", {"background": "green"}),
    ("a drawing of {} on a grey striped background", {"background": "grey", "pattern": "striped"}),
    ("a picture of {} with sunglasses on a turquoise background", {"eyes": "sunglasses", "background": "turquoise"}),
    ("a portrait of {} with glasses", {"eyes": "glasses"}),
    ("a portrait of {} wearing a red jacket", {"clothes": "jacket", "clothes_colour": "red"}),
    (
        "a drawing of {} wearing a purple sweater on a yellow background",
        {"clothes": "sweater", "clothes_colour": "purple", "background": "yellow"},
    ),
    (
        "a picture of {} wearing a green checkered shirt on a red dotted background",
        {"clothes": "checkered shirt", "clothes_colour": "green", "background": "red", "pattern": "dotted"},
    ),
)

# The same for a learned style. It decides about colours, so that no probe asks for one.
STYLE_PROBES: tuple[tuple[str, dict[str, str]], ...] = (
    ("a {} portrait of a person", {}),
    ("a {} drawing of a person with glasses on a striped background", {"eyes": "glasses", "pattern": "striped"}),
    ("a {} picture of a person with long hair", {"hair": "long hair"}),
    ("a {} portrait of a person with curly hair sunglasses", {"hair": "curly hair", "eyes": "sunglasses"}),
    (
        "a {} drawing of a person with bald happy eyes walrus moustache",
        {"hair": "bald", "eyes": "happy eyes", "beard": "walrus moustache"},
    ),
    (
        "a {} picture of a person wearing a jacket on a dotted background",
        {"clothes": "jacket", "pattern": "dotted"},
    ),
    (
        "a {} portrait of a person with pigtails big smile wearing a checkered shirt on a plain background",
        {"hair": "pigtails", "mouth": "big smile", "clothes": "checkered shirt", "pattern": "plain"},
    ),
    (
        "a {} drawing of a person with bun beard wearing a sweater",
        {"hair": "bun", "beard": "beard", "clothes": "sweater"},
    ),
)
