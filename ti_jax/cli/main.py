"""The commands: ``ti-jax train`` (``train.py``), ``infer`` (``infer.py``), ``evaluate``, ``plan``, ``data``,
``verify``, ``embedding``, ``doctor`` and ``ui``.

JAX is imported inside the commands, after the command line has been checked.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ti_jax import __version__
from ti_jax.config import (
    DataConfig,
    EvaluateConfig,
    InferConfig,
    PlanConfig,
    TrainConfig,
    check_fields,
    resolve,
    resolve_data,
    resolve_evaluate,
    resolve_infer,
)
from ti_jax.config.fields import setting
from ti_jax.config.rules import PORT, TEXT, TEXTS, WHOLE
from ti_jax.config.yaml import nearest
from ti_jax.errors import InputError, OutOfStep
from ti_jax.remote import as_given
from ti_jax.startup import avoid_missing_tpu, shorten_plugin_errors

TRAIN_EXAMPLES = """\
examples:
  {prog}
      the embedded model learns <cleo> from its example pictures, on a CPU in a minute or two
  {prog} --train_data_dir me/ --output_dir output/me
      the embedded model learns <me> from your pictures
  {prog} --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir cat/ \\
      --placeholder_token "<cat-toy>" --initializer_token toy --learning_rate 5e-4 --output_dir output/cat
  {prog} --config configs/sd15.yaml --train_data_dir cat/ --placeholder_token "<cat-toy>" --initializer_token toy
"""

INFER_EXAMPLES = """\
examples:
  {prog} --embedding output/learned_embeds.safetensors --prompt "a portrait of <cleo> wearing a red jacket"
  {prog} --embedding cat.safetensors --prompt "a <cat-toy> on a beach" "a <cat-toy> in the snow" --num_images 4 \\
      --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --scheduler dpm++ --output cat.png
"""

VERIFY_EXAMPLES = """\
example:
  ti-jax verify output/learned_embeds.safetensors --prompt "a portrait of <cleo>"
"""

EVALUATE_EXAMPLES = """\
examples:
  ti-jax evaluate output/learned_embeds.safetensors --train_data_dir held_back/
  ti-jax evaluate cat.safetensors --train_data_dir cat/ --evaluation_clip clip-vit-large-patch14/ \\
      --output scores.json --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5
"""


PLAN_EXAMPLES = """\
examples:
  {prog} --config configs/sdxl.yaml --topology v5e:2x4
  {prog} --config configs/sd15.yaml --topology v5e:2x2 --train_batch_size 4 --largest_batch
  {prog} --config configs/sd15.yaml --topology rtx4090:1 --largest_batch
"""


DATA_EXAMPLES = """\
examples:
  ti-jax data me/
  ti-jax data cat/ --resolution 512 --alpha_mask --contact_sheet cat.png
"""


UI_EXAMPLES = """\
examples:
  {prog}
  {prog} --output_dir runs --port 8000 --models ~/models
