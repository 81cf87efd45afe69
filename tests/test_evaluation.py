"""Scores of a word: what the judge reads, the paper's CLIP scores, and the runs that keep the best state."""

import dataclasses
import json
import os
from pathlib import Path

import children
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ti_jax
from ti_jax import Embedding
from ti_jax.config import EvaluateConfig, TrainConfig, resolve_evaluate
from ti_jax.errors import InputError
from ti_jax.evaluation import scores
from ti_jax.evaluation.avatar_judge import Judge, JudgeConfig, JudgeNetwork, Probe, judge_shapes, split_logits
from ti_jax.evaluation.evaluate import Evaluator, evaluate

REPOSITORY = Path(__file__).parent.parent
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230)}
CONFIG = JudgeConfig(
    attributes=(("top", tuple(COLOURS)), ("bottom", tuple(COLOURS))),
    identity=("top",),
    probes=(Probe("a {}"), Probe("a photo of a {}", (("bottom", "blue"),))),
    channels=(32, 32),
    hidden=16,
    side=16,
)


def picture(top, bottom):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8], pixels[8:] = COLOURS[top], COLOURS[bottom]
    return pixels


@pytest.fixture(scope="module")
def judge():
    """A judge of two-coloured pictures, trained here on all nine of them."""
    import optax

    pairs = [(top, bottom) for top in COLOURS for bottom in COLOURS]
    pixels = jnp.asarray(np.stack([picture(*pair) for pair in pairs]) / 127.5 - 1.0, jnp.float32)
    labels = jnp.array([[list(COLOURS).index(word) for word in pair] for pair in pairs])
    network = JudgeNetwork(CONFIG)
    params = jax.jit(network.init)(jax.random.key(0), pixels)["params"]
    optimizer = optax.adam(1e-2)

    def loss(params):
        parts = split_logits(CONFIG, network.apply({"params": params}, pixels)[0]).values()
        return sum(
            optax.softmax_cross_entropy_with_integer_labels(part, labels[:, index]).mean()
            for index, part in enumerate(parts)
        )

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for _ in range(200):
        params, state = step(params, state)
    return Judge(CONFIG, params)


def test_the_judge_reads(judge):
    pairs = [("red", "blue"), ("green", "green"), ("blue", "red")]
    seen = judge.read(np.stack([picture(*pair) for pair in pairs]))
    assert seen == [{"top": top, "bottom": bottom} for top, bottom in pairs]
    for part in judge.probabilities(np.stack([picture(*pairs[0])] * 70)).values():
        np.testing.assert_allclose(part.sum(-1), 1.0, rtol=1e-5)
        assert part.shape == (70, 3)


def test_a_judge_is_saved_and_loaded(judge, tmp_path):
    judge.save(tmp_path / "judge")
    loaded = Judge.load(tmp_path)
    assert loaded.config == judge.config
    pixels = np.stack([picture("red", "blue"), picture("green", "red")])
    assert loaded.read(pixels) == judge.read(pixels)
    np.testing.assert_allclose(loaded.features(pixels), judge.features(pixels), atol=1e-2)  # float16 in the file


@pytest.mark.parametrize("damage", ["config", "weights", "shape"])
def test_a_broken_judge_is_one_line(judge, tmp_path, damage):
    with pytest.raises(InputError, match="no judge comes with this model"):
        Judge.load(tmp_path)
    judge.save(tmp_path / "judge")
    if damage == "config":
        (tmp_path / "judge" / "config.json").write_text("{")
    elif damage == "weights":
        (tmp_path / "judge" / "model.safetensors").write_bytes(b"no")
    else:
        path = tmp_path / "judge" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden": 17}))
    with pytest.raises(InputError, match="judge"):
        Judge.load(tmp_path)


