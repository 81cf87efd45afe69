"""Files behind a URL: copies of them, and the folder of a run there. On an emulator of Cloud Storage, and in memory."""

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from servers import cloud_storage

from ti_jax import remote
from ti_jax.cli.main import main
from ti_jax.config import TrainConfig, concept_configs, resolve
from ti_jax.config.yaml import load_yaml
from ti_jax.data.folder import load_images
from ti_jax.embeddings import Embedding
from ti_jax.embeddings.naming import load_given
from ti_jax.errors import InputError
from ti_jax.files import as_url, write_atomically
from ti_jax.remote import as_given, local_copy, place_of
from ti_jax.training import remote_folder
from ti_jax.training.remote_folder import LOCK, RemoteFolder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of its own."""
    monkeypatch.setenv("TI_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module", params=["gs", "memory"])
def storage(request):
    """``(url, file system)`` of an empty place of each kind."""
    pytest.importorskip("gcsfs", reason="needs the extra gcs")
    if request.param == "memory":
        yield "memory://bucket", fsspec.filesystem("memory")
    else:
        with cloud_storage("bucket"):
            yield "gs://bucket", fsspec.filesystem("gs")


@pytest.fixture
def there(storage, request):
    """A folder of the test's own: its URL, and how to put a file into it."""
    url, files = storage
    folder = f"{url}/{request.node.originalname}"

    def put(name, content):
        files.pipe_file(f"{folder.partition('://')[2]}/{name}", content)

    return folder, put, files


def refusal(call, *arguments, **settings):
    with pytest.raises(InputError) as error:
        call(*arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "path, url",
    [
        ("gs://b/a", "gs://b/a"),
        ("gs://b/a/", "gs://b/a"),
        (Path("gs://b/a"), "gs://b/a"),
        ("file:///tmp/a", "file:///tmp/a"),
        ("s3://b", "s3://b"),
        ("output/cat", None),
        ("c:/pictures", None),
        ("a:b", None),
        ("gs:", None),
        ("/gs://b", None),
    ],
)
def test_what_is_a_url(path, url):
    assert as_url(path) == url
    assert url is not None or local_copy(path) == Path(path) == place_of(path)


def test_a_copy_follows_what_is_there(there):
    url, put, files = there
    put("cat/0.png", b"one")
    put("cat/deep/1.png", b"two")
    folder = local_copy(f"{url}/cat/")
    assert folder.name == "cat" and (folder / "0.png").read_bytes() == b"one"
    assert (folder / "deep" / "1.png").read_bytes() == b"two"
    before = (folder / "0.png").stat().st_mtime_ns
    put("cat/deep/1.png", b"TWO")  # as long as before
    files.rm_file(f"{url.partition('://')[2]}/cat/0.png")
    put("cat/2.png", b"three")
    assert local_copy(f"{url}/cat") == folder
    assert sorted(path.name for path in folder.rglob("*.png")) == ["1.png", "2.png"]
    assert (folder / "deep" / "1.png").read_bytes() == b"TWO"
    kept = (folder / "2.png").stat().st_mtime_ns
    local_copy(f"{url}/cat")
    assert (folder / "2.png").stat().st_mtime_ns == kept >= before, "what is the same is not copied again"
    (folder / "2.png").write_bytes(b"spoilt")
    assert (local_copy(f"{url}/cat") / "2.png").read_bytes() == b"three"
    assert local_copy(f"{url}/cat/2.png") == folder / "2.png"


def test_only_what_is_chosen_is_copied(there):
    url, put, _ = there
    put("a.txt", b"a")
    put("b.txt", b"b")
    assert [path.name for path in local_copy(url, lambda names: ["b.txt"]).iterdir()] == ["b.txt"]


def test_messages_have_the_url_and_not_the_copy(there, capsys):
    url, put, _ = there
    put("cat/0.png", b"no picture")
    assert main(["data", f"{url}/cat"]) == 1
    assert main(["train", "--train_data_dir", f"{url}/cat"]) == 2
    said = capsys.readouterr().err
    assert f"{url}/cat/0.png" in said and "cache" not in said and said.count("\n") == 1
    assert as_given(str(place_of(f"{url}/cat/0.png"))) == f"{url}/cat/0.png"
    here = place_of(f"{url}/cat").as_uri()
    assert as_given(here) == here, "where the copy itself is meant"
    assert as_given("output/cat, /etc/remote/gs/cat") == "output/cat, /etc/remote/gs/cat"


def test_what_is_not_there(storage):
    url, _ = storage
    assert "no such file or folder" in refusal(local_copy, f"{url}/none")
    assert "has .. in it" in refusal(local_copy, f"{url}/a/../b")
    assert "no such file" in refusal(Embedding.load, f"{url}/none.safetensors")


