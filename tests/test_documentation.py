"""The commands in the README and the documentation: each parses, and the marked ones run as they are written.

``<!-- run -->`` in the line before a block of commands: it runs in the suite; ``<!-- run: slow -->``: with ``-m slow``.
The blocks of a page run in its order, in a folder that has what a clone has.
"""

import functools
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NO_OPTIMISATIONS

from ti_jax.cli import embedding, main
from ti_jax.cli.flags import NO_COUNTERPART, parse
from ti_jax.config import DataConfig, EvaluateConfig, InferConfig, PlanConfig, TrainConfig, check_fields

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").glob("*.yaml")]
)
BLOCK = re.compile(r"(?:<!-- (run|run: slow) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
CONFIGS = {
    "train": TrainConfig, "infer": InferConfig, "plan": PlanConfig, "data": DataConfig, "evaluate": EvaluateConfig,
    "verify": main.VerifyConfig,
    "doctor": main.DoctorConfig,
    "ui": main.UiConfig,
}  # fmt: skip


def commands_of(path):
    """Command lines of a page: those of its blocks and its inline code, as words; of a config those of its header."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        text = re.sub(r"(?<=\w) {3,}(?=\w)", "\n", re.sub(r"^# ?", "", text, flags=re.MULTILINE))
        text = f"```sh\n{text}```"
    found = [line for _, kind, block in BLOCK.findall(text) if kind == "sh" for line in lines_of(block)]
    inline = re.findall(r"`([^`]+)`", BLOCK.sub("", text))
    return [words for line in found + [" ".join(each.split()) for each in inline] for words in programs_in(line)]


def lines_of(block):
    """The lines of a block of shell commands, continued ones joined, without what is passed to a program as text."""
    block = re.sub(r"<<'(\w+)'\n.*?^\1$", "", block, flags=re.DOTALL | re.MULTILINE)
    return block.replace("\\\n", " ").splitlines()


def programs_in(line):
    """The words of each call of our programs in a line, also of one that is passed to another program as text."""
    if re.search(r"(train|infer)\.py|ti-jax", line) is None:
        return
    words = ["&&", *shlex.split(line, comments=True)]
    for at, word in enumerate(words):
        if " " in word:
            yield from programs_in(word)
        started = words[at - 1] in ("&&", "python") or "torchrun" in words[:at]
        if (word == "ti-jax" and words[at - 1] == "&&") or (word in ("train.py", "infer.py") and started):
            rest = list(itertools.takewhile(lambda word: word not in ("&&", "|", ">"), words[at + 1 :]))
            rest = [each for before, each in itertools.pairwise(["", *rest]) if each != "..." or before.startswith("-")]
            yield [*([] if word == "ti-jax" else [word[:-3]]), *rest]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_parses(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands_of(path):
        check(*words)


@functools.cache
def check(*words):
    """Raise an error where a command line has a flag or a value that does not exist."""
    if not words or words[0].startswith("--"):
        assert words in ((), ("--help",), ("--version",)), words
        return
    command, *rest = words
    if command == "embedding":
        return check_embedding(rest)
    assert command in CONFIGS, f"there is no command {' '.join(words)}"
    rest = rest[1:] if rest and not rest[0].startswith("-") else rest
    if rest in ([], ["--help"]):
        return
    if "--config" in rest and not (ROOT / rest[rest.index("--config") + 1]).exists():  # one that a run has written
        at = rest.index("--config")
        rest = rest[:at] + rest[at + 2 :]
    if command == "infer" and "--prompt" not in rest:  # left out with "..."
        rest += ["--prompt", "{}"]
    has_file = command not in ("evaluate", "verify", "doctor", "ui")
    check_fields(
        parse(CONFIGS[command], rest, prog="", examples="", config_file=has_file, no_counterpart=NO_COUNTERPART)
    )


def check_embedding(words):
    if words:
        _, cls, *_ = embedding.COMMANDS[words[0]]
        first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
        check_fields(parse(cls, words[first:], prog="", examples="", config_file=False))


def test_what_is_not_right_in_a_page_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Write `ti-jax data cat/ --recursive`.\n\n```sh\ncd x && python train.py --num_vector 2 \\\n  --seed 1\n```\n"
    )
    wrong, right = commands_of(page)
    check(*right)
    assert wrong == ["train", "--num_vector", "2", "--seed", "1"]
    with pytest.raises(Exception, match="unknown flag --num_vector; did you mean --num_vectors"):
        check(*wrong)


def marked(mark):
    """The blocks of each page that have a mark."""
    for path in PAGES:
        if blocks := [block for how, _, block in BLOCK.findall(path.read_text(encoding="utf-8")) if how == mark]:
            yield pytest.param(blocks, id=str(path.relative_to(ROOT)))


@pytest.mark.parametrize("blocks", list(marked("run")))
def test_marked_commands_run(blocks, tmp_path):
    run(blocks, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", list(marked("run: slow")))
def test_marked_commands_that_take_long_run(blocks, tmp_path):
    run(blocks, tmp_path)


def run(blocks, folder):
    for name in ("train.py", "infer.py", "configs", "docs", "ti_jax"):
        (folder / name).symlink_to(ROOT / name)
    programs = folder / "bin"
    programs.mkdir()
    for name, arguments in (("python", ""), ("ti-jax", "-m ti_jax")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (programs / name).chmod(0o755)
    # As a user's: not compiled as tests are, and not on eight devices.
    own = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", NO_OPTIMISATIONS)}
    own |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    commands = ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)]
    done = subprocess.run(commands, cwd=folder, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr and "error:" not in done.stderr


PACKAGE = """
KINDS = {"a": "an apple tree", "b": "a banana plant"}
RESUME = "start again"

def check(path, kind, number):
    remedy = "give another picture, " if number else "leave the picture out, "
    for name in ("training_folder", "validation_folder"):
        raise InputError(f"--{name} {path.stem!r}: {KINDS[kind]}; {remedy}" + _hint(number))

def _hint(number):
    return f"like {number + 1}"

def warn(what):
    print(f"warning: {what}; {RESUME}")

def run():
    warn("the network is away")
"""


def test_messages_are_read_from_the_code(tmp_path, monkeypatch):
    """What is put together from names, constants, other functions and callers is followed."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "hooks")
    from messages import Slot, messages

    def shown(folder):
        return [
            "".join(f"[{part}]" if isinstance(part, Slot) else part for part in message.text)
            for message in messages(folder)
        ]

    (tmp_path / "module.py").write_text(PACKAGE)
    *errors, warning = shown(tmp_path)
    assert set(errors) == {
        f"--{name} [stem]: {kind}; {remedy}, like [number]"
        for name in ("training_folder", "validation_folder")
        for kind in ("an apple tree", "a banana plant")
        for remedy in ("give another picture", "leave the picture out")
    }
    assert warning == "warning: the network is away; start again"
    assert "--huber_c [huber_c]: does nothing without --loss huber; give both or neither" in shown(
        ROOT / "ti_jax" / "config"
    )
