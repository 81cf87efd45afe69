"""The recipe of the embedded model: its captions are exact, its export is the loader's inverse, a cut run goes on."""

import dataclasses
import itertools
import json
import re
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
        names = ("styles", "world", "data", "tokenizer", "base", "vae", "export", "trainer", "judge", "measure")
        yield type("Recipe", (), {name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(RECIPE))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def scenes(recipe):
    config = recipe.data.DataConfig(
        random_pictures=300, people=8, pictures_a_person=5, styled_pictures_a_person=3, styled_pictures=200,
        validation_pictures=20, styled_validation_pictures=20, pictures_a_held_out_style=3,
    )  # fmt: skip
    return config, *recipe.data.draw_scenes(config)


def test_who_and_what_is_held_out_is_in_no_training_picture(recipe, scenes):
    config, drawn, groups = scenes
    data = recipe.data
    people = {own[0].person for own in data.held_out_scenes(config).values()}
    unseen = set(data.held_out_styles(config).values())
    assert len(people) == 8 + config.test_people and len(unseen) == 4 + config.test_styles
    for scene, group in zip(drawn, groups, strict=True):
        assert (scene.person in people) == (data.DEV_PEOPLE <= group < data.DEV_STYLES)
        assert (scene.style in unseen) == (group >= data.DEV_STYLES)
    trained = data.trained(groups)
    assert groups[trained].max() < data.HELD_OUT
    assert not {data.VALIDATION, data.STYLED_VALIDATION} & set(groups[trained].tolist())
    # Each of their values is trained, and each pair of two of them.
    seen = {drawn[index].style for index in trained} | set(data.trained_styles(config))
    for style in unseen:
        for one, other in itertools.combinations(range(len(style)), 2):
            assert any(known[one] == style[one] and known[other] == style[other] for known in seen - unseen)


def test_the_same_people_with_the_same_pictures_in_all_versions(recipe, scenes):
    """Their scenes are those of the pictures in benchmarks/people and ti_jax/assets/concepts."""
    config = scenes[0]
    known = json.loads((RECIPE.parents[1] / "benchmarks" / "people" / "people.json").read_text())
    for name, own in recipe.data.held_out_scenes(config).items():
        facts = recipe.world.visible(tuple(known[name].get(attribute) for attribute in recipe.world.IDENTITY))
        assert {scene.person for scene in own} == {facts} and len(own) == 4
        assert {scene.style for scene in own} == {recipe.styles.NATURAL}


def test_styles_change_what_they_should(recipe, scenes):
    """The natural style changes nothing; each other value changes the picture, and a palette hides all own colours."""
    styles, world, data = recipe.styles, recipe.world, recipe.data
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64"><mask id="m">'
        '<rect width="64" height="64" fill="#fff"/></mask><g mask="url(#m)">'
        '<circle cx="32" cy="32" r="16" fill="#{skin}"/><path d="M18 20h28v8H18Z" fill="#{hair}"/>'
        '<path d="M10 52h44v12H10Z" fill="#{clothes}"/><circle cx="28" cy="34" r="2" fill="#1B0640"/>'
        '<circle cx="32" cy="40" r="3" fill="#E15c66"/></g></svg>'
    )

    def draw(scene):
        hair, skin, clothes = world.part_colours(scene)
        return data.rasterise(svg.format(hair=hair, skin=skin, clothes=clothes), scene).astype(int)

    rng = np.random.default_rng(0)
    person = ("long hair", "red", "brown", "no beard", "round nose")
    scene, other = (
        dataclasses.replace(world.draw_scene(rng, who), background=colour, pattern="plain", clothes_colour=clothes)
        for who, colour, clothes in (
            (person, "white", "blue"), (("long hair", "black", "dark", "no beard", "wrinkles"), "blue", "yellow"),
        )
    )  # fmt: skip
    plain = draw(scene)
    assert styles.restyle("<x/>", "natural", "no outline", ("fff",)) == "<x/>"
    np.testing.assert_array_equal(plain, styles.light_and_frame(plain.astype(np.uint8), "flat", "no frame"))
    pictures = [plain]
    for name, values in styles.ATTRIBUTES.items():
        for value in values[1:]:
            changed = {name: value} | (dict.fromkeys(world.COLOURS) if name == "palette" else {})
            pictures.append(draw(dataclasses.replace(scene, **changed)))
            if name == "palette":  # whoever it is
                np.testing.assert_array_equal(pictures[-1], draw(dataclasses.replace(other, **changed)))
    for one, two in itertools.combinations(pictures, 2):
        assert np.abs(one - two).mean() > 3
    left, right = (draw(dataclasses.replace(scene, light=light)) for light in ("left lit", "right lit"))
    assert left[:, :16].mean() > right[:, :16].mean() + 50 and right[:, -16:].mean() > left[:, -16:].mean() + 50
    # Lines lie around the parts and leave the inside of the face alone.
    lined = draw(dataclasses.replace(scene, outline="outlined"))
    np.testing.assert_array_equal(lined[32:42, 26:38], plain[32:42, 26:38])
    assert np.abs(lined - plain).max() > 100