def test_a_bucket_that_is_not_there(storage, capsys):
    if storage[0].startswith("gs"):
        for flags in (["--train_data_dir", "gs://nobody/cat"], ["--output_dir", "gs://nobody/out"]):
            assert main(["train", *flags]) == 2
            said = capsys.readouterr().err
            assert "gs://nobody/" in said and "no bucket 'nobody'" in said and said.count("\n") == 1


def test_no_access_no_package_no_such_kind():
    class Refused(Exception):
        code = 403

    def fail(error):
        with remote.remote_errors("gs://b/a"):
            raise error

    assert "gcloud auth application-default login" in refusal(fail, Refused("b@c does not have storage.objects.get"))
    assert "gcloud auth" in refusal(fail, ValueError("Your default credentials were not found"))
    assert "check the network" in refusal(fail, ConnectionError("reset"))
    assert refusal(local_copy, "nokind://b/a").startswith("nokind://b/a: nokind:// is not known")
    assert refusal(fail, ImportError("Please install gcsfs to access Google Storage")) == (
        "gs://b/a: needs the package gcsfs; pip install 'ti_jax[gcs]'"
    )


def test_only_the_folder_of_a_run_may_be_written_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "only --output_dir may be a URL" in refusal(write_atomically, Path("gs://bucket/a.png"), b"")
    assert main(["infer", "--prompt", "a portrait", "--output", "gs://bucket/a.png"]) == 2
    assert "gs://bucket: only --output_dir" in capsys.readouterr().err
    assert main(["train", "--logging_dir", "gs://bucket/logs"]) == 2
    assert "give its name alone" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_word_and_both_halves_of_one(there, tmp_path):
    url, put, files = there
    rows = np.arange(768 + 1280, dtype=np.float32)[None]
    word = Embedding("<cat>", {"text_encoder": rows[:, :768], "text_encoder_2": rows[:, 768:]})
    word.save(tmp_path / "learned_embeds.safetensors")
    for path in tmp_path.glob("*.safetensors"):
        put(path.name, path.read_bytes())
    put("learned_embeds-steps-5.safetensors", b"other")
    for name in ("", "/learned_embeds.safetensors", "/learned_embeds_2.safetensors"):
        found = Embedding.load(url + name)
        assert found.token == "<cat>"
        np.testing.assert_array_equal(found.vectors["text_encoder_2"], rows[:, 768:])
    (other,) = load_given([f"{url}/learned_embeds.safetensors=<dog>"])
    assert other.token == "<dog>"
    files.rm_file(f"{url.partition('://')[2]}/learned_embeds_2.safetensors")
    assert "the other half is missing" in refusal(Embedding.load, f"{url}/learned_embeds.safetensors")


def test_concepts_and_a_config_file(there, pictures):
    url, put, _ = there
    for name in ("ana", "ben"):
        put(f"family/{name}/0.png", (pictures / "0.png").read_bytes())
    put("run.yaml", b"seed: 7\n")
    put("family.yaml", f"- train_data_dir: {url}/family/ana\n".encode())
    assert load_yaml(f"{url}/run.yaml", TrainConfig) == {"seed": 7}
    config = resolve(TrainConfig(concepts=f"{url}/family", output_dir=f"{url}/out"))
    assert [each.placeholder_token for each in concept_configs(config)] == ["<ana>", "<ben>"]
    for each in (*concept_configs(config), *concept_configs(resolve(TrainConfig(concepts=f"{url}/family.yaml")))):
        assert len(load_images(local_copy(each.train_data_dir), 16, on_skip=print).pixels) == 1


# -- the folder of a run


def opened(url, cache, monkeypatch, name):
    """The folder on another machine."""
    monkeypatch.setenv("TI_JAX_CACHE", str(cache / name))
    folder = RemoteFolder.of(url)
    folder.folder.mkdir(parents=True, exist_ok=True)
    return folder


def names(folder):
    return sorted(folder._here())


