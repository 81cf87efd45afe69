"""``ti-jax embedding convert|inspect|merge|prune|transfer``: tools for files of learned words.

Modules that are slow to import are imported inside the commands, after the command line has been checked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ti_jax.cli.flags import parse
from ti_jax.config import ModelSource, check_fields
from ti_jax.config.fields import setting
from ti_jax.config.rules import TEXT, WHOLE, WORD
from ti_jax.config.yaml import nearest
from ti_jax.errors import InputError
from ti_jax.words import fill

if TYPE_CHECKING:
    from ti_jax.embeddings import Embedding

FormatName = Literal["diffusers", "comfyui", "a1111", "card"]

CONVERT_EXAMPLES = """\
examples:
  {prog} learned_embeds.safetensors cat-toy.pt
      from diffusers' format to AUTOMATIC1111's
  {prog} cat-card.png cat.safetensors --token "<cat-toy>"
      from an AUTOMATIC1111 image card, under another name
  {prog} learned_embeds.safetensors cat.safetensors --format comfyui
      an SDXL word's two files into one file with clip_l and clip_g
"""

INSPECT_EXAMPLES = """\
examples:
  {prog} output/learned_embeds.safetensors
  {prog} cat.pt style.png --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5
"""

MERGE_EXAMPLES = """\
examples:
  {prog} cat.pt dog.pt catdog.safetensors --token "<catdog>"
      the mean of the two
  {prog} cat.pt dog.pt mostly-cat.safetensors --token "<catdog>" --method slerp --weights 3 1
      a quarter of the arc from cat to dog
  {prog} cat.pt watercolour.pt both.safetensors --token "<both>" --method concat
"""

PRUNE_EXAMPLES = """\
examples:
  {prog} cat.safetensors cat-2.safetensors --keep 2 --pretrained_model_name_or_path ./my-sd
      keep the two vectors that matter most to that model's text encoder
  {prog} cat.safetensors cat-short.safetensors --drop 0 3 --pretrained_model_name_or_path ./my-sd
"""


TRANSFER_EXAMPLES = """\
examples:
  {prog} cat.safetensors --to sdxl
      writes cat-sdxl.safetensors and cat-sdxl_2.safetensors, for train.py --initializer_embedding cat-sdxl.safetensors
  {prog} cat.safetensors cat-xl.safetensors --to sdxl --pretrained_model_name_or_path ./my-sdxl
  {prog} cat-xl.safetensors --to sd15
