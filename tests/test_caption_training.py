"""Training with captions: against a PyTorch loop, on eight devices, resumed, and beside a run without captions."""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from test_step import Problem, relative, torch_rows

import ti_jax
from ti_jax.cli import main
from ti_jax.data.inputs import read_inputs
from ti_jax.errors import InputError
from ti_jax.training.job import load_model_and_concepts

CAPTIONS = {"0": "red hair, glasses, purple background", "1": "a drawing of <new> in a red jacket"}
RANDOM = {"shuffle_tags": True, "keep_tags": 1, "tag_dropout": 0.2, "caption_dropout": 0.25}


@pytest.fixture(scope="module")
def captioned(pictures, tmp_path_factory):
    """Three pictures in folders of kohya's, the first two with captions."""
    folder = tmp_path_factory.mktemp("captioned")
    for name, target in (("0", "2_person"), ("1", "2_person"), ("2", "1_person")):
        (folder / target).mkdir(exist_ok=True)
        shutil.copy(pictures / f"{name}.png", folder / target)
        if name in CAPTIONS:
            (folder / target / f"{name}.txt").write_text(CAPTIONS[name])
    return folder


@pytest.fixture(scope="module", params=[RANDOM, pytest.param({}, marks=pytest.mark.slow)])
def learned(request, tiny_sd, captioned, tmp_path_factory):
    """A problem with captions, and its state and losses after `STEPS` on one device, eight samples at a time."""
    # Small pictures: a sum over many numbers one by one, as programs that are not optimised take it, is off by 1e-6.
    # AdamW divides by the gradient's size: with a small epsilon rows would learn the rounding of what is nearly 0.
    problem = Problem(
        tiny_sd, captioned, tmp_path_factory.mktemp("learned"), recursive=True, resolution=8, train_batch_size=8,
        adam_epsilon=1e-4, **request.param,
    )  # fmt: skip
    return problem, *problem.run(num_devices=1, batch_size=8)


def test_twenty_steps_with_captions_equal_a_pytorch_loop(learned, tiny_sd):
    problem, state, losses = learned
    assert problem.dataset.entries.tolist() == [0, 1, 1, 2, 2], "the folder 1_person comes first"
    assert len(problem.concept.prompts) > (8 if problem.config.shuffle_tags else 4)
    rows, their_losses = torch_rows(problem, tiny_sd, "epsilon")
    assert relative(losses, their_losses) < 1e-5
    assert relative(state.rows["text_encoder"], rows["text_encoder"]) < 1e-5
    assert relative(state.rows["text_encoder"], problem.concept.rows["text_encoder"]) > 0.01, "nothing was learned"


def test_eight_devices_with_captions_end_with_the_rows_of_one(learned):
    """Of few prompts each is encoded once, of many each sample's."""
    problem, *_ = learned
    one, losses_of_one = problem.run(num_devices=1, batch_size=8)
    eight, losses_of_eight = problem.run(num_devices=8, batch_size=1, shard_prompts=True)
    assert relative(eight.rows["text_encoder"], one.rows["text_encoder"]) < 1e-6
    assert relative(losses_of_eight, losses_of_one) < 1e-6


def train(config):
    return ti_jax.train(config, devices=jax.devices()[:1])


def rows(result):
    return result.embedding.vectors["text_encoder"]


