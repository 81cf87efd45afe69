"""Tokenizers load from either generation of files, without PyTorch and without a word."""

import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import VOCAB

from ti_jax.config import ASSETS
from ti_jax.errors import InputError
from ti_jax.weights.tokenizers import MERGES, clip_tokenizer, load_tokenizer

MINI_SD = ASSETS / "mini-sd"
PROMPTS = [
    "",
    "a portrait of a person with pink long hair",
    "A  Portrait\tof A PERSON's beard, and 12 xyz é!",
    "<|startoftext|> a <|endoftext|> b",
    "<cat-toy> <cat-toy>_1 in the snow",
    "日本 🙂",
]
FILES = {
    "transformers 4": ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"),
    "transformers 4, bare": ("vocab.json", "merges.txt"),
    "transformers 5": ("tokenizer.json", "tokenizer_config.json"),
    "transformers 5, bare": ("tokenizer.json",),
    "all": ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
}


def folder_with(files, tmp_path: Path) -> Path:
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / name).mkdir()
        for file in files:
            shutil.copy(MINI_SD / "tokenizer" / file, tmp_path / name / file)
    return tmp_path


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("layout", FILES)
def test_both_generations_give_the_same_ids(layout, name, tmp_path):
    tokenizer = load_tokenizer(folder_with(FILES[layout], tmp_path), name)
    expected = load_tokenizer(MINI_SD, "tokenizer")
    assert [tokenizer(prompt).input_ids for prompt in PROMPTS] == [expected(prompt).input_ids for prompt in PROMPTS]
    assert len(expected(PROMPTS[1]).input_ids) == 11  # start, nine words of one token each, end
    special = [(t.bos_token_id, t.eos_token_id, t.pad_token_id, len(t)) for t in (tokenizer, expected)]
    assert special == [(VOCAB - 2, VOCAB - 1, VOCAB - 1, VOCAB)] * 2
    if "bare" not in layout:
        assert tokenizer.model_max_length == 40


@pytest.mark.parametrize(
    ("files", "spoil", "said"),
    [
        ((), {}, "no tokenizer; expected vocab.json and merges.txt, or tokenizer.json"),
        (("vocab.json",), {}, "no tokenizer"),
        (("merges.txt", "tokenizer_config.json"), {}, "no tokenizer"),
        (("merges.txt",), {"vocab.json": "{"}, "not a CLIP tokenizer"),
        (("merges.txt",), {"vocab.json": '{"a</w>": 0}'}, "not a CLIP tokenizer"),
        (("vocab.json",), {"merges.txt": "a b c d\n"}, "not a CLIP tokenizer"),
        ((), {"tokenizer.json": "{}"}, "not a CLIP tokenizer"),
        (("tokenizer.json",), {"tokenizer_config.json": "{"}, "not a CLIP tokenizer"),
        ((), {"tokenizer.json": "version https://git-lfs.github.com/spec/v1\n"}, "a git-lfs pointer"),
    ],
)
def test_refusals(files, spoil, said, tmp_path):
    folder = folder_with(files, tmp_path)
    for file, content in spoil.items():
        (folder / "tokenizer" / file).write_text(content)
    with pytest.raises(InputError, match=said) as error:
        load_tokenizer(folder, "tokenizer")
    assert str(folder / "tokenizer") in str(error.value) and "\n" not in str(error.value)


def test_another_models_tokenizer(tmp_path):
    """One without CLIP's start and end tokens, such as GPT-2's."""
    folder = folder_with(("merges.txt",), tmp_path)
    vocabulary = json.loads((MINI_SD / "tokenizer" / "vocab.json").read_text())
    others = {token: index for token, index in vocabulary.items() if not token.startswith("<|")}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(others))
    with pytest.raises(InputError, match=r"<\|startoftext\|> and <\|endoftext\|> are not in its vocabulary"):
        load_tokenizer(folder, "tokenizer")


QUIET = """
    import sys, warnings
    warnings.simplefilter("error")

    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("torch", "diffusers"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Hidden())
    import importlib.util
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "torch" else found(name, package)
    from ti_jax.weights.hub import EMBEDDED_DEFAULT
    from ti_jax.weights.tokenizers import MERGES, clip_tokenizer, load_tokenizer
    print(load_tokenizer(EMBEDDED_DEFAULT, "tokenizer")("a person").input_ids)
    assert "torch" not in sys.modules
"""


def test_silent_without_pytorch():
    command = [sys.executable, "-c", textwrap.dedent(QUIET)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    numbers = json.loads((MINI_SD / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert done.stdout == f"{[VOCAB - 2, numbers['a</w>'], numbers['person</w>'], VOCAB - 1]}\n"
    assert done.stderr == ""


# -- CLIP's own, which comes with the package

CLIP_IDS = {
    "a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407],
    "": [49406, 49407],
    "Hello, World?": [49406, 3306, 267, 1002, 286, 49407],
}


@pytest.mark.parametrize(("pad_token", "pad_id"), [("<|endoftext|>", 49407), ("!", 0)])
def test_clip_ids(pad_token, pad_id):
    tokenizer = clip_tokenizer(pad_token)
    assert {prompt: tokenizer(prompt).input_ids for prompt in CLIP_IDS} == CLIP_IDS
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (49408, 49406, 49407)
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (pad_id, 77)
    # The padding is a special token, so it is found in a prompt too: as in diffusers, with the published folders.
    assert tokenizer("no!").input_ids[2:-1] == ([0] if pad_token == "!" else [256])
    padded = tokenizer("a cat", padding="max_length").input_ids
    assert padded == [49406, 320, 2368, 49407] + [pad_id] * 73
    # Every token is text, and goes there and back.
    assert sorted(tokenizer.get_vocab().values()) == list(range(49408))


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_clip_is_what_a_folder_with_the_same_files_gives(tmp_path, pad_token):
    """As the published folders have it: ``vocab.json``, ``merges.txt`` with a line of title, and the special tokens."""
    ours = clip_tokenizer(pad_token)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(ours.get_vocab()))
    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines[1:48895]]), encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings = {**special, "pad_token": pad_token, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": pad_token}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = load_tokenizer(tmp_path, "tokenizer")
    prompts = [
        "no! wait",
        *PROMPTS,
        "naïve café, 3.14 don't we'll",
        "ｆｕｌｌ width",
        "emoji 👩‍👩‍👧 ok",
        "tab\tand\nline",
        "ﬁ ǅ İ",
    ]
    assert [ours(prompt).input_ids for prompt in prompts] == [theirs(prompt).input_ids for prompt in prompts]
    assert ours.get_vocab() == theirs.get_vocab()


def test_clip_vocabulary_is_openais():
    digest = hashlib.sha256(MERGES.read_bytes()).hexdigest()
    assert digest == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    assert "Copyright (c) 2021 OpenAI" in (MERGES.parent / "LICENSE").read_text()