"""

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@dataclass(frozen=True)
class ConvertConfig:
    """Read the learned word in FILE, of any known format, and write it to OUT in another format."""

    format: FormatName | None = None
    """Format of OUT: diffusers (.safetensors, .bin), comfyui (.safetensors with emb_params, or clip_l and clip_g),
    a1111 (.pt) or card (AUTOMATIC1111's .png). Left out: card for .png, a1111 for .pt, diffusers for .safetensors and
    .bin."""
    token: str | None = setting(None, WORD)
    """The word in OUT. Left out: as in FILE. If FILE has several words, the one to read."""
    picture: str | None = setting(None, TEXT, path="input")
    """Picture of an image card. Left out: the word on a plain background."""


@dataclass(frozen=True)
class InspectConfig(ModelSource):
    """Show what files of learned words contain: format, family, norms, nearest tokens, metadata."""

    token: str | None = setting(None, WORD)
    """If a file has several words, the one to read."""
    nearest: int = setting(5, WHOLE)
    """How many of the vocabulary's tokens to show for each vector, nearest by cosine first."""


@dataclass(frozen=True)
class MergeConfig:
    """Merge the learned words of several FILEs into one, and write it to OUT."""

    token: str | None = setting(None, WORD)
    """The new word, e.g. <catdog>. Required."""
    method: Literal["sum", "concat", "slerp"] = "sum"
    """sum: weighted sum, vector by vector. concat: all vectors, one after the other. slerp: spherical interpolation,
    direction and length separately."""
    weights: tuple[str, ...] = ()
    """A number for each FILE, in their order. For sum they are used as given (left out: 1/k each, the mean), for slerp
    they are normalised (left out: equal); concat takes none."""
    format: FormatName | None = None
    """Format of OUT, as in convert."""


@dataclass(frozen=True)
class PruneConfig(ModelSource):
    """Drop vectors of the word in FILE, write the rest to OUT, and report what is lost."""

    keep: int | None = setting(None, first=True)
    """How many vectors to keep. Greedy: drops one at a time the vector that changes the text encoder's output least."""
    drop: tuple[str, ...] = setting((), first=True)
    """Indices of the vectors to drop, counted from 0, instead of --keep."""
    prompt: str = setting("a photo of {}", TEXT)
    """Prompt for the text encoder, with the word in it or {} in its place."""
    token: str | None = setting(None, WORD)
    """The word in OUT. Left out: as in FILE. If FILE has several words, the one to read."""
    format: FormatName | None = None
    """Format of OUT, as in convert."""


@dataclass(frozen=True)
class TransferConfig(ModelSource):
    """Make of the word in FILE, of SD1.x or SDXL, the start of a word for the other family, and write it to OUT (left
    out: FILE's name with the family). It is a start, not the word: train.py --initializer_embedding OUT goes on from
    there. For SDXL the vectors are used for its first text encoder, which is that of SD1.x; the second starts from the
    rows of the tokens that are nearest to them in the first."""

    pretrained_model_name_or_path: str | None = setting(None, TEXT, path="model", first=True)
    """The SDXL model whose tokens and text encoders' tables are read for --to sdxl: a diffusers folder, a hub id or a
    single checkpoint. Left out: stabilityai/stable-diffusion-xl-base-1.0."""
    to: Literal["sdxl", "sd15"] | None = setting(None, first=True)
    """The family to start for. Required."""
    token: str | None = setting(None, WORD)
    """The word in OUT. Left out: as in FILE. If FILE has several words, the one to read."""
    format: FormatName | None = None
    """Format of OUT, as in convert."""


def run(args: Sequence[str], prog: str) -> str:
    """Run ``embedding COMMAND FILE ... [flags]`` and return what to print.

    Raises:
      InputError: any error in the input; nothing has been written.
      SystemExit: with status 0, after a command's ``--help``.
    """
    if not args:
        raise InputError(f"no command given; one of {', '.join(COMMANDS)}, or {prog} --help")
    command, *rest = args
    if command in ("-h", "--help"):
        return _overview(prog)
    if command not in COMMANDS:
        remedy = nearest(command, COMMANDS, "did you mean {}?", f"known are {', '.join(COMMANDS)}")
        raise InputError(f"unknown command {command!r}; {remedy}")
    function, cls, files, examples = COMMANDS[command]
    first_flag = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    paths, flags = rest[:first_flag], rest[first_flag:]
    prog = f"{prog} {command}"
    config: Any = parse(cls, flags, prog=f"{prog} {files}", examples=examples.format(prog=prog), config_file=False)
    if any(not path for path in paths):
        raise InputError(f"a file's name is empty: {prog} {files}, with the flags after them")
    return function([Path(path) for path in paths], config, f"{prog} {files}")


def _overview(prog: str) -> str:
    lines = [f"  {f'{name} {files}':26}{cls.__doc__}" for name, (_, cls, files, _) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {prog} COMMAND FILE ... [FLAGS]",
            "",
            "Tools for files of learned words. They read the formats of diffusers, AUTOMATIC1111 (.pt, image cards),",
            "ComfyUI, kohya, invoke and OneTrainer, recognised by the file's content.",
            "",
            "commands:",
            *lines,
            "",
            f"{prog} COMMAND --help  lists a command's flags.",
        ]
    )


def _expect(paths: Sequence[Path], least: int, most: int | None, usage: str) -> None:
    if len(paths) < least or (most is not None and len(paths) > most):
        given = " ".join(map(str, paths)) or "none"
        raise InputError(f"files given: {given}; expected {usage}, with the flags after them")