def test_pictures_of_another_size_are_refused(judge):
    with pytest.raises(InputError, match="16, 16, 3"):
        judge.read(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(InputError, match="float32"):
        judge.read(np.zeros((1, 16, 16, 3), np.float32))


def test_scores_by_hand(judge):
    concept = np.stack([picture("red", "green"), picture("red", "blue"), picture("red", "red")])
    assert scores.reference_attributes(judge, concept) == {"top": "red"}
    # Of the plain probe's two pictures one shows the concept; of the edit's two one the concept, and both the edit.
    drawn = [picture("red", "red"), picture("green", "red"), picture("red", "blue"), picture("blue", "blue")]
    asked = []

    def draw(prompts):
        asked.extend(prompts)
        return [Image.fromarray(pixels) for pixels in drawn]

    others = (np.stack([picture("blue", "blue")]), np.stack([picture("green", "green")]))
    result = scores.judge_scores(judge, draw, "<x>", concept, 2, others)
    assert asked == ["a <x>", "a <x>", "a photo of a <x>", "a photo of a <x>"]
    assert result.by_attribute == {"editability/bottom": 1.0, "identity/top": 0.5}
    assert (result.identity, result.editability, result.candidates) == (0.5, 1.0, 3)
    assert result.as_dict()["reference"] == {"top": "red"} and "clip_i" not in result.as_dict()
    assert str(result).startswith("identity 0.500, editability 1.000, rank ")


def test_a_word_for_a_style_is_scored_as_one(judge, tmp_path):
    """With the style's attributes and probes where the judge has some, and as somebody's where it has none."""
    styled = dataclasses.replace(
        judge,
        config=dataclasses.replace(
            CONFIG, style=("bottom",), style_probes=(Probe("{} a"), Probe("{} photo", (("top", "red"),)))
        ),
    )
    styled.save(tmp_path / "judge")
    styled = Judge.load(tmp_path)
    assert styled.config.concept("style") == (("bottom",), styled.config.style_probes)
    assert styled.config.concept("object") == (("top",), CONFIG.probes) == judge.config.concept("style")
    concept = np.stack([picture("red", "green"), picture("blue", "green")])
    word = Embedding("<x>", {"text_encoder": np.ones((1, 4))}, {"learnable_property": "style"})
    asked = []

    class Model:
        def generate(self, prompts, **settings):
            asked.append(list(prompts))
            return [Image.fromarray(picture("red", "green" if "photo" in prompt else "blue")) for prompt in prompts]

    evaluator = Evaluator(styled, concept, images=1)
    evaluator.compile(Model(), word)
    result = evaluator.scores(Model(), word)
    assert asked == [["<x>"] * 2, ["<x> a", "<x> photo"]]
    assert result.reference == {"bottom": "green"}
    assert result.by_attribute == {"editability/top": 1.0, "identity/bottom": 0.5}


def test_what_a_probe_asks_for_is_not_counted_against_the_concept(judge):
    asks_for_another = Probe("a {} with a green top", (("top", "green"),))
    shares = scores.attribute_scores(
        judge.read(np.stack([picture("green", "red")])), [asks_for_another], {"top": "red"}
    )
    assert shares == {"editability/top": 1.0}


def test_rank_counts_who_is_nearer():
    drawn = np.array([[1.0, 0.0], [0.8, 0.6]])
    own, nearer, farther = np.array([[0.6, 0.8]]), np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert scores.rank_among(drawn, [own, farther]) == 1
    assert scores.rank_among(drawn, [own, nearer, farther]) == 2


class PlaneClip:
    """Stands where a CLIP model would: a picture is the mean of two of its colours, a text one of two directions."""

    def image_features(self, images):
        means = np.array([np.asarray(image).reshape(-1, 3).mean(0)[:2] for image in images])
        return means / np.linalg.norm(means, axis=-1, keepdims=True)

    def text_features(self, texts):
        assert all("<x>" not in text for text in texts)
        return np.array([[1.0, 0.0] if text == "a photo of on the beach" else [0.0, 1.0] for text in texts])


def test_clip_scores_by_hand():
    red, green = (Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0)))

    def draw(prompts):
        return [red] * len(prompts)

    edits = ("a photo of {} on the beach", "a painting of {}")
    result = scores.clip_scores(PlaneClip(), draw, "<x>", [red, green], 3, edits=edits, distractors=[[green]])
    assert result.clip_i == pytest.approx(0.5)  # half of the pairs are alike, half at right angles
    assert result.clip_t == pytest.approx(0.5)  # one text fits, one does not
    assert (result.rank, result.candidates) == (1, 2)


@pytest.fixture(scope="module")
def judged_sd(tiny_sd, judge, tmp_path_factory):
    """The tiny model with a judge beside it."""
    folder = tmp_path_factory.mktemp("judged")
    for path in tiny_sd.iterdir():
        (folder / path.name).symlink_to(path)
    judge.save(folder / "judge")
    return folder


def settings(judged_sd, pictures, tmp_path, **changes):
    values = dict(
        pretrained_model_name_or_path=str(judged_sd), train_data_dir=str(pictures), placeholder_token="<x>",
        initializer_token="person", output_dir=str(tmp_path / "out"), max_train_steps=6, train_batch_size=2,
        learning_rate=0.1, validation_inference_steps=2, overview_prompts=("a {}",), evaluation_images=1,
        report_to="none", resolution=16, logging_steps=1,
    )  # fmt: skip
    return TrainConfig(**values | changes)


