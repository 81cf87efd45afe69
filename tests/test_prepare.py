"""Everything that a run needs later is built or checked before its first step, and the cheapest first."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import ti_jax
from ti_jax.cli import main
from ti_jax.config import InferConfig, resolve
from ti_jax.data.inputs import read_inputs
from ti_jax.diffusion.schedule import NoiseSchedule
from ti_jax.embeddings import Embedding
from ti_jax.errors import InputError
from ti_jax.training.job import load_model_and_concepts
from ti_jax.training.optimizer import warmup_note

CASES = Path(__file__).parent / "cases"


@pytest.fixture
def with_scheduler(tiny_sd, tmp_path):
    """``with_scheduler(name)`` -> the tiny model with the scheduler of a case, and so its prediction of noise."""

    def make(name):
        folder = shutil.copytree(tiny_sd, tmp_path / name)
        shutil.copy(CASES / f"scheduler_{name}.json", folder / "scheduler" / "scheduler_config.json")
        return str(folder)

    return make


@pytest.fixture
def no_weights(monkeypatch):
    """Reading any weights, or the hub, fails the test."""

    def fail(*args, **keywords):
        raise AssertionError("weights were read before the check")

    monkeypatch.setattr("ti_jax.weights.load.read_tree", fail)
    monkeypatch.setattr("ti_jax.weights.sources.read_tree", fail)


def load(config, say):
    """As a run does before its first step."""
    sd, (concept,) = load_model_and_concepts([config], [read_inputs(config, say)], say)
    return sd, concept


# -- schedulers


@pytest.mark.parametrize("name", ["unipc", "lcm", "sde", "zsnr"])
def test_a_model_of_any_scheduler_draws(name, with_scheduler, capsys, tmp_path):
    model = with_scheduler(name)
    sd = ti_jax.StableDiffusion.from_pretrained(model)
    theirs = NoiseSchedule.from_config(json.loads((CASES / f"scheduler_{name}.json").read_text())).alphas_cumprod
    np.testing.assert_array_equal(sd.schedule.alphas_cumprod, theirs)
    own = sd.generate(["a drawing"], num_inference_steps=2)[0]
    if name != "zsnr":  # whose ddim would start without signal
        np.testing.assert_array_equal(own, sd.generate(["a drawing"], num_inference_steps=2, scheduler="ddim")[0])
    out = str(tmp_path / "o.png")
    assert main.main(
        ["infer", "--pretrained_model_name_or_path", model, "--prompt", "a drawing", "--num_inference_steps", "2",
         "--guidance_scale", "7.5", "--output", out]
    ) == 0  # fmt: skip
    assert capsys.readouterr().err.count("drawing with ddim") == 1
    with Image.open(out) as image:
        np.testing.assert_array_equal(image, own)
        assert "Sampler: DDIM," in image.info["parameters"]


def test_a_model_whose_scheduler_cannot_draw_trains(short_run, with_scheduler, capsys):
    """So do, below, lcm's and that of zero SNR, with a --scheduler."""
    config = replace(
        short_run, pretrained_model_name_or_path=with_scheduler("unipc"), max_train_steps=2, validation_steps=1,
        validation_prompt="a drawing of {}", num_validation_images=1, save_steps=2, checkpointing_steps=2,
    )  # fmt: skip
    result = ti_jax.train(config, devices=jax.devices()[:1])
    assert np.isfinite(result.losses).all()
    assert capsys.readouterr().err.count("drawing with ddim") == 1, "told once"
    for picture in ("overview.png", "samples/step-000002.png"):
        assert (result.output_dir / picture).exists()


def test_train_draws_with_the_scheduler_that_it_is_given(short_run, with_scheduler, capsys):
    config = replace(
        short_run, pretrained_model_name_or_path=with_scheduler("zsnr"), max_train_steps=2, scheduler="euler"
    )
    result = ti_jax.train(config, devices=jax.devices()[:1])
    assert np.isfinite(result.losses).all()
    assert "drawing with" not in capsys.readouterr().err
    with Image.open(result.output_dir / "samples" / "overview-00.png") as image:
        assert "Sampler: Euler," in image.info["parameters"]


@pytest.mark.parametrize(("name", "says"), [("edm", "is EDM"), ("flow", "is flow matching")])
def test_another_kind_of_diffusion_is_refused_before_its_weights(name, says, short_run, with_scheduler, no_weights):
    config = replace(short_run, pretrained_model_name_or_path=with_scheduler(name))
    with pytest.raises(InputError, match=says):
        ti_jax.train(config)


