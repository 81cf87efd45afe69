"""Configs: filled in for the model, checked value by value, read from and written to YAML without loss."""

import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest

from ti_jax.cli import embedding
from ti_jax.cli.flags import field_docs
from ti_jax.cli.main import VerifyConfig
from ti_jax.config import (
    ASSETS,
    DEMO_CONFIG,
    STABLE_DIFFUSION_DEFAULTS,
    DataConfig,
    EvaluateConfig,
    InferConfig,
    PlanConfig,
    TrainConfig,
    check_fields,
    dump_yaml,
    load_yaml,
    resolve,
    resolve_data,
    resolve_evaluate,
    resolve_infer,
    resolve_plan,
    rules,
)
from ti_jax.config.fields import settings_of
from ti_jax.config.rates import Rates
from ti_jax.config.row_norm import RowNorm
from ti_jax.config.yaml import strip_optional
from ti_jax.errors import InputError

CONFIGS = Path(__file__).parents[1] / "configs"
OTHER = {
    "pretrained_model_name_or_path": "some/model",
    "train_data_dir": "cat",
    "placeholder_token": "<cat-toy>",
    "initializer_token": "toy",
}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def train_config_of(path: Path) -> TrainConfig:
    return TrainConfig(**load_yaml(path, TrainConfig))


# -- what suits the model


def test_embedded_model_takes_everything_from_demo_yaml():
    config = resolve(TrainConfig())
    assert Path(config.train_data_dir) == ASSETS / "concepts" / "cleo"
    assert Path(config.templates).read_text().splitlines()[0] == "a portrait of {}"
    for name, value in load_yaml(DEMO_CONFIG, TrainConfig).items():
        assert getattr(config, name) == value
    assert (config.resolution, config.mixed_precision) == (None, None)


