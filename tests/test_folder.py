import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from permissions import shared_folder, without_rights  # noqa: F401 (a fixture)
from PIL import Image

from ti_jax.data.cropping import cropped_to
from ti_jax.data.folder import load_images
from ti_jax.data.pictures import Pictures
from ti_jax.errors import InputError


def gradient(width, height):
    """A smooth picture, different in each corner and channel: uint8 [H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack(
        [255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), 40 + 100 * x * y / (width * height)], -1
    ).astype(np.uint8)


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(folder, name, pixels, mode=None, **options):
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(folder / name, **options)


def levels(pictures, index=0):
    """The pixels of one picture as 0..255."""
    return (pictures.pixels[index].astype(np.float64) + 1.0) * 127.5


def refusal(folder, *args, **kwargs):
    with pytest.raises(InputError) as error:
        load_images(folder, *(args or (16,)), **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- which files, and what comes back


def test_every_picture_sorted_by_name_and_nothing_else(tmp_path):
    for name in ("b.png", "a.JPG", "c.webp", "10.bmp", "9.tiff", "d.gif"):
        save(tmp_path, name, gradient(24, 32))
    (tmp_path / "README.md").write_text("about the pictures")
    (tmp_path / "a.txt").write_text("a caption")
    (tmp_path / "data.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    save(tmp_path, ".hidden.png", gradient(8, 8))
    (tmp_path / "inside.png").mkdir()
    save(tmp_path / "inside.png", "deep.png", gradient(8, 8))
    os.mkfifo(tmp_path / "pipe.png")
    pictures = load_images(tmp_path, 16)
    assert isinstance(pictures, Pictures)
    assert pictures.names == ("10.bmp", "9.tiff", "a.JPG", "b.png", "c.webp", "d.gif")
    assert pictures.pixels.shape == (6, 16, 16, 3) and pictures.pixels.dtype == np.float32
    assert pictures.pixels.min() >= -1.0 and pictures.pixels.max() <= 1.0
    assert pictures.original_sizes.tolist() == [[32, 24]] * 6
    # 24 x 32 is scaled by 2/3 to 16 x 21.3, and 2.67 are cut at the top.
    assert pictures.crop_offsets.tolist() == [[3, 0]] * 6
    assert pictures.original_sizes.dtype == pictures.crop_offsets.dtype == np.int32


def test_lossless_pixels_at_the_right_size_come_through_exactly(tmp_path):
    pixels = noise(16, 16)
    save(tmp_path, "a.png", pixels)
    for center_crop in (False, True):
        pictures = load_images(str(tmp_path), 16, center_crop=center_crop)
        np.testing.assert_array_equal(pictures.pixels[0], (pixels / 127.5 - 1.0).astype(np.float32))
        assert pictures.crop_offsets.tolist() == [[0, 0]]


# -- the two pixel paths


def diffusers_center_crop(path, size):
    """What textual_inversion.py does with --center_crop, written from its description."""
    image = Image.open(path).convert("RGB")
    array = np.array(image).astype(np.uint8)
    crop = min(array.shape[0], array.shape[1])
    height, width = array.shape[0], array.shape[1]
    array = array[(height - crop) // 2 : (height + crop) // 2, (width - crop) // 2 : (width + crop) // 2]
    image = Image.fromarray(array).resize((size, size), resample=Image.Resampling.BICUBIC)
    array = np.array(image).astype(np.uint8)
    return (array / 127.5 - 1.0).astype(np.float32)


@pytest.mark.parametrize("size", [(64, 64), (65, 40), (40, 65), (41, 64), (20, 9), (9, 20), (8, 8), (33, 200)])
def test_center_crop_is_diffusers_pixel_path(tmp_path, size):
    save(tmp_path, "a.png", noise(*size))
    save(tmp_path, "b.jpg", gradient(*size))
    pictures = load_images(tmp_path, 32, center_crop=True)
    for index, name in enumerate(pictures.names):
        np.testing.assert_array_equal(pictures.pixels[index], diffusers_center_crop(tmp_path / name, 32))


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (48, 48), (12, 18), (500, 8)])
def test_default_path_is_scaling_to_cover_and_cutting_the_overhang(tmp_path, size):
    save(tmp_path, "a.png", noise(*size))
    pictures = load_images(tmp_path, 24)
    width, height = size
    scale = 24 / min(size)
    kind = Image.Resampling.LANCZOS if min(size) > 24 else Image.Resampling.BICUBIC
    scaled = Image.open(tmp_path / "a.png").resize((round(width * scale), round(height * scale)), kind)
    top, left = pictures.crop_offsets[0]
    expected = np.asarray(scaled)[top : top + 24, left : left + 24]
    # Both round to 8 bits, along one side and then the other, at other places: one level apart at most.
    assert np.abs(levels(pictures) - expected).max() < 1.01
    assert pictures.original_sizes.tolist() == [[height, width]]


def test_a_circle_stays_a_circle(tmp_path):
    y, x = np.mgrid[0:60, 0:120]
    circle = np.uint8(255 * ((x - 59.5) ** 2 + (y - 29.5) ** 2 < 20**2))
    save(tmp_path, "a.png", np.stack([circle] * 3, -1))
    inside = levels(load_images(tmp_path, 48))[..., 0] > 127.5
    assert inside.any(axis=0).sum() == inside.any(axis=1).sum() == 32  # 40 of 60 pixels, at 48


def test_a_fine_pattern_is_averaged_when_scaled_down_not_sampled(tmp_path):
    y, x = np.mgrid[0:256, 0:256]
    save(tmp_path, "a.png", np.stack([np.uint8(255 * ((x + y) % 2))] * 3, -1))
    assert np.abs(levels(load_images(tmp_path, 32)) - 127.5).max() < 2


def test_a_very_long_picture_needs_no_room_for_its_scaled_self(tmp_path):
    """Scaled to cover, it would have 256 x 15,360,000 pixels."""
    square, offset = cropped_to(Image.fromarray(noise(60_000, 1)), (256, 256), center_crop=False)
    assert square.size == (256, 256) and offset == (0, 29_999 * 256)


# -- forms of files


def test_transparent_parts_are_laid_on_white(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:4] = (200, 100, 0, 255)
    pixels[4:6] = (200, 100, 0, 128)
    pixels[6:] = (9, 9, 9, 0)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    Image.fromarray(pixels).save(tmp_path / "rgba.webp", lossless=True)
    Image.fromarray(pixels[..., [0, 3]]).convert("LA").save(tmp_path / "la.png")
    Image.fromarray(pixels).save(tmp_path / "rgba.tiff")
    pictures = load_images(tmp_path, 8)
    for index, name in enumerate(pictures.names):
        solid, half, clear = (levels(pictures, index)[row, 0].round() for row in (0, 5, 7))
        if name == "la.png":
            assert solid.tolist() == [200] * 3 and half.tolist() == [227] * 3 and clear.tolist() == [255] * 3
        else:
            assert solid.tolist() == [200, 100, 0] and half.tolist() == [227, 177, 127], name
            assert clear.tolist() == [255] * 3, name


def test_palettes_and_single_transparent_colours(tmp_path):
    indices = np.repeat(np.arange(4, dtype=np.uint8), 16).reshape(8, 8)
    image = Image.frombytes("P", (8, 8), indices.tobytes())
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 10, 20, 30])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "bytes.png", transparency=bytes([0, 255, 128, 255]))
    image.save(tmp_path / "index.gif", transparency=1)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    Image.new("L", (8, 8), 7).save(tmp_path / "grey.png", transparency=7)
    Image.new("1", (8, 8), 1).save(tmp_path / "one.png")
    pictures = load_images(tmp_path, 8)
    found = {name: levels(pictures, i)[::2, 0].round().tolist() for i, name in enumerate(pictures.names)}
    red, green, blue, dark, white = [255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30], [255, 255, 255]
    assert found["plain.png"] == [red, green, blue, dark]
    assert found["bytes.png"] == [white, green, [127, 127, 255], dark]
    assert found["index.gif"] == [red, white, blue, dark]
    assert found["rgb.png"] == found["grey.png"] == found["one.png"] == [white] * 4


def grey16(top=65535):
    return np.linspace(0, top, 64).reshape(8, 8).astype(np.uint16)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    values = grey16()
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.tiff")
    image.save(tmp_path / "c.pgm")
    (tmp_path / "d.tiff").write_bytes(big_endian_tiff(values))
    image.save(tmp_path / "e.jp2")
    pictures = load_images(tmp_path, 8)
    assert len(pictures.names) == 5
    for index, name in enumerate(pictures.names):
        got = levels(pictures, index)
        assert np.abs(got - (values / 257.0)[..., None]).max() < 1.01, name


def big_endian_tiff(values):
    """A TIFF with 16-bit grey of the other byte order, by hand."""
    height, width = values.shape
    entries = [(256, width), (257, height), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    entries.append((279, values.size * 2))
    data = values.astype(">u2").tobytes()
    table = struct.pack(">H", len(entries)) + b"".join(
        struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in entries
    )
    return struct.pack(">2sHI", b"MM", 42, 8 + len(data)) + data + table + struct.pack(">I", 0)


def test_16_bit_grey_with_a_transparent_level(tmp_path):
    values = np.full((8, 8), 1000, np.uint16)
    values[0] = 30000
    Image.fromarray(values).save(tmp_path / "a.png", transparency=1000)
    got = levels(load_images(tmp_path, 8)).round()
    assert (got[0] == 117).all() and (got[1:] == 255).all()


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_floating_point_grey(tmp_path, top):
    values = np.linspace(0, top, 64).reshape(8, 8).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert np.abs(levels(load_images(tmp_path, 8)) - (values * 255 / top)[..., None]).max() < 0.51


@pytest.mark.parametrize(
    "values", [np.float32([[np.nan, 1]]), np.float32([[-1, 1]]), np.float32([[0, 1e6]]), np.int32([[0, 1 << 24]])]
)
def test_grey_without_a_white_is_refused(tmp_path, values):
    Image.fromarray(np.tile(values, (4, 4))).save(tmp_path / "a.tiff")
    assert "a.tiff: " in refusal(tmp_path) and "cannot tell black and white" in refusal(tmp_path)


def test_cmyk_lab_and_grey(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.tiff")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "b.jpg", quality=100)
    Image.new("LAB", (8, 8), (255, 128, 128)).save(tmp_path / "c.tiff")
    Image.new("L", (8, 8), 77).save(tmp_path / "d.jpg", quality=100)
    Image.new("YCbCr", (8, 8), (77, 128, 128)).save(tmp_path / "e.jpg", quality=100)
    pictures = load_images(tmp_path, 8)
    for index, colour in enumerate([(255, 0, 0), (255, 0, 0), (255, 255, 255), (77, 77, 77), (77, 77, 77)]):
        assert np.abs(levels(pictures, index) - colour).max() < 2.5, pictures.names[index]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
def test_a_picture_is_turned_as_its_exif_tag_says(tmp_path, orientation, name):
    upright = gradient(24, 16)
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if name == "a.jpg" else {"lossless": True} if name == "a.webp" else {}
    save(tmp_path, name, np.ascontiguousarray(undo(upright)), exif=exif, **options)
    pictures = load_images(tmp_path, 16)
    assert pictures.original_sizes.tolist() == [[16, 24]]
    assert np.abs(levels(pictures) - upright[:, 4:20]).max() < 6


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for name in ("a.gif", "a.png", "a.webp", "a.tiff"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with Image.open(tmp_path / name) as image:
            assert image.n_frames == 3
    pictures = load_images(tmp_path, 8)
    for index in range(4):
        assert np.abs(levels(pictures, index) - (255, 0, 0)).max() < 2.5


# -- what is refused


def test_folders_that_do_not_serve(tmp_path):
    assert refusal(tmp_path / "none").startswith(f"{tmp_path / 'none'}: no such folder")
    save(tmp_path, "a.png", gradient(8, 8))
    assert "not a folder; give the folder with the pictures, not one of them" in refusal(tmp_path / "a.png")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("x")
    assert refusal(empty).startswith(f"{empty}: no pictures in this folder; looked for .png, .jpg, .jpeg, .webp, ")


def bad_files():
    jpeg = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(jpeg, "JPEG")
    png = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(png, "PNG")
    wrong_sum = bytearray(png.getvalue())
    wrong_sum[60] ^= 255
    return {
        "cut.jpg": jpeg.getvalue()[:-1000],
        "cut.png": png.getvalue()[: len(png.getvalue()) // 2],
        "damaged.png": bytes(wrong_sum),
        "text.png": b"This is not a picture.\n",
        "empty.png": b"",
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "cut.webp": b"RIFF\x10\x00\x00\x00WEBPVP8 ",
        "cut.gif": b"GIF89a\x10\x00\x10\x00",
        "cut.tiff": b"II*\x00\x08\x00\x00\x00",
        "cut.bmp": b"BM\x00\x00",
    }


@pytest.mark.parametrize("name", bad_files())
def test_a_bad_file_among_good_ones_is_named_or_left_out(tmp_path, name):
    save(tmp_path, "a.png", gradient(16, 16))
    save(tmp_path, "z.png", gradient(16, 16))
    (tmp_path / name).write_bytes(bad_files()[name])
    said = refusal(tmp_path)
    assert said.startswith(f"{tmp_path / name}: ") and "--skip_bad_images" in said
    told = []
    pictures = load_images(tmp_path, 16, skip_bad=True, on_skip=told.append)
    assert pictures.names == ("a.png", "z.png") and len(pictures.pixels) == 2
    assert len(told) == 1 and told[0].startswith(f"left out: {tmp_path / name}: ") and "\n" not in told[0]


def test_what_is_wrong_is_told_apart(tmp_path):
    for name, why in [("cut.jpg", "truncated"), ("text.png", "not a picture, despite its suffix")]:
        (tmp_path / name).write_bytes(bad_files()[name])
        assert why in refusal(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "dead.png").symlink_to(tmp_path / "gone.png")
    assert "a link to nothing" in refusal(tmp_path)


def test_left_out_files_are_told_on_stderr(tmp_path, capsys):
    save(tmp_path, "a.png", gradient(16, 16))
    (tmp_path / "b.png").write_bytes(b"")
    load_images(tmp_path, 16, skip_bad=True)
    assert capsys.readouterr().err == f"left out: {tmp_path / 'b.png'}: not a picture, despite its suffix\n"


def test_nothing_left(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"")
    assert refusal(tmp_path, skip_bad=True, on_skip=lambda text: None) == (
        f"{tmp_path}: not one of its 2 pictures can be used"
    )


def huge_png(width, height):
    """A valid PNG that is small on the disk: one bit a pixel, rows of zeros."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_picture_too_large_is_refused_before_it_is_decoded(tmp_path):
    save(tmp_path, "a.png", gradient(16, 16))
    (tmp_path / "bomb.png").write_bytes(huge_png(30_000, 30_000))
    said = refusal(tmp_path)
    assert said.startswith(f"{tmp_path / 'bomb.png'}: more than 178,956,970 pixels, the most that one picture may have")
    told = []
    assert load_images(tmp_path, 16, skip_bad=True, on_skip=told.append).names == ("a.png",)
    assert len(told) == 1 and "178,956,970" in told[0]