"""


@dataclass(frozen=True)
class VerifyConfig:
    """Load a learned word into diffusers on PyTorch, and compare a prompt's encoding with ti_jax's."""

    pretrained_model_name_or_path: str | None = setting(None, TEXT, path="model")
    """The model that the word was learned for: a diffusers folder or a Hugging Face Hub id. Left out: the small model
    that comes with ti_jax. Single-file checkpoints are not supported here: diffusers cannot read them offline."""
    prompt: str | None = setting(None, TEXT)
    """Prompt with the word in it, or {} in its place. Left out: the word alone."""
    clip_skip: int = setting(0, WHOLE)
    """Last layers of the text encoder to leave out, counted as diffusers does."""


@dataclass(frozen=True)
class DoctorConfig:
    """Is everything there that a run needs, and is it used? Versions, devices and memory, cache, disk, hub login, and a
    timed training step of the embedded model, each with advice. Exits with 0, or with 1 if there is a problem. A bug
    report starts with what it says."""

    json: bool = False
    """Print the findings as JSON."""


@dataclass(frozen=True)
class UiConfig:
    """A page in the browser: drop pictures, learn a word, try it, save it. Runs go on when the page or this command
    ends, and are found again. Needs the extra `ui` (pip install 'ti_jax[ui]')."""

    output_dir: str = setting("output", TEXT, path="output")
    """Folder of the runs, each in a folder of its own; also those that train.py has made there are shown."""
    models: tuple[str, ...] = setting((), TEXTS, path="input")
    """Models that the page offers besides the embedded one and hub ids: diffusers folders, .safetensors or .ckpt files,
    or folders of such. It reads no others of this machine."""
    host: str = setting("127.0.0.1", TEXT)
    """Address to serve at. Any other than this machine's own lets others start runs and see pictures: there is no
    password."""
    port: int = setting(7860, PORT)
    """Port to serve at; 0: any that is free."""


def main(argv: Sequence[str] | None = None, prog: str = "ti-jax") -> int:
    """Run a command line and return its exit status.

    Args:
      argv: a command and its flags; None: those of this process.
      prog: the program's name in messages; for a script, such as ``train.py``, the command is left out.

    Returns:
      0; 1 if ``verify`` finds a difference, ``data`` a picture that a run would stop at, or ``doctor`` a problem; 2
      after an `InputError`, which is printed on one line of stderr; 130 if interrupted.

    Raises:
      SystemExit: with status 0 after a command's ``--help``, with 141 when the reader of stdout has left.
    """
    argv = sys.argv[1:] if argv is None else argv
    _take_any_text()
    try:
        return _run(argv, prog)
    except InputError as error:
        print(f"{prog}: error: {' '.join(as_given(str(error)).split())}", file=sys.stderr, flush=True)
        if isinstance(error, OutOfStep):
            os._exit(2)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130


def _take_any_text() -> None:
    """Make the console escape characters that it cannot encode: words and paths may be in any script."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # a service, or pythonw
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run(argv: Sequence[str], prog: str) -> int:
    if not argv:
        raise InputError(f"no command given; one of {', '.join(COMMANDS)}, or {prog} --help")
    command, *args = argv
    if command in ("-h", "--help"):
        with _output():
            print(_overview(prog))
        return 0
    if command == "--version":
        with _output():
            print(f"ti-jax {__version__}")
        return 0
    if command not in COMMANDS:
        remedy = nearest(command, COMMANDS, "did you mean {}?", f"known are {', '.join(COMMANDS)}")
        raise InputError(f"unknown command {command!r}; {remedy}")
    avoid_missing_tpu()
    shorten_plugin_errors()
    run, _ = COMMANDS[command]
    return run(args, prog if prog.endswith(".py") else f"{prog} {command}")


def _overview(prog: str) -> str:
    lines = [f"  {name:11}{about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {prog} COMMAND [FLAGS]",
            "",
            "Textual Inversion for Stable Diffusion in JAX: learn a new word from a few pictures, and draw with it.",
            "",
            "commands:",
            *lines,
            "",
            f"{prog} COMMAND --help  lists a command's flags;  {prog} --version  prints the version.",
        ]
    )


def _as_typed(prog: str) -> str:
    return f"python {prog}" if prog.endswith(".py") else prog


def _train(args: Sequence[str], prog: str) -> int:
    from ti_jax.cli.flags import NO_COUNTERPART, parse

    with _output():
        examples = TRAIN_EXAMPLES.format(prog=_as_typed(prog))
        config = parse(TrainConfig, args, prog=prog, examples=examples, no_counterpart=NO_COUNTERPART)
    config = resolve(config)
    from ti_jax.training.loop import train

    # A run that was stopped early has not succeeded: report that in the exit status.
    return 130 if train(config).interrupted else 0


def _infer(args: Sequence[str], prog: str) -> int:
    from ti_jax.cli.flags import parse

    with _output():
        config = parse(InferConfig, args, prog=prog, examples=INFER_EXAMPLES.format(prog=_as_typed(prog)))
    config = resolve_infer(config)
    from ti_jax.cli.infer import draw
    from ti_jax.machine import enable_compilation_cache

    enable_compilation_cache()
    paths = draw(config)
    with _output():
        print(*paths, sep="\n")
    return 0


def _evaluate(args: Sequence[str], prog: str) -> int:
    from ti_jax.cli.flags import parse

    file, flags = _file_and_flags(args)
    with _output():
        config = parse(EvaluateConfig, flags, prog=f"{prog} FILE", examples=EVALUATE_EXAMPLES, config_file=False)
    _require_file(file, prog)
    config = resolve_evaluate(config)
    from ti_jax.evaluation.evaluate import evaluate
    from ti_jax.machine import enable_compilation_cache

    enable_compilation_cache()
    scores = evaluate(file, config)
    with _output():
        print(scores)
        for name, share in scores.by_attribute.items():
            print(f"  {name:28}{share:.3f}")
    return 0