def test_demo_yaml_sets_only_what_no_arguments_leave_open():
    """Otherwise ``train.py`` and ``train.py --config configs/demo.yaml`` were different runs."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    assert [name for name in load_yaml(DEMO_CONFIG, TrainConfig) if defaults[name] is not None] == []
    assert resolve(train_config_of(CONFIGS / "demo.yaml")) == resolve(TrainConfig())


def test_demo_prompts_are_words_that_the_embedded_model_knows():
    vocabulary = json.loads((ASSETS / "mini-sd" / "tokenizer" / "vocab.json").read_text())
    config = resolve(TrainConfig())
    prompts = [*config.overview_prompts, *Path(config.templates).read_text().splitlines(), config.initializer_token]
    for word in " ".join(prompts).replace("{}", "").replace("{caption}", "").split():
        assert word + "</w>" in vocabulary


def test_other_model_takes_the_values_of_diffusers_script():
    config = resolve(TrainConfig(**OTHER))
    for name, value in STABLE_DIFFUSION_DEFAULTS.items():
        assert getattr(config, name) == value
    assert config.templates is None


@pytest.mark.parametrize("given", [OTHER, {}, {"num_train_epochs": 3}])
def test_resolving_twice_changes_nothing(given):
    config = resolve(TrainConfig(**given))
    assert resolve(config) == config


def test_what_is_given_stays():
    given = TrainConfig(learning_rate=1e-2, train_batch_size=3, max_train_steps=7, overview_prompts=("a {}",))
    config = resolve(given)
    assert (config.learning_rate, config.train_batch_size, config.max_train_steps) == (1e-2, 3, 7)
    assert config.overview_prompts == ("a {}",)


@pytest.mark.parametrize(("given", "word"), [(True, "full"), (False, "none"), ("policy", "policy"), (None, None)])
def test_gradient_checkpointing_in_python_is_a_word_or_true_or_false(given, word):
    assert resolve(TrainConfig(gradient_checkpointing=given)).gradient_checkpointing == word


def test_epochs_are_not_overridden_by_the_default_number_of_steps():
    assert resolve(TrainConfig(num_train_epochs=2)).max_train_steps is None
    assert resolve(TrainConfig(num_train_epochs=2, **OTHER)).max_train_steps is None
    assert resolve(TrainConfig(num_train_epochs=2, max_train_steps=9)).max_train_steps == 9


@pytest.mark.parametrize(
    ("folder", "word"),
    [("me", "<me>"), ("a/My Cat.2/", "<my-cat-2>"), ("a/--", "<concept>"), ("été", "<été>"), ("b/../me", "<me>")],
)
def test_own_pictures_of_the_embedded_model_are_named_after_their_folder(folder, word):
    assert resolve(TrainConfig(train_data_dir=folder)).placeholder_token == word
    assert resolve(TrainConfig(train_data_dir=folder, placeholder_token="<x>")).placeholder_token == "<x>"


@pytest.mark.parametrize("missing", ["train_data_dir", "placeholder_token", "initializer_token"])
def test_other_model_needs_pictures_word_and_initializer(missing):
    with pytest.raises(InputError, match=f"^--{missing} must be given with --pretrained_model_name_or_path"):
        resolve(TrainConfig(**{name: value for name, value in OTHER.items() if name != missing}))


def test_a_learned_word_to_start_from_takes_the_place_of_the_initializer():
    start = {"initializer_embedding": "~/cat.pt"}
    for config in (
        resolve(TrainConfig(**start)),
        resolve(TrainConfig(**{**OTHER, **start, "initializer_token": None})),
    ):
        assert config.initializer_token is None and config.initializer_embedding == str(Path("~/cat.pt").expanduser())
        assert resolve(config) == config
    with pytest.raises(InputError, match=r"^--initializer_token 'toy' and --initializer_embedding '.*cat.pt': .*leave"):
        resolve(TrainConfig(**OTHER, **start))


def test_paths_are_text_without_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = resolve(TrainConfig(train_data_dir=Path("~/cat"), output_dir="~/out", embeddings=["~/a", "b"]))
    assert config.train_data_dir == f"{tmp_path}/cat"
    assert config.output_dir == f"{tmp_path}/out"
    assert config.embeddings == (f"{tmp_path}/a", "b")


def test_infer_defaults_follow_the_model():
    embedded = resolve_infer(InferConfig(prompt=("a",)))
    assert (embedded.num_inference_steps, embedded.guidance_scale) == (25, 3.0)
    other = resolve_infer(InferConfig(prompt=("a",), pretrained_model_name_or_path="some/model"))
    assert (other.num_inference_steps, other.guidance_scale) == (30, 7.5)
    given = resolve_infer(InferConfig(prompt=("a",), num_inference_steps=2, guidance_scale=0.0))
    assert (given.num_inference_steps, given.guidance_scale) == (2, 0.0)


# -- values that cannot be

CONFIGS_OF = {  # of each config class what checks it, and values that it must have
    TrainConfig: (resolve, OTHER),
    PlanConfig: (resolve_plan, {"pretrained_model_name_or_path": "some/model"}),
    DataConfig: (resolve_data, {}),
    # With a model, because the embedded one has no revision or variant.
    InferConfig: (resolve_infer, {"prompt": ("a",), "pretrained_model_name_or_path": "some/model"}),
    EvaluateConfig: (resolve_evaluate, {"train_data_dir": "cat", "pretrained_model_name_or_path": "some/model"}),
    **dict.fromkeys([VerifyConfig, *(cls for _, cls, _, _ in embedding.COMMANDS.values())], (None, {})),
}
# Text that may well be empty, and numbers whose bounds only the file tells.
# Lists of a closed type, too.
WITHOUT_RULE = {"report_to", "negative_prompt", "validation_negative_prompt", "weights", "keep", "drop"}
# What a setting does nothing without.
NEEDED_BY = {
    "huber_c": {"loss": "huber"}, "bucket_step": {"aspect_ratio_buckets": True},
    "max_aspect_ratio": {"aspect_ratio_buckets": True}, "initializer_embedding": {"initializer_token": None},
    "concepts_per_batch": {"concepts": "family"}, "dataset_name": {"train_data_dir": None},
    "image_column": {"dataset_name": "a/b", "train_data_dir": None},
    "negative_class": {"learn_negative": True}, "negative_guidance_scale": {"learn_negative": True},
    "early_stop_window": {"early_stop": True}, "early_stop_threshold": {"early_stop": True},
}  # fmt: skip


def resolved(cls, **values):
    check, needed = CONFIGS_OF[cls]
    if values.keys() & {"concepts", "concepts_per_batch"}:  # a run reads them when it is resolved, a plan does not
        check = resolve_plan
    for name in values:
        needed = needed | NEEDED_BY.get(name, {})
    config = cls(**{**needed, **values})
    if check is not None:
        return check(config)
    check_fields(config)
    return config


def cases(which):
    return [
        pytest.param(cls, name, value, id=f"{cls.__name__}-{name}-{value!r}")
        for cls in CONFIGS_OF
        for name, about in settings_of(cls).items()
        if about.rule is not None
        for value in getattr(about.rule, which)
    ]


@pytest.mark.parametrize(("cls", "name", "value"), cases("bad"))
def test_bad_value_is_named_with_its_flag(cls, name, value):
    with pytest.raises(InputError) as error:
        resolved(cls, **{name: value})
    shown = " ".join(map(repr, value)) if isinstance(value, tuple) else repr(value)
    assert str(error.value).startswith(f"--{name} {shown}: must be ")


@pytest.mark.parametrize(("cls", "name", "value"), cases("good"))
def test_values_at_the_bounds_are_taken(cls, name, value):
    assert getattr(resolved(cls, **{name: value}), name) == value


@pytest.mark.parametrize("cls", CONFIGS_OF)
def test_every_field_has_a_doc_and_a_rule_or_a_closed_type(cls):
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    assert list(docs) == [field.name for field in dataclasses.fields(cls)]
    assert all(doc.endswith(".") for doc in docs.values())
    for name, about in settings_of(cls).items():
        base, _ = strip_optional(hints[name])
        closed = base is bool or typing.get_origin(base) is typing.Literal
        assert (about.rule is None) == (closed or name in WITHOUT_RULE), name


def test_every_rule_has_examples():
    for name, rule in vars(rules).items():
        if isinstance(rule, rules.Rule):
            assert rule.good and rule.bad, name
            assert all(map(rule.holds, rule.good)) and not any(map(rule.holds, rule.bad)), name


@pytest.mark.parametrize("cls", CONFIGS_OF)
def test_paths_have_their_home_folder_and_any_bytes(cls, monkeypatch, tmp_path):
    """Of every config that is resolved; all its paths at once, and one after the other."""
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {name for name, about in settings_of(cls).items() if about.path is not None}
    hints = typing.get_type_hints(cls)
    # These have a suffix, or must be UTF-8 for a library.
    for name in paths - {"output", "output_dir", "contact_sheet"}:
        many = typing.get_origin(strip_optional(hints[name])[0]) is tuple
        value = getattr(resolved(cls, **{name: ("~/a\udce9",) if many else "~/a\udce9"}), name)
        if CONFIGS_OF[cls][0] is not None:
            assert value == ((f"{tmp_path}/a\udce9",) if many else f"{tmp_path}/a\udce9"), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_vectors": "3"}, "--num_vectors '3': must be a whole number"),
        ({"num_vectors": True}, "--num_vectors True: must be a whole number"),
        ({"seed": 1.5}, "--seed 1.5: must be a whole number"),
        ({"learning_rate": "5e-4"}, "--learning_rate '5e-4': must be a number"),
        ({"embeddings": (1,)}, "--embeddings 1: must be a list of texts"),
        ({"center_crop": 1}, "--center_crop 1: must be true or false"),
        ({"row_norm": "mean"}, "--row_norm 'mean': must be free, initial, vocabulary or a number"),
        ({"lr_scheduler": "cosin"}, "--lr_scheduler 'cosin': must be one of constant, "),
        ({"mixed_precision": "fp16"}, "--mixed_precision 'fp16': must be no or bf16"),
        ({"gradient_checkpointing": "half"}, "--gradient_checkpointing 'half': must be one of none, policy or full"),
        ({"overview_prompts": ()}, "--overview_prompts : must be one text or more"),
    ],
)
def test_configs_made_in_python_are_checked_too(values, message):
    with pytest.raises(InputError) as error:
        resolve(TrainConfig(**{**OTHER, **values}))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "value"), [("revision", "fp16"), ("variant", "fp16"), ("prediction_type", "v_prediction")]
)
@pytest.mark.parametrize(
    "make", [lambda **v: resolve(TrainConfig(**v)), lambda **v: resolve_infer(InferConfig(("a",), **v))]
)
def test_embedded_model_has_no_variants(make, name, value):
    with pytest.raises(InputError, match=f"^--{name} {value}: the embedded model has only one"):
        make(**{name: value})


@pytest.mark.parametrize("values", [{"validation_prompt": "a photo of"}, {"overview_prompts": ("a {}", "a cat")}])
def test_prompts_that_show_the_word_must_hold_it(values):
    with pytest.raises(InputError, match=r"^--\w+ 'a (photo of|cat)': the new word <cat-toy> is not in it"):
        resolve(TrainConfig(**OTHER, **values))


@pytest.mark.parametrize("prompt", ["a {} here", "a <cat-toy> here", "a <CAT-TOY>"])
def test_prompts_hold_the_word_or_braces(prompt):
    assert resolve(TrainConfig(**OTHER, validation_prompt=prompt)).validation_prompt == (prompt,)


def test_each_of_several_validation_prompts_must_hold_the_word():
    with pytest.raises(InputError, match=r"^--validation_prompt 'a cat': the new word <cat-toy> is not in it"):
        resolve(TrainConfig(**OTHER, validation_prompt=("a {}", "a cat")))


@pytest.mark.parametrize("places", [(), ("none", "tensorboard"), ("tensorboard", "tensorboard")])
def test_places_to_report_to_stand_once_and_none_alone(places):
    with pytest.raises(InputError, match=f"^--report_to {' '.join(places)}: must be none, or one or several of"):
        resolve(TrainConfig(report_to=places))


@pytest.mark.parametrize("written", ["a {}: b", "['a {}', 'b {}']"])
def test_one_text_may_stand_for_a_list_in_yaml(tmp_path, written):
    prompts = ("a {}: b",) if written[0] == "a" else ("a {}", "b {}")
    written = written if written[0] == "[" else f"'{written}'"
    path = write(tmp_path / "config.yaml", f"validation_prompt: {written}\nreport_to: none\n")
    config = train_config_of(path)
    assert config.validation_prompt == prompts and config.report_to == ("none",)
    # A field that has always been a list stays strict.
    with pytest.raises(InputError, match="embeddings: 'x' is not a list of texts"):
        load_yaml(write(path, "embeddings: x\n"), TrainConfig)


def test_infer_needs_a_prompt():
    with pytest.raises(InputError, match=r"^--prompt is missing"):
        resolve_infer(InferConfig())


# -- YAML


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_right_once_the_concept_is_given(path):
    values = load_yaml(path, TrainConfig)
    concept = {} if path.name.startswith("demo") else {name: OTHER[name] for name in list(OTHER)[1:]}
    assert resolve(TrainConfig(**values, **concept)).pretrained_model_name_or_path == values.get(
        "pretrained_model_name_or_path"
    )


def test_a_dumped_config_loads_as_it_was(tmp_path):
    config = resolve(TrainConfig(**OTHER, num_train_epochs=3, validation_prompt="a {}: b # c", embeddings=("x", "y")))
    assert train_config_of(write(tmp_path / "config.yaml", dump_yaml(config))) == config


AWKWARD = [
    *["no", "null", "~", "true", "", "=", "<<"],
    *["5e-4", "1e3", "12:30", "2024-01-01", "007", "0x1f", "1_000", ".inf", "-"],
    *["a:b", "a: b", "- a", "#x", "a #b", "{}", "[x]", "'", '"', "%", "@x", "`x", "!x", "&x", "*x", "?", "|", ">"],
    *[" x ", "a\nb\n", "\t", "\\n", "é☃🐈", "\x7f", "a" * 300, "a b " * 100],
]


@pytest.mark.parametrize("text", AWKWARD)
def test_any_text_survives_the_yaml_file(tmp_path, text):
    config = TrainConfig(revision=text, embeddings=(text, "b"))
    assert train_config_of(write(tmp_path / "config.yaml", dump_yaml(config))) == config


@pytest.mark.parametrize("number", [1e-8, 5e-4, 0.1 + 0.2, 1e22, 3.0, 1.7976931348623157e308])
def test_any_number_survives_the_yaml_file(tmp_path, number):
    config = TrainConfig(learning_rate=number)
    assert train_config_of(write(tmp_path / "config.yaml", dump_yaml(config))) == config


def test_secrets_stay_out_of_the_file_and_of_repr():
    config = TrainConfig(hub_token="hf_secret")
    assert "hf_secret" not in dump_yaml(config) + repr(config)


@pytest.mark.parametrize("cls", CONFIGS_OF)
def test_fields_that_a_dump_leaves_out_come_back_by_default(cls):
    for field in dataclasses.fields(cls):
        _, optional = strip_optional(typing.get_type_hints(cls)[field.name])
        assert optional == (field.default is None), field.name


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("learning_rate: 5e-4", {"learning_rate": 5e-4}),
        ("learning_rate: 1", {"learning_rate": 1.0}),
        ("learning_rate: .5E+1", {"learning_rate": 5.0}),
        ("mixed_precision: no", {"mixed_precision": "no"}),
        ("row_norm: 1", {"row_norm": 1.0}),
        ("row_norm: initial", {"row_norm": RowNorm("initial")}),
        ("revision: on\nvariant: 2024-01-01", {"revision": "on", "variant": "2024-01-01"}),
        ("center_crop: true\nseed: -0", {"center_crop": True, "seed": 0}),
        ("resolution: null\nvariant: ~\nrevision:", {"resolution": None, "variant": None, "revision": None}),
        ("gradient_checkpointing: true", {"gradient_checkpointing": "full"}),
        ("gradient_checkpointing: false", {"gradient_checkpointing": "none"}),
        ("gradient_checkpointing: none", {"gradient_checkpointing": "none"}),
        ("gradient_checkpointing: policy", {"gradient_checkpointing": "policy"}),
        ("gradient_checkpointing: null", {"gradient_checkpointing": None}),
        ("embeddings: [a, 'b c']", {"embeddings": ("a", "b c")}),
        ("overview_prompts:\n  - a {}\n", {"overview_prompts": ("a {}",)}),
        ("placeholder_token: <cat-toy>", {"placeholder_token": "<cat-toy>"}),
        ("\ufeffseed: 3\r\n", {"seed": 3}),
        ("", {}),
        ("# nothing\n", {}),
    ],
)
def test_yaml_is_read_as_people_mean_it(tmp_path, text, values):
    loaded = load_yaml(write(tmp_path / "x.yaml", text), TrainConfig)
    assert loaded == values
    assert [type(value) for value in loaded.values()] == [type(value) for value in values.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'; did you mean learning_rate?"),
        ("learning-rate: 1", "unknown key 'learning-rate'; did you mean learning_rate?"),
        ("zzz: 1", "unknown key 'zzz'; keys are the flags of --help without their hyphens"),
        ("config: a.yaml", "unknown key 'config'"),
        ("1: 2", "unknown key 1;"),
        ("<<: {seed: 1}", "unknown key '<<'"),
        ("seed: x", "seed: 'x' is not a whole number"),
        ("seed: 1.0", "seed: 1.0 is not a whole number"),
        ("seed: '1'", "seed: '1' is not a whole number"),
        ("seed: true", "seed: True is not a whole number"),
        ("seed: null", "seed: None is not a whole number"),
        ("learning_rate: '5e-4'", "learning_rate: '5e-4' is not a number"),
        ("learning_rate: 5e-4x", "learning_rate: '5e-4x' is not a number"),
        ("learning_rate: [1]", "learning_rate: [1] is not a number"),
        ("learning_rate: false", "learning_rate: False is not a number"),
        ("center_crop: yes", "center_crop: 'yes' is not true or false"),
        ("gradient_checkpointing: yes", "gradient_checkpointing: 'yes' is not one of none, policy or full"),
        ("gradient_checkpointing: 1", "gradient_checkpointing: 1 is not one of none, policy or full"),
        ("center_crop: 1", "center_crop: 1 is not true or false"),
        ("revision: 1234567", "revision: 1234567 is not text; put quotes around it"),
        ("revision: {a: b}", "revision: {'a': 'b'} is not text"),
        ("embeddings: a", "embeddings: 'a' is not a list of texts, like [one, two]"),
        ("embeddings: [1]", "embeddings: [1] is not a list of texts"),
        ("embeddings: null", "embeddings: None is not a list of texts"),
        ("lr_scheduler: cosin", "lr_scheduler: 'cosin' is not one of constant, "),
        ("seed: 1\nseed: 2", ", line 2: not valid YAML: 'seed' is given twice, first on line 1"),
        ("seed: 1\n  center_crop: x: y", ", line 2: not valid YAML: "),
        ("seed: [1", ", line 1: not valid YAML: "),
        ("a\n\tb: 1", ", line 2: not valid YAML: "),
        ("seed: !!python/object/apply:os.system [id]", ", line 1: not valid YAML: could not determine a constructor"),
        ("seed: *x", ", line 1: not valid YAML: found undefined alias 'x'"),
        ("? [a]\n: 1", ", line 1: not valid YAML: "),
        ("seed: 1\n---\nseed: 2", ", line 2: not valid YAML: "),
        ("seed: 1\nvariant: a\x07b", ", line 2: a character that YAML does not allow (#x0007)"),
        ("[" * 5000, ": nested too deeply"),
        ("- a", "expected lines of  key: value , found ['a']"),
        ("just text", "expected lines of  key: value , found 'just text'"),
    ],
)
def test_yaml_faults_are_one_line_with_their_place(tmp_path, text, message):
    path = write(tmp_path / "x.yaml", text)
    with pytest.raises(InputError) as error:
        load_yaml(path, TrainConfig)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_yaml_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"nope\.yaml: cannot read the config \(No such file"):
        load_yaml(tmp_path / "nope.yaml", TrainConfig)
    with pytest.raises(InputError, match=r"cannot read the config \(Is a directory\)"):
        load_yaml(tmp_path, TrainConfig)
    (tmp_path / "latin.yaml").write_bytes(b"variant: caf\xe9\n")
    with pytest.raises(InputError, match=r"latin\.yaml: not a text file in UTF-8 \(byte 12\)"):
        load_yaml(tmp_path / "latin.yaml", TrainConfig)


def test_input_files_are_looked_for_beside_the_yaml_file_first(tmp_path, monkeypatch):
    job, here = tmp_path / "job", tmp_path / "here"
    (job / "cat").mkdir(parents=True)
    (here / "dog").mkdir(parents=True)
    (job / "t.txt").write_text("a {}\n")
    text = "train_data_dir: {}\ntemplates: t.txt\nembeddings: [t.txt, elsewhere.pt, /abs.pt]\noutput_dir: cat\n"
    monkeypatch.chdir(here)
    (tmp_path / "link.yaml").symlink_to(job / "x.yaml")

    write(job / "x.yaml", text.format("cat"))
    for path in (job / "x.yaml", tmp_path / "link.yaml"):
        values = load_yaml(path, TrainConfig)
        assert values["train_data_dir"] == str(job / "cat")
        assert values["templates"] == str(job / "t.txt")
        assert values["embeddings"] == (str(job / "t.txt"), "elsewhere.pt", "/abs.pt")
        assert values["output_dir"] == "cat"

    write(job / "x.yaml", text.format("dog"))
    assert load_yaml(job / "x.yaml", TrainConfig)["train_data_dir"] == "dog"

    (here / "cat").mkdir()
    write(job / "x.yaml", text.format("cat"))
    with pytest.raises(InputError, match=re.escape("train_data_dir: 'cat' is there both beside the file")):
        load_yaml(job / "x.yaml", TrainConfig)
    monkeypatch.chdir(job)
    assert load_yaml("x.yaml", TrainConfig)["train_data_dir"] == str(job / "cat")


# -- rates that change


def test_rates_are_read_as_automatic1111_writes_them(tmp_path):
    text = "5e-3:200, 1e-3:1000, 2e-4"
    assert Rates(text).steps == ((5e-3, 200), (1e-3, 1000), (2e-4, None))
    assert Rates("1:5,2").steps == ((1.0, 5), (2.0, None))
    config = resolve(
        TrainConfig(**OTHER, **load_yaml(write(tmp_path / "a.yaml", f"learning_rate: {text}"), TrainConfig))
    )
    assert config.learning_rate == text
    assert load_yaml(write(tmp_path / "b.yaml", dump_yaml(config)), TrainConfig)["learning_rate"] == Rates(text)


NO_RATES = [
    "5e-3", "", "5e-3:200", "5e-3:200, ", "5e-3:0, 1", "5e-3:9, 1:9, 1", "5e-3:9, 1:8, 1", "0:5, 1", "nan:5, 1",
    "1:5, inf", "a:5, 1", "1:b, 1", "1:5.5, 1", "1:2:3, 1", "1:5; 1",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_RATES)
def test_other_text_is_no_rates(text):
    with pytest.raises(InputError) as error:
        resolve(TrainConfig(**OTHER, learning_rate=text))
    assert str(error.value) == f"--learning_rate {text!r}: must be {Rates.EXPECTED}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": "1:5, 2", "lr_scheduler": "cosine"}, "--learning_rate '1:5, 2': has its own schedule, so "),
        ({"optimizer": "schedule_free", "ema_decay": 0.9}, "--ema_decay 0.9: --optimizer schedule_free averages"),
        ({"optimizer": "schedule_free", "adam_beta1": 0.0}, "--adam_beta1 0: must be above 0 with --optimizer"),
        ({"optimizer": "dti", "adam_beta1": 0.5}, "--adam_beta1 0.5: does nothing with --optimizer dti"),
        ({"optimizer": "dti", "max_grad_norm": 1.0}, "--max_grad_norm 1: does nothing with --optimizer dti"),
        (
            {"initializer_token": None, "initializer_embedding": "cat.pt", "initializer_output": True},
            "--initializer_output True: needs the words of --initializer_token to start from",
        ),
        (
            {"initializer_token": None, "initializer_embedding": "cat.pt", "context_loss": 1e-4},
            "--context_loss 0.0001: needs the words of --initializer_token to compare with",
        ),
        (
            {"learn_negative": True, "context_loss": 1e-4},
            "--context_loss 0.0001: prompts do not have the word of --learn_negative",
        ),
        ({"huber_c": 0.2}, "--huber_c 0.2: does nothing without --loss huber"),
        # Also those that are what would be used.
        ({"bucket_step": 64}, "--bucket_step 64: does nothing without --aspect_ratio_buckets; give both or neither"),
        ({"max_aspect_ratio": 2.0}, "--max_aspect_ratio 2: does nothing without --aspect_ratio_buckets"),
        ({"image_column": "image"}, "--image_column 'image': does nothing without --dataset_name"),
    ],
)
def test_settings_that_do_not_go_together(values, message):
    with pytest.raises(InputError) as error:
        resolve(TrainConfig(**{**OTHER, **values}))
    assert str(error.value).startswith(message)


def test_prodigys_rate_is_a_factor():
    assert resolve(TrainConfig(**OTHER, optimizer="prodigy")).learning_rate == 1.0
    assert resolve(TrainConfig(optimizer="prodigy")).learning_rate == 1.0
    assert resolve(TrainConfig(**OTHER, optimizer="prodigy", learning_rate=0.5)).learning_rate == 0.5


def test_the_rate_and_the_norm_of_dti():
    for config in (resolve(TrainConfig(optimizer="dti", **given)) for given in ({}, OTHER)):
        assert config.learning_rate == 1e-2 and (config.row_norm, config.kept_norm) == ("free", "vocabulary")
    assert TrainConfig(optimizer="dti", row_norm="initial").kept_norm == "initial"
    assert TrainConfig().kept_norm == "free"
