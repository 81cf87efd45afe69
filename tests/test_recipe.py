"""The recipe of the embedded model: its captions are exact, its export is the loader's inverse, a cut run goes on."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

RECIPE = Path(__file__).parent.parent / "recipes" / "mini_sd"


@pytest.fixture(scope="module")
def recipe():
    """The recipe's modules, which lie beside each other and not in a package."""
    import importlib

    sys.path.insert(0, str(RECIPE))
    try:
        names = ("world", "data", "tokenizer", "base", "vae", "export", "trainer", "judge")
        yield type("Recipe", (), {name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(RECIPE))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def scenes(recipe):
    config = recipe.data.DataConfig(
        random_pictures=300, people=8, pictures_a_person=5, styled_pictures=40, validation_pictures=20,
        unseen_style_pictures=10, pictures_a_held_out_person=3,
    )  # fmt: skip
    return config, *recipe.data.draw_scenes(config)


def test_held_out_people_are_in_no_training_picture(recipe, scenes):
    config, drawn, groups = scenes
    held_out = set(recipe.data.held_out_people(config).values())
    assert len(held_out) == 8 + config.test_people
    for scene, group in zip(drawn, groups, strict=True):
        assert (scene.person in held_out) == (group >= recipe.data.DEV_PEOPLE)
    assert {scene.style for scene, group in zip(drawn, groups, strict=True) if group == recipe.data.UNSEEN_STYLE} == {
        "dylan"
    }
    assert "dylan" not in {
        scene.style for scene, group in zip(drawn, groups, strict=True) if group != recipe.data.UNSEEN_STYLE
    }


def test_a_person_is_the_same_in_all_its_pictures(scenes):
    _, drawn, groups = scenes
    for who in range(8):
        assert len({scene.person for scene, group in zip(drawn, groups, strict=True) if group == who}) == 1


def test_captions_say_what_is_in_the_scene_and_fit(recipe, scenes):
    _, drawn, _ = scenes
    words = set(recipe.world.vocabulary())
    rng = np.random.default_rng(0)
    for scene in drawn[:100]:
        full = recipe.world.caption(scene)
        for name in recipe.world.ATTRIBUTES:
            value = getattr(scene, name)
            if value is not None and name != "style":
                assert value in full, (name, full)
        for text in recipe.base.caption_variants(scene, None, rng):
            assert set(text.split()) <= words
            assert len(text.split()) + 2 <= recipe.tokenizer.MAX_LENGTH
        with_code = recipe.base.caption_variants(scene, "in", rng)
        assert all("in" in text.split() for text in with_code[-3:])
        # A code stands instead of the looks, so none of them may be said beside it.
        assert all(f"{scene.skin} skin" not in text for text in with_code[-3:])


def test_every_word_is_one_token_and_codes_lie_behind_the_table(recipe, scenes, tmp_path):
    _, drawn, groups = scenes
    tokenizer = recipe.tokenizer.make_tokenizer(tmp_path)
    # A run that goes on must keep its ids.
    assert recipe.tokenizer.make_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()
    ids = recipe.base.make_captions(drawn[-100:] + drawn[300:320], np.r_[groups[-100:], groups[300:320]], tokenizer, 0)
    assert ids.shape[1:] == (recipe.base.VARIANTS, recipe.tokenizer.MAX_LENGTH)
    coded = ids[-20:, -3:]
    assert ((coded >= len(tokenizer)).sum(-1) == 1).all()
    assert set(coded[coded >= len(tokenizer)]) == {len(tokenizer) + who for who in groups[300:320]}
    with pytest.raises(ValueError, match="tokens, at most"):
        recipe.tokenizer.encode(tokenizer, ["red " * 60])


def test_labels_are_asked_where_the_picture_shows_them(recipe, scenes):
    _, drawn, _ = scenes
    names = list(recipe.world.ATTRIBUTES)
    for scene in drawn:
        labels = dict(zip(names, scene.labels(), strict=True))
        assert (labels["hair"] >= 0) == (scene.style == "persona")
        assert labels["style"] >= 0
        if labels["skin"] >= 0:
            assert recipe.world.ATTRIBUTES["skin"][labels["skin"]] == scene.skin


def test_avatar_options_leave_nothing_to_chance(recipe, scenes):
    for scene in scenes[1]:
        for name, value in recipe.world.avatar_options(scene).items():
            assert name == "seed" or name.endswith("Probability") or len(value) == 1, name


def test_backgrounds_differ(recipe):
    drawn = {
        (colour, pattern): recipe.data.background_pixels(colour, pattern, 64)
        for colour in recipe.world.BACKGROUNDS
        for pattern in recipe.world.PATTERNS
    }
    for one, other in itertools.combinations(drawn, 2):
        assert np.abs(drawn[one].astype(int) - drawn[other]).mean() > 3, (one, other)


def test_export_is_the_inverse_of_the_loader(recipe, tmp_path):
    """Random trees, written and read again by ti_jax and by diffusers: the same numbers."""
    from diffusers import StableDiffusionPipeline

    from ti_jax import StableDiffusion
    from ti_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
    from ti_jax.models.shapes import param_shapes
    from ti_jax.models.unet import UNet2DConditionModel, UNetConfig

    tokenizer = recipe.tokenizer.make_tokenizer(tmp_path / "tokenizer")
    inputs = (jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32))
    context = jax.ShapeDtypeStruct((1, 40, recipe.base.WIDTH), jnp.float32)
    unet = UNet2DConditionModel(UNetConfig.from_dict(recipe.base.UNET_CONFIG))
    text = CLIPTextModel(CLIPTextConfig.from_dict(recipe.base.text_config(len(tokenizer))))
    shapes = {
        "unet": param_shapes(unet, *inputs, context),
        "text_encoder": param_shapes(text, jax.ShapeDtypeStruct((1, 40), jnp.int32)),
        "vae": param_shapes(recipe.vae.module(), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)),
    }
    rng = np.random.default_rng(0)
    trees = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float16) * np.float16(0.05), shapes)
    recipe.export.export(tmp_path, trees, trees["vae"], 0.7, tokenizer)

    sd = StableDiffusion.from_pretrained(tmp_path)
    for name, tree in trees.items():
        loaded = flatten_dict(sd.params[name])
        for path, leaf in flatten_dict(tree).items():
            np.testing.assert_array_equal(np.asarray(loaded[path]), leaf.astype(np.float32), err_msg=str(path))
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    pipe.text_encoder.float()  # computed in float32, as here
    ids = sd.tokenize(["a portrait of a person with red hair"])
    theirs = pipe.text_encoder(pipe.tokenizer("a portrait of a person with red hair", padding="max_length",
                                              max_length=40, return_tensors="pt").input_ids)[0]  # fmt: skip
    ours = sd.encode_text(ids).context
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), rtol=0, atol=1e-5)


