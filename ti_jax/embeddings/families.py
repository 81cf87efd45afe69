"""Which model family a word is for: told by the lengths of its vectors, and by metadata where a length fits two."""

from __future__ import annotations

from collections.abc import Mapping

from ti_jax.models.components import TEXT_ENCODERS

# Lengths of a token embedding, by text encoder, of the published model families. Where a word fits several, as a single
# [n, 768] does, the first is meant unless its metadata says otherwise.
FAMILIES = {
    "SD1.x": {"text_encoder": 768},
    "SD2.x": {"text_encoder": 1024},
    "SDXL": {"text_encoder": 768, "text_encoder_2": 1280},
}

# kohya's entries ("stable-diffusion-xl-v1-base/textual-inversion", "sdxl_base_v1-0", "sd_v2_768_v"), and what tells the
# family in them, in the order in which it must be looked for.
_TELLING_ENTRIES = ("modelspec.architecture", "ss_base_model_version")
_TELLING_PARTS = {"xl": "SDXL", "v2": "SD2.x", "v1": "SD1.x"}


def family_of(dims: Mapping[str, int], metadata: Mapping[str, str] | None = None) -> str | None:
    """Name of the family that a word with these vector lengths by text encoder is for; None if it is no published one.

    Args:
      metadata: what the word's file says; it decides where the lengths leave a choice, and never against them.
    """
    fitting = [name for name, family in FAMILIES.items() if dims.items() <= family.items()]
    for entry in _TELLING_ENTRIES:
        said = (metadata or {}).get(entry, "").lower()
        named = next((name for part, name in _TELLING_PARTS.items() if part in said), None)
        if named in fitting:
            return named
    return fitting[0] if fitting else None


def describe(dims: Mapping[str, int], metadata: Mapping[str, str] | None = None) -> str:
    """The family in words, with the lengths; and that it is half of one, where a text encoder's vectors are missing."""
    numbers = f"{' and '.join(str(dim) for dim in dims.values())} numbers a vector"
    name = family_of(dims, metadata)
    if name is None:
        return f"a model with {numbers}"
    if dict(dims) == FAMILIES[name]:
        return f"{name} ({numbers})"
    which = "second" if TEXT_ENCODERS[1] in dims else "first"
    return f"the {which} text encoder of {name} alone ({numbers})"
