"""A dataset of the Hugging Face hub, here from the disk: its pictures and captions as a folder."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ti_jax.config import TrainConfig, resolve
from ti_jax.data.captions import read_captions
from ti_jax.data.folder import load_images
from ti_jax.data.hub_dataset import as_folder
from ti_jax.errors import InputError


@pytest.fixture(autouse=True)
def datasets(tmp_path, monkeypatch):
    """The library, with a cache of its own."""
    # Here and not above: every process of the session collects this file, and it takes 100 MB.
    datasets = pytest.importorskip("datasets", reason="needs the extra datasets")
    monkeypatch.setenv("TI_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    return datasets


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(3)]


@pytest.fixture
def parquet(tmp_path, images, datasets):
    """Three pictures, of which two have captions."""
    rows = {"picture": images, "caption": ["red, hair", None, "blue"], "number": [1, 2, 3]}
    features = datasets.Features(
        {"picture": datasets.Image(), "caption": datasets.Value("string"), "number": datasets.Value("int64")}
    )
    path = tmp_path / "set.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return TrainConfig(dataset_name=str(path), image_column="picture", caption_column="caption")


def refusal(config):
    with pytest.raises(InputError) as error:
        as_folder(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_pictures(folder, images):
    pixels = load_images(folder, 16, on_skip=pytest.fail).pixels
    np.testing.assert_array_equal(np.round((pixels + 1) * 127.5), images)


def test_a_parquet_file(parquet, images):
    folder = as_folder(parquet)
    assert_pictures(folder, images)
    assert read_captions(folder) == {"000000.png": "red, hair", "000002.png": "blue"}
    before = (folder / "000000.png").stat().st_mtime_ns
    assert as_folder(parquet) == folder and (folder / "000000.png").stat().st_mtime_ns == before, "made once"
    assert list(folder.parent.iterdir()) == [folder], "nothing else is left"
    assert read_captions(as_folder(replace(parquet, no_captions=True))) == {}
    assert read_captions(as_folder(replace(parquet, caption_column=None))) == {}, "there is no column text"


def test_a_folder_of_pictures_and_one_that_was_saved(tmp_path, images, datasets):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a red car"}\n' * 1)
    config = TrainConfig(dataset_name=str(folder))
    found = as_folder(config)
    assert "a red car" in read_captions(found).values()
    datasets.load_dataset(str(folder)).save_to_disk(tmp_path / "saved")
    saved = as_folder(TrainConfig(dataset_name=str(tmp_path / "saved")))
    assert sorted(path.name for path in saved.iterdir()) == sorted(path.name for path in found.iterdir())


def test_columns_that_are_not_there(parquet):
    where = f"--dataset_name {parquet.dataset_name}"
    assert refusal(replace(parquet, image_column="image")) == (
        f"{where}: no column 'image' beside picture, caption, number; name the one with the pictures with "
        "--image_column"
    )
    assert refusal(replace(parquet, image_column="number")).startswith(
        f"{where}: the column 'number' does not hold pictures; name the one that does"
    )
    assert refusal(replace(parquet, caption_column="text")) == (
        f"{where}: no column 'text' beside picture, caption, number; name the one with the captions with "
        "--caption_column, or ignore all captions with --no_captions"
    )
    assert refusal(replace(parquet, caption_column="number")).startswith(
        f"{where}: the column 'number' does not hold texts"
    )


def test_datasets_that_cannot_be_loaded(tmp_path, monkeypatch):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    said = refusal(TrainConfig(dataset_name=str(tmp_path / "broken.parquet")))
    assert said.startswith(f"--dataset_name {tmp_path / 'broken.parquet'}: cannot be loaded (")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert refusal(TrainConfig(dataset_name="a/b")) == (
        "--dataset_name a/b: no such folder or file here, and for a dataset of the hub it needs the package datasets; "
        "pip install 'ti_jax[datasets]'"
    )


def test_the_folder_may_be_a_dataset(tmp_path, monkeypatch):
    """If there is no such folder, and it has the form of an id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "cats").mkdir(parents=True)
    config = resolve(TrainConfig(train_data_dir="someone/Blue_cats"))
    assert (config.dataset_name, config.train_data_dir) == ("someone/Blue_cats", None)
    assert config.placeholder_token == "<blue-cats>"
    for folder in ("my/cats", "./someone/Blue_cats", "cats", "someone/Blue_cats/", "a/b/c", "gs://someone/cats"):
        config = resolve(TrainConfig(train_data_dir=folder))
        assert (config.dataset_name, config.train_data_dir) == (None, folder)


def test_a_dataset_stands_in_for_the_folder():
    config = resolve(TrainConfig(dataset_name="someone/Blue_cats"))
    assert config.placeholder_token == "<blue-cats>" and config.train_data_dir is None
    with pytest.raises(
        InputError, match=r"--dataset_name a/b and --train_data_dir cat: pictures come from one of them"
    ):
        resolve(TrainConfig(dataset_name="a/b", train_data_dir="cat"))
    with pytest.raises(InputError, match=r"^--keep_tags 2: does nothing without --shuffle_tags or --tag_dropout"):
        resolve(TrainConfig(keep_tags=2))