# -- checks before the weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_inference_steps": 2000}, "--validation_inference_steps 2000: .*from 1 to 1000, not 2000"),
        ({"train_data_dir": "nowhere"}, "nowhere: no such folder"),
        ({"placeholder_token": "person"}, "'person' is a word that this tokenizer knows already"),
        ({"initializer_token": "xyzzy"}, "'xyzzy' is not one token of this model"),
        ({"templates": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"embeddings": ("nowhere.pt",)}, "nowhere.pt"),
        ({"initializer_token": None, "initializer_embedding": "nowhere.pt"}, "nowhere.pt"),
        ({"evaluate": True}, "no judge comes with this model"),
        ({"evaluation_clip": "nowhere", "evaluate": True}, "nowhere: not the folder of a CLIP model"),
        ({"num_vectors": 40}, "--num_vectors 40: .*give at most 2[0-9], or shorter --templates"),
        ({"vae": "nowhere"}, "--vae nowhere: not an autoencoder"),
    ],
)
def test_what_is_wrong_is_found_before_the_weights_are_read(changes, message, short_run, no_weights):
    config = resolve(replace(short_run, **changes))
    with pytest.raises(InputError, match=message):
        load(config, print)


def test_a_broken_picture_is_found_before_the_weights_are_read(short_run, pictures, tmp_path, no_weights):
    folder = shutil.copytree(pictures, tmp_path / "broken")
    (folder / "x.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"x\.png: not a picture"):
        load(resolve(replace(short_run, train_data_dir=str(folder))), print)


@pytest.mark.parametrize("wrong", ["train_data_dir", "templates", "picture"])
def test_what_needs_no_model_is_checked_before_it_is_downloaded(wrong, short_run, pictures, tmp_path, monkeypatch):
    def download(*args, **keywords):
        raise AssertionError("the model was asked for before the check")

    monkeypatch.setattr("ti_jax.pipeline.model_description.resolve", download)
    config = replace(resolve(short_run), pretrained_model_name_or_path="somebody/not-cached")
    if wrong == "picture":
        folder = shutil.copytree(pictures, tmp_path / "broken")
        (folder / "x.png").write_bytes(b"no picture")
        config = replace(config, train_data_dir=str(folder))
    else:
        config = replace(config, **{wrong: "nowhere"})
    with pytest.raises(InputError, match=r"x\.png" if wrong == "picture" else "nowhere"):
        load(config, print)


def test_the_most_vectors_that_the_error_names_do_fit(short_run):
    with pytest.raises(InputError) as caught:
        load(resolve(replace(short_run, num_vectors=40)), print)
    most = int(str(caught.value).split("give at most ")[1].split(",")[0])
    load(resolve(replace(short_run, num_vectors=most)), print)
    with pytest.raises(InputError, match="--num_vectors"):
        load(resolve(replace(short_run, num_vectors=most + 1)), print)


def test_a_warm_up_that_does_not_end_is_reported(short_run):
    config = replace(short_run, lr_scheduler="constant_with_warmup")
    assert "--lr_warmup_steps 500: the run ends after 12 updates" in warmup_note(config, 12)
    assert warmup_note(config, 501) is None and warmup_note(short_run, 12) is None
    assert warmup_note(replace(config, lr_warmup_steps=0), 1) is None


# -- pictures as infer.py draws them


def test_pictures_of_a_run_are_those_of_infer(short_run, with_scheduler, capsys, tmp_path):
    validation = "a (drawing:1.6) of {}"
    overview = ("a [portrait] of ({}:0.7)", "a portrait of {}", "a portrait of {} BREAK a drawing")
    config = replace(
        short_run, pretrained_model_name_or_path=with_scheduler("lcm"), max_train_steps=1, validation_steps=1,
        validation_prompt=validation, overview_prompts=overview,
        validation_negative_prompt="a (person:1.2)", validation_guidance_scale=3.0, seed=5, scheduler="dpm++",
    )  # fmt: skip
    out = ti_jax.train(config, devices=jax.devices()[:1]).output_dir

    def drawn(prompt):
        path = tmp_path / "drawn.png"
        args = [
            "infer", "--prompt", prompt.replace("{}", "<new>"), "--embedding", str(out / "learned_embeds.safetensors"),
            "--pretrained_model_name_or_path", config.pretrained_model_name_or_path, "--num_images", "4", "--seed", "5",
            "--negative_prompt", "a (person:1.2)", "--num_inference_steps", "2", "--guidance_scale", "3",
            "--scheduler", "dpm++", "--output", str(path),
        ]  # fmt: skip
        assert main.main(args) == 0
        return [np.asarray(Image.open(tmp_path / f"drawn-{number}.png")) for number in range(4)]

    grid = np.asarray(Image.open(out / "samples" / "step-000001.png"))
    np.testing.assert_array_equal(grid, np.concatenate(drawn(validation), axis=1))
    for row, prompt in enumerate(("a portrait of person", *overview)):
        for column, picture in enumerate(drawn(prompt)):
            path = out / "samples" / f"overview-{4 * row + column:02d}.png"
            np.testing.assert_array_equal(np.asarray(Image.open(path)), picture, err_msg=f"{prompt} {column}")
    # Pictures are published: they say the model's name, and not where it is on this disk.
    folder = Path(config.pretrained_model_name_or_path)
    for path in (*out.rglob("*.png"), tmp_path / "drawn-0.png", tmp_path / "drawn-grid.png"):
        text = Image.open(path).text["parameters"]
        told = f"Model: {folder.name}, " in text
        assert str(folder.parent) not in text and (told or path.name in ("overview.png", "progress.png"))


def test_the_prompt_before_training_keeps_words_that_hold_the_token(short_run):
    templates = Path(short_run.templates)
    templates.write_text("artwork of {}\n")
    config = resolve(replace(short_run, placeholder_token="artw", overview_prompts=("{}",)))
    _, concept = load(config, print)
    assert concept.prompts == ["artwork of artw"] and concept.first_prompt_before_training == "artwork of person"


# -- words in prompts


def test_a_word_that_no_file_provides_is_reported(tiny_sd, short_run, capsys, tmp_path):
    file = tmp_path / "w.safetensors"
    Embedding("<x>", {"text_encoder": np.zeros((2, 32), np.float32)}).save(file)
    config = InferConfig(
        prompt=("a <cat> and (<X>:1.2), <x>_1, 1 < 2 > 0",), negative_prompt="<dog>", embedding=(str(file),),
        pretrained_model_name_or_path=str(tiny_sd), num_inference_steps=1, guidance_scale=2.0,
        output=str(tmp_path / "o.png"),
    )  # fmt: skip
    from ti_jax.cli.infer import draw

    draw(config)
    err = capsys.readouterr().err
    assert err.splitlines() == [
        "warning: <cat> in a prompt is plain text: no --embedding has this word",
        "warning: <dog> in a prompt is plain text: no --embedding has this word",
    ]
    said = []
    load(resolve(replace(short_run, validation_prompt="{} and <cat>")), said.append)
    assert said == ["warning: <cat> in a prompt is plain text: no file of --embeddings has this word"]


def test_a_word_in_the_negative_prompt_is_used(tiny_sd, capsys, tmp_path):
    file = tmp_path / "w.safetensors"
    Embedding("rick", {"text_encoder": np.zeros((2, 32), np.float32)}).save(file)
    from ti_jax.cli.infer import draw

    def told(prompt, negative):
        draw(
            InferConfig(
                prompt=(prompt,), negative_prompt=negative, embedding=(str(file),), num_inference_steps=1,
                guidance_scale=2.0, pretrained_model_name_or_path=str(tiny_sd), output=str(tmp_path / "o.png"),
            )
        )  # fmt: skip
        return capsys.readouterr().err

    assert told("a portrait", "rick") == ""
    assert "no prompt has the word rick" in told("a brick wall", "a person")
    assert told("a portrait", "rick_1") == ""  # its second vector


def test_a_capital_letter_in_a_word_of_several_vectors_is_reported(short_run):
    said = []
    read_inputs(resolve(replace(short_run, placeholder_token="<New>", num_vectors=2)), said.append)
    (line,) = said
    assert line.startswith("warning: diffusers with transformers 5 finds <New> only in lower case")
    assert "save it as <new>, or write <New> <New>_1 there" in line
    read_inputs(resolve(replace(short_run, placeholder_token="<New>")), said.append)
    read_inputs(resolve(replace(short_run, placeholder_token="<new>", num_vectors=2)), said.append)
    assert len(said) == 1


# -- another autoencoder


def test_another_autoencoder_takes_the_place_of_the_models_own(tiny_sd, short_run, tmp_path):
    import diffusers
    import torch

    own = diffusers.AutoencoderKL.from_pretrained(tiny_sd, subfolder="vae")
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.mul_(1.1)
    other = tmp_path / "vae"
    own.save_pretrained(other)
    plain = ti_jax.StableDiffusion.from_pretrained(tiny_sd)
    mixed = ti_jax.StableDiffusion.from_pretrained(tiny_sd, vae=other)
    whole = shutil.copytree(tiny_sd, tmp_path / "whole")
    shutil.rmtree(whole / "vae")
    shutil.copytree(other, whole / "vae")
    expected = ti_jax.StableDiffusion.from_pretrained(whole)
    assert mixed.identity == expected.identity != plain.identity
    latents = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    with torch.no_grad():
        theirs = own.decode(torch.tensor(latents).permute(0, 3, 1, 2) / own.config.scaling_factor).sample
    np.testing.assert_allclose(mixed.decode_latents(latents), theirs.permute(0, 2, 3, 1), atol=1e-4)

    sd, _ = load(resolve(replace(short_run, vae=str(other))), print)
    assert sd.identity == expected.identity


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "a AutoencoderTiny; only AutoencoderKL is implemented"),
        ({"scaling_factor": 0.13025}, "scaled by 0.13025 and the model's by 0.18215"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused(config, message, tiny_sd, tmp_path, no_weights):
    folder = shutil.copytree(Path(tiny_sd) / "vae", tmp_path / "vae")
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, **config}))
    with pytest.raises(InputError, match=message):
        ti_jax.StableDiffusion.from_pretrained(tiny_sd, vae=folder)


def test_a_models_folder_is_not_taken_for_its_autoencoder(tiny_sd, no_weights):
    with pytest.raises(InputError, match=r"not an autoencoder .*\(its folder vae has\)"):
        ti_jax.StableDiffusion.from_pretrained(tiny_sd, vae=tiny_sd)