def test_a_person_is_the_same_in_all_its_pictures(scenes):
    _, drawn, groups = scenes
    for who in range(8):
        own = [scene for scene, group in zip(drawn, groups, strict=True) if group == who]
        (person,) = {scene.person for scene in own if scene.style[0] == "natural"}
        # A palette shows their shapes alone.
        assert all(scene.person == (person[0], None, None, *person[3:]) for scene in own if scene.style[0] != "natural")


def test_captions_say_what_is_in_the_scene_and_fit(recipe, scenes):
    _, drawn, _ = scenes
    words = set(recipe.world.vocabulary())
    rng = np.random.default_rng(0)
    for scene in [*drawn[:50], *drawn[340:440]]:
        full = recipe.world.caption(scene)
        style = recipe.styles.words(scene.style)
        for name in recipe.world.ATTRIBUTES:
            value = scene.seen(name)
            if value is not None and name not in recipe.world.STYLE:
                assert value in full, (name, full)
            if value in style:
                assert value in full.split(" of ")[0]
        assert ("nose" in full or "wrinkles" in full) == (scene.beard not in recipe.world.NOSE_COVERING)
        if scene.palette != "natural":
            colours = set(itertools.chain(*(recipe.world.ATTRIBUTES[name] for name in recipe.world.COLOURS))) | {"skin"}
            assert not colours & set(full.split())
        for text in recipe.base.caption_variants(scene, None, None, rng):
            assert set(text.split()) <= words
            assert len(text.split()) + 2 <= recipe.tokenizer.MAX_LENGTH
            assert all(value in text.split(" of ")[0] for value in style)  # a style is always said, and all of it
        with_code = recipe.base.caption_variants(scene, "in", None, rng)
        assert all("in" in text.split() for text in with_code[-3:])
        # A code stands instead of the looks, so none of them may be said beside it.
        assert all(f"{scene.skin} skin" not in text for text in with_code[-3:])
        both = recipe.base.caption_variants(scene, "in", "the", rng)
        assert all({"in", "the"} <= set(text.split()) for text in both[-3:])
        assert all(value not in text.split(" of ")[0] for value in style for text in both[-3:])


def test_every_word_is_one_token_and_codes_lie_behind_the_table(recipe, scenes, tmp_path):
    _, drawn, groups = scenes
    tokenizer = recipe.tokenizer.make_tokenizer(tmp_path)
    # A run that goes on must keep its ids.
    assert recipe.tokenizer.make_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()
    people = [index for index in recipe.data.trained(groups) if groups[index] >= 0]
    ids = recipe.base.make_captions([drawn[index] for index in people], groups[people], tokenizer, 0)
    assert ids.shape[1:] == (recipe.base.VARIANTS, recipe.tokenizer.MAX_LENGTH)
    numbers = {style: 8 + number for number, style in enumerate(recipe.styles.every_style())}
    for index, own in zip(people, ids, strict=True):
        codes = [set(row[row >= len(tokenizer)] - len(tokenizer)) for row in own]
        style = numbers.get(drawn[index].style)
        who = {groups[index]}
        expected = [*[set()] * 4, *[who] * 3] if style is None else [set(), who, who, {style}, *[who | {style}] * 3]
        assert codes == expected
    with pytest.raises(ValueError, match="tokens, at most"):
        recipe.tokenizer.encode(tokenizer, ["red " * 60])


def test_labels_are_asked_where_the_picture_shows_them(recipe, scenes):
    _, drawn, _ = scenes
    names = list(recipe.world.ATTRIBUTES)
    for scene in drawn:
        labels = dict(zip(names, scene.labels(), strict=True))
        assert min(labels[name] for name in ("hair", "pattern", *recipe.world.STYLE)) >= 0
        assert (labels["nose"] >= 0) == (scene.beard not in ("beard", "moustache", "walrus moustache"))
        for name in recipe.world.COLOURS[1:]:
            assert (labels[name] >= 0) == (scene.palette == "natural")
        if labels["skin"] >= 0:
            assert recipe.world.ATTRIBUTES["skin"][labels["skin"]] == scene.skin


def test_avatar_options_leave_nothing_to_chance(recipe, scenes):
    for scene in scenes[1]:
        for name, value in recipe.world.avatar_options(scene).items():
            assert name == "seed" or name.endswith("Probability") or len(value) == 1, name


