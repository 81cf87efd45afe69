import re

import pytest
from conftest import VOCAB
from permissions import shared_folder, without_rights  # noqa: F401 (a fixture)
from transformers import CLIPTokenizer

from ti_jax.config import ASSETS
from ti_jax.errors import InputError
from ti_jax.text import tokens
from ti_jax.text.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES, load_templates


def refusal(path):
    with pytest.raises(InputError) as error:
        load_templates("object", path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_our_lists():
    assert load_templates("object") == list(OBJECT_TEMPLATES) and load_templates("style") == list(STYLE_TEMPLATES)
    # As broad as those of diffusers' script, which has 27 and 19.
    assert len(set(OBJECT_TEMPLATES)) == len(OBJECT_TEMPLATES) >= 27
    assert len(set(STYLE_TEMPLATES)) == len(STYLE_TEMPLATES) >= 19
    for template in OBJECT_TEMPLATES + STYLE_TEMPLATES:
        assert template.count("{}") == 1 and template == template.strip()
        # The word stands alone, whatever its letters.
        assert re.search(r"(^|\s)\{\}($|\s)", template)
    assert all("style" in template for template in STYLE_TEMPLATES)
    assert load_templates("object") is not load_templates("object")
    with pytest.raises(InputError, match="learnable_property 'person': it must be object or style"):
        load_templates("person")


def test_our_lists_fit_the_shortest_text_encoder_that_we_ship():
    """The embedded model reads 30 tokens and knows few words, so that most of ours fall into letters there."""
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "mini-sd" / "tokenizer")
    prompts = [template.replace("{}", "<cat-toy>") for template in STYLE_TEMPLATES + OBJECT_TEMPLATES]
    ids = tokens.tokenize(tokenizer, prompts, {"<cat-toy>": 1}, VOCAB, 32)
    assert ((ids == VOCAB).sum(axis=1) == 1).all()


def test_a_file(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_bytes(
        b"\xef\xbb\xbfa portrait of {}\r\n\r\n  # a remark, {} or not\r\n"
        b"\ta drawing of {}  \n#{}\n\n{} and {}\r{name} {0} {{}} {}\nein Bild, gr\xc3\xbcn\xe2\x80\xa8von {}"
    )
    expected = [
        "a portrait of {}",
        "a drawing of {}",
        "{} and {}",
        "{name} {0} {{}} {}",
        "ein Bild, grün\u2028von {}",
    ]
    assert load_templates("object", path) == load_templates("style", str(path)) == expected


def test_files_that_do_not_serve(tmp_path):
    path = tmp_path / "t.txt"
    assert refusal(path) == f"templates {path}: no such file; give a text file with one prompt a line"
    assert refusal(tmp_path).startswith(f"templates {tmp_path}: cannot be read (Is a directory)")
    for content in (b"", b"\n \n# {}\n", b"\xef\xbb\xbf"):
        path.write_bytes(content)
        assert refusal(path).startswith(f"templates {path}: no template in it")
    for line in (b"a photo of a cat", b"{0}", b"{ }", b"{name}", b"}{"):
        path.write_bytes(b"# first\r\n\r\na {}\r\n" + line + b"\nno word\n")
        assert refusal(path).startswith(f"templates {path}, line 4: no {{}} for the new word in {line.decode()!r}")
    path.write_bytes(b"a {}\n" + b"long " * 40 + b"\n")
    assert len(refusal(path)) < len(str(path)) + 140
    path.write_bytes(b"a {}\nb {}\n\xff\xfe of {}\n")
    assert refusal(path) == f"templates {path}, line 3: not UTF-8 text; save the file as UTF-8"
    path.write_bytes("a {}".encode("utf-16"))
    assert "line 1: not UTF-8 text" in refusal(path)


def test_no_permission(shared_folder):  # noqa: F811
    path = shared_folder / "t.txt"
    path.write_text("a {}")
    path.chmod(0o000)
    with without_rights():
        assert refusal(path).startswith(f"templates {path}: cannot be read (Permission denied)")
