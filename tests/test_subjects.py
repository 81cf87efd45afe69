"""What `benchmarks/learning.py` learns: people, styles and pairs of both, their prompts and their true attributes."""

import sys
from pathlib import Path

import numpy as np
import pytest

from ti_jax.evaluation.avatar_judge import Judge

ROOT = Path(__file__).parent.parent
PATHS = [str(ROOT / "benchmarks"), str(ROOT / "recipes" / "mini_sd")]
NAMES = ("subjects", "learning", "torch_loops", "world", "styles", "judge", "data", "trainer")


@pytest.fixture(scope="module")
def bench():
    """The modules, and a judge of the recipe's world that is asked for its probes alone."""
    import dataclasses
    import importlib

    kept = list(sys.path)
    sys.path[:0] = PATHS
    try:
        modules = {name: importlib.import_module(name) for name in NAMES}
        world, judge = modules["world"], modules["judge"]
        config = dataclasses.replace(
            judge.NAMES, style=world.STYLE,
            probes=judge.as_probes(world.PROBES), style_probes=judge.as_probes(world.STYLE_PROBES),
        )  # fmt: skip
        yield type("Bench", (), {**modules, "judge": Judge(config, {})})
    finally:
        sys.path[:] = kept
        for name in NAMES:
            sys.modules.pop(name, None)


def test_splits_and_pictures(bench):
    sizes = {split: len(bench.subjects.people(split)) for split in bench.subjects.SPLITS}
    assert sizes == {"dev": 8, "test": 16, "dev-style": 4, "test-style": 12, "dev-pairs": 4, "test-pairs": 12}
    for split in ("dev", "test", "dev-style", "test-style"):
        for person in bench.subjects.people(split):
            assert len(list(person.folder.glob("*.png"))) == 4
            assert person.is_style == ("style" in split)
    # No moustached person has a nose to be scored.
    assert {person.name for person in bench.subjects.people("test") if "nose" not in person.truth} == {
        "test03", "test12", "test13", "test15"
    }  # fmt: skip


def test_the_word_of_diffusers_method_is_that_at_the_end_of_its_training(bench, tmp_path):
    (person, *_) = everyone = bench.subjects.people("dev-style")
    measured = bench.learning.Bench(tmp_path / "strips", everyone)
    start = measured.stock_loop("stock-best", person, 0, {}).rows["text_encoder"]
    word, figures = measured.word("stock-best", person, 0, {"max_train_steps": 1})
    assert figures["steps"] == 1
    # AdamW's first update is the learning rate in each element.
    change = np.abs(word.vectors["text_encoder"] - start)
    np.testing.assert_allclose(change, bench.learning.STOCK_BEST_LEARNING_RATE, rtol=0.05)


def test_prompts_say_what_is_asked_and_descriptions_what_is_true(bench):
    subjects, words = bench.subjects, set(bench.world.vocabulary())
    for split in subjects.SPLITS:
        for person in subjects.people(split):
            for probe in subjects.probes_for(person.truth, bench.judge, 1):
                with_word, plain = person.prompt(probe, "<x>").split(), person.prompt(probe, None).split()
                said = subjects.description(person, probe)
                tokens = {"<x>", "<style>"} if person.parts else {"<x>"}
                assert set(with_word) - words == tokens and set(plain) <= words and set(said.split()) <= words
                for name, word in {**person.truth, **dict(probe.expects)}.items():
                    usual = name in bench.world.STYLE and word == bench.world.ATTRIBUTES[name][0]
                    assert usual or word in said, (name, said)
                for word in dict(probe.expects).values():
                    assert word in " ".join(with_word) and word in " ".join(plain)


def test_of_a_person_counts_what_the_style_shows(bench):
    """And the pair's figures stand beside those of its words alone, over the same attributes."""
    subjects, learning, judge = bench.subjects, bench.learning, bench.judge
    amber, natural = (
        next(pair for pair in subjects.people("dev-pairs") if pair.parts[1].name == name) for name in ("amber", "coral")
    )
    assert {"hair", "beard", "palette"} <= set(amber.truth) and "skin" not in amber.truth
    assert {"skin", "hair_colour", "light"} <= set(natural.truth)

    def line(person, wrong):
        """Readings of pictures that are right but for one attribute of each."""
        first = {name: values[0] for name, values in bench.world.ATTRIBUTES.items()}
        probes = subjects.probes_for(person.truth, judge, learning.IMAGES_A_PROBE)
        seen = [{**first, **person.truth, **dict(probe.expects), **wrong} for probe in probes]
        return {"method": "ours", "person": person.name, "seed": 0, "changes": {}, "cores": 1, "readings": seen}

    lines = [line(amber, {"hair": "bald", "frame": "round"}), line(amber.parts[0], {"skin": "dark"})]
    shares = learning.scores(lines[0], amber.truth, judge)
    assert (shares["person"], shares["style"], shares["whole"]) == (pytest.approx(2 / 3), 0.75, 0.0)
    assert learning.scores(lines[1], amber.parts[0].truth, judge)["identity"] == pytest.approx(0.8)
    alone = learning.alone(amber, {each["person"]: each for each in lines}, judge)
    assert alone == {"person": 1.0}  # the skin is hidden in the pair, and the style's word was not measured
    rows = list(learning.table(lines, subjects.people("dev-pairs"), judge))
    assert rows[0].startswith("| method | runs | identity | person | style | hair | beard | nose | palette |")
    assert any(row.startswith("| each word alone | 4 |  | 1.00") for row in rows)
