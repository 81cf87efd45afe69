"""Files behind a URL, such as ``gs://bucket/folder``: copied to this machine before they are read.

Copies, and not paths of another kind: weights are mapped into memory, pictures are opened by other libraries, and all
of them want files. So one function, `local_copy`, stands where a path becomes a file, and all that follows is as ever.
A copy is kept in the user's cache, under the parts of its URL, and what has changed behind the URL is copied again.
How a run's own folder is behind a URL: `ti_jax.training.remote_folder`.

fsspec knows the kinds of URLs; ``gs://`` needs gcsfs (the extra ``gcs``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ti_jax.cache import cache_folder, cache_root
from ti_jax.errors import InputError, one_line
from ti_jax.files import as_url, disk_errors, write_atomically

COPIES, RUNS = "remote", "runs"
CONNECTIONS = 8
# From this size on a copy takes long enough that it is said.
WORTH_SAYING = 50 * 1000**2


class Stamp(NamedTuple):
    """What changes with a file's content: its size and the storage's own mark of the version."""

    size: int
    version: str


class Storage:
    """A folder or file behind a URL."""

    def __init__(self, url: str):
        """Connect; nothing is read yet.

        Raises:
          InputError: an unknown kind of URL, or its package is missing.
        """
        # gcsfs would ask for the kind of each bucket, and say so in a line for each file when it may not.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        import fsspec

        self.url = url
        with remote_errors(url):
            self.fs, self.root = fsspec.core.url_to_fs(url)
        self.root = self.root.rstrip("/")

    def listing(self) -> dict[str, Stamp]:
        """All files, by their names from the root on, with slashes; ``{"": ...}`` for a file, none for nothing there.

        Raises:
          InputError: it cannot be listed.
        """
        with remote_errors(self.url):
            self.fs.invalidate_cache()
            found = self.fs.find(self.root, detail=True)
        start = f"{self.root}/"
        names = {name.removeprefix(start) if name != self.root else "": info for name, info in found.items()}
        # Storages without folders have an empty object where a folder was made by hand.
        return {name: _stamp(info) for name, info in names.items() if not name.endswith("/")}

    def path(self, name: str) -> str:
        """The file system's path of a file."""
        return f"{self.root}/{name}" if name else self.root

    def read(self, name: str) -> bytes | None:
        """A small file's content; None if there is no such file."""
        with remote_errors(self.url):
            try:
                return self.fs.cat_file(self.path(name))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with remote_errors(self.url):
            self.fs.pipe_file(self.path(name), content)

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Copy files into a folder here (``""``: the root, to this path); each appears only when it is whole.

        Raises:
          InputError: one of them cannot be read, or the disk here is full.
        """

        def fetch(name: str) -> None:
            target = folder / name
            with disk_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.parent / f".tmp-{secrets.token_hex(8)}"
            try:
                with remote_errors(self.url):
                    self.fs.get_file(self.path(name), str(aside))
                with disk_errors(target):
                    os.replace(aside, target)
            finally:
                aside.unlink(missing_ok=True)

        _in_parallel(fetch, names)

    def send(self, names: Iterable[str], folder: Path) -> None:
        """Copy files from a folder here; at any time each is the complete old one or the complete new one.

        Raises:
          InputError: one of them cannot be written.
        """

        def send(name: str) -> None:
            with remote_errors(self.url):
                if self._writes_whole:
                    self.fs.put_file(str(folder / name), self.path(name))
                    return
                aside = f"{self.path(name).rpartition('/')[0]}/.tmp-{secrets.token_hex(8)}"
                self.fs.put_file(str(folder / name), aside)
                self.fs.mv(aside, self.path(name))

        _in_parallel(send, names)

    @property
    def _writes_whole(self) -> bool:
        """Object stores show an object only once all of it has arrived."""
        protocols = (self.fs.protocol,) if isinstance(self.fs.protocol, str) else self.fs.protocol
        return not {"gs", "s3", "abfs", "oss", "r2"}.isdisjoint(protocols)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those that are not there any more are as removed."""

        def remove(name: str) -> None:
            with remote_errors(self.url), contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self.path(name))

        _in_parallel(remove, names)


def _in_parallel(work: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="remote") as pool:
        for done in [pool.submit(work, name) for name in names]:
            done.result()


def _stamp(info: Mapping[str, Any]) -> Stamp:
    versions = (info.get(key) for key in ("generation", "etag", "ETag", "mtime", "created", "LastModified"))
    return Stamp(int(info["size"] or 0), str(next((each for each in versions if each), "")))


