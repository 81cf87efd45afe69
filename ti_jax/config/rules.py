"""The rules that a field's value can have, each with examples on both sides of its bounds."""

from __future__ import annotations

import math
import re

from ti_jax.config.fields import Rule
from ti_jax.config.rates import Rates
from ti_jax.words import is_word

COUNT = Rule("1 or more", lambda value: value >= 1, good=(1,), bad=(0, -1))
WHOLE = Rule("0 or more", lambda value: value >= 0, good=(0,), bad=(-1,))
PORT = Rule("from 0 to 65535", lambda value: 0 <= value < 2**16, good=(0, 2**16 - 1), bad=(-1, 2**16))
SEED = Rule("from 0 to 4294967295", lambda value: 0 <= value < 2**32, good=(0, 2**32 - 1), bad=(-1, 2**32))
# The largest square has 67 million pixels. More is a slip of the keyboard: it would run for days, or until XLA aborts.
SIDE = Rule(
    "from 8 to 8192 pixels and divisible by 8",
    lambda value: 8 <= value <= 8192 and value % 8 == 0,
    good=(8, 520, 8192),
    bad=(0, -8, 4, 60, 513, 8200, 1_000_000),
)
POSITIVE = Rule(
    "above 0 and finite",
    lambda value: value > 0 and math.isfinite(value),
    good=(1e-12, 3.0),
    bad=(0.0, -1e-4, math.nan, math.inf),
)
LEARNING_RATE = Rule(
    POSITIVE.allowed,
    lambda value: isinstance(value, str) or POSITIVE.holds(value),
    good=(*POSITIVE.good, Rates("5e-3:200, 1e-3:1000, 2e-4")),
    bad=POSITIVE.bad,
)
ROW_NORM = Rule(
    POSITIVE.allowed,
    lambda value: isinstance(value, str) or POSITIVE.holds(value),
    good=(*POSITIVE.good, "free", "initial", "vocabulary"),
    bad=POSITIVE.bad,
)
NOT_NEGATIVE = Rule(
    "0 or more and finite",
    lambda value: value >= 0 and math.isfinite(value),
    good=(0.0, 12.0),
    bad=(-0.1, math.nan, math.inf),
)
RATIO = Rule(
    "1 or more and finite",
    lambda value: value >= 1 and math.isfinite(value),
    good=(1.0, 2.5),
    bad=(0.99, 0.5, -2.0, math.nan, math.inf),
)
NOT_ONE = Rule(
    "finite and not 1",
    lambda value: math.isfinite(value) and value != 1,
    good=(0.5, 0.0, 3.0, -1.0),
    bad=(1.0, math.nan, math.inf),
)
CHANCE = Rule("from 0 to 1", lambda value: 0 <= value <= 1, good=(0.0, 1.0), bad=(-0.1, 1.1, math.nan))
DECAY = Rule("0 or more and below 1", lambda value: 0 <= value < 1, good=(0.0, 0.9999), bad=(-0.1, 1.0, math.nan))
TEXT = Rule("text that is not empty", lambda value: bool(value.strip()), good=("a {}",), bad=("", " "))
TEXTS = Rule(
    "texts that are not empty",
    lambda value: all(item.strip() for item in value),
    good=((), ("a", "b")),
    bad=(("",), ("a", " ")),
)
SOME_TEXTS = Rule(
    "one text or more, none empty",
    lambda value: bool(value) and all(item.strip() for item in value),
    good=(("a {}",),),
    bad=(("{}", " "),),
)
WORD = Rule(
    "one word without spaces, like <cat-toy>",
    is_word,
    good=("<cat-toy>", "sks"),
    bad=("", " ", "my cat", " cat", "cat\n"),
)
RANGE = Rule(
    "two numbers, 0 or more, the first below the second",
    lambda value: 0 <= value[0] < value[1],
    good=((0, 1), (10, 20)),
    bad=((-1, 3), (4, 4), (5, 2)),
)
ADDRESS = Rule(
    "HOST:PORT, like 10.0.0.1:1234",
    lambda value: re.fullmatch(r"\S+:\d+", value) is not None,
    good=("10.0.0.1:1234", "[::1]:80"),
    bad=("", "host", "host:", ":80", "host:80:", "a b:80"),
)
PNG = Rule(
    "the path of a .png file",
    lambda value: value.lower().endswith(".png"),
    good=("out.png", "a/b.PNG"),
    bad=("", "out.jpg", "out", "folder/"),
)
JSON = Rule(
    "the path of a .json file",
    lambda value: value.lower().endswith(".json"),
    good=("scores.json", "a/b.JSON"),
    bad=("", "scores.txt", "scores"),
)
