"""report.html: one file with all that a run tells, whatever words and settings it has."""

import importlib.util
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from words import sdxl_word, word

from ti_jax.config import ASSETS, TrainConfig, resolve
from ti_jax.config.defaults import differing
from ti_jax.embeddings.embedding import NEGATIVE_CLASS
from ti_jax.training import curves, page
from ti_jax.training.page import Page, Row, Word, render
from ti_jax.training.report import read_lines
from ti_jax.training.run_page import RunPage
from ti_jax.training.uses import Base, base_of, uses

NASTY = '<b onload="x">&amp;</b>'


def records(total=40, each=10, rows=2, prefix=""):
    """What a run leaves in metrics.jsonl."""
    found = []
    for step in range(each, total + 1, each):
        losses = [1 / number for number in range(step - each + 1, step + 1)]
        found.append({"step": step, "loss": np.mean(losses), "learning_rate": 1e-3 * step / total,
                      "samples_per_second": 8.0, "losses": losses})  # fmt: skip
        figures = {"distance": step / total, "cosine": 1 - step / 100, "norm": 0.3 + step / 100}
        found.append({"step": step} | {f"{prefix}text_encoder/row_{row}/{key}": value + row / 50
                                       for row in range(rows) for key, value in figures.items()})  # fmt: skip
    return found


def a_row(number):
    near = [("girl", 0.61), (NASTY, 0.5)]
    return Row(f"text_encoder/row_{number}", 0.3, 0.7, 0.4, 0.6, 0.9, near, near)


def a_page(folder, **given):
    """A page of a run whose pictures are in ``folder``."""
    picture = folder / "overview.png"
    Image.new("RGB", (30, 20), "purple").save(picture)
    words = word(2, token="<cat>")
    of_cat = Word(
        token=NASTY, about={"learned from": "4 pictures"}, rows=[a_row(0), a_row(1)], overview=page.data_uri(picture),
        scores={"token": "x", "identity": 0.75, "by_attribute": {"identity/hair": 1.0}},
        scores_log=[{"step": 10, "identity": 0.5}, {"step": 40, "identity": 0.75}],
        uses=uses(words, NASTY, "path/to/cat", Base("org/model")),
    )  # fmt: skip
    made = Page(
        title=NASTY, state="finished", step=40, total=40, running=False, words=[of_cat], records=records(),
        facts={"model": "org/model"}, settings={"seed": (3, 0), "templates": (NASTY, None)},
        seconds={"load": 1.0, "train": 0.0}, versions={"jax": "0.10.2"},
    )  # fmt: skip
    return replace(made, **given)


class Elements(HTMLParser):
    """The elements of a page with their attributes, which must all be closed, and its text."""

    EMPTY = frozenset(("meta", "img", "br", "link", "path", "line", "rect", "circle"))

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data


def test_a_page_needs_nothing_else_and_takes_any_word(tmp_path):
    text = render(a_page(tmp_path))
    elements = Elements(text)
    tags = [tag for tag, _ in elements.found]
    assert not {"script", "link", "iframe", "b"} & set(tags) and "@import" not in text and "url(" not in text
    for _, attributes in elements.found:
        assert all(attributes.get(name, "data:").startswith("data:") for name in ("src", "href", "xlink:href"))
    assert tags.count("svg") == 5  # loss, rate, norm, direction, scores
    for said in (NASTY, "finished", "0.750", "identity/hair", "girl 0.61", "models/embeddings/", "0.10.2"):
        assert said in elements.text, said
    assert "http-equiv" not in text and "width: 0.0%" in text


def test_the_page_of_a_run_that_goes_on_loads_itself_again(tmp_path):
    fresh = a_page(tmp_path, running=True, records=[], state="learning", step=0, seconds={}, settings={})
    elements = Elements(render(replace(fresh, words=[replace(fresh.words[0], overview=None, scores_log=())])))
    assert ("meta", {"http-equiv": "refresh", "content": "20"}) in elements.found
    assert "no figures yet" in elements.text and "svg" not in [tag for tag, _ in elements.found]


def test_the_page_of_several_words_leads_to_theirs(tmp_path):
    several = a_page(tmp_path, records=records(prefix="a&b/"))
    short = replace(several.words[0], prefix="a&b/", link="a&b/report.html", uses=(), about={})
    elements = Elements(render(replace(several, words=[short])))
    assert ("a", {"href": "a%26b/report.html"}) in elements.found
    assert "Norm of" in elements.text and "How to use it" not in elements.text


