"""Whole training runs on a tiny model: what they write, how they stop, and that a resumed run is the same run."""

import contextlib
import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import children
import jax
import numpy as np
import programs
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import ti_jax
from ti_jax.config import PlanConfig, resolve, resolve_plan
from ti_jax.config.yaml import load_yaml
from ti_jax.data.inputs import read_inputs
from ti_jax.training.actions import Timetable
from ti_jax.training.job import load, total_updates
from ti_jax.training.plan import Planner

REPOSITORY = Path(__file__).parent.parent


SETTINGS = {"num_vectors": 2, "train_batch_size": 2}


@pytest.fixture
def config(short_run):
    return replace(short_run, **SETTINGS)


@pytest.fixture(scope="module")
def two_steps(make_short_run, tmp_path_factory):
    """The result of a run of two steps."""
    return train(replace(make_short_run(tmp_path_factory.mktemp("run")), **SETTINGS, max_train_steps=2))


@pytest.fixture
def after_two_steps(config, two_steps):
    """The config of a run whose folder has those two steps."""
    shutil.copytree(two_steps.output_dir, config.output_dir)
    return config


def train(config):
    return ti_jax.train(config, devices=jax.devices()[:1])


def rows(result):
    return result.embedding.vectors["text_encoder"]


@pytest.fixture(scope="module")
def twelve_steps(make_short_run, tmp_path_factory):
    """The result of a run of twelve steps that does all that a run may do, and what it said."""
    config = replace(
        make_short_run(tmp_path_factory.mktemp("run")), **SETTINGS, save_steps=5, checkpointing_steps=4,
        checkpoints_total_limit=2, validation_prompt="a drawing of {}", validation_steps=6, num_validation_images=2,
    )  # fmt: skip
    with contextlib.redirect_stderr(io.StringIO()) as told:
        return train(config), told.getvalue()


def test_what_a_run_leaves(twelve_steps):
    result, told = twelve_steps
    out = result.output_dir
    assert result.losses.shape == (12,) and np.isfinite(result.losses).all() and not result.interrupted
    kept = ti_jax.Embedding.load(out / "learned_embeds.safetensors")
    assert kept.token == "<new>" and np.array_equal(kept.vectors["text_encoder"], rows(result))
    assert kept.metadata["steps"] == "12" and kept.metadata["initializer_token"] == "person"
    steps = {path.name for path in out.glob("learned_embeds-steps-*")}
    assert steps == {"learned_embeds-steps-5.safetensors", "learned_embeds-steps-10.safetensors"}
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["12", "8"]
    size = sum(path.stat().st_size for path in (out / "checkpoints" / "12").rglob("*") if path.is_file())
    assert size < 20_000, "a checkpoint is a few kilobytes"
    with Image.open(out / "overview.png") as overview, Image.open(out / "progress.png") as progress:
        assert overview.width > 300 and progress.height > 2 * 128
    assert {path.name for path in (out / "samples").iterdir()} == {
        "step-000006.png", "step-000012.png", *(f"overview-{i:02d}.png" for i in range(8)),
    }  # fmt: skip
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = [loss for record in records for loss in record.get("losses", [])]
    np.testing.assert_allclose(logged, result.losses, rtol=1e-6)
    assert {"loss", "learning_rate", "steps_per_second", "samples_per_second"} <= records[0].keys()
    # Every three steps, and where an action stands between; however many updates a dispatch had.
    logged = [record for record in records if "losses" in record]
    assert [record["step"] for record in logged] == [3, 4, 5, 6, 8, 9, 10, 12]
    assert [len(record["losses"]) for record in logged] == [3, 1, 1, 1, 2, 1, 1, 2]
    np.testing.assert_allclose(logged[0]["loss"], np.mean(result.losses[:3]), rtol=1e-6)
    assert any("text_encoder/row_1/distance" in record for record in records)
    assert list((out / "logs").glob("events.out.tfevents.*"))
    assert load_yaml(out / "config.yaml", ti_jax.TrainConfig)["max_train_steps"] == 12
    assert "row 0 moved by" in told and "row 1 moved by" in told and "to compile" in told
    report = (out / "report.html").read_text()
    assert "warning" not in told and "&lt;new&gt;" in report and "finished" in report and report.count("<svg") == 4
    assert report.count("data:image/") == 2 and str(out.parent) not in report, "both pictures, and no path"
    assert hashlib.sha256((out / "learned_embeds.safetensors").read_bytes()).hexdigest() in report
    assert "<code>max_train_steps</code>" in report and f"{result.seconds['train']:.1f}" in report


