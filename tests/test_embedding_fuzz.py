"""Damaged and hostile embedding files: each loads rightly or is one clear line, and does no harm.

They are all loaded in one process of their own, which a limit on its time and a look at its memory hold to that.
"""

import collections
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from words import a1111_file, numbers, sdxl_word, word

from ti_jax.embeddings import image_card

MEMORY_MB = 1000
SECONDS_A_FILE = 20
BOMB_MB = 1200

# What the child does; it tells of each file on a line of its own, so that a crash names the file.
CHILD = """
import json, signal, sys, warnings
from pathlib import Path
warnings.simplefilter("error")
from ti_jax.embeddings import Embedding
from ti_jax.errors import InputError

def peak():
    # Not getrusage's: a process takes that over from the one that started it. Only Linux has this.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), 0)

files = sys.argv[1:]
Embedding.load(files[0])  # PyTorch and Pillow are there from here on
start = peak()
for file in files:
    print(json.dumps({"begun": file}), flush=True)
    signal.alarm(SECONDS)
    try:
        embedding = Embedding.load(file)
        told = {name: [list(v.shape), v.tobytes().hex()] for name, v in embedding.vectors.items()}
        result = {"file": file, "loaded": told}
    except InputError as error:
        result = {"file": file, "refused": str(error)}
    signal.alarm(0)
    print(json.dumps({**result, "mb": peak() - start}), flush=True)
""".replace("SECONDS", str(SECONDS_A_FILE))


