"""What the embedded model does not know is said before a word is learned from it or drawn with."""

from ti_jax.config import ASSETS, TrainConfig
from ti_jax.data.captions import report_captions
from ti_jax.text.embedded_words import note_unknown, unknown_words
from ti_jax.text.templates import for_captions, load_templates


def test_words_and_commas_that_no_caption_has():
    texts = ["a portrait of {}, man riding a horse", "A Portrait of <horse> with red hair"]
    assert unknown_words(texts) == [",", "man", "riding", "horse"]


def test_the_probes_and_weights_are_known():
    assert (
        unknown_words(["a drawing of {} wearing a (purple:1.2) sweater on a yellow background", "{caption} [name]"])
        == []
    )
    assert note_unknown(["a sepia outlined portrait of a person with bald walrus moustache"], "a prompt") is None


def test_captions_are_looked_at_for_the_embedded_model_alone(tmp_path):
    captions, said = {"1.png": "man, smile", "2.png": "smirk"}, []
    report_captions(TrainConfig(), tmp_path, captions, ["1.png", "2.png"], said.append)
    assert (
        len(said) == 2 and "captions with what the embedded model does not know" in said[1] and "'man', ','" in said[1]
    )
    said.clear()
    report_captions(TrainConfig(pretrained_model_name_or_path="x"), tmp_path, captions, ["1.png"], said.append)
    assert len(said) == 1


def test_its_own_templates_take_captions_in_words_that_it_knows():
    plain, captioned = for_captions(load_templates("object", ASSETS / "demo_templates.txt"), "object")
    assert plain == ["a portrait of {}", "a drawing of {}", "a picture of {}", "{}"]
    assert captioned[0] == "a portrait of {} {caption}" and len(captioned) == 3
    assert unknown_words(captioned) == []
