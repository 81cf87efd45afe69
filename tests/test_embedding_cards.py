"""Image cards: written here as AUTOMATIC1111's source writes them, and read here as it reads them."""

import base64
import io
import itertools
import json
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from words import a1111_file, assert_same, numbers, refusal, sdxl_word, word

from ti_jax.embeddings import Embedding, image_card
from ti_jax.embeddings.a1111_format import _plain_picture, drawable, fitted, write_card
from ti_jax.errors import InputError

# -- AUTOMATIC1111's image_embedding.py, from its description, in plain Python where the module uses NumPy


class TorchEncoder(json.JSONEncoder):
    def default(self, value):
        return {"TORCHTENSOR": value.cpu().detach().numpy().tolist()}


def sequence():
    state = 0
    while True:
        state = (1664525 * state + 1013904223) % 2**32
        yield state % 255


def masked(block):
    """Each number of uint8 [h, w, 3] xored with the low half of the next of the sequence."""
    mask = [number & 0x0F for number in itertools.islice(sequence(), block.size)]
    return block ^ np.array(mask, np.uint8).reshape(block.shape)


def ornamented(block, shades):
    """Circles in the high half: a row of them shifted every other time, in shades that the word gives."""
    picture = Image.new("RGB", (block.shape[1], block.shape[0]))
    draw = ImageDraw.Draw(picture)
    count = 0
    for x in range(-6, block.shape[1], 8):
        for row, y in enumerate(range(-6, block.shape[0], 8)):
            shade = int(shades[count % len(shades)])
            shift = 4 if row % 2 == 0 else 0
            draw.ellipse((x + shift, y, x + 6 + shift, y + 6), fill=(shade,) * 3)
            count += 1
    return block ^ (np.array(picture) & 0xF0)


def their_pixels(picture, data):
    packed = np.frombuffer(zlib.compress(json.dumps(data, cls=TorchEncoder).encode(), 9), np.uint8)
    height = picture.height
    size = len(packed) + height - len(packed) % height
    size += 3 * height - size % (3 * height)
    first = np.abs(next(iter(data["string_to_param"].values())).detach().numpy()[0][:1024])
    shades = (first / first.max() * 255).astype(np.uint8)
    blocks = []
    for half, order in ((packed & 0x0F, shades), (packed >> 4, shades[::-1])):
        blocks.append(masked(ornamented(np.resize(half, size).reshape(height, -1, 3), order)))
    width = blocks[0].shape[1]
    whole = Image.new("RGB", (picture.width + 2 * width + 2, height), (0, 0, 0))
    whole.paste(Image.fromarray(blocks[0]), (0, 0))
    whole.paste(picture, (width + 1, 0))
    whole.paste(Image.fromarray(blocks[1]), (width + picture.width + 2, 0))
    return whole


def their_text(data):
    info = PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(json.dumps(data, cls=TorchEncoder).encode()).decode())
    return info


def they_read(path, channel):
    """What AUTOMATIC1111 makes of a card: a dict, tensors as lists."""
    image = Image.open(path)
    if channel == "text":
        return json.loads(base64.b64decode(image.text["sd-ti-embedding"]))
    pixels = np.array(image.convert("RGB"))
    bright = (pixels > 0).all(2)
    columns, rows = bright.any(0), bright.any(1)
    pixels = pixels[
        rows.argmax() : len(rows) - rows[::-1].argmax(), columns.argmax() : len(columns) - columns[::-1].argmax()
    ]
    pixels = pixels & 0x0F
    black = np.where(pixels.sum(axis=(0, 2)) == 0)[0]
    low, high = masked(pixels[:, : black.min()]), masked(pixels[:, black.max() + 1 :])
    return json.loads(zlib.decompress((high << 4 | low).flatten().tobytes()))