def seeds(folder):
    """Good files of every container, by name."""
    word(2).save(folder / "one.safetensors")
    sdxl_word(1).save(folder / "two.safetensors", format="comfyui")
    word(2).save(folder / "zip.bin")
    word(2).save(folder / "a1111.pt", format="a1111")
    torch.save(a1111_file(torch.from_numpy(numbers(2, 768))), folder / "old.pt", _use_new_zipfile_serialization=False)
    word(1).save(folder / "card.png", format="card")
    with Image.open(folder / "card.png") as card:
        card.save(folder / "pixels.png")
        card.save(folder / "card.webp", lossless=True)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def flipped(content, places, chance):
    damaged = bytearray(content)
    for place in places:
        damaged[place] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def safetensors_file(header, payload=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


def lying_safetensors():
    """Headers that say what is not so."""
    row, numbers_ = b"\0" * 3072, {"dtype": "F32", "shape": [1, 768], "data_offsets": [0, 3072]}

    def one(**changes):
        return safetensors_file({"<x>": {**numbers_, **changes}}, row)

    yield "huge-shape", one(shape=[10**12, 768])
    yield "huge-offsets", one(data_offsets=[0, 10**15])
    yield "huge-both", one(shape=[10**9, 768], data_offsets=[0, 10**9 * 3072])
    yield "overflowing-shape", one(shape=[2**62, 4, 768])
    yield "negative-shape", one(shape=[-1, 768])
    yield "reversed-offsets", one(data_offsets=[3072, 0])
    yield "no-dimension", one(shape=[])
    yield "many-dimensions", one(shape=[1] * 60 + [768])
    for dtype in ("F64", "F16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "I32", "U32", "BANANA"):
        yield f"dtype-{dtype}", one(dtype=dtype)
    yield "no-entries", safetensors_file({})
    yield "only-metadata", safetensors_file({"__metadata__": {"format": "pt"}})
    yield "metadata-of-numbers", safetensors_file({"__metadata__": {"a": 1}, "<x>": numbers_}, row)
    yield "a-list", safetensors_file([1, 2])
    yield "deep", safetensors_file(b'{"a":' * 100_000)
    yield "header-of-an-exabyte", safetensors_file({"<x>": numbers_}, row, length=2**60)
    yield "header-past-the-end", safetensors_file({"<x>": numbers_}, row, length=10_000)
    yield "header-cut-off", safetensors_file({"<x>": numbers_}, row, length=40)
    many = {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(50_000)}
    yield "many-tensors", safetensors_file(many, b"\0" * 200_000)


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def hostile_pickles(mark):
    """Pickles that would run something that leaves a file at ``mark``, or take memory, wherever the harm is hidden."""
    import builtins
    import shutil

    tensor = torch.ones(1, 768)
    harm = Call(os.system, f"touch {mark}")
    for name, data in {
        "as-tensor": {"<x>": harm},
        "as-key": {harm: tensor},
        "nested": {"string_to_param": {"*": tensor}, "name": [[{"a": (harm,)}]]},
        "beside": {"<x>": tensor, "note": harm},
        "eval": {"<x>": Call(builtins.eval, f"open({str(mark)!r}, 'w')")},
        "open": {"<x>": Call(builtins.open, str(mark), "w")},
        "copy": {"<x>": Call(shutil.copy, "/etc/hostname", str(mark))},
        "getattr": {"<x>": Call(builtins.getattr, "text", "join")},
        "subprocess": {"<x>": Call(subprocess.call, ["touch", str(mark)])},
        "ordered": collections.OrderedDict([("<x>", Call(os.mkdir, str(mark)))]),
        "nested-pickle": {"<x>": Call(pickle.loads, pickle.dumps(harm))},
    }.items():
        for kind in ("zip", "old", "plain"):
            buffer = io.BytesIO()
            if kind == "plain":
                pickle.dump(data, buffer, protocol=2)
            else:
                torch.save(data, buffer, _use_new_zipfile_serialization=kind == "zip")
            yield f"{name}-{kind}", buffer.getvalue()
    buffer = io.BytesIO()
    torch.save({"<x>": tensor.expand(1 << 22, 768)}, buffer)
    yield "expanded", buffer.getvalue()
    packed = io.BytesIO()
    with zipfile.ZipFile(buffer) as good, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in good.infolist():
            with bomb.open(entry.filename, "w") as inside:
                for part in repeat(bytes(1 << 20), BOMB_MB) if "/data/" in entry.filename else [good.read(entry)]:
                    inside.write(part)
    yield "bomb", packed.getvalue()
    for legacy in (False, True):
        # A storage that says it holds two thousand million numbers, and a tensor of all of them.
        buffer = io.BytesIO()
        torch.save({"<x>": torch.ones(2, 768)}, buffer, _use_new_zipfile_serialization=not legacy)
        yield f"huge-storage-{legacy}", _with_pickle(buffer.getvalue(), b"M\x00\x06", b"J\xff\xff\xff\x77")
        yield f"huge-tensor-{legacy}", _with_pickle(buffer.getvalue(), b"K\x02M\x00\x03", b"J\xff\xff\xff\x07M\x00\x03")
    nested = b"\x80\x02" + b"(" * 200_000 + b"." + b"]" * 10
    yield "marks", nested
    yield "lists", b"\x80\x02" + b"](" * 100_000 + b"."


def _with_pickle(content, old, new):
    """A PyTorch file with other bytes in its pickle."""
    if not content.startswith(b"PK"):
        assert old in content
        return content.replace(old, new)
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as good, zipfile.ZipFile(changed, "w") as bad:
        for entry in good.infolist():
            inside = good.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert old in inside
                inside = inside.replace(old, new)
            bad.writestr(entry.filename, inside)
    return changed.getvalue()


def hostile_cards():
    def card(text=None, pixels=None):
        info, buffer = PngInfo(), io.BytesIO()
        if text is not None:
            info.add_text("sd-ti-embedding", text)
        image = Image.new("RGB", (64, 64), (9, 9, 9)) if pixels is None else Image.fromarray(pixels)
        image.save(buffer, format="PNG", pnginfo=info)
        return buffer.getvalue()

    packer = zlib.compressobj(9)
    bomb = b"".join([*(packer.compress(b" " * (1 << 20)) for _ in range(BOMB_MB)), packer.flush()])
    plain = np.full((64, 64, 3), 9, np.uint8)
    yield "no-word", card()
    yield "no-base64", card("?" * 100)
    yield "deep-json", card("W1tb" * 1_000_000)
    yield "long-json", card("LFtd" * 3_000_000)
    yield "deep-pixels", card(pixels=image_card._with_edges(plain, zlib.compress(b"[" * 5_000_000)))
    yield "bomb-pixels", card(pixels=image_card._with_edges(plain, bomb))
    yield "bomb-picture", black_png(30_000)
    yield "large-picture", black_png(5_600)


def black_png(side):
    """A square of one bit a pixel, packed row by row: Pillow would hold a byte for each."""
    packer, row = zlib.compressobj(), bytes(1 + side // 8)  # which filter, then the pixels
    packed = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    parts = {b"IHDR": struct.pack(">2I5B", side, side, 1, 0, 0, 0, 0), b"IDAT": packed, b"IEND": b""}
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_mutated_files(tmp_path):
    chance = random.Random(0)
    folder, mark = tmp_path / "files", tmp_path / "harmed"
    folder.mkdir()
    good = seeds(folder)
    kinds = {name: "good" for name in good}

    def add(kind, name, content):
        (folder / name).write_bytes(content)
        kinds[name] = kind

    for name, content in good.items():
        for number in range(4):
            add("cut", f"cut{number}-{name}", content[: chance.randrange(1, len(content) - 1)])
        for number in range(4):  # where headers and directories are
            end = chance.choice([200, 64, 12])
            places = [chance.choice([chance.randrange(end), len(content) - 1 - chance.randrange(end)]) for _ in "123"]
            add("flipped", f"header{number}-{name}", flipped(content, places, chance))
        for number in range(2):
            places = [chance.randrange(len(content)) for _ in range(1 + 20 * number)]
            add("flipped", f"anywhere{number}-{name}", flipped(content, places, chance))
    for name, content in lying_safetensors():
        add("lying", f"{name}.safetensors", content)
    for name, content in hostile_pickles(mark):
        add("hostile", f"{name}.pt", content)
    for name, content in hostile_cards():
        add("hostile", f"{name}.png", content)
    assert len(kinds) > 150

    names = ["a1111.pt", *sorted(kinds)]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *names], cwd=folder, capture_output=True, text=True, timeout=500,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    assert child.returncode == 0, f"{lines[-1:]}: {child.stderr[-3000:]}"
    assert child.stderr == "" and not mark.exists()
    results = {line["file"]: line for line in lines if "file" in line}
    assert results.keys() == kinds.keys()
    assert max(line["mb"] for line in results.values()) < MEMORY_MB, max(results.values(), key=lambda line: line["mb"])

    for name, kind in kinds.items():
        result = results[name]
        if kind == "good" or "refused" not in result:
            assert kind not in ("hostile", "lying") or name == "dtype-F32.safetensors", f"{name} was loaded"
            if kind != "flipped":  # of which the flipped bit may be one of the numbers
                original = next(seed for seed in good if name.endswith(seed))
                assert result["loaded"] == results[original]["loaded"], name
            for shape, numbers_ in result["loaded"].values():
                rows = np.frombuffer(bytes.fromhex(numbers_), np.float32).reshape(shape)
                assert rows.ndim == 2 and np.isfinite(rows).all(), name
        else:
            said = result["refused"]
            assert "\n" not in said and said.startswith(f"{name}: ") and len(said) < 1000, said