def test_keep_best_ends_with_the_best_state(judged_sd, pictures, tmp_path):
    """Measured at 2, 4 and 6; the middle one is said to be the best, and must be what the run ends with."""
    values = {2: 0.2, 4: 0.9, 6: 0.4}
    real = Evaluator.scores

    def told(self, sd, embedding, others=()):
        return scores.Scores(
            identity=values[int(embedding.metadata["steps"])], editability=real(self, sd, embedding, others).editability
        )

    config = settings(judged_sd, pictures, tmp_path, keep_best="identity", evaluation_steps=2, save_steps=2)
    with pytest.MonkeyPatch.context() as patch:  # not the fixture: the step is shared with other runs
        patch.setattr(Evaluator, "scores", told)
        result = ti_jax.train(config, devices=jax.devices()[:1])
    folder = tmp_path / "out"
    assert result.embedding.metadata["steps"] == "4"
    best = ti_jax.Embedding.load(folder / "learned_embeds-steps-4.safetensors")
    final = ti_jax.Embedding.load(folder / "learned_embeds.safetensors")
    np.testing.assert_array_equal(final.vectors["text_encoder"], best.vectors["text_encoder"])
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [(line["step"], line["identity"]) for line in lines] == list(values.items())
    assert json.loads((folder / "scores.json").read_text())["identity"] == 0.9


@pytest.fixture(scope="module")
def measured(judged_sd, pictures, tmp_path_factory):
    """The config of a run that measures every two steps and at its end; its folder has what it leaves."""
    config = settings(
        judged_sd, pictures, tmp_path_factory.mktemp("measured"), keep_best="identity", evaluation_steps=2,
        checkpointing_steps=2, save_steps=2, evaluate=True,
    )  # fmt: skip
    ti_jax.train(config, devices=jax.devices()[:1])
    return config


def test_evaluate_reports_again_from_the_file(measured, judged_sd, pictures, tmp_path):
    folder = Path(measured.output_dir)
    written = json.loads((folder / "scores.json").read_text())
    assert set(written["by_attribute"]) == {"identity/top", "editability/bottom"}
    config = resolve_evaluate(
        EvaluateConfig(
            train_data_dir=str(pictures),
            pretrained_model_name_or_path=str(judged_sd),
            evaluation_images=1,
            num_inference_steps=50,
            distractors=str(distractor(tmp_path)),
            output=str(tmp_path / "scores.json"),
        )
    )
    again = evaluate(str(folder / "learned_embeds.safetensors"), config)
    assert again.as_dict().items() >= {key: written[key] for key in ("identity", "editability", "reference")}.items()
    assert again.candidates == 2 and json.loads((tmp_path / "scores.json").read_text())["rank"] == again.rank


def distractor(tmp_path):
    folder = tmp_path / "others" / "red"
    folder.mkdir(parents=True)
    Image.fromarray(picture("red", "red")).save(folder / "0.png")
    return folder.parent


