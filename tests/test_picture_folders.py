"""What is said of the files of a folder that are no use, and where the output of a run may not be."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ti_jax.data.folder import load_images
from ti_jax.data.picture_files import unread_pictures
from ti_jax.errors import InputError


def picture(path, width=16, height=16):
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path)


def said(folder, resolution=16, **options):
    lines = []
    load_images(folder, resolution, on_skip=lines.append, **options)
    assert all("\n" not in line for line in lines)
    return lines


def refusal(folder, resolution=16, **options):
    with pytest.raises(InputError) as error:
        load_images(folder, resolution, on_skip=pytest.fail, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- formats that are not read

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
JPEG_XL = b"\xff\x0a\xff\x00"


@pytest.fixture
def without_heif():
    """As on a machine without pillow-heif, which may be installed here: in a process of its own."""

    def lines(folder):
        code = (
            "import sys; sys.modules['pillow_heif'] = None\n"
            "from ti_jax.data.folder import load_images\n"
            "from ti_jax.errors import InputError\n"
            "try: load_images(sys.argv[1], 16)\n"
            "except InputError as error: print(error, file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
        return done.stderr.splitlines()

    return lines


def test_pictures_of_other_formats_are_named_with_what_to_do(tmp_path, without_heif):
    picture(tmp_path / "a.png")
    picture(tmp_path / "plain.jpg")
    (tmp_path / "plain.jpg").rename(tmp_path / "IMG_7")
    picture(tmp_path / "odd.png")
    (tmp_path / "odd.png").rename(tmp_path / "photo.png_large")
    for name in ("1.heic", "2.HEIC", "3.hif", "4.heif"):
        (tmp_path / name).write_bytes(HEIC)
    (tmp_path / "b.jxl").write_bytes(JPEG_XL)
    for name in ("c.CR2", "d.dng"):
        (tmp_path / name).write_bytes(b"II*\0")
    for name, content in [
        ("a.txt", b"BM a caption"),
        ("notes.md", b"GIF"),
        ("film.mov", b"\0\0\0\x14ftypqt  "),
        ("e", b""),
    ]:
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".hidden.heic").write_bytes(HEIC)
    (tmp_path / "inside").mkdir()
    assert without_heif(tmp_path) == [
        f"left out: 9 of the pictures in {tmp_path}: "
        "4 HEIC (1.heic, 2.HEIC, 3.hif, ...): pip install 'ti_jax[heif]' reads them; "
        "1 JPEG (IMG_7): give them the suffix .jpg; "
        "1 JPEG XL (b.jxl): save them as JPEG or PNG; "
        "1 PNG (photo.png_large): give them the suffix .png; "
        "2 camera raw (c.CR2, d.dng): save them as JPEG or PNG"
    ]


def test_a_folder_of_nothing_else_says_so_too(tmp_path, without_heif):
    (tmp_path / "a.heic").write_bytes(HEIC)
    (line,) = without_heif(tmp_path)
    assert line.startswith(f"{tmp_path}: no pictures in this folder; looked for .png, .jpg, ")
    assert line.endswith(
        f". Not read: 1 of the pictures in {tmp_path}: 1 HEIC (a.heic): pip install 'ti_jax[heif]' reads them"
    )


def test_heic_under_the_suffix_of_a_jpeg_is_called_heic(tmp_path, without_heif):
    (tmp_path / "a.jpg").write_bytes(HEIC)
    (line,) = without_heif(tmp_path)
    assert line.startswith(f"{tmp_path}/a.jpg: HEIC, despite its suffix; pip install 'ti_jax[heif]' reads them")


def test_heic_is_read_where_its_package_is(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="reading HEIC needs the extra heif")
    levels = np.stack(np.mgrid[0:64, 0:96][::-1] * np.array([2, 3])[:, None, None], -1).astype(np.uint8)
    pixels = np.dstack([levels, np.full((64, 96), 60, np.uint8)])
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(tmp_path / "a.heic", quality=100, chroma=444)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.heic").read_bytes())
    pictures = load_images(tmp_path, 64, on_skip=pytest.fail)
    assert pictures.names == ("a.heic", "b.jpg") and pictures.original_sizes.tolist() == [[64, 96]] * 2
    for found in (pictures.pixels + 1) * 127.5:
        assert np.abs(found - pixels[:, 16:80]).max() < 6
    assert unread_pictures(tmp_path) is None
    (tmp_path / "c.heic").write_bytes(HEIC)
    assert refusal(tmp_path).startswith(f"{tmp_path}/c.heic: broken, though it begins as HEIC; mend or remove it")


def test_a_folder_of_pictures_and_captions_needs_no_word(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a caption")
    (tmp_path / "metadata.jsonl").write_text("{}")
    assert said(tmp_path) == [] and unread_pictures(tmp_path) is None


# -- sizes


@pytest.mark.parametrize(("width", "height"), [(1, 1), (5000, 1), (7, 300)])
def test_pictures_without_an_area_are_refused_or_left_out(tmp_path, width, height):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", width, height)
    start = (
        f"{tmp_path / 'b.png'}: {width} x {height} pixels: nothing can be learned from a picture with a side of less "
    )
    assert refusal(tmp_path) == start + "than 8 pixels; mend or remove it, or go on without it with --skip_bad_images"
    assert said(tmp_path, skip_bad=True) == [f"left out: {start}than 8 pixels"]


def test_small_and_narrow_pictures_are_named(tmp_path):
    for number in range(5):
        picture(tmp_path / f"{number}.png", 15, 20)
    picture(tmp_path / "enough.png", 16, 64)
    assert said(tmp_path, 64) == [
        "warning: 5 pictures are enlarged more than 4 times to 64 pixels, and the word learns the blur: 0.png, 1.png, "
        "2.png, ...; give larger pictures, or a smaller --resolution"
    ]
    assert said(tmp_path, 56) == []
    picture(tmp_path / "wide.png", 65, 16)
    assert said(tmp_path, 56) == [
        "warning: 1 picture is more than 4 times as long as wide, and only the square in the middle is used: wide.png; "
        "crop to the part that matters"
    ]


# -- names


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not have names that are not UTF-8")
def test_names_in_any_script_and_names_that_are_not_text(tmp_path):
    names = ["猫.png", "ねこ.png", "кот.png", "قط.png", "🐈.png", "name\nof two lines.png", os.fsdecode(b"caf\xe9.png")]
    for name in names:
        picture(tmp_path / name)
    assert load_images(tmp_path, 16, on_skip=pytest.fail).names == tuple(sorted(names))
    for name in names:
        picture(tmp_path / name, 15, 200)
        (tmp_path / name).with_suffix(".heix").write_bytes(JPEG_XL)
    code = "import sys; from ti_jax.data.folder import load_images; load_images(sys.argv[1], 64)"
    for encoding in ("utf-8", "cp1252", "ascii"):
        env = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
        done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, env=env)
        assert done.returncode == 0, done.stderr
        assert len(done.stderr.splitlines()) == 3