@pytest.mark.slow
def test_what_is_kept_is_chosen_by_the_memory_that_is_free(config, capsys, monkeypatch):
    config = replace(config, max_train_steps=1)
    same = {name: getattr(config, name) for name in ("pretrained_model_name_or_path", "num_vectors", "templates")}

    def temporary(way):
        plan = resolve_plan(PlanConfig(**same, gradient_checkpointing=way, logging_steps=1))
        return Planner(plan, np.float32, jax.devices()[:1]).at(config.train_batch_size).temporary

    def run(free):
        monkeypatch.setattr("ti_jax.training.loop.free_memory", lambda devices: free)
        out = train(config).output_dir
        return capsys.readouterr().err, load_yaml(out / "config.yaml", ti_jax.TrainConfig)["gradient_checkpointing"]

    told, kept = run(None)
    assert kept == "none" and "gradient checkpointing" not in told
    told, kept = run((temporary("none") + temporary("policy")) / 2)
    assert kept == "policy" and "a step; gradient checkpointing policy; the training step took" in told
    told, kept = run(0)
    assert kept == "full" and "gradient checkpointing full; the training step took" in told
    assert re.search(
        r"^warning: the training step takes .* give a smaller --train_batch_size .*--resolution$", told, re.M
    )


def test_an_sdxl_word_is_two_files_that_diffusers_loads(config, tiny_sdxl):
    from diffusers import StableDiffusionXLPipeline

    result = train(replace(config, pretrained_model_name_or_path=str(tiny_sdxl), initializer_token="red person"))
    files = [result.output_dir / f"learned_embeds{suffix}.safetensors" for suffix in ("", "_2")]
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    for file, encoder, tokenizer in zip(
        files, (pipe.text_encoder, pipe.text_encoder_2), (pipe.tokenizer, pipe.tokenizer_2), strict=True
    ):
        pipe.load_textual_inversion(file, token="<new>", text_encoder=encoder, tokenizer=tokenizer)
    for name, encoder in (("text_encoder", pipe.text_encoder), ("text_encoder_2", pipe.text_encoder_2)):
        learned = result.embedding.vectors[name]
        assert learned.shape == (2, encoder.config.hidden_size)
        assert np.array_equal(encoder.get_input_embeddings().weight[-2:].detach().numpy(), learned)
    assert ti_jax.Embedding.load(files[0]).vectors.keys() == {"text_encoder", "text_encoder_2"}


def test_both_rows_learn_and_a_frozen_word_does_not(config, tmp_path):
    other = ti_jax.Embedding("<other>", {"text_encoder": np.full((1, 32), 0.1, np.float32)})
    other.save(tmp_path / "other.safetensors")
    Path(config.templates).write_text("a {} and <other>\n")
    config = replace(config, embeddings=(str(tmp_path / "other.safetensors"),), adam_weight_decay=0.1)
    result = train(config)
    start = ti_jax.StableDiffusion.from_pretrained(config.pretrained_model_name_or_path).token_table("text_encoder")
    moved = [np.abs(start - row).max(axis=1).min() > 0 for row in rows(result)]
    assert moved == [True, True] and not np.array_equal(*rows(result))
    assert result.embedding.num_vectors == 2
    again = ti_jax.Embedding.load(tmp_path / "other.safetensors")
    assert np.array_equal(again.vectors["text_encoder"], other.vectors["text_encoder"])

    ti_jax.Embedding("<other>", {"text_encoder": np.full((1, 32), 0.2, np.float32)}).save(
        tmp_path / "other.safetensors"
    )
    with pytest.raises(ti_jax.InputError, match=r"belongs to another run \(embeddings \w{16} there, \w{16} here\)"):
        train(replace(config, resume_from_checkpoint="latest"))


def test_the_autoencoder_lies_on_no_device_while_a_word_is_learned(config):
    sd, _ = load([resolve(config)], [read_inputs(resolve(config), print)])
    kinds = {name: {type(leaf) for leaf in jax.tree.leaves(tree)} for name, tree in sd.params.items()}
    assert kinds.pop("vae") == {np.ndarray}
    assert all(issubclass(kind, jax.Array) for found in kinds.values() for kind in found)