def test_a_run_with_captions_resumes_exactly_and_without_them_it_is_the_plain_run(
    short_run, captioned, pictures, tmp_path, capsys
):
    config = replace(
        short_run, train_data_dir=str(captioned), recursive=True, train_batch_size=2, max_train_steps=6,
        checkpointing_steps=3, **RANDOM,
    )  # fmt: skip
    whole = train(config)
    told = capsys.readouterr().err
    assert "captions: used for 2 of 3 pictures; --no_captions ignores them" in told
    assert "folders: by their names an epoch shows 1 of the pictures 1 times, 2 of the pictures 2 times" in told
    shutil.rmtree(whole.output_dir / "checkpoints" / "6")
    resumed = train(replace(config, resume_from_checkpoint="latest"))
    assert "resuming at step 3 of 6" in capsys.readouterr().err
    assert np.array_equal(rows(resumed), rows(whole)) and np.array_equal(resumed.losses, whole.losses[3:])
    with pytest.raises(InputError, match=r"belongs to another run .*captions"):
        train(replace(config, resume_from_checkpoint="latest", caption_dropout=0.5))

    ignoring = replace(config, no_captions=True, output_dir=str(tmp_path / "ignoring"))
    bare = shutil.copytree(captioned, tmp_path / "bare", ignore=shutil.ignore_patterns("*.txt"))
    without = replace(config, train_data_dir=str(bare), output_dir=str(tmp_path / "without"))
    ignored, plain = train(ignoring), train(without)
    assert np.array_equal(rows(ignored), rows(plain)) and np.array_equal(ignored.losses, plain.losses)
    assert not np.array_equal(rows(plain), rows(whole))


def check(config):
    """As a run does before the weights are read."""
    said = []
    _, (concept,) = load_model_and_concepts([config], [read_inputs(config, said.append)], said.append)
    return concept, said


def test_captions_that_are_too_long_are_counted(short_run, captioned, tmp_path):
    folder = shutil.copytree(captioned, tmp_path / "long")
    (folder / "2_person" / "0.txt").write_text(", ".join(["red hair"] * 20))
    concept, said = check(replace(short_run, train_data_dir=str(folder), recursive=True))
    assert "captions: 1 longer than the text encoder reads, and cut at the end, tag by tag: 2_person/0.png" in said
    assert max(prompt.count("red hair") for prompt in concept.prompts) in range(3, 12)
    assert all("<new>" in prompt for prompt in concept.prompts)


def test_templates_for_captions_alone_need_captions(short_run, captioned):
    templates = short_run.templates
    with open(templates, "w") as file:
        file.write("a picture of {}, {caption}\n")
    concept, _ = check(replace(short_run, train_data_dir=str(captioned), recursive=True))
    assert "a picture of <new>, red hair, glasses, purple background" in concept.prompts
    with pytest.raises(InputError) as error:
        check(replace(short_run, no_captions=True))
    assert str(error.value) == (
        f"--templates {templates}: each template has {{caption}}, and no picture has a caption; add a template without "
        "it, or captions"
    )


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("9.txt", b"a red car", "9.txt: a caption without a picture"),
        ("0.txt", "grün".encode("utf-16"), "0.txt: text in UTF-16"),
        ("0.txt", "grün".encode("cp1252"), "0.txt, line 1: not UTF-8 text"),
        ("0.txt", b"", "0.txt: an empty caption"),
        ("metadata.jsonl", b"{", "metadata.jsonl, line 1: not JSON"),
        # Of a word without brackets, glued to others, nothing would be learned.
        ("0.txt", b"a photo of{}s", "prompt 'a photo ofwords' does not hold the new word 'word'"),
    ],
)
def test_what_is_wrong_is_one_line_before_the_weights_are_read(
    short_run, pictures, tmp_path, monkeypatch, capsys, name, content, fault
):
    monkeypatch.setattr("ti_jax.weights.sources.read_tree", None)
    folder = shutil.copytree(pictures, tmp_path / "faulty")
    (folder / name).write_bytes(content)
    args = ["train", "--pretrained_model_name_or_path", short_run.pretrained_model_name_or_path]
    args += ["--train_data_dir", str(folder), "--placeholder_token", "word" if b"{}" in content else "<new>"]
    args += ["--initializer_token", "person", "--templates", short_run.templates, "--output_dir", str(tmp_path / "o")]
    assert main.main(args) == 2
    told = capsys.readouterr().err
    assert fault in told.splitlines()[-1] and "Traceback" not in told
    assert not (tmp_path / "o" / "learned_embeds.safetensors").exists()