def test_a_large_picture_is_shown_smaller(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (900, 2000, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    shown = page.data_uri(tmp_path / "large.png")
    assert shown.startswith("data:image/jpeg;base64,") and len(shown) < (tmp_path / "large.png").stat().st_size / 3
    (tmp_path / "cut.png").write_bytes((tmp_path / "large.png").read_bytes()[: page.LARGEST_PICTURE + 9])
    assert page.data_uri(tmp_path / "cut.png") is None and page.data_uri(tmp_path / "none.png") is None


# -- curves


def test_a_curve_of_the_loss_has_all_updates_and_few_points(tmp_path):
    """Before a resume and after it, from the file as it is after a kill."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records(total=1000)) + '{"step": 10')
    means, smooth = curves.losses(read_lines(path))
    assert len(means) == len(smooth) == curves.MOST_POINTS and means[-1][0] == smooth[-1][0] == 1000
    assert np.mean([value for _, value in means]) == pytest.approx(np.mean(1 / np.arange(1, 1001)))
    window = round(1000 * curves.SMOOTHED)
    assert smooth[-1][1] == pytest.approx(np.mean(1 / np.arange(1001 - window, 1001)))
    assert curves.losses([]) == ([], [])


def test_a_long_series_keeps_its_end():
    many = [{"step": step, "x": float(step)} for step in range(1, 1008)]
    points = curves.series(many, "x")
    assert points[0] == (1, 1) and points[-1] == (1007, 1007) and len(points) <= curves.MOST_POINTS + 1
    assert curves.series(many, "y") == []


def test_curves_have_a_colour_each_and_the_background_is_grey():
    found = curves.draw({f"row {n}": [(0, 1), (9, n)] for n in range(9)} | {"usual": [(0, 1), (9, 1)]}, faint=["usual"])
    assert found.colours["usual"] == curves.GREY and found.colours["row 0"] != found.colours["row 1"]
    assert len(found.svg) < 30_000 and "<script" not in found.svg and "<!--" not in found.svg
    assert importlib.util.find_spec("no_such_module") is None, "and Python imports as it did"
    flat = curves.draw({"rate": [(0, 0.5), (9, 0.5)]}).svg
    assert "nan" not in flat.lower() and re.search(r'<path d="M', flat)


# -- how programs take a word


def test_how_programs_take_a_word():
    by_program = {use.program: use for use in uses(word(1, token="<cat-toy>"), "a {} here", "path/to/x", Base("org/m"))}
    automatic, comfy = by_program["AUTOMATIC1111, Forge"], by_program["ComfyUI"]
    assert (automatic.place, automatic.prompt) == ("embeddings/cat-toy.safetensors", "a cat-toy here")
    assert comfy.prompt == "a embedding:cat-toy here" and comfy.files == ("learned_embeds.safetensors",)
    assert "--prompt 'a <cat-toy> here'" in by_program["ti_jax"].code and 'from_pretrained("org/m")' in (
        by_program["diffusers"].code
    )


def test_how_programs_take_an_sdxl_word_for_the_negative_prompt():
    negative = sdxl_word(1, token="<bad>", metadata={NEGATIVE_CLASS: "a hand"})
    found = uses(negative, "a photo of {}", "x", Base("m.safetensors", single_file=True, clip_skip=1))
    by_program = {use.program: use for use in found}
    assert by_program["ComfyUI"].files == ("learned_embeds_sdxl.safetensors",)
    assert by_program["ComfyUI"].negative_prompt == "embedding:bad" and by_program["ComfyUI"].prompt.endswith("a hand")
    assert "Clip skip is to be 2" in by_program["AUTOMATIC1111, Forge"].note and "-2" in by_program["ComfyUI"].note
    code = by_program["diffusers"].code
    assert "from_single_file" in code and 'negative_prompt="<bad>"' in code and "clip_skip=1" in code
    assert by_program["diffusers"].files[1] == "learned_embeds_2.safetensors"


def test_a_model_in_a_folder_is_named_without_it(tmp_path):
    assert base_of(TrainConfig(pretrained_model_name_or_path=str(tmp_path)), "m") == Base("path/to/m")
    assert base_of(TrainConfig(pretrained_model_name_or_path="org/m"), "org/m") == Base("org/m")
    assert base_of(TrainConfig(clip_skip=1), "mini-sd") == Base(None, clip_skip=1)


# -- settings


def test_settings_that_differ_from_the_defaults():
    assert differing(resolve(TrainConfig())) == {}
    given = TrainConfig(seed=3, max_train_steps=9, hub_token="secret", process_id=0, train_batch_size=8)
    assert differing(resolve(given)) == {"seed": (3, 0), "max_train_steps": (9, 60)}
    model = TrainConfig(pretrained_model_name_or_path="m", initializer_token="c")
    other = resolve(replace(model, train_data_dir="cat", placeholder_token="<x>"))
    assert differing(other) == {
        "pretrained_model_name_or_path": ("m", None), "train_data_dir": ("cat", None),
        "placeholder_token": ("<x>", None), "initializer_token": ("c", None),
    }  # fmt: skip
    own = resolve(TrainConfig(train_data_dir=str(ASSETS / "concepts" / "ana")))
    assert list(differing(own)) == ["train_data_dir"]  # the word is named after it


# -- a run


def test_a_page_that_cannot_be_made_is_one_warning(tmp_path, capsys):
    job = SimpleNamespace(
        folder=tmp_path, start=SimpleNamespace(step=0), embeddings=lambda state: (), total=9,
    )  # fmt: skip
    shown = RunPage(job)
    shown.refresh(3)  # too soon after the start
    assert capsys.readouterr().err == ""
    (tmp_path / "metrics.jsonl").mkdir()
    shown.finish((), 3, "finished")
    shown.finish((), 4, "finished")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: report.html could not be made: ") and not (tmp_path / "report.html").exists()
