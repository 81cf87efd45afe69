"""The model family of a word: from the lengths of its vectors, and from metadata if a length fits two."""

from __future__ import annotations

from collections.abc import Mapping

from ti_jax.models.components import TEXT_ENCODERS

# Token-embedding widths by text encoder of the published model families. If a word fits several, as a single [n, 768]
# does, it is the first one's unless its metadata says otherwise.
FAMILIES = {
    "SD1.x": {"text_encoder": 768},
    "SD2.x": {"text_encoder": 1024},
    "SDXL": {"text_encoder": 768, "text_encoder_2": 1280},
}

# kohya's entries ("stable-diffusion-xl-v1-base/textual-inversion", "sdxl_base_v1-0", "sd_v2_768_v"), and the substrings
# that identify the family, in the order in which to look for them.
_TELLING_ENTRIES = ("modelspec.architecture", "ss_base_model_version")
_TELLING_PARTS = {"xl": "SDXL", "v2": "SD2.x", "v1": "SD1.x"}


def family_of(dims: Mapping[str, int], metadata: Mapping[str, str] | None = None) -> str | None:
    """Name of the family of a word with these vector lengths by text encoder; None if it fits no published one.

    Args:
      metadata: of the word's file; it only decides between families that the lengths fit.
    """
    fitting = [name for name, family in FAMILIES.items() if dims.items() <= family.items()]
    for entry in _TELLING_ENTRIES:
        said = (metadata or {}).get(entry, "").lower()
        named = next((name for part, name in _TELLING_PARTS.items() if part in said), None)
        if named in fitting:
            return named
    return fitting[0] if fitting else None


def describe(dims: Mapping[str, int], metadata: Mapping[str, str] | None = None) -> str:
    """The family and the lengths for a message; says so if the vectors of one text encoder are missing."""
    numbers = f"{' and '.join(str(dim) for dim in dims.values())} numbers a vector"
    name = family_of(dims, metadata)
    if name is None:
        return f"a model with {numbers}"
    if dict(dims) == FAMILIES[name]:
        return f"{name} ({numbers})"
    which = "second" if TEXT_ENCODERS[1] in dims else "first"
    return f"the {which} text encoder of {name} alone ({numbers})"
