"""Draws what lines on stdin ask for, in a process of its own: ``python -m ti_jax.cli.drawer``; for ``ti-jax ui``.

A line is a JSON object with fields of `InferConfig`; the answer, on stdout, has ``paths`` and ``notes``, or ``error``.
The model stays in memory from one line to the next, and the process ends with its stdin.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from ti_jax.cli.infer import draw
from ti_jax.config import InferConfig, ModelSettings, resolve_infer
from ti_jax.errors import InputError, one_line
from ti_jax.machine import enable_compilation_cache
from ti_jax.pipeline import StableDiffusion
from ti_jax.pipeline.model_description import OpenModel


def serve(lines: Iterable[str], answers: TextIO) -> None:
    """Answer every line."""
    held: dict[Any, StableDiffusion] = {}
    for line in lines:
        notes = io.StringIO()
        answer: dict[str, Any]
        try:
            with contextlib.redirect_stderr(notes):
                answer = {"paths": list(map(str, _draw(json.loads(line), held)))}
        except InputError as error:
            answer = {"error": str(error)}
        except Exception as error:  # a bug must be an answer, too, or the page would wait
            answer = {"error": f"a fault of ti_jax: {type(error).__name__}: {one_line(error)}"}
        answers.write(json.dumps(answer | {"notes": notes.getvalue().splitlines()}) + "\n")
        answers.flush()


def _draw(request: dict[str, Any], held: dict[Any, StableDiffusion]) -> list[Any]:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in request.items()
    }
    config = resolve_infer(InferConfig(**values))
    model = tuple(getattr(config, field.name) for field in dataclasses.fields(ModelSettings))

    def load(found: OpenModel) -> StableDiffusion:
        if model not in held:
            held.clear()  # two would not fit
            held[model] = StableDiffusion.load(found)
        return held[model]

    return draw(config, load)


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    enable_compilation_cache()
    serve(sys.stdin, out)
