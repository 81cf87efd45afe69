"""A run of which everything is in Cloud Storage: model, pictures, templates, and what it writes. On an emulator."""

from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from servers import cloud_storage

from ti_jax import Embedding, train
from ti_jax.config import TrainConfig
from ti_jax.config.yaml import load_yaml
from ti_jax.errors import InputError

# gcsfs sends up to 5 MB at once, of which its HTTP library thinks that it may take long.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")


@pytest.fixture
def bucket():
    """A file system with an empty bucket."""
    pytest.importorskip("gcsfs", reason="needs the extra gcs")
    with cloud_storage("bucket"):
        yield fsspec.filesystem("gs")


@pytest.fixture
def machine(tmp_path):
    """``machine(name)``: what follows is on that machine, whose cache was empty."""
    # Not the fixture monkeypatch: with that, programs are not shared between tests.
    with pytest.MonkeyPatch.context() as patch:
        yield lambda name: patch.setenv("TI_JAX_CACHE", str(tmp_path / name))


def test_a_run_goes_on_on_another_machine(short_run, bucket, machine, capsys):
    here = replace(short_run, max_train_steps=6, checkpointing_steps=2, num_validation_images=1)
    whole = train(here)
    bucket.put(str(here.pretrained_model_name_or_path), "bucket/models/", recursive=True)
    bucket.put(str(here.train_data_dir), "bucket/cat/", recursive=True)
    bucket.put_file(here.templates, "bucket/templates.txt")
    model = f"gs://bucket/models/{Path(here.pretrained_model_name_or_path).name}"
    there = replace(
        here,
        pretrained_model_name_or_path=model,
        train_data_dir=f"gs://bucket/cat/{Path(here.train_data_dir).name}",
        templates="gs://bucket/templates.txt",
        output_dir="gs://bucket/runs/cat",
    )
    machine("first")
    train(replace(there, max_train_steps=4))
    bucket.rm_file("bucket/runs/cat/checkpoints/4/_CHECKPOINT_METADATA")  # the machine vanished while it was sent
    machine("second")
    capsys.readouterr()
    result = train(replace(there, resume_from_checkpoint="latest"))
    said = capsys.readouterr().err
    assert "resuming at step 2 of 6" in said
    assert "gs://bucket/runs/cat/learned_embeds.safetensors: <new> after 6 steps" in said
    rows = whole.embedding.vectors["text_encoder"]
    np.testing.assert_array_equal(result.embedding.vectors["text_encoder"], rows)

    machine("third")
    word = Embedding.load("gs://bucket/runs/cat")
    np.testing.assert_array_equal(word.vectors["text_encoder"], rows)
    assert word.metadata["base_model"] == Path(model).name
    config = load_yaml("gs://bucket/runs/cat/config.yaml", TrainConfig)
    assert config["output_dir"] == there.output_dir and config["train_data_dir"] == there.train_data_dir
    written = {name.removeprefix("bucket/runs/cat/") for name in bucket.find("bucket/runs/cat")}
    local = {path.relative_to(here.output_dir).as_posix() for path in Path(here.output_dir).rglob("*")}
    assert {name for name in local if "/" not in name and "." in name and name[0] != "."} <= written
    assert {"checkpoints/6/_CHECKPOINT_METADATA", "overview.png"} <= written
    assert not any(".ti_jax-lock" in name or ".tmp-" in name for name in written)

    # A new run in the folder moves the results aside, there, too.
    train(replace(there, max_train_steps=2))
    written = {name.removeprefix("bucket/runs/cat/") for name in bucket.find("bucket/runs/cat")}
    assert {"previous-1/checkpoints/6/_CHECKPOINT_METADATA", "checkpoints/2/_CHECKPOINT_METADATA"} <= written
    assert "checkpoints/6/_CHECKPOINT_METADATA" not in written


def test_the_pictures_folder_is_no_place_for_a_run(short_run, bucket):
    bucket.put(str(short_run.train_data_dir), "bucket/cat", recursive=True)
    with pytest.raises(InputError, match="in the folder of the pictures, --train_data_dir gs://bucket/cat"):
        train(replace(short_run, train_data_dir="gs://bucket/cat", output_dir="gs://bucket/cat/out"))