@pytest.mark.heavy
def test_a_large_photograph_is_read_without_a_warning(tmp_path):
    """100 megapixels are where Pillow starts to warn; there are phones that have more."""
    (tmp_path / "a.png").write_bytes(huge_png(10_000, 10_000))
    with pytest.warns(Image.DecompressionBombWarning), Image.open(tmp_path / "a.png"):
        pass
    assert (load_images(tmp_path, 16).pixels == -1.0).all()


def test_warnings_of_pillow_do_not_leak(tmp_path):
    """A TIFF whose date tag is cut off, and a palette picture that Pillow asks to be converted."""
    image = Image.frombytes("P", (8, 8), bytes(64))
    image.putpalette([1, 2, 3])
    image.save(tmp_path / "p.png", transparency=b"\x80")
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x0f\x01\x02\x00\xff\x00\x00\x00\xff\xff\x00\x00"
    save(tmp_path, "e.jpg", gradient(8, 8), exif=exif)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with Image.open(tmp_path / "p.png") as image:
            image.convert("RGB")
        with Image.open(tmp_path / "e.jpg") as image:
            image.getexif()
        loud = len(seen)
        load_images(tmp_path, 8)
        assert loud > 0 and len(seen) == loud


def test_no_permission(shared_folder):  # noqa: F811
    save(shared_folder, "a.png", gradient(16, 16))
    save(shared_folder, "b.png", gradient(16, 16))
    (shared_folder / "b.png").chmod(0o000)
    with without_rights():
        assert refusal(shared_folder).startswith(f"{shared_folder / 'b.png'}: no permission to read it")
        assert load_images(shared_folder, 16, skip_bad=True, on_skip=str).names == ("a.png",)
    shared_folder.chmod(0o000)
    with without_rights():
        assert refusal(shared_folder) == (
            f"{shared_folder}: the folder cannot be read (Permission denied); change its permissions"
        )