def _plan(args: Sequence[str], prog: str) -> int:
    from ti_jax.cli.flags import NO_COUNTERPART, parse

    with _output():
        examples = PLAN_EXAMPLES.format(prog=prog)
        config = parse(PlanConfig, args, prog=prog, examples=examples, no_counterpart=NO_COUNTERPART)
    from ti_jax.machine import enable_compilation_cache
    from ti_jax.training.plan import plan

    if config.topology is None:  # a program compiled for absent devices can be cached, but not loaded again
        enable_compilation_cache()
    found = plan(config)
    with _output():
        print(*found.lines(), sep="\n")
    return 0


def _data(args: Sequence[str], prog: str) -> int:
    from ti_jax.cli.flags import NO_COUNTERPART, parse

    folder, flags = _file_and_flags(args)
    with _output():
        config = parse(DataConfig, flags, prog=f"{prog} DIR", examples=DATA_EXAMPLES, no_counterpart=NO_COUNTERPART)
    config = replace(config, train_data_dir=folder or config.train_data_dir)
    if config.train_data_dir is None:
        raise InputError(f"the folder is missing: {prog} DIR, with the flags after it")
    from ti_jax.data.survey import survey

    found = survey(resolve_data(config))
    with _output():
        print(*found.lines(), sep="\n")
    return 1 if found.refused else 0


def _file_and_flags(args: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The embedding file, which comes first ("" if there is none), and the flags after it."""
    return ("", args) if not args or args[0].startswith("-") else (args[0], args[1:])


def _require_file(file: str, prog: str) -> None:
    if not file:
        raise InputError(f"the embedding file is missing: {prog} FILE, with the flags after it")


def _verify(args: Sequence[str], prog: str) -> int:
    from ti_jax.cli.flags import parse

    file, flags = _file_and_flags(args)
    with _output():
        config = parse(VerifyConfig, flags, prog=f"{prog} FILE", examples=VERIFY_EXAMPLES, config_file=False)
    _require_file(file, prog)
    check_fields(config)
    from ti_jax.cli.verify import verify

    report = verify(file, config.pretrained_model_name_or_path, config.prompt, config.clip_skip)
    with _output():
        print(report)
    return 0 if report.ok else 1


def _embedding(args: Sequence[str], prog: str) -> int:
    from ti_jax.cli.embedding import run

    with _output():
        print(run(args, prog))
    return 0


def _doctor(args: Sequence[str], prog: str) -> int:
    from ti_jax.cli.flags import parse

    with _output():
        config = parse(DoctorConfig, args, prog=prog, examples="", config_file=False)
    from ti_jax.cli.doctor import examine

    found = examine()
    with _output():
        print(found.as_json() if config.json else "\n".join(found.lines()))
    return 0 if found.ok else 1


def _ui(args: Sequence[str], prog: str) -> int:
    from ti_jax.cli.flags import parse

    with _output():
        config = parse(UiConfig, args, prog=prog, examples=UI_EXAMPLES.format(prog=prog), config_file=False)
    check_fields(config)
    from ti_jax.ui.server import serve

    serve(os.path.expanduser(config.output_dir), config.host, config.port, config.models)
    return 0


@contextlib.contextmanager
def _output() -> Iterator[None]:
    """Context for printing to stdout: a reader that has closed the pipe, like ``head``, ends the program silently."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Or Python complains when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # as a shell reports SIGPIPE


COMMANDS: dict[str, tuple[Callable[[Sequence[str], str], int], str]] = {
    "train": (_train, "Learn a new word from a few pictures (train.py)."),
    "infer": (_infer, "Draw pictures of prompts, with learned words in them (infer.py)."),
    "evaluate": (
        _evaluate,
        "Score a learned word: is it the concept, and are prompts still followed?",
    ),
    "plan": (
        _plan,
        "Estimate memory and time of a training run, here, on a TPU slice or on a GPU, without running it.",
    ),
    "data": (_data, "Show what a run would see in a folder of pictures: a table and a contact sheet, without a model."),
    "verify": (_verify, "Check that diffusers on PyTorch loads a learned word and encodes it as ti_jax does."),
    "embedding": (
        _embedding,
        "Convert, inspect, merge, prune or transfer files of learned words, of any known format.",
    ),
    "doctor": (_doctor, "Check this machine: versions, devices, caches, a timed step; what a bug report starts with."),
    "ui": (_ui, "Learn, try and save words on a page in the browser."),
}