def test_backgrounds_differ(recipe):
    colours = {palette: [None] for palette in recipe.styles.PALETTES} | {"natural": recipe.world.BACKGROUNDS}
    drawn = {
        (palette, colour, pattern): recipe.data.background_pixels(colour, pattern, 64, palette)
        for palette in colours
        for colour in colours[palette]
        for pattern in recipe.world.PATTERNS
    }
    for one, other in itertools.combinations(drawn, 2):
        assert np.abs(drawn[one].astype(int) - drawn[other]).mean() > 3, (one, other)


@pytest.mark.heavy
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


def test_the_base_goes_on_from_one_with_another_vocabulary(recipe, tmp_path, monkeypatch):
    """Each token has the row that it had, whatever its number is now; a new token keeps the row that it was given."""
    from transformers import CLIPTokenizer

    from ti_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
    from ti_jax.models.shapes import param_shapes
    from ti_jax.models.unet import UNet2DConditionModel, UNetConfig

    base, shipped = recipe.base, RECIPE.parents[1] / "ti_jax" / "assets" / "mini-sd"
    words = [word for word in recipe.world.vocabulary() if word != "sunglasses"]
    monkeypatch.setattr(recipe.world, "vocabulary", lambda: ["aardvark", *words])
    tokenizer = recipe.tokenizer.make_tokenizer(tmp_path)
    length, table_of = recipe.tokenizer.MAX_LENGTH, lambda tree: tree["embeddings"]["token_embedding"]

    def text_shapes(count):
        encoder = CLIPTextModel(CLIPTextConfig.from_dict(base.text_config(count)))
        return param_shapes(encoder, jnp.zeros((1, length), jnp.int32))

    inputs = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1, jnp.int32), jnp.zeros((1, length, base.WIDTH))
    shapes = param_shapes(UNet2DConditionModel(UNetConfig.from_dict(base.UNET_CONFIG)), *inputs)
    text, given = text_shapes(len(tokenizer)), jnp.full((len(tokenizer), base.WIDTH), 7.0)
    table_of(text)["embedding"] = given
    tree, text = base.start_from(shipped, shapes, text, tokenizer)
    assert jax.tree.structure(tree) == jax.tree.structure(shapes) and jax.tree.all(jax.tree.map(np.any, tree))
    old = CLIPTokenizer.from_pretrained(shipped / "tokenizer")
    loaded = base.load_component(shipped, "text_encoder", text_shapes(len(old)), np.float32)
    table, before = table_of(text)["embedding"], table_of(loaded)["embedding"]

    def number(tokenizer, word):
        (found,) = tokenizer(word).input_ids[1:-1]
        return found

    moved = 0
    for word in ("a", "person", "striped", "the"):
        assert np.array_equal(table[number(tokenizer, word)], before[number(old, word)])
        moved += number(tokenizer, word) != number(old, word)
    assert moved and np.array_equal(table[number(tokenizer, "aardvark")], given[0])


def test_the_card_has_the_words_and_the_figures_of_its_run(recipe, tmp_path):
    kinds = (("renders", 0.99), ("vae", 0.5), ("drawn", 0.25))
    figures = {kind: {"hair": share, "eyes": 1.0} for kind, share in kinds} | {"vae_psnr": 29.51}
    figures |= {f"styled/{kind}": {"light": share} for kind, share in kinds} | {"styled/vae_psnr": 27.3}
    recipe.export.write_card(tmp_path, (RECIPE / "card.md").read_text(), figures)
    card = (tmp_path / "README.md").read_text()
    assert not re.search("{(words|figures|count)}", card)
    assert "- hair colour: black, brown, red, pink, orange, blond, white" in card
    assert "- light: flat, left lit, right lit" in card
    assert "| through the autoencoder (29.5 dB) | 0.50 |  |" in card and "| drawn from full captions | 0.25 |" in card
    assert "|  | 0.50 |\n| drawn from full captions with a style |" in card and "(27.3 dB)" in card


def test_the_gate_asks_for_each_attribute_from_words_and_from_codes(recipe):
    good = dict.fromkeys(recipe.world.STYLE, 0.95)
    figures = {"styled/drawn": {**good, "hair": 0.5}, "codes/styles": good}
    assert recipe.measure.passes(figures)
    for kind, name in itertools.product(figures, recipe.world.STYLE):
        assert not recipe.measure.passes(figures | {kind: {**figures[kind], name: 0.94}})


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
    kinds = {"renders", "vae", "vae_psnr", "drawn"}
    kinds |= {f"styled/{kind}" for kind in kinds} | {
        "styled/held_out",
        "codes/people",
        "codes/styles",
        "codes/both",
        "gate",
    }
    assert set(figures) == kinds
    assert figures["gate"] is False  # nothing was learned
    people = json.loads((tmp_path / "people" / "people.json").read_text())
    assert {facts["split"] for facts in people.values()} == {"dev", "test", "dev-style", "test-style"}
    assert len(list((tmp_path / "people" / "amber").glob("*.png"))) == 4
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