def _load(path: Path, token: str | None = None) -> Embedding:
    from ti_jax.embeddings import Embedding

    embedding = Embedding.load(path, token)
    for remark in embedding.remarks:
        print(f"note: {path}: {remark}", file=sys.stderr)
    return embedding


def _write(embedding: Embedding, path: Path, format_name: str | None, picture: Path | None = None) -> str:
    """Write a word; returns the line that reports it."""
    from ti_jax.embeddings.a1111_format import write_card
    from ti_jax.embeddings.families import describe
    from ti_jax.embeddings.formats import format_for, render
    from ti_jax.files import write_together

    chosen = format_name or format_for(path)
    if picture is None:
        files = render(embedding, path, chosen)
    elif chosen == "card":
        files = write_card(embedding, path, _read_picture(picture))
    else:
        raise InputError(f"--picture {picture}: only an image card has a picture; give OUT as .png, or leave it out")
    write_together(files)
    count = f"{embedding.num_vectors} vector{'s' if embedding.num_vectors > 1 else ''}"
    family = describe(embedding.dims, embedding.metadata)
    return f"{' and '.join(map(str, files))}: {embedding.token}, {count}, for {family}, as {chosen}"


def _check_target(path: Path, format_name: str | None) -> None:
    """Refuse a place for OUT that nothing could be written to, before a model is read or even downloaded."""
    from ti_jax.embeddings.formats import format_for

    if format_name is None:
        format_for(path)
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no such folder; make it or choose another place")


def _read_picture(path: Path) -> Any:
    from ti_jax.data.reading import read_picture

    if not path.exists():
        raise InputError(f"--picture {path}: no such file")
    try:
        return read_picture(path)
    except InputError as error:
        raise InputError(f"--picture {error}") from error


def _convert(paths: Sequence[Path], config: ConvertConfig, usage: str) -> str:
    from ti_jax.embeddings.warn import word_warnings

    _expect(paths, 2, 2, usage)
    check_fields(config)
    source, target = paths
    picture = None if config.picture is None else Path(config.picture)
    embedding = _load(source, config.token)
    written = _write(embedding, target, config.format, picture)
    for warning in word_warnings(embedding):
        print(f"warning: {warning}", file=sys.stderr)
    return written


def _inspect(paths: Sequence[Path], config: InspectConfig, usage: str) -> str:
    _expect(paths, 1, None, usage)
    check_fields(config)
    from ti_jax.embeddings import check_fits
    from ti_jax.embeddings.inspect import compare, load_for_inspection

    reports, refused = [], []
    for path in paths:
        try:
            reports.append(load_for_inspection(path, config.token))
        except InputError as error:
            if len(paths) == 1:
                raise
            refused.append(f"not read: {error}")
    if not reports:
        raise InputError("; ".join(refused))
    from ti_jax.text.text_encoders import TextEncoders

    encoders = TextEncoders.from_pretrained(config.pretrained_model_name_or_path, config.revision, config.variant)
    parts = []
    for report in reports:
        dims = report.embedding.dims
        # Half an SDXL word can be compared with its text encoder; the embedded model is only a default guess.
        comparable = dims.items() <= encoders.embedding_dims.items()
        if config.pretrained_model_name_or_path is not None and not comparable:
            check_fits(report.embedding, encoders.embedding_dims, report.path)
        if comparable:
            report = compare(report, {name: encoders.vocabulary(name) for name in dims}, config.nearest)
        parts.append(str(report))
    return "\n\n".join([*parts, *refused])


def _merge(paths: Sequence[Path], config: MergeConfig, usage: str) -> str:
    _expect(paths, 3, None, usage)
    if config.token is None:
        raise InputError("--token is missing: give the new word a name, like <catdog>")
    check_fields(config)
    weights = [_number("weights", word, float) for word in config.weights] or None
    from ti_jax.embeddings.merge import merge

    *sources, target = paths
    merged = merge([_load(path) for path in sources], config.token, config.method, weights, sources)
    return _write(merged, target, config.format)


