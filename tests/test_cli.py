"""The command line: every flag arrives, help tells all of them, and what is wrong is one line with status 2."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from ti_jax.cli import embedding, main
from ti_jax.cli.flags import NO_COUNTERPART, field_docs, parse
from ti_jax.config import DataConfig, EvaluateConfig, InferConfig, PlanConfig, TrainConfig
from ti_jax.config.rates import RATE
from ti_jax.config.row_norm import NORM
from ti_jax.config.yaml import strip_optional
from ti_jax.errors import InputError

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "train": TrainConfig, "infer": InferConfig, "evaluate FILE": EvaluateConfig, "plan": PlanConfig,
    "data DIR": DataConfig,
    "verify FILE": main.VerifyConfig,
    "ui": main.UiConfig,
    **{f"embedding {name} {files}": cls for name, (_, cls, files, _) in embedding.COMMANDS.items()},
}  # fmt: skip


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)


def flags(cls, *args, **kwargs):
    return parse(cls, args, prog="test", examples="", **kwargs)


def samples(cls):
    """Of each field the words after its flag and the value that they stand for, which no default and no other has."""
    hints, found = typing.get_type_hints(cls), {}
    for index, field in enumerate(dataclasses.fields(cls)):
        base, _ = strip_optional(hints[field.name])
        if typing.get_origin(base) is typing.Literal:
            choice = next(choice for choice in typing.get_args(base) if choice != field.default)
            found[field.name] = [choice], choice
        elif typing.get_origin(base) is tuple:
            first = typing.get_args(base)[0]
            if typing.get_origin(first) is typing.Literal:
                choice = next(choice for choice in typing.get_args(first) if (choice,) != field.default)
                found[field.name] = [choice], (choice,)
            else:
                values = {str: (f"a {{}} {index}", "c"), int: (index, 2000 + index), float: (0.25, index + 0.5)}[first]
                found[field.name] = list(map(str, values)), values
        elif base is bool:
            found[field.name] = [], not field.default
        elif base in (RATE, NORM):
            text = {RATE: "5e-3:200, 1e-3:1000, 2e-4", NORM: "vocabulary"}[base]
            found[field.name] = [text], text
        else:
            value = {str: f"text {index}", int: 1000 + index, float: index + 0.25}[base]
            found[field.name] = [f"{value:e}" if base is float else str(value)], value
        assert found[field.name][1] != field.default
    return found


# -- flags


@pytest.mark.parametrize("cls", COMMANDS.values())
@pytest.mark.parametrize(
    "written",
    [
        lambda name, words: [f"--{name}", *words],
        lambda name, words: [f"--{name.replace('_', '-')}", *words],
        lambda name, words: [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words],
    ],
    ids=["underscores", "hyphens", "equals"],
)
def test_every_flag_reaches_the_config_and_nothing_else_moves(cls, written):
    """All at once, and then by the digits of their number in base 2, so that of any two flags one stands alone."""
    known = samples(cls)
    for bit in (None, *range(len(known).bit_length())):
        some = {name: known[name] for index, name in enumerate(known, 1) if bit is None or index >> bit & 1}
        line = [word for name, (words, _) in some.items() for word in written(name, words)]
        given = {name: value for name, (_, value) in some.items()}
        assert dataclasses.asdict(flags(cls, *line)) == dataclasses.asdict(cls()) | given


@pytest.mark.parametrize("cls", COMMANDS.values())
def test_flags_go_before_the_file(tmp_path, cls):
    path = tmp_path / "x.yaml"
    known = {name: value for name, (_, value) in samples(cls).items()}
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in known.items()))
    assert dataclasses.asdict(flags(cls, "--config", str(path))) == known
    line, told = [], {}
    for field in dataclasses.fields(cls):
        base, optional = strip_optional(typing.get_type_hints(cls)[field.name])
        if base is bool:
            words, told[field.name] = [f"--no_{field.name}"], False
        elif optional:
            words, told[field.name] = [f"--{field.name}", "None"], None
        else:
            told[field.name] = field.default
            default = field.default if isinstance(field.default, tuple) else [str(field.default)]
            words = [f"--{field.name}", *default]
        line += words
    assert dataclasses.asdict(flags(cls, *line, "--config", str(path))) == told


def test_switches_are_turned_off_in_either_spelling(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("center_crop: true\nscale_lr: true\n")
    config = flags(TrainConfig, "--config", str(path), "--no-center_crop")
    assert (config.center_crop, config.scale_lr) == (False, True)
    assert not flags(TrainConfig, "--config", str(path), "--no-center-crop").center_crop


@pytest.mark.parametrize(
    ("args", "value"),
    [
        ([], None),
        (["--gradient_checkpointing"], "full"),  # as diffusers' script has it
        (["--gradient-checkpointing", "--seed", "1"], "full"),
        (["--no_gradient_checkpointing"], "none"),
        (["--no-gradient-checkpointing"], "none"),
        (["--gradient_checkpointing", "policy"], "policy"),
        (["--gradient-checkpointing=none"], "none"),
        (["--gradient_checkpointing", "--no_gradient_checkpointing"], "none"),
        (["--no_gradient_checkpointing", "--gradient_checkpointing"], "full"),
    ],
)
def test_gradient_checkpointing_is_a_switch_or_has_a_value(args, value):
    assert flags(TrainConfig, *args).gradient_checkpointing == value


def test_the_last_of_repeated_flags_counts():
    assert flags(TrainConfig, "--seed", "1", "--seed", "2").seed == 2


def test_a_list_may_be_given_in_pieces():
    pieces = ["--validation_prompt", "a {}", "--seed", "2", "--validation-prompt=b {}", "--validation_prompt", "c {}"]
    config = flags(TrainConfig, *pieces, "d {}", "--scale_lr")
    assert config.validation_prompt == ("a {}", "b {}", "c {}", "d {}")
    assert (config.seed, config.scale_lr) == (2, True)
    assert flags(TrainConfig, "--validation_prompt=-x {}").validation_prompt == ("-x {}",)


def test_negative_numbers_and_leading_hyphens_are_values():
    assert flags(TrainConfig, "--learning_rate", "-1e-3").learning_rate == -1e-3
    assert flags(InferConfig, "--negative_prompt=-blurry").negative_prompt == "-blurry"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--learning_rat", "1"], "unknown flag --learning_rat; did you mean --learning_rate?"),
        (["--learning-rat=1"], "unknown flag --learning-rat; did you mean --learning_rate?"),
        (["--zzz"], "unknown flag --zzz; see test --help"),
        (["-x"], "unknown flag -x; see test --help"),
        (["--seed"], "--seed takes one value, a whole number; it has none"),
        (["--seed", "--scale_lr"], "--seed takes one value, a whole number; it has none"),
        (["--seed", "1", "2"], "--seed takes one value, a whole number; it has 2: 1 2 (quote text that has spaces)"),
        (["--seed", "x"], "--seed x: must be a whole number"),
        (["--seed", "1.5"], "--seed 1.5: must be a whole number"),
        (["--seed", "None"], "--seed None: must be a whole number"),
        (["--learning-rate", "fast"], "--learning_rate fast: must be a number"),
        (["--row_norm", "mean"], "--row_norm mean: must be free, initial, vocabulary or a number"),
        (["--report_to", "mlflow"], "--report_to mlflow: must be one of tensorboard, wandb or none"),
        (["--lr_scheduler=cosin"], "--lr_scheduler cosin: must be one of constant, constant_with_warmup, linear, "),
        (["--scale_lr", "true"], "'true' belongs to no flag; a switch has no value: --name is on, --no_name is off"),
        (["--scale_lr=False"], "'False' belongs to no flag; a switch has no value"),
        (["cat/"], "'cat/' belongs to no flag; a flag is written --name value (quote text that has spaces)"),
        (["--", "--seed"], "--seed"),
        (["--no-seed", "3"], "--no-seed: --seed has a value and no --no_ form; "),
        (["--gradient_checkpointing", "half"], "--gradient_checkpointing half: must be one of none, policy or full"),
        (["--gradient-checkpointing=true"], "--gradient_checkpointing true: must be one of none, policy or full"),
        (
            ["--gradient_checkpointing", "none", "full"],
            "--gradient_checkpointing takes one value, one of none, policy ",
        ),
        (
            ["--no_gradient_checkpointing=full"],
            "--no_gradient_checkpointing=full: --no_gradient_checkpointing takes no ",
        ),
        (["--config"], "--config takes one value, text; it has none"),
        (["--config", "nope.yaml"], "nope.yaml: cannot read the config"),
        (["--config", "nope.yaml", "--sed", "1"], "unknown flag --sed; did you mean --seed?"),
    ],
)
def test_flags_that_cannot_be_are_named_with_the_remedy(args, message):
    with pytest.raises(InputError) as error:
        flags(TrainConfig, *args)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", sorted(NO_COUNTERPART))
def test_flags_of_diffusers_without_a_counterpart_say_why(name):
    assert name not in {field.name for field in dataclasses.fields(TrainConfig)}
    for written in (f"--{name}", f"--{name.replace('_', '-')}", f"--{name}=1"):
        with pytest.raises(InputError, match=rf"^--{name} has no counterpart here \(.+\); leave it out$"):
            flags(TrainConfig, written, no_counterpart=NO_COUNTERPART)
    with pytest.raises(InputError, match=f"^unknown flag --{name}"):
        flags(InferConfig, f"--{name}")


def test_the_flags_of_diffusers_script_are_all_known():
    ours = {field.name for field in dataclasses.fields(TrainConfig)} | NO_COUNTERPART.keys()
    theirs = """save_steps save_as_full_pipeline num_vectors pretrained_model_name_or_path revision variant
        tokenizer_name train_data_dir placeholder_token initializer_token learnable_property repeats output_dir
        seed resolution center_crop train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps
        gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles
        dataloader_num_workers adam_beta1 adam_beta2 adam_weight_decay adam_epsilon push_to_hub hub_token
        hub_model_id logging_dir mixed_precision allow_tf32 report_to validation_prompt num_validation_images
        validation_steps validation_epochs local_rank checkpointing_steps checkpoints_total_limit
        resume_from_checkpoint enable_xformers_memory_efficient_attention no_safe_serialization"""
    assert set(theirs.split()) <= ours


# -- help


@pytest.mark.parametrize(("command", "cls"), COMMANDS.items())
def test_help_tells_every_flag_with_its_doc_and_default(capsys, monkeypatch, command, cls):
    monkeypatch.setenv("COLUMNS", "80")
    words = [word for word in command.split() if word.islower()]
    with pytest.raises(SystemExit) as stop:
        main.main([*words, "--help"])
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"usage: ti-jax {command} ")
    assert "\x1b" not in out
    box = out[out.index("options") : out.index("\nexample")]
    assert max(map(len, box.splitlines())) <= 80
    text = " ".join(re.sub(r"[│|]", " ", out).split())
    for field in dataclasses.fields(cls):
        flag = text.index(f" --{field.name}")
        doc = text.index(field_docs(cls)[field.name], flag)
        if field.default not in (None, (), False):
            default = " ".join(map(repr, field.default)) if isinstance(field.default, tuple) else field.default
            assert text[doc:].startswith(f"{field_docs(cls)[field.name]} (default: {default})")
    assert re.search(rf" examples?: ti-jax {' '.join(words)} ", text[doc:])


@pytest.mark.parametrize(
    ("command", "first"),
    [
        ("train", ["config", "pretrained_model_name_or_path", "train_data_dir", "placeholder_token"]),
        ("infer", ["config", "pretrained_model_name_or_path", "prompt", "embedding", "revision"]),
    ],
)
def test_help_has_the_flags_that_matter_most_first(capsys, monkeypatch, command, first):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main.main([command, "--help"])
    assert re.findall(r"^\W --(\w+)", capsys.readouterr().out, re.M)[: len(first)] == first


@pytest.mark.parametrize("script", ["train.py", "infer.py"])
def test_examples_in_the_help_are_right(capsys, script):
    command = script.removesuffix(".py")
    with pytest.raises(SystemExit):
        main.main([command, "--help"], prog=script)
    _, examples = capsys.readouterr().out.split("examples:\n")
    lines = [line.strip() for line in examples.replace("\\\n", " ").splitlines() if f"python {script}" in line]
    assert lines
    for line in lines:
        args = shlex.split(line)[2:]
        config = flags(COMMANDS[command], *[arg.replace("configs/", f"{ROOT}/configs/") for arg in args])
        (main.resolve if command == "train" else main.resolve_infer)(config)


def test_help_lists_the_commands_and_version(capsys):
    assert main.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in main.COMMANDS)
    assert main.main(["--version"]) == 0
    assert re.fullmatch(r"ti-jax \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_help_into_a_closed_pipe_is_quiet():
    done = subprocess.run(
        f"{sys.executable} train.py --help | head -n 1",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("usage: train.py [-h] [OPTIONS]\n", "")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "-m ti_jax",
            "ti-jax: error: no command given; one of train, infer, evaluate, plan, data, verify, embedding, doctor, "
            "ui, or ti-jax --help",
        ),
        ("-m ti_jax trian", "ti-jax: error: unknown command 'trian'; did you mean train?"),
        (
            "-m ti_jax xyz --seed",
            "ti-jax: error: unknown command 'xyz'; known are train, infer, evaluate, plan, data, verify, embedding",
        ),
        ("-m ti_jax train --sed 1", "ti-jax: error: unknown flag --sed; did you mean --seed?"),
        (
            "-m ti_jax verify",
            "ti-jax: error: the embedding file is missing: ti-jax verify FILE, with the flags after it",
        ),
        (
            "-m ti_jax verify x.safetensors --seed 1",
            "ti-jax: error: unknown flag --seed; see ti-jax verify FILE --help",
        ),
        ("train.py --seed x", "train.py: error: --seed x: must be a whole number"),
        (
            "train.py --gradient_checkpointing half",
            "train.py: error: --gradient_checkpointing half: must be one of none, policy or full",
        ),
        ("train.py --num_vectors 0", "train.py: error: --num_vectors 0: must be 1 or more"),
        (
            "train.py --local_rank 3",
            "train.py: error: --local_rank has no counterpart here (JAX detects the devices by ",
        ),
        (
            "train.py --pretrained_model_name_or_path a/b",
            "train.py: error: --train_data_dir and --placeholder_token and ",
        ),
        (
            "train.py --config nope.yaml",
            "train.py: error: nope.yaml: cannot read the config (No such file or directory)",
        ),
        ("train.py --config a\nb.yaml", "train.py: error: a b.yaml: cannot read the config"),
        ("infer.py", "infer.py: error: --prompt is missing: say what to draw"),
        (
            "infer.py --prompt a --height 63",
            "infer.py: error: --height 63: must be from 8 to 8192 pixels and divisible by 8",
        ),
        (
            "infer.py --prompt a --height 1000000",
            "infer.py: error: --height 1000000: must be from 8 to 8192 pixels and divisible by 8",
        ),
        ("infer.py --prompt a --output a.jpg", "infer.py: error: --output 'a.jpg': must be the path of a .png file"),
        ("infer.py --prompt a --scheduler pndm", "infer.py: error: --scheduler pndm: must be one of ddim, euler, "),
    ],
)
def test_bad_command_lines_end_in_one_line_and_status_2(capsys, command, message):
    script, *args = command.removeprefix("-m ").split(" ")
    command, prog = ([], "ti-jax") if script == "ti_jax" else ([script.removesuffix(".py")], script)
    assert main.main([*command, *args], prog) == 2
    check_refusal(*capsys.readouterr(), message)


def check_refusal(stdout, stderr, message):
    assert stdout == ""
    assert stderr.startswith(message)
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1


# -- whole processes


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("-m ti_jax trian", "ti-jax: error: unknown command 'trian'; did you mean train?"),
        ("train.py --num_vectors 0", "train.py: error: --num_vectors 0: must be 1 or more"),
        ("infer.py --prompt a --height 63", "infer.py: error: --height 63: must be from 8 to 8192 pixels and "),
    ],
)
def test_scripts_end_in_one_line_and_status_2(command, message):
    done = run(*command.split(" "))
    assert done.returncode == 2
    check_refusal(done.stdout, done.stderr, message)


@pytest.mark.parametrize("module", ["tyro", "jax", "orbax"])
def test_a_package_that_is_not_installed_is_one_line(tmp_path, module):
    code = f"import runpy, sys; sys.modules[{module!r}] = None; runpy.run_path('train.py', run_name='__main__')"
    done = run("-c", code, "--output_dir", str(tmp_path / "out"), "--max_train_steps", "1")
    assert done.returncode == 2
    check_refusal(done.stdout, done.stderr, f"train.py: error: {module}")
    assert "is not installed: pip install -e . in the folder of train.py installs all that is needed" in done.stderr


def test_help_and_refusals_do_not_wait_for_jax():
    code = "\n".join(
        [
            "import sys",
            "from ti_jax.cli.main import main",
            "assert main(['train', '--seed', 'x']) == 2",
            "assert main(['infer', '--prompt', 'a', '--seed', '-1']) == 2",
            "assert main(['--help']) == 0",
            "slow = {'jax', 'flax', 'numpy', 'transformers', 'torch', 'PIL'} & sys.modules.keys()",
            "assert not slow, slow",
        ]
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_interruption_is_one_line_and_a_fault_of_ours_keeps_its_traceback(capsys, monkeypatch):
    def interrupted(args, prog):
        raise KeyboardInterrupt

    def faulty(args, prog):
        raise ZeroDivisionError

    monkeypatch.setitem(main.COMMANDS, "train", (interrupted, ""))
    assert main.main(["train"], prog="train.py") == 130
    assert capsys.readouterr().err == "train.py: interrupted\n"
    monkeypatch.setitem(main.COMMANDS, "train", (faulty, ""))
    with pytest.raises(ZeroDivisionError):
        main.main(["train"])