@pytest.mark.slow
def test_a_resumed_run_remembers_the_best(judged_sd, pictures, tmp_path):
    """Cut after the measurement at 2 steps, resumed to 6: the log has each step once."""
    import signal

    config = settings(
        judged_sd, pictures, tmp_path, keep_best="identity", evaluation_steps=2, checkpointing_steps=2, logging_steps=2
    )
    real = Evaluator.scores

    def cut(self, sd, embedding, others=()):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, sd, embedding, others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "scores", cut)
        assert ti_jax.train(config).interrupted
    import dataclasses

    result = ti_jax.train(dataclasses.replace(config, resume_from_checkpoint="latest"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    best = max(lines, key=lambda line: line["identity"])  # the first of equals
    assert result.embedding.metadata["steps"] == str(best["step"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(train_data_dir=None), "--train_data_dir is missing"),
        (dict(evaluation_images=0), "--evaluation_images 0: must be 1 or more"),
        (dict(num_inference_steps=0), "--num_inference_steps 0: must be 1 or more"),
        (dict(output="scores.txt"), "must be the path of a .json file"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        resolve_evaluate(EvaluateConfig(**dict(train_data_dir="x") | changes))


def test_the_command_line_says_what_is_missing(tiny_sd, tmp_path, capsys):
    """A real file, a real command line, one line."""
    from ti_jax.cli.main import main

    word = ti_jax.Embedding("<x>", {"text_encoder": np.zeros((1, 32), np.float32)})
    word.save(tmp_path / "x.safetensors", format="diffusers")
    pixels = Image.fromarray(picture("red", "blue"))
    (tmp_path / "pictures").mkdir()
    pixels.save(tmp_path / "pictures" / "0.png")
    command = ["evaluate", str(tmp_path / "x.safetensors"), "--pretrained_model_name_or_path", str(tiny_sd)]
    assert main([*command, "--train_data_dir", str(tmp_path / "pictures")]) == 2
    assert "no judge comes with this model" in capsys.readouterr().err
    assert main(["evaluate", "--train_data_dir", str(tmp_path / "pictures")]) == 2
    assert "the embedding file is missing" in capsys.readouterr().err
    assert main(command) == 2
    assert "--train_data_dir is missing" in capsys.readouterr().err


@pytest.mark.heavy
def test_the_embedded_model_brings_its_judge(concept, tmp_path, capsys):
    """``ti-jax evaluate`` on a person, measured with the plain word's row: the judge names who is in the pictures."""
    from ti_jax.cli.main import main

    sd = ti_jax.StableDiffusion.from_pretrained()
    (person,) = sd.tokenizers["text_encoder"]("person", add_special_tokens=False).input_ids
    word = ti_jax.Embedding("<x>", {"text_encoder": sd.token_table("text_encoder")[person][None]})
    word.save(tmp_path / "x.safetensors", format="diffusers")
    command = ["evaluate", str(tmp_path / "x.safetensors"), "--train_data_dir", str(concept)]
    command += ["--output", str(tmp_path / "scores.json"), "--evaluation_images", "1", "--num_inference_steps", "4"]
    assert main(command) == 0
    told = json.loads((tmp_path / "scores.json").read_text())
    assert told["reference"] == {
        "hair": "pigtails", "hair_colour": "black", "skin": "brown", "beard": "no beard", "nose": "wrinkles",
    }  # fmt: skip
    assert 0 <= told["identity"] <= 1 and 0 <= told["editability"] <= 1
    assert "identity" in "".join(capsys.readouterr())


def test_a_model_without_a_judge_needs_clip(tiny_sd, pictures, tmp_path):
    with pytest.raises(InputError, match="no judge comes with this model"):
        ti_jax.train(settings(tiny_sd, pictures, tmp_path, evaluate=True))
    with pytest.raises(InputError, match="--keep_best clip_i: needs a CLIP model"):
        ti_jax.train(settings(tiny_sd, pictures, tmp_path, keep_best="clip_i"))


def test_shapes_take_no_memory():
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(judge_shapes(CONFIG)))


KILLED_WHILE_MEASURING = """
import os, signal, sys
import ti_jax
from ti_jax.config.yaml import load_yaml
from ti_jax.evaluation.evaluate import Evaluator

real = Evaluator.scores

def scores(self, sd, embedding, others=()):
    found = real(self, sd, embedding, others)
    if embedding.metadata["steps"] == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
    return found

Evaluator.scores = scores
ti_jax.train(ti_jax.TrainConfig(**load_yaml(sys.argv[1], ti_jax.TrainConfig)))
"""


@pytest.mark.parametrize("step", ["4", pytest.param("6", marks=pytest.mark.slow)])  # 6 is the last
def test_a_kill_while_measuring_loses_nothing(measured, tmp_path, capsys, step):
    """Scores, best word and files are those of a run that nobody disturbed."""
    import dataclasses
    import subprocess
    import sys

    from ti_jax.config.yaml import dump_yaml

    config = dataclasses.replace(measured, output_dir=str(tmp_path / "out"))
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_MEASURING, str(tmp_path / "run.yaml"), step],
        env=children.environment() | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
    )  # fmt: skip
    assert killed.returncode == -9, killed.stderr
    ti_jax.train(dataclasses.replace(config, resume_from_checkpoint="latest"), devices=jax.devices()[:1])
    told = capsys.readouterr().err
    assert f"resuming at step {int(step) - 2} of 6" in told and "editability" in told

    def left(folder):
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        scores = (folder / "scores.jsonl").read_text(), (folder / "scores.json").read_text()
        best = ti_jax.Embedding.load(folder / "learned_embeds-best.safetensors")
        return {name for name in names if "checkpoints" not in name}, scores, best.metadata["steps"], best.vectors

    whole, found = left(Path(measured.output_dir)), left(tmp_path / "out")
    assert found[:3] == whole[:3]
    assert np.array_equal(found[3]["text_encoder"], whole[3]["text_encoder"])
    final = (
        ti_jax.Embedding.load(Path(folder) / "learned_embeds.safetensors")
        for folder in (config.output_dir, measured.output_dir)
    )
    assert len({embedding.metadata["steps"] for embedding in final}) == 1