def _prune(paths: Sequence[Path], config: PruneConfig, usage: str) -> str:
    _expect(paths, 2, 2, usage)
    check_fields(config)
    if (config.keep is None) == (not config.drop):
        raise InputError("give one of --keep (how many vectors to keep) and --drop (the indices of those to drop)")
    drop = [_number("drop", word, int) for word in config.drop]
    from ti_jax.embeddings import check_fits
    from ti_jax.embeddings import prune as pruning

    source, target = paths
    embedding = _load(source, config.token)
    count = embedding.num_vectors
    if config.keep is not None:
        pruning.check_keep(count, config.keep)
    staying = pruning.staying_without(count, drop) if drop else []
    _check_target(target, config.format)
    from ti_jax.text.text_encoders import TextEncoders

    encoders = TextEncoders.from_pretrained(config.pretrained_model_name_or_path, config.revision, config.variant)
    check_fits(embedding, encoders.embedding_dims, source)

    def states(selections: Sequence[Sequence[int]]) -> Any:
        return encoders.end_states(config.prompt, embedding, selections)

    if config.keep is not None:
        staying = pruning.choose(count, config.keep, states)
    (loss,) = pruning.losses(count, [staying], states)
    written = _write(pruning.select(embedding, staying), target, config.format)
    gone = [str(number) for number in range(count) if number not in staying]
    dropped = f"vector{'s' if len(gone) > 1 else ''} {' '.join(gone)} of {count}"
    prompt = fill(config.prompt, embedding.token)
    return f"{written}\n{dropped} dropped: for {prompt!r} {loss}"


def _transfer(paths: Sequence[Path], config: TransferConfig, usage: str) -> str:
    _expect(paths, 1, 2, usage)
    if config.to is None:
        raise InputError("--to is missing: the family to start a word for, sdxl or sd15")
    check_fields(config)
    source = paths[0]
    target = paths[1] if len(paths) > 1 else source.with_name(f"{source.stem}-{config.to}.safetensors")
    from ti_jax.embeddings import transfer
    from ti_jax.embeddings.families import FAMILIES

    embedding = _load(source, config.token)
    _check_target(target, config.format)
    if config.to == "sd15":
        return _write(transfer.to_sd15(embedding), target, config.format)
    model = config.pretrained_model_name_or_path or SDXL
    transfer.check_source(embedding, FAMILIES["SDXL"][transfer.FIRST] if model == SDXL else None, model)
    from ti_jax.text.text_encoders import TextEncoders

    encoders = TextEncoders.from_pretrained(model, config.revision, config.variant)
    if len(encoders.modules) != 2:
        raise InputError(f"--pretrained_model_name_or_path {model}: it has one text encoder; give an SDXL model")
    first, second = (
        transfer.TokenTable(encoders.tokenizers[name].get_vocab(), encoders.token_table(name))
        for name in (transfer.FIRST, transfer.SECOND)
    )
    moved, nearest = transfer.to_sdxl(embedding, first, second, model)
    return f"{_write(moved, target, config.format)}\n{transfer.report(nearest)}"


def _number(flag: str, word: str, kind: type[int] | type[float]) -> Any:
    try:
        return kind(word)
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"--{flag} {word}: must be {what}") from None


Command = tuple[Callable[[Sequence[Path], Any, str], str], type, str, str]

COMMANDS: dict[str, Command] = {
    "convert": (_convert, ConvertConfig, "FILE OUT", CONVERT_EXAMPLES),
    "inspect": (_inspect, InspectConfig, "FILE ...", INSPECT_EXAMPLES),
    "merge": (_merge, MergeConfig, "FILE FILE ... OUT", MERGE_EXAMPLES),
    "prune": (_prune, PruneConfig, "FILE OUT", PRUNE_EXAMPLES),
    "transfer": (_transfer, TransferConfig, "FILE [OUT]", TRANSFER_EXAMPLES),
}