def local_copy(path: str | Path, chosen: Callable[[list[str]], list[str]] | None = None) -> Path:
    """The path itself or, for a URL, that of a copy in the user's cache, with the same name and the same files.

    Args:
      chosen: which of the files to copy, of the names in the folder; None: all.

    Raises:
      InputError: nothing is there, it cannot be read, its package is missing, or the disk here is full.
    """
    url = as_url(path)
    if url is None:
        return Path(path)
    storage, target = Storage(url), place_of(url)
    there = storage.listing()
    if not there:
        raise InputError(f"{url}: no such file or folder there, or nothing in it; check the spelling")
    wanted = there if "" in there or chosen is None else {name: there[name] for name in chosen(list(there))}
    record = read_record(COPIES, url)
    known = {name: Stamp(*stamp) for name, (stamp, *_) in record.items()}
    changed = [
        name
        for name, stamp in wanted.items()
        if known.get(name) != stamp or record[name][1] != list(local_stamp(target / name) or ())
    ]
    size = sum(wanted[name].size for name in changed)
    if size > WORTH_SAYING:
        print(f"copying {size / 1e9:.2g} GB from {url}", file=sys.stderr)
    if target.is_dir() != ("" not in there):
        _clear(target)
    if "" not in there:
        with disk_errors(target):
            target.mkdir(parents=True, exist_ok=True)
    storage.fetch(changed, target)
    if "" not in there:
        for old in _files(target) - set(there):
            (target / old).unlink(missing_ok=True)
    kept = {name: entry for name, entry in record.items() if name in there and name not in changed}
    fresh = {name: [list(wanted[name]), list(local_stamp(target / name) or ())] for name in changed}
    write_record(COPIES, url, kept | fresh)
    return target


def _clear(target: Path) -> None:
    """Remove a copy that was a file, where there is a folder of the name now, or the other way round."""
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


def place_of(path: str | Path, kind: str = COPIES) -> Path:
    """The path itself or, for a URL, where its copy is; nothing is copied.

    Raises:
      InputError: there is no cache folder, or the URL has ``..`` in it.
    """
    url = as_url(path)
    if url is None:
        return Path(path)
    scheme, rest = url.split("://", 1)
    parts = [part for part in rest.split("/") if part]
    if ".." in parts:
        raise InputError(f"{url}: has .. in it; write the address itself")
    return _cache(kind) / scheme / Path(*parts)


def _cache(kind: str) -> Path:
    folder = cache_folder(kind, sys.maxsize)
    if folder is None:
        raise InputError("no cache folder for copies of remote files; set TI_JAX_CACHE to one that can be written")
    return folder.absolute()


def as_given(text: str) -> str:
    """A text with the URLs of copies in place of their paths; a path written as ``file://`` stays."""
    try:
        root = str(cache_root().absolute())
    except RuntimeError:  # no home folder, and so no copies
        return text
    return re.sub(rf"(?<!file://){re.escape(root)}/(?:{COPIES}|{RUNS})/([a-z][a-z0-9+.-]+)/", r"\1://", text)


def _files(folder: Path) -> set[str]:
    """The names of all files in a folder and its sub-folders, with slashes, but those that are being written."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".tmp-"))
    return {path.relative_to(folder).as_posix() for path in files}


def local_stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of a file here; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _record_path(kind: str, url: str) -> Path:
    return _cache(kind) / f".{hashlib.sha256(url.encode()).hexdigest()[:24]}.json"


def read_record(kind: str, url: str) -> dict[str, Any]:
    """What was copied last: by name, the stamp behind the URL and the one here."""
    try:
        return json.loads(_record_path(kind, url).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_record(kind: str, url: str, record: Mapping[str, Any]) -> None:
    """Keep a record for `read_record`."""
    write_atomically(_record_path(kind, url), json.dumps(record).encode())


@contextlib.contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Context that turns whatever a file system's package raises into an `InputError` of one line."""
    try:
        yield
    except InputError:
        raise
    # Of many classes: those of HTTP libraries, of credentials, of each package. None is a bug of ours: the arguments
    # are an address and names of files.
    except Exception as error:
        raise InputError(f"{url}: {_described(error, url)}") from error


def _described(error: Exception, url: str) -> str:
    scheme, bucket = url.split("://")[0], url.split("://")[1].split("/")[0]
    google = scheme in ("gs", "gcs")
    said = one_line(error)
    if isinstance(error, ImportError):
        missing = "the package gcsfs; pip install 'ti_jax[gcs]'" if google else f"a package that is missing ({said})"
        return f"needs {missing}"
    if isinstance(error, ValueError) and "rotocol" in said:
        return f"{scheme}:// is not known; give a path of this machine, or gs://BUCKET/FOLDER"
    if isinstance(error, FileNotFoundError):
        return f"no such file or folder, or no bucket {bucket!r}; check the spelling"
    if isinstance(error, PermissionError) or getattr(error, "code", None) in (401, 403) or "redentials" in said:
        log_in = (
            "log in with  gcloud auth application-default login , or give the machine's service account the role "
            "Storage Object User for the bucket"
        )
        return f"no access ({said}); {log_in if google else 'check the credentials'}"
    return f"cannot be reached ({said}); check the network, and try again"