def picture(width=200, height=256):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    pixels[:, width // 2] = 0  # a black column of the picture's own
    return Image.fromarray(pixels)


@pytest.fixture(params=[(1, 768), (4, 768), (1, 1024), (4, 1024)], ids=lambda p: f"{p[0]}x{p[1]}")
def tensor(request):
    return torch.from_numpy(numbers(*request.param))


def expected(tensor):
    metadata = {"steps": "1999", "sd_checkpoint": "6ce0161689", "base_model": "v1-5-pruned-emaonly"}
    return Embedding("mein-stil", {"text_encoder": tensor.numpy()}, metadata)


# -- theirs, read here


@pytest.mark.parametrize(
    ("channel", "suffix"), [("text", ".png"), ("pixels", ".png"), ("both", ".png"), ("pixels", ".webp")]
)
def test_their_cards(tmp_path, tensor, channel, suffix):
    data = a1111_file(tensor)
    image = picture() if channel == "text" else their_pixels(picture(), data)
    path = tmp_path / f"a{suffix}"
    if suffix == ".webp":
        image.save(path, lossless=True)
    else:
        image.save(path, pnginfo=None if channel == "pixels" else their_text(data))
    embedding = Embedding.load(path)
    assert_same(embedding, expected(tensor))
    assert embedding.metadata == expected(tensor).metadata
    assert Embedding.load(path, token="<x>").token == "<x>"


def test_a_card_in_a_black_frame_and_with_transparency(tmp_path, tensor):
    card = their_pixels(picture(), a1111_file(tensor))
    framed = Image.new("RGB", (card.width + 30, card.height + 20))
    framed.paste(card, (10, 15))
    framed.save(tmp_path / "a.png")
    card.convert("RGBA").save(tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert_same(Embedding.load(tmp_path / name), expected(tensor))


def test_a_broken_text_chunk_falls_back_on_the_pixels(tmp_path, tensor):
    for text in ("not base64!", base64.b64encode(b"{").decode(), base64.b64encode(b"[1]").decode()):
        info = PngInfo()
        info.add_text("sd-ti-embedding", text)
        their_pixels(picture(), a1111_file(tensor)).save(tmp_path / "a.png", pnginfo=info)
        assert_same(Embedding.load(tmp_path / "a.png"), expected(tensor))
        picture().save(tmp_path / "b.png", pnginfo=info)
        assert "a picture without a word in it" in refusal(tmp_path / "b.png")


def test_the_mask_is_theirs():
    # The first numbers of the sequence as its module asserts them.
    assert list(itertools.islice(sequence(), 8)) == [253, 242, 127, 44, 157, 27, 239, 133]
    mask = [number & 0x0F for number in itertools.islice(sequence(), 100_000)]
    assert image_card._mask(100_000).tolist() == mask and image_card._mask(0).size == 0


# -- ours, read there


@pytest.mark.parametrize("channel", ["text", "pixels"])
@pytest.mark.parametrize("own_picture", [False, True])
def test_our_cards_are_read_there(tmp_path, tensor, channel, own_picture):
    embedding = Embedding("<cat-toy>", {"text_encoder": tensor.numpy()}, {"steps": "500", "base_model": "sd"})
    path = tmp_path / "a.png"
    if own_picture:
        path.write_bytes(write_card(embedding, path, picture())[path])
    else:
        embedding.save(path, format="card")
    data = they_read(path, channel)
    rows = np.array(data["string_to_param"].pop("*").pop("TORCHTENSOR"), np.float32)
    assert rows.tobytes() == tensor.numpy().tobytes() and rows.shape == tuple(tensor.shape)
    assert data == {
        "string_to_token": {"*": 265}, "string_to_param": {}, "name": "<cat-toy>", "step": 500,
        "sd_checkpoint": None, "sd_checkpoint_name": "sd",
    }  # fmt: skip
    assert_same(Embedding.load(path), embedding)


def test_each_of_our_channels_alone(tmp_path):
    word(4).save(tmp_path / "a.png", format="card")
    with Image.open(tmp_path / "a.png") as card:
        card.save(tmp_path / "pixels.png")
        Image.new("RGB", (8, 8)).save(tmp_path / "text.png", pnginfo=_text_of(card))
        card.save(tmp_path / "lossy.jpg")
    for name in ("pixels.png", "text.png"):
        assert_same(Embedding.load(tmp_path / name), word(4))
    assert "a JPEG picture, and image cards are PNG" in refusal(tmp_path / "lossy.jpg")


def _text_of(image):
    info = PngInfo()
    info.add_text("sd-ti-embedding", image.text["sd-ti-embedding"])
    return info


# -- refused


def test_what_is_no_card(tmp_path):
    path = tmp_path / "a.png"
    for image in (picture(), Image.new("RGB", (64, 64)), Image.new("L", (5, 5), 200)):
        image.save(path)
        assert refusal(path).startswith(f"{path}: a picture without a word in it, be it in the chunk")
    Image.new("L", (40_000, 1_000)).save(path)
    assert "40000 x 1000 pixels, far too large for a card" in refusal(path)
    with pytest.raises(InputError, match=r"is for SDXL .*; save it with format 'comfyui'"):
        sdxl_word().save(path, format="card")
    with pytest.raises(InputError, match=r"an image card is a \.png file"):
        word().save(tmp_path / "a.jpg", format="card")


@pytest.mark.parametrize(
    "value",
    ["[[1.0], [1.0, 2.0]]", '[["1"]]', "[[[1.0]]]", "[[true]]", "{}", "1.0", "[[1.0], 2.0]", "[[1" + "0" * 400 + "]]"],
)
def test_tensors_in_cards_that_are_none(tmp_path, value):
    info = PngInfo()
    text = '{"string_to_param": {"*": {"TORCHTENSOR": ' + value + "}}}"
    info.add_text("sd-ti-embedding", base64.b64encode(text.encode()).decode())
    picture().save(tmp_path / "a.png", pnginfo=info)
    assert refusal(tmp_path / "a.png").startswith(f"{tmp_path / 'a.png'}: ")


def test_a_bomb_in_the_pixels_is_not_unpacked(tmp_path):
    stream = zlib.compress(b"[" * 100_000_000, 9)
    Image.fromarray(image_card._with_edges(np.array(picture()), stream)).save(tmp_path / "a.png")
    assert "a picture without a word in it" in refusal(tmp_path / "a.png")
    nested = io.BytesIO(b"[" * 1_000_000)
    Image.fromarray(image_card._with_edges(np.array(picture()), zlib.compress(nested.getvalue()))).save(
        tmp_path / "a.png"
    )
    assert "a picture without a word in it" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("<Größe>", "<Gr[U+00F6][U+00DF]e>"),
        ("<猫>", "<[U+732B]>"),
        ("کتاب", "[U+06A9][U+062A][U+0627][U+0628]"),
        ("🐈", "[U+1F408]"),
    ],
)
def test_names_in_scripts_that_the_font_lacks_are_drawn_as_code_points(text, drawn):
    assert drawable(text) == drawn


@pytest.mark.parametrize("token", ["x", "<cat-toy>", "W" * 60, "<" + "猫" * 40 + ">", "m" * 5000])
def test_names_on_cards_are_not_clipped(tmp_path, token):
    lines, font = fitted(drawable(token), 480, 64)
    assert all(font.getlength(line) <= 480 for line in lines) and len(lines) <= 12
    if len(token) < 5000:
        assert "".join(lines) == drawable(token)
    pixels = np.asarray(_plain_picture(word(token=token))).astype(int)
    edge = np.concatenate([pixels[:, :8].reshape(-1, 3), pixels[:, -8:].reshape(-1, 3), pixels[:8].reshape(-1, 3)])
    assert (edge == (40, 44, 52)).all() and (pixels.max(axis=2) > 200).any()
    word(token=token).save(tmp_path / "a.png", format="card")
    assert Embedding.load(tmp_path / "a.png").token == token