def test_a_resumed_run_is_the_same_to_the_bit(config, twelve_steps, tmp_path):
    whole, _ = twelve_steps
    first = train(replace(config, max_train_steps=7, checkpointing_steps=7))  # in the middle of a chunk of three
    second = train(replace(config, resume_from_checkpoint="latest"))
    assert np.array_equal(rows(second), rows(whole))
    assert np.array_equal(np.concatenate([first.losses, second.losses]), whole.losses)
    records = [json.loads(line) for line in (second.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "losses" in record] == [3, 6, 7, 9, 12]
    assert sum(len(record.get("losses", [])) for record in records) == 12
    by_path = replace(
        config, output_dir=str(tmp_path / "third"), resume_from_checkpoint=config.output_dir + "/checkpoints/7"
    )
    assert np.array_equal(rows(train(by_path)), rows(whole))


def test_an_earlier_run_is_moved_aside(after_two_steps, two_steps):
    second = train(replace(after_two_steps, max_train_steps=3))
    kept = ti_jax.Embedding.load(second.output_dir / "previous-1" / "learned_embeds.safetensors")
    assert np.array_equal(kept.vectors["text_encoder"], rows(two_steps))
    assert kept.metadata["steps"] == "2" and second.embedding.metadata["steps"] == "3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 2e-2}, "learning_rate 0.01 there, 0.02 here"),
        ({"seed": 5}, "seed 0 there, 5 here"),
        ({"train_batch_size": 1}, "batch size on all devices 2 there, 1 here"),
        ({"initializer_token": "red"}, "initializer_token person there, red here"),
        ({"lr_scheduler": "linear"}, "lr_scheduler constant there, linear here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(after_two_steps, change, message):
    with pytest.raises(ti_jax.InputError, match=message):
        train(replace(after_two_steps, **change, resume_from_checkpoint="latest"))


def test_a_checkpoint_of_another_model_or_other_pictures_is_refused(after_two_steps, tmp_path):
    config = after_two_steps
    other = tmp_path / "others"
    other.mkdir()
    Image.new("RGB", (16, 16)).save(other / "black.png")
    with pytest.raises(ti_jax.InputError, match=r"belongs to another run .*other pictures"):
        train(replace(config, train_data_dir=str(other), resume_from_checkpoint="latest"))
    spoilt = tmp_path / "model"
    shutil.copytree(config.pretrained_model_name_or_path, spoilt)
    weights = spoilt / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + 1
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ti_jax.InputError, match=r"belongs to another run .*other base model"):
        train(replace(config, pretrained_model_name_or_path=str(spoilt), resume_from_checkpoint="latest"))


def test_checkpoints_that_are_not_there(config, tmp_path, capsys):
    with pytest.raises(ti_jax.InputError, match=r"not a checkpoint folder.*this run has none yet"):
        train(replace(config, resume_from_checkpoint=str(tmp_path / "nowhere")))
    train(replace(config, max_train_steps=2, resume_from_checkpoint="latest"))
    assert "no checkpoint" in capsys.readouterr().err
    with pytest.raises(ti_jax.InputError, match="this run has 2 in"):
        train(replace(config, resume_from_checkpoint=str(tmp_path / "nowhere")))
    for path in (Path(config.output_dir) / "checkpoints" / "2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(ti_jax.InputError, match="cannot be read") as error:
        train(replace(config, resume_from_checkpoint="latest"))
    assert "\n" not in str(error.value)


def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_good_rows(config):
    with pytest.raises(ti_jax.InputError, match=r"non-finite at step \d+; the rows of step \d+ are saved") as error:
        train(replace(config, learning_rate=1e38))
    kept = ti_jax.Embedding.load(Path(config.output_dir) / "learned_embeds.safetensors")
    assert np.isfinite(kept.vectors["text_encoder"]).all()
    assert f"step {kept.metadata['steps']} are saved" in str(error.value)


def test_a_full_disk_is_one_line_and_what_was_saved_stays(config, tmp_path):
    """On a real file system of 4 MB, filled up while the run goes on."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        first = train(replace(config, output_dir=str(small / "out"), max_train_steps=4))
        (small / "filler").write_bytes(b"x" * (3 * 2**20))
        run = subprocess.run(
            command(config, output_dir=str(small / "out"), resume_from_checkpoint="latest", checkpointing_steps=3),
            capture_output=True, text=True, env=children.environment(),
        )  # fmt: skip
        assert run.returncode == 2
        assert run.stderr.count("Traceback") == 0 and run.stderr.strip().splitlines()[-1].endswith(
            "the disk is full; free some space or choose another place"
        )
        # The word is written all the same: it needs no more than a file that is there has.
        kept = ti_jax.Embedding.load(small / "out" / "learned_embeds.safetensors")
        assert kept.metadata["steps"] == "6" and not np.array_equal(kept.vectors["text_encoder"], rows(first))
        (small / "filler").unlink()
        on = train(replace(config, output_dir=str(small / "out"), resume_from_checkpoint="latest"))
        assert len(on.losses) == 8
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_what_does_not_move_is_told(config, capsys):
    train(replace(config, learning_rate=1e-30, max_train_steps=2))
    assert "did not move at all in 2 steps" in capsys.readouterr().err


def test_words_and_prompts_that_cannot_be_learned(config):
    with pytest.raises(ti_jax.InputError, match="'person' is a word that this tokenizer knows"):
        train(replace(config, placeholder_token="person"))
    with pytest.raises(ti_jax.InputError, match="'zebra' is not one token"):
        train(replace(config, initializer_token="zebra"))
    Path(config.templates).write_text("red " * 30 + "{}\n")
    with pytest.raises(ti_jax.InputError, match="would be cut"):
        train(config)
    Path(config.templates).write_text("a s{}s\n")
    with pytest.raises(ti_jax.InputError, match="does not hold the new word"):
        train(replace(config, placeholder_token="sks"))


def test_a_validation_prompt_longer_than_the_text_encoder_reads_is_drawn_whole(config):
    """In pieces, as ``infer.py`` does: what stands beyond the first piece counts."""
    prompts = tuple("{} " + "red " * 40 + end for end in ("glasses", "a beard"))
    config = replace(config, max_train_steps=1, validation_steps=1, num_validation_images=1, validation_prompt=prompts)
    samples = train(config).output_dir / "samples"
    drawn = []
    for number in range(2):
        with Image.open(samples / f"step-000001-{number:02d}.png") as picture:
            drawn.append(np.asarray(picture).astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() > 1


def test_a_hub_that_cannot_be_reached_is_told_before_training(config, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code = (
        "import sys, ti_jax\n"
        f"try: ti_jax.train(ti_jax.TrainConfig(push_to_hub=True, hub_token='hf_x', output_dir={config.output_dir!r}))\n"
        "except ti_jax.InputError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.startswith("--push_to_hub: cannot open the repository 'out'") and told.count("\n") == 1
    assert not (Path(config.output_dir) / "metrics.jsonl").exists()


def test_steps_of_epochs(config):
    by_epochs = replace(config, max_train_steps=None, num_train_epochs=3, repeats=10)
    assert total_updates(by_epochs, num_entries=4, global_batch=16) == 9
    assert total_updates(replace(by_epochs, max_train_steps=7), 4, 16) == 7


class Every:
    """An action that does nothing, now and then."""

    def __init__(self, every):
        self.every = every


def test_the_host_is_needed_only_where_something_is_due():
    at_all, save, checkpoint, validate = (Every(every) for every in (None, 25, 40, 33))
    timetable = Timetable([at_all, save, validate, checkpoint], longest=10, total=57)
    stops = [0]
    while stops[-1] < 57:
        stops.append(timetable.next(stops[-1]))
    assert stops == [0, 10, 20, 25, 30, 33, 40, 50, 57]
    due = {step: timetable.due(step) for step in stops}
    assert {step: actions for step, actions in due.items() if actions} == {
        0: [at_all, save, validate, checkpoint], 25: [at_all, save], 33: [at_all, validate],
        40: [at_all, checkpoint], 50: [at_all, save],
    }  # fmt: skip
    assert Timetable([at_all], longest=10, total=57).due(10) == []


def command(config, **changes):
    config = replace(config, **changes)
    flags = ["pretrained_model_name_or_path", "train_data_dir", "placeholder_token", "initializer_token", "templates",
             "num_vectors", "train_batch_size", "learning_rate", "max_train_steps", "logging_steps", "output_dir",
             "checkpointing_steps", "validation_inference_steps"]  # fmt: skip
    words = [word for flag in flags for word in (f"--{flag}", str(getattr(config, flag)))]
    if config.resume_from_checkpoint:
        words += ["--resume_from_checkpoint", config.resume_from_checkpoint]
    return [sys.executable, str(REPOSITORY / "train.py"), *words, "--overview_prompts", "a portrait of {}"]


@pytest.mark.slow
def test_ten_kills_end_with_the_rows_of_an_undisturbed_run(config, tmp_path):
    steps = 20_000
    whole = train(replace(config, max_train_steps=steps, output_dir=str(tmp_path / "whole")))
    chance = random.Random(0)
    arguments = {"max_train_steps": steps, "checkpointing_steps": 50, "resume_from_checkpoint": "latest"}
    metrics, log = Path(config.output_dir) / "metrics.jsonl", tmp_path / "stderr"
    with log.open("a") as told:
        for _ in range(10):
            before = time.time()
            run = subprocess.Popen(command(config, **arguments), stderr=told, env=children.environment())
            while run.poll() is None and not (metrics.exists() and metrics.stat().st_mtime > before + 1):
                time.sleep(0.02)  # until it is past starting, or every kill would hit the start
            time.sleep(chance.uniform(0.2, 3))
            assert run.poll() is None, log.read_text()
            run.kill()
            run.wait()
        done = subprocess.run(command(config, **arguments), stderr=told, env=children.environment())
    assert done.returncode == 0, log.read_text()
    resumed = [int(step) for step in re.findall(r"resuming at step (\d+)", log.read_text())]
    assert len(resumed) == 10 and resumed == sorted(set(resumed)), "a kill that hit no progress shows nothing"
    kept = ti_jax.Embedding.load(Path(config.output_dir) / "learned_embeds.safetensors")
    assert np.array_equal(kept.vectors["text_encoder"], rows(whole))


def test_the_step_is_compiled_once_a_run(config, caplog):
    """Chunks of any length, resuming and drawing between them are one program."""
    programs.forget()
    config = replace(config, validation_prompt="a {}", validation_steps=5, save_steps=4)
    with jax.log_compiles(True):
        train(config)
    compiled = [record.getMessage() for record in caplog.records if "Finished XLA compilation" in record.getMessage()]
    assert sum("run_steps" in message for message in compiled) == 1


def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(config, two_steps, capsys):
    """As the sampler's check for NaN, and a device without memory, end a drawing."""
    no_memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
    faults = iter([ti_jax.InputError("picture 1 came out as NaN"), no_memory, no_memory])

    def fail(*arguments, compile_only=False, **settings):
        if not compile_only:
            raise next(faults)

    config = replace(config, validation_prompt="a {}", validation_steps=1, max_train_steps=2)
    with pytest.MonkeyPatch.context() as patch:  # not the fixture: the step is shared with other runs
        patch.setattr(ti_jax.StableDiffusion, "generate", fail)
        result = train(config)
    told = capsys.readouterr().err
    assert "warning: the validation picture of <new> could not be drawn: picture 1 came out as NaN" in told
    assert "warning: the validation picture of <new> could not be drawn: RESOURCE_EXHAUSTED" in told
    assert "warning: the overview of <new> could not be drawn: RESOURCE_EXHAUSTED" in told
    assert not result.interrupted and np.array_equal(result.losses, two_steps.losses)
    assert ti_jax.Embedding.load(result.output_dir / "learned_embeds.safetensors").metadata["steps"] == "2"
    assert (result.output_dir / "checkpoints" / "2").is_dir()


def test_a_resumed_run_saves_after_an_older_checkpoint(config, capsys):
    train(replace(config, checkpointing_steps=4))
    resume = f"{config.output_dir}/checkpoints/4"
    result = train(replace(config, max_train_steps=6, checkpointing_steps=3, resume_from_checkpoint=resume))
    assert sorted(path.name for path in (result.output_dir / "checkpoints").iterdir()) == ["4", "6"]
    assert "checkpoints after step 4 are moved to" in capsys.readouterr().err
