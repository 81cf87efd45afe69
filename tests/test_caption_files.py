"""Captions as they are found: beside the pictures, in one file, in a folder of folders; and those that do not serve."""

import json
import os

import pytest
from PIL import Image

from ti_jax.config import TrainConfig
from ti_jax.data.captions import read_captions, report_captions
from ti_jax.data.folder import load_images
from ti_jax.data.picture_files import picture_paths, repeats_of, report_repeats
from ti_jax.errors import InputError


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16)).save(path)


def refusal(function, *args):
    with pytest.raises(InputError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def folder(tmp_path):
    """Three pictures without captions."""
    for name in ("a.png", "b.JPG", "c.d.webp"):
        picture(tmp_path / name)
    return tmp_path


# -- where captions are


def test_text_files_beside_the_pictures(folder):
    assert read_captions(folder) == {}
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf1girl,  red\thair,\r\n\r\n smile \n")
    (folder / "b.caption").write_text("ein grünes Kleid", encoding="utf-8")
    (folder / "c.d.TXT").write_text("a {} (worn:1.3)")
    for name in ("README.txt", "license.txt", "Readme.dataset.txt", ".hidden.txt", "notes.md"):
        (folder / name).write_text("about all of them")
    assert read_captions(folder) == {
        "a.png": "1girl, red hair, smile", "b.JPG": "ein grünes Kleid", "c.d.webp": "a {} (worn:1.3)",
    }  # fmt: skip


def test_a_picture_that_is_left_out_may_have_a_caption(folder):
    (folder / "raw.cr2").write_bytes(b"II*\0")
    (folder / "raw.txt").write_text("a caption")
    assert "raw.cr2" in read_captions(folder)


def test_the_templates_may_be_in_the_folder(folder):
    templates = folder / "prompts.txt"
    templates.write_text("a {}")
    assert read_captions(folder, templates=templates) == {}
    assert "prompts.txt: a caption without a picture" in refusal(read_captions, folder)


def test_metadata_of_an_imagefolder(folder):
    rows = [{"file_name": "a.png", "text": "a red\ncar"}, {"file_name": "./b.JPG", "text": "blue", "label": 3}]
    (folder / "metadata.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    assert read_captions(folder) == {"a.png": "a red car", "b.JPG": "blue"}
    rows = [{"file_name": "a.png", "prompt": "a boat"}]
    (folder / "metadata.jsonl").write_text(json.dumps(rows[0]))
    assert read_captions(folder, column="prompt") == {"a.png": "a boat"}


def test_sub_folders_and_how_often_they_are_shown(tmp_path):
    for name in ("10_ana/a.png", "10_ana/near/b.png", "5_ben/a.png", "other/c.png", "d.png", ".hidden/e.png"):
        picture(tmp_path / name)
    os.symlink(tmp_path, tmp_path / "other" / "up")
    (tmp_path / "10_ana" / "a.txt").write_text("one")
    (tmp_path / "5_ben" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "two"}')
    names = ("10_ana/a.png", "10_ana/near/b.png", "5_ben/a.png", "d.png", "other/c.png")
    assert load_images(tmp_path, 16, on_skip=pytest.fail, recursive=True).names == names
    assert load_images(tmp_path, 16, on_skip=pytest.fail).names == ("d.png",)
    assert [repeats_of(name) for name in names] == [10, 10, 5, 1, 1]
    assert read_captions(tmp_path, recursive=True) == {"10_ana/a.png": "one", "5_ben/a.png": "two"}
    assert read_captions(tmp_path) == {}
    said = []
    report_repeats(names, said.append)
    assert said == [
        "folders: by their names an epoch shows 2 of the pictures 1 times, 1 of the pictures 5 times, 2 of the "
        "pictures 10 times"
    ]
    report_repeats(("d.png", "e.png"), pytest.fail)
    assert refusal(repeats_of, "0_ana/a.png") == (
        "0_ana/a.png: its folder 0_ana says to show it 0 times; move it away, or rename it"
    )
    (tmp_path / "d.png").unlink()
    assert refusal(picture_paths, tmp_path) == (
        f"{tmp_path}: no pictures in this folder, but 4 in sub-folders; add --recursive"
    )


# -- captions that do not serve


def test_a_caption_without_a_picture(folder):
    for name in ("z.txt", "z.caption", "readme.caption"):
        (folder / name).write_text("a red car")
        stem = name.partition(".")[0]
        assert refusal(read_captions, folder) == (
            f"{folder / name}: a caption without a picture: no {stem}.png, .jpg or the like is beside it; rename it "
            "like its picture, move it out of the folder, or ignore all captions with --no_captions"
        )
        (folder / name).unlink()
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "x"}\n{"file_name": "deep/z.png", "text": "x"}'
    )
    assert refusal(read_captions, folder) == (
        f"{folder / 'metadata.jsonl'}, line 2: a caption without a picture: there is no deep/z.png beside this file; "
        "correct file_name, remove the line, add --recursive to read sub-folders, or ignore all captions with "
        "--no_captions"
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16(folder, encoding):
    for name in ("a.txt", "metadata.jsonl"):
        (folder / name).write_bytes("ein grünes Kleid".encode(encoding))
        assert refusal(read_captions, folder) == (f"{folder / name}: text in UTF-16 or UTF-32; save the file as UTF-8")
        (folder / name).unlink()


def test_cp1252(folder):
    for name in ("a.txt", "metadata.jsonl"):
        (folder / name).write_bytes("\n\nein grünes Kleid".encode("cp1252"))
        assert refusal(read_captions, folder) == (
            f"{folder / name}, line 3: not UTF-8 text, perhaps Windows' own encoding (cp1252); save the file as UTF-8"
        )
        (folder / name).unlink()


@pytest.mark.parametrize("content", [b"", b" \r\n\t\n", b"\xef\xbb\xbf"])
def test_an_empty_caption(folder, content):
    (folder / "a.txt").write_bytes(content)
    assert refusal(read_captions, folder) == (
        f"{folder / 'a.txt'}: an empty caption; say in it what is in the picture, or remove the file, and the picture "
        "is learned from with the plain templates"
    )


def test_two_captions_for_one_picture(folder):
    (folder / "a.txt").write_text("x")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "y"}')
    assert refusal(read_captions, folder) == (
        f"{folder / 'metadata.jsonl'}, line 1: a second caption for a.png, which {folder / 'a.txt'} has one for; "
        "remove one"
    )


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"file_name": "a.png", "text": "x"', "not JSON (Expecting ',' delimiter: line 1 column 35 (char 34)); each"),
        ('["a.png", "x"]', 'found ["a.png", "x"] where an object like {"file_name": "a.png", ...} must be'),
        ('{"text": "x"}', 'no file_name; each line must be like {"file_name": "a.png", "text": "a ..."}'),
        ('{"file_name": 3, "text": "x"}', "no file_name; each line must be like"),
        ('{"file_name": "a.png", "label": 3}', "no 'text' beside file_name, label; name the one that has the caption "
         "with --caption_column, or ignore all captions with --no_captions"),
        ('{"file_name": "a.png", "text": ["x"]}', "'text' of a.png is [\"x\"], and must be a text in quotes"),
        ('{"file_name": "a.png", "text": " "}', "an empty caption; say in it what is in a.png, or remove the line"),
        ('{"file_name": "a.png", "text": null}', "an empty caption; say in it what is in a.png, or remove the line"),
    ],
)  # fmt: skip
def test_broken_metadata(folder, line, fault):
    (folder / "metadata.jsonl").write_text('{"file_name": "b.JPG", "text": "fine"}\n\n' + line + "\n")
    assert refusal(read_captions, folder).startswith(f"{folder / 'metadata.jsonl'}, line 3: {fault}")