def test_what_is_written_is_sent_and_found_again(there, cache, monkeypatch):
    url, put, files = there
    first = opened(url, cache, monkeypatch, "first")
    with first.opened():
        write_atomically(first.folder / "metrics.jsonl", b"1\n")
        (first.folder / "checkpoints" / "5").mkdir(parents=True)
        write_atomically(first.folder / "checkpoints" / "5" / "_CHECKPOINT_METADATA", b"{}")
        write_atomically(first.folder / "checkpoints" / "5" / "data", b"rows")
        first.send()
        with (first.folder / "metrics.jsonl").open("ab") as file:
            file.write(b"2\n")
        put("checkpoints/9/data", b"half of a checkpoint")
        put("previous-1/metrics.jsonl", b"old")
    assert not files.exists(f"{url.partition('://')[2]}/{LOCK}")
    second = opened(url, cache, monkeypatch, "second")
    with second.opened():
        assert names(second) == ["checkpoints/5/_CHECKPOINT_METADATA", "checkpoints/5/data", "metrics.jsonl"]
        assert (second.folder / "metrics.jsonl").read_bytes() == b"1\n2\n"
        assert [path.name for path in (second.folder / "checkpoints").iterdir()] == ["5"]
        assert (second.folder / "previous-1").is_dir(), "its number is taken"
        for path in (second.folder / "checkpoints" / "5").iterdir():
            path.unlink()
    third = opened(url, cache, monkeypatch, "third")
    with third.opened():
        assert names(third) == ["metrics.jsonl"]
    assert files.cat_file(f"{url.partition('://')[2]}/previous-1/metrics.jsonl") == b"old"


def test_a_checkpoint_is_made_one_last_and_unmade_first(there, cache, monkeypatch):
    url, _, _ = there
    folder = opened(url, cache, monkeypatch, "first")
    with folder.opened():
        done = []
        for name in ("send", "remove"):
            work = getattr(folder._storage, name)
            monkeypatch.setattr(
                folder._storage, name, lambda names, *to, work=work: (done.append(sorted(names)), work(names, *to))
            )
        for name in ("checkpoints/5/_CHECKPOINT_METADATA", "checkpoints/5/state/d/1", "learned_embeds.safetensors"):
            (folder.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder.folder / name).write_bytes(b"1")
        folder.send()
        marker, rows = ["checkpoints/5/_CHECKPOINT_METADATA"], ["checkpoints/5/state/d/1"]
        assert [each for each in done if each] == [["learned_embeds.safetensors"], rows, marker]
        done.clear()
        for name in (*marker, *rows):
            (folder.folder / name).unlink()
        folder.send()
        assert [each for each in done if each] == [marker, rows]


def test_what_could_not_be_sent_is_sent_by_the_next_run_here(there, cache, monkeypatch, capsys):
    url, put, files = there
    place = url.partition("://")[2]
    folder = opened(url, cache, monkeypatch, "first")
    with pytest.raises(InputError, match="Not all has been sent"), folder.opened():
        (folder.folder / "a").write_bytes(b"a")
        folder.send()
        (folder.folder / "b").write_bytes(b"b")

        def fail(*arguments):
            raise InputError("the network is away")

        send = folder._storage.send
        monkeypatch.setattr(folder._storage, "send", fail)
        folder.send()
        folder.send()
        assert capsys.readouterr().err.count("warning: the network is away") == 1
    assert files.exists(f"{place}/a") and not files.exists(f"{place}/b")
    with opened(url, cache, monkeypatch, "first").opened():
        assert files.cat_file(f"{place}/b") == b"b"
    # Where another machine has gone on meanwhile, it is kept.
    (folder.folder / "b").write_bytes(b"newer")
    put("a", b"of another")
    with opened(url, cache, monkeypatch, "first").opened():
        assert (folder.folder / "b").read_bytes() == b"b" and (folder.folder / "a").read_bytes() == b"of another"
    (aside,) = folder.folder.parent.glob("*-unsent-1")
    assert (aside / "b").read_bytes() == b"newer"
    assert send is not None


def test_one_run_at_a_time(there, cache, monkeypatch, capsys):
    url, put, _ = there
    monkeypatch.setattr(remote_folder, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(remote_folder, "PATIENCE_SECONDS", 1.0)
    first, second = (opened(url, cache, monkeypatch, name) for name in ("first", "second"))
    monkeypatch.setattr(remote_folder, "_has_ended", lambda holder: False)
    with first.opened():
        assert "another run is writing there" in refusal(second.opened().__enter__)
    # Of a machine that has vanished.
    put(LOCK, json.dumps({"host": "gone", "process": 5}).encode())
    with second.opened():
        assert "a run of gone, process 5 had this folder" in capsys.readouterr().err
        # It comes back, and finds that it has no folder any more.
        put(LOCK, json.dumps({"token": "another"}).encode())
        assert "another run has taken it over" in refusal(second.send)
        second._write_lock()
        second._lost.clear()
    assert not any(thread.name == "lock" for thread in threading.enumerate())


def test_a_lock_of_a_process_of_this_machine_that_has_ended(there, cache, monkeypatch):
    url, put, _ = there
    monkeypatch.setattr(remote_folder, "PATIENCE_SECONDS", 1e9)
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    holder = {"host": socket.gethostname(), "boot": remote_folder._boot(), "process": killed.pid}
    put(LOCK, json.dumps(holder).encode())
    with opened(url, cache, monkeypatch, "first").opened():
        pass
