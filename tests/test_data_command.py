"""``ti-jax data``: what a run would see, told without a model."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ti_jax.cli import main


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "things"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (80, 64)), ("b.png", (64, 200)), ("c.png", (20, 32)), ("d.png", (64, 64))):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(folder / name)
    mask = np.zeros((64, 80), np.uint8)
    mask[:, 40:] = 255
    Image.fromarray(mask).save(folder / "a.mask.png")
    return folder


def run(capsys, *args):
    status = main.main(["data", *map(str, args)])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err


def test_a_table_and_a_contact_sheet(folder, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    status, lines, _ = run(capsys, folder, "--contact_sheet", sheet)
    assert status == 0
    assert lines == [
        "picture  size      learned from          mask       problems",
        "a.jpg    80 x 64   64 x 64, 20% cut off  50% white",
        "b.png    64 x 200  64 x 64, 68% cut off  none       less than half of it is used",
        "c.png    20 x 32   64 x 64, 38% cut off  none       enlarged 3.2 times",
        "d.png    64 x 64   64 x 64               none",
        "",
        "4 pictures, 2 with problems",
        f"{sheet}: what is learned from; what masks leave out is dark",
    ]
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[1] > 4 * 128, "four cells side by side"


def test_what_would_stop_a_run(folder, tmp_path, capsys):
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    Image.new("L", (8, 8), 255).save(folder / "d.mask.png")
    Image.new("RGB", (4, 64)).save(folder / "thin.png")
    status, lines, _ = run(capsys, folder, "--contact_sheet", tmp_path / "sheet.png")
    told = {line.split()[0]: line for line in lines if line}
    assert status == 1
    assert "broken, though it begins as" in told["broken.png"]
    assert "the mask has 8 x 8 pixels and its picture d.png 64 x 64" in told["d.png"]
    assert "a side of less than 8 pixels" in told["thin.png"]
    assert "6 pictures, 5 with problems, 3 of which would stop a run" in lines


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the folder is missing: ti-jax data DIR, with the flags after it"),
        (["nowhere"], "nowhere: no such folder; give the folder with the pictures"),
        (["nowhere", "--resolution", "9"], "--resolution 9: must be from 8 to 8192 pixels and divisible by 8"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, args, message):
    assert run(capsys, *args) == (2, [], f"ti-jax: error: {message}\n")


def test_no_model_and_no_jax_is_loaded(folder, tmp_path):
    code = (
        "import sys; from ti_jax.cli.main import main; "
        f"main(['data', {str(folder)!r}, '--contact_sheet', {str(tmp_path / 's.png')!r}]); "
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