def test_empty_metadata(folder):
    (folder / "metadata.jsonl").write_text("\n \n")
    assert refusal(read_captions, folder).startswith(f"{folder / 'metadata.jsonl'}: an empty file; write a line with")


# -- what is said


def test_what_is_used_is_reported(folder):
    def said(captions, **changes):
        lines = []
        report_captions(TrainConfig(**changes), folder, captions, ["a", "b"], lines.append)
        return lines

    assert said({"a": "bun", "raw": "y"}) == ["captions: used for 1 of 2 pictures; --no_captions ignores them"]
    assert said({}) == []
    assert said({}, shuffle_tags=True, caption_dropout=0.1) == [
        "note: --shuffle_tags and --caption_dropout do nothing, because no picture has a caption"
    ]
    assert said({}, tag_dropout=0.1, no_captions=True) == [
        "note: --tag_dropout does nothing, because --no_captions is given"
    ]
    assert said({}, caption_column="title", no_captions=True) == [
        "note: --caption_column does nothing, because --no_captions is given"
    ]
    alone = [f"note: --caption_column title does nothing, because {folder} has no metadata.jsonl"]
    assert said({}, caption_column="title") == alone
    assert said({}, caption_column="title", dataset_name="a/b") == []
    (folder / "metadata.jsonl").write_text("")
    assert said({}, caption_column="title") == []