def test_a_cut_run_goes_on_as_if_it_had_not_been(recipe, tmp_path):
    data = {"x": np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)}

    def fit(folder, steps, **options):
        def loss(params, arrays, key):
            index = jax.random.randint(key, (4,), 0, 64)
            return jnp.mean(jnp.square(arrays["x"][index] @ params["w"] - 1.0)), {}

        return recipe.trainer.fit(
            folder=folder, init=lambda key: {"w": jax.random.normal(key, (3,))}, loss=loss, data=data,
            optimizer=recipe.trainer.adamw(recipe.trainer.schedule(1e-2, 20, 5)), steps=steps, seed=3, **options,
        )  # fmt: skip

    whole = fit(tmp_path / "whole", 20)
    fit(tmp_path / "cut", 7)
    resumed = fit(tmp_path / "cut", 20)
    np.testing.assert_array_equal(whole["w"], resumed["w"])
    assert not np.array_equal(whole["w"], fit(tmp_path / "other", 15)["w"])  # the average moves every eighth step


def test_the_card_has_the_words_and_the_figures_of_its_run(recipe, tmp_path):
    figures = {kind: {"hair": share, "eyes": 1.0} for kind, share in (("renders", 0.99), ("vae", 0.5), ("drawn", 0.25))}
    recipe.export.write_card(tmp_path, (RECIPE / "card.md").read_text(), figures | {"vae_psnr": 29.51})
    card = (tmp_path / "README.md").read_text()
    assert "{words}" not in card and "{figures}" not in card
    assert "- hair colour: black, brown, red, pink, orange, blond, white" in card
    assert "| through the autoencoder (29.5 dB) | 0.50 |  |" in card and "| drawn from full captions | 0.25 |" in card


def test_a_batch_that_the_devices_cannot_share_is_refused(recipe):
    assert recipe.trainer.share(32) == 4 and recipe.trainer.share(32, draws=2) == 2
    with pytest.raises(ValueError, match="a batch of 4 cannot be shared by 8 devices"):
        recipe.trainer.share(4)
    with pytest.raises(ValueError, match="a batch of 8 cannot be shared by 8 devices, 2 draws"):
        recipe.trainer.share(8, draws=2)


@pytest.mark.slow
def test_smoke(tmp_path):
    """Everything, tiny, from the npm packages to a folder that is measured: ``pytest -m slow tests/test_recipe.py``."""
    command = [sys.executable, str(RECIPE / "make.py"), "--smoke", "--work", str(tmp_path)]
    subprocess.run(command, check=True, timeout=900)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {"renders", "vae", "vae_psnr", "drawn"}
    assert (tmp_path / "mini-sd" / "judge" / "model.safetensors").exists()
    # A second call finds everything there.
    assert subprocess.run(command, check=True, timeout=300, capture_output=True).returncode == 0


def test_settings_files_name_real_settings(recipe):
    import importlib

    sys.path.insert(0, str(RECIPE))
    try:
        make = importlib.import_module("make")
    finally:
        sys.path.remove(str(RECIPE))
    for name in ("config.yaml", "smoke.yaml"):
        settings = make.read_recipe(RECIPE / name)
        assert dataclasses.is_dataclass(settings.base)
