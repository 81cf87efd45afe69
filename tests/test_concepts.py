"""Several concepts in one run: where they come from, what each has for itself, and what is refused."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ti_jax.cli.main import main
from ti_jax.config import TrainConfig, concept_configs, dump_yaml, load_yaml, resolve
from ti_jax.data.inputs import read_all_inputs
from ti_jax.data.sharing import next_entry, share, weight
from ti_jax.errors import InputError
from ti_jax.training import run_folder
from ti_jax.training.mixing import Mixing, mixing_of


@pytest.fixture
def family(tmp_path):
    """A folder with the pictures of two concepts, and files and folders that are none."""
    folder = tmp_path / "family"
    for name in ("ana", "My Cat"):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / name / f"{number}.png")
    (folder / "My Cat").rename(tmp_path / "elsewhere")
    (folder / "My Cat").symlink_to(tmp_path / "elsewhere")  # the word is the link's name
    (folder / ".hidden").mkdir()
    (folder / "README.md").write_text("our family")
    return folder


def words_of(config):
    return {Path(each.output_dir).name: each.placeholder_token for each in concept_configs(config)}


# -- where they come from


def test_each_sub_folder_is_a_concept(family):
    config = resolve(TrainConfig(concepts=str(family), num_vectors=2, output_dir="out"))
    assert words_of(config) == {"ana": "<ana>", "my-cat": "<my-cat>"}
    for concept in concept_configs(config):
        assert concept.num_vectors == 2 and Path(concept.output_dir).parent == Path("out")
        assert resolve(concept) == concept and concept_configs(concept) == (concept,)
    assert resolve(config) == config


def test_an_entry_of_a_file_has_what_it_says_and_the_rest_from_the_run(family, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    (family / "styles.txt").write_text("a {} portrait\n")
    file = family / "ours.yaml"
    file.write_text(
        "- train_data_dir: ana\n  num_vectors: 3\n"
        "- train_data_dir: My Cat\n  placeholder_token: tom\n  initializer_token: person\n"
        "  learnable_property: style\n  templates: styles.txt\n"
    )
    config = resolve(TrainConfig(concepts=str(file), initializer_token="in", output_dir=str(tmp_path / "out")))
    ana, tom = concept_configs(config)
    assert (ana.placeholder_token, ana.num_vectors, ana.initializer_token) == ("<ana>", 3, "in")
    assert (tom.placeholder_token, tom.num_vectors, tom.initializer_token) == ("tom", 1, "person")
    assert tom.learnable_property == "style" and tom.templates == str(family / "styles.txt")
    assert tom.train_data_dir == str(family / "My Cat") and tom.output_dir == str(tmp_path / "out" / "tom")
    assert ana.templates == config.templates != tom.templates
    inputs = read_all_inputs((ana, tom), print)
    assert inputs[1].templates == ["a {} portrait"]


def test_each_word_has_as_many_samples_as_in_a_run_of_its_own(family):
    alone = resolve(TrainConfig(train_data_dir=str(family / "ana")))
    assert resolve(TrainConfig(concepts=str(family))).max_train_steps == 2 * alone.max_train_steps
    assert resolve(TrainConfig(concepts=str(family), max_train_steps=7)).max_train_steps == 7
    assert resolve(TrainConfig(concepts=str(family), num_train_epochs=7)).max_train_steps is None


def test_the_config_of_a_run_brings_its_concepts_back(family, tmp_path):
    config = resolve(TrainConfig(concepts=str(family)))
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert TrainConfig(**load_yaml(tmp_path / "config.yaml", TrainConfig)) == config


# -- what is refused


def refusal(config):
    with pytest.raises(InputError) as error:
        config = resolve(config)
        run_folder.check_apart(config)
        read_all_inputs(concept_configs(config), print)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a list with an entry  - train_data_dir: ...  for each concept; nothing in it"),
        ("train_data_dir: ana\n", "expected a list with an entry"),
        ("- ana\n", "concept 1: expected lines of  key: value , found 'ana'"),
        (
            "- train_data_dir: ana\n- train_dir: ana\n",
            "concept 2: unknown key 'train_dir'; did you mean train_data_dir?",
        ),
        ("- train_data_dir: ana\n  seed: 1\n", "concept 1: unknown key 'seed'; known are train_data_dir, placeholder"),
        ("- train_data_dir: ana\n  num_vectors: many\n", "concept 1: num_vectors: 'many' is not a whole number"),
        ("- train_data_dir: ana\n  num_vectors: 0\n", "<ana>: --num_vectors 0: must be 1 or more"),
        ("- placeholder_token: <x>\n", "concept 1: no train_data_dir; give the folder with the concept's pictures"),
        ("- train_data_dir: ana\n  placeholder_token: my cat\n", "must be one word without spaces"),
        (
            "- train_data_dir: ana\n- train_data_dir: My Cat\n  placeholder_token: <ANA>\n",
            "concept 2: <ANA> has the same word as <ana> of",
        ),
        (
            "- train_data_dir: ana\n- train_data_dir: My Cat\n  placeholder_token: ana\n",
            "concept 2: ana has the same folder, ana, for its results as <ana> of",
        ),
        ("- train_data_dir: ana\n  placeholder_token: <a/b>\n", "a folder 'a/b', which cannot be a name; give another"),
        ("- train_data_dir: ana\n  placeholder_token: <samples>\n", "which is for what the run itself writes"),
        ("- train_data_dir: ana\n  templates: nowhere.txt\n", "templates nowhere.txt: no such file"),
        ("- train_data_dir: nowhere\n", "nowhere: no such folder"),
        ("- train_data_dir: [\n", "line 2: not valid YAML"),
    ],
)
def test_a_file_that_cannot_be(family, text, message):
    file = family / "ours.yaml"
    file.write_text(text)
    assert message in refusal(TrainConfig(concepts=str(file)))


def test_a_folder_that_cannot_be(family, tmp_path):
    concepts = str(family)
    assert "no such folder or file; give a folder of folders" in refusal(TrainConfig(concepts=concepts + "/none"))
    assert "no sub-folder in it" in refusal(TrainConfig(concepts=str(family / "ana")))
    (family / "empty").mkdir()
    assert f"<empty>: {family / 'empty'}: no pictures in this folder" in refusal(TrainConfig(concepts=concepts))
    (family / "empty").rename(family / "Ana")
    told = refusal(TrainConfig(concepts=concepts))
    assert "sub-folder ana: <ana> has the same word as <ana> of" in told and "sub-folder Ana; give one another" in told


def test_settings_that_contradict_concepts(family):
    concepts = str(family)
    told = refusal(TrainConfig(concepts=concepts, train_data_dir="x"))
    assert "and --train_data_dir x: the concepts have their own; leave one out" in told
    assert "and --placeholder_token <x>: the" in refusal(TrainConfig(concepts=concepts, placeholder_token="<x>"))
    told = refusal(TrainConfig(concepts=concepts, pretrained_model_name_or_path="some/model"))
    assert "<my-cat>: --initializer_token must be given" in told
    told = refusal(TrainConfig(concepts=concepts, validation_prompt=("a portrait of <ana>",)))
    assert "<my-cat>: --validation_prompt" in told and "the new word <my-cat> is not in it" in told
    assert "there is one concept" in refusal(TrainConfig(concepts_per_batch=2))


def test_the_concepts_cannot_lie_where_the_run_writes(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for output in (family, family / "out", family / "ana"):
        assert "choose a folder outside it" in refusal(TrainConfig(concepts=str(family), output_dir=str(output)))
    inside = tmp_path / "out" / "ana" / "samples"
    inside.parent.mkdir(parents=True)
    (family / "ana").rename(inside)
    file = tmp_path / "ours.yaml"
    file.write_text(f"- train_data_dir: {inside}\n  placeholder_token: <ana>\n")
    told = refusal(TrainConfig(concepts=str(file), output_dir="out"))
    assert "a folder that runs write to, in --output_dir out" in told


def test_a_command_that_cannot_be_writes_nothing(family, tmp_path, capfd):
    (family / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    assert main(["train", "--concepts", str(family), "--output_dir", str(out), "--max_train_steps", "1"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "<empty>: " in line and "no pictures in this folder" in line
    assert [path for path in sorted(tmp_path.rglob("*")) if out not in (path, *path.parents)] == before
    assert not any(path.is_file() and path.stat().st_size > 10 for path in out.rglob("*"))


# -- the folder


def results_of(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\x89PNG parameters")


def test_earlier_results_of_concepts_are_moved_aside(tmp_path):
    (tmp_path / "config.yaml").write_text("output_dir: x\nconcepts: family\n")
    for name in ("ana", "ben"):
        results_of(tmp_path / name, "learned_embeds.safetensors", "samples/overview-00.png", "overview.png")
    results_of(tmp_path / "alone", "learned_embeds.safetensors", "samples/overview-00.png")
    (tmp_path / "alone" / "config.yaml").write_text("output_dir: x\nplaceholder_token: <alone>\n")
    results_of(tmp_path / "kept", "learned_embeds.safetensors")
    (tmp_path / "ana" / "mine.txt").write_text("mine")
    run_folder.prepare(tmp_path, None, [tmp_path / "ana", tmp_path / "new"])
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name in left if not name.startswith("previous-1/")} == {
        "alone/learned_embeds.safetensors", "alone/samples/overview-00.png", "alone/config.yaml",
        "kept/learned_embeds.safetensors", "ana/mine.txt",
    }  # fmt: skip
    for name in ("ana", "ben"):
        assert f"previous-1/{name}/samples/overview-00.png" in left
    assert (tmp_path / "new" / "samples").is_dir()


# -- how they share a batch


def test_the_numbers_of_a_batch(family):
    config = TrainConfig(concepts=str(family))
    assert mixing_of(config, 1, 8).in_batch == 1 and mixing_of(config, 8, 7).in_batch == 1
    assert mixing_of(config, 8, 8).updates(8 * 250) == 250 * mixing_of(config, 8, 8).in_batch
    chosen = replace(config, concepts_per_batch=4)
    assert mixing_of(chosen, 8, 16) == Mixing(8, 4)
    with pytest.raises(InputError, match="there are 3 concepts"):
        mixing_of(chosen, 3, 16)
    with pytest.raises(InputError, match="does not divide the 6 samples"):
        mixing_of(chosen, 8, 6)


@pytest.mark.parametrize(("in_batch", "batch"), [(1, 4), (2, 4), (3, 6)])
def test_every_word_has_as_many_samples_and_sees_each_of_its_pictures_as_often(in_batch, batch):
    """Concepts of 2, 1 and 5 entries: a batch has as many of each of its concepts, dealt out in turn."""
    counts, steps = [2, 1, 5], 60
    sharing, key = share(counts, in_batch), jax.random.key(0)
    draw = jax.jit(jax.vmap(jax.vmap(lambda s, p: next_entry(sharing, 8, key, s, p, batch), (None, 0)), (0, None)))
    drawn = np.asarray(draw(np.arange(steps), np.arange(batch)))
    concept = np.repeat(np.arange(3), counts)[drawn]
    for step, row in enumerate(concept):
        places = step * in_batch + np.arange(batch) % in_batch
        assert row.tolist() == (places % 3).tolist()
    assert np.bincount(concept.ravel()).tolist() == [steps * batch // 3] * 3
    for number, count in enumerate(counts):
        # In the order of the concept's own samples: round after round, and within a batch from left to right.
        own = drawn.reshape(steps, batch // in_batch, in_batch).swapaxes(1, 2).reshape(steps * in_batch, -1)
        own = own[number::3].ravel() - sum(counts[:number])
        epochs = own[: len(own) // count * count].reshape(-1, count)
        assert (np.sort(epochs) == np.arange(count)).all()
        assert count < 3 or len({tuple(epoch) for epoch in epochs}) > 5, "every epoch has the same order"


def test_every_word_has_as_many_samples_where_its_pictures_are_of_several_shapes():
    """Two datasets: all of the first concept and some of the others; the rest of these."""
    of, there = [2, 4, 6], [[2, 1, 2], [0, 3, 4]]
    weights = np.array([weight(sizes, of) for sizes in there])
    np.testing.assert_allclose(weights, [1 + 1 / 4 + 1 / 3, 3 / 4 + 2 / 3])
    samples, in_batch, batch = np.zeros(3), 2, 4
    for sizes, used in zip(there, weights, strict=True):
        sharing, key = share(sizes, in_batch, of), jax.random.key(0)
        updates = len(sharing.turns) * 6
        draw = jax.jit(
            jax.vmap(jax.vmap(lambda t, p: next_entry(sharing, sum(sizes), key, t, p, batch), (None, 0)), (0, None))  # noqa: B023
        )
        drawn = np.asarray(draw(np.arange(updates), np.arange(batch))).ravel()
        owner = np.repeat(np.arange(3), sizes)
        shares = np.bincount(owner[drawn], minlength=3) / len(drawn)
        np.testing.assert_allclose(shares, np.array(sizes) / of / used)
        each = np.bincount(drawn, minlength=sum(sizes))
        for concept in set(owner):
            own = each[owner == concept]
            assert own.max() - own.min() <= 1, "a picture is seen more often than another"
        samples += used * shares
    np.testing.assert_allclose(samples, samples[0])
