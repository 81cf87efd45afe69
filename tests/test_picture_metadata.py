"""Pictures whose pixels are whole, whatever else in the file is broken; and colour profiles."""

import io
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from ti_jax.data.folder import load_images
from ti_jax.data.reading import read_picture
from ti_jax.errors import InputError

CASES = Path(__file__).parent / "cases" / "pictures"
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)

# Tags that Pillow or TIFF give a meaning, and some that nobody knows; every type of value, and types that are none.
TAGS = [0, 0x0100, 0x0101, 0x0102, 0x0103, 0x0106, 0x010E, 0x010F, 0x0110, 0x0111, 0x0112, 0x0115, 0x0117, 0x011A]
TAGS += [0x011B, 0x0128, 0x0131, 0x0132, 0x013E, 0x013F, 0x014A, 0x0201, 0x0202, 0x0211, 0x0213, 0x02BC, 0x8298]
TAGS += [0x829A, 0x8769, 0x8825, 0x9000, 0x927C, 0x9286, 0xA002, 0xA005, 0xFFFF]
TYPES = [*range(15), 16, 17, 18, 255]


def entry(rng, order, tag):
    """One entry of a directory of tags whose value is nonsense: its type, its count, its place in the file."""
    count = rng.choice([0, 1, 2, 3, 4, 8, 1000, 2**32 - 1])
    value = rng.randbytes(4) if rng.random() < 0.4 else struct.pack(order + "I", rng.choice([0, 8, 26, 60, 2**32 - 1]))
    return struct.pack(order + "HHI", tag, rng.choice(TYPES), count) + value


def damaged_exif(rng, orientation):
    """EXIF of a whole orientation, first as the standard orders it, and of tags that are broken."""
    order = rng.choice("<>")
    tags = [struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)]
    tags += [entry(rng, order, rng.choice(TAGS)) for _ in range(rng.randint(1, 6))]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    last = struct.pack(order + "I", rng.choice([0, 8, 5000]))
    return b"Exif\0\0" + head + b"".join(tags) + last + rng.randbytes(rng.randint(0, 80))


def damaged_tiff(rng, orientation):
    """A TIFF of `PIXELS` with an orientation, and broken tags that its pixels do not depend on."""
    layout = [(256, 24), (257, 16), (258, 8), (259, 1), (262, 2), (273, 8), (274, orientation), (277, 3), (278, 16)]
    layout.append((279, PIXELS.size))
    tags = [struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in layout]
    others = [tag for tag in TAGS if tag not in (256, 257, 258, 259, 262, 273, 274, 277, 278, 279)]
    tags += [entry(rng, "<", tag) for tag in rng.sample(others, rng.randint(1, 4))]
    tags.sort(key=lambda tag: struct.unpack("<H", tag[:2]))
    head = struct.pack("<2sHI", b"II", 42, 8 + PIXELS.size)
    return head + PIXELS.tobytes() + struct.pack("<H", len(tags)) + b"".join(tags) + struct.pack("<I", 0)


def upright(pixels, orientation):
    return {1: pixels, 3: pixels[::-1, ::-1], 6: np.rot90(pixels, -1), 8: np.rot90(pixels, 1)}[orientation]


def encoded(form, **options):
    out = io.BytesIO()
    Image.fromarray(PIXELS).save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "WEBP", "TIFF"])
def test_broken_tags_never_refuse_whole_pixels(tmp_path, form):
    """Of 1000 such files Pillow's exif_transpose refuses about 200 in each format but TIFF, where it is 20."""
    rng = random.Random(form)
    path = tmp_path / "a.png"
    options = {"lossless": True} if form == "WEBP" else {}
    if form == "MPO":
        options = {"save_all": True, "append_images": [Image.fromarray(PIXELS)]}
    expected = {}
    for orientation in (1, 3, 6, 8):
        with Image.open(io.BytesIO(encoded(form, **options))) as image:
            expected[orientation] = upright(np.asarray(image), orientation)
    for _ in range(300 if form != "TIFF" else 1500):
        orientation = rng.choice((1, 3, 6, 8))
        if form == "TIFF":
            content = damaged_tiff(rng, orientation)
        else:
            content = encoded(form, exif=damaged_exif(rng, orientation), **options)
        path.write_bytes(content)
        np.testing.assert_array_equal(np.asarray(read_picture(path)), expected[orientation])


@pytest.mark.parametrize("number", range(6))
def test_photographs_that_were_refused(tmp_path, number):
    """Their orientation says: a quarter to the right."""
    path = CASES / f"exif_{number}.jpg"
    with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
        as_stored = np.asarray(image)
    np.testing.assert_array_equal(np.asarray(read_picture(path)), np.rot90(as_stored, -1))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0nothing", b"Exif\0\0II*\0\xff\xff\xff\xff", bytes(9), b"x"])
def test_an_orientation_that_cannot_be_read_turns_nothing(tmp_path, exif):
    (tmp_path / "a.webp").write_bytes(encoded("WEBP", lossless=True, exif=exif))
    np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "a.webp")), PIXELS)


# -- PNG: chunks that the pixels do not depend on


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def chunks(png):
    """(kind, start of its data, end of its data) of every chunk."""
    start = 8
    while start < len(png):
        length, kind = struct.unpack_from(">I4s", png, start)
        yield kind, start + 8, start + 8 + length
        start += 12 + length


def png_with_everything():
    info = PngInfo()
    info.add_text("parameters", "a cat " * 20)
    info.add_text("workflow", "nodes " * 30, zip=True)
    info.add_itxt("XML:com.adobe.xmp", "<x/>" * 9, zip=True)
    info.add_text("Raw profile type exif", "\nexif\n 8\n4578\n")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("PNG", pnginfo=info, exif=exif, icc_profile=profile, dpi=(72, 72))


@pytest.mark.parametrize("checksum", ["wrong", "right"])
def test_broken_chunks_never_refuse_whole_pixels(tmp_path, checksum):
    """With a wrong checksum in one of them, or text that cannot be unpacked, Pillow calls all of the file no PNG."""
    png, rng = png_with_everything(), random.Random(3)
    ancillary = [(kind, start, end) for kind, start, end in chunks(png) if kind[0] & 0x20]
    assert {kind for kind, _, _ in ancillary} == {b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"pHYs", b"eXIf"}
    path, turned = tmp_path / "a.png", np.rot90(PIXELS, -1)
    for _ in range(400):
        kind, start, end = rng.choice(ancillary)
        damaged = bytearray(png)
        for _ in range(rng.randint(1, 5)):
            damaged[rng.randrange(start, end)] ^= rng.randrange(1, 256)
        if checksum == "right":
            damaged[end : end + 4] = struct.pack(">I", zlib.crc32(damaged[start - 4 : end]))
        path.write_bytes(damaged)
        found = np.asarray(read_picture(path)).astype(int)
        if kind == b"iCCP":  # a profile that can be read, but is not sRGB's any more, may change the colours
            assert found.shape == turned.shape
        elif kind == b"eXIf":
            turns = [np.rot90(side, turn) for side in (PIXELS, PIXELS[:, ::-1]) for turn in range(4)]
            assert any(np.array_equal(found, turn) for turn in turns)
        else:
            np.testing.assert_array_equal(found, turned)


def test_a_text_that_is_too_long_for_pillow(tmp_path):
    """Some programs store megabytes of settings in the picture."""
    png = encoded("PNG")
    long = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3_000_000)))
    (tmp_path / "a.png").write_bytes(png[:33] + long + png[33:])
    with pytest.raises((OSError, ValueError)):
        Image.open(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "a.png")), PIXELS)


def test_broken_pixels_are_still_refused_whatever_the_text(tmp_path):
    png = png_with_everything()
    ends = {kind: (start, end) for kind, start, end in chunks(png)}
    for kind in (b"IHDR", b"IDAT"):
        damaged = bytearray(png)
        damaged[ends[kind][1] - 3] ^= 1
        damaged[ends[b"tEXt"][0] + 3] ^= 1
        (tmp_path / "a.png").write_bytes(damaged)
        with pytest.raises(InputError):
            read_picture(tmp_path / "a.png")
    damaged = bytearray(png)
    damaged[ends[b"tEXt"][0] + 3] ^= 1
    (tmp_path / "a.png").write_bytes(damaged[: ends[b"IDAT"][0] + 300])
    with pytest.raises(InputError):
        read_picture(tmp_path / "a.png")


# -- colour profiles


def fixed(value):
    return struct.pack(">i", round(value * 65536))


def curve(values):
    """A tone curve of levels from 0 to 1 at equal distances, or of one gamma."""
    if isinstance(values, float):
        return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(values * 256))
    return (
        b"curv\0\0\0\0" + struct.pack(">I", len(values)) + np.round(np.asarray(values) * 65535).astype(">u2").tobytes()
    )


def icc(space, tags, kind=b"mntr", pcs=b"XYZ "):
    """An ICC profile, version 2 (ICC.1:2001-04), of a colour space and tags."""
    white = fixed(0.9642) + fixed(1) + fixed(0.8249)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + white, b"cprt": b"text\0\0\0\0-\0", **tags}
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    place, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I", place + len(body)) + bytes(4) + b"\x02\x10\0\0" + kind + space + pcs
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + white
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


# Linear RGB -> XYZ under D50, each matrix as published with its profile.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])


def decoded(levels):
    """sRGB levels, 0 to 1, to linear light (IEC 61966-2-1)."""
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def to_levels(linear):
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def rgb_profile(matrix, tones):
    primaries = {
        name: b"XYZ \0\0\0\0" + b"".join(map(fixed, column))
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix.T, strict=True)
    }
    return icc(b"RGB ", {**primaries, b"rTRC": curve(tones), b"gTRC": curve(tones), b"bTRC": curve(tones)})


TONES = decoded(np.linspace(0, 1, 1024))


def p3_as_srgb(pixels):
    """Display P3 to sRGB by the formulas: light, one matrix, levels; what sRGB cannot show is clipped."""
    return to_levels(decoded(pixels / 255.0) @ (np.linalg.inv(SRGB) @ DISPLAY_P3).T)


def loaded(folder, name, image, **options):
    image.save(folder / name, **options)
    return np.asarray(read_picture(folder / name)).astype(float)


@pytest.mark.parametrize(
    ("name", "options"), [("a.png", {}), ("a.webp", {"lossless": True}), ("a.tiff", {}), ("a.jpg", {"quality": 100})]
)
def test_display_p3_becomes_srgb(tmp_path, name, options):
    smooth = np.asarray(Image.fromarray(PIXELS).resize((96, 64), Image.Resampling.BICUBIC))
    got = loaded(tmp_path, name, Image.fromarray(smooth), icc_profile=rgb_profile(DISPLAY_P3, TONES), **options)
    with Image.open(tmp_path / name) as image:
        stored = np.asarray(image)
    assert np.abs(stored - p3_as_srgb(stored)).max() > 30
    assert np.abs(got - p3_as_srgb(stored)).max() < 1.6


def test_a_picture_in_display_p3_of_a_phone():
    """Its own profile; a saturated red, clipped where sRGB ends."""
    with Image.open(CASES / "display_p3.png") as image:
        stored = np.asarray(image)
    got = np.asarray(read_picture(CASES / "display_p3.png")).astype(float)
    assert np.abs(got - stored).max() >= 36
    assert np.abs(got - p3_as_srgb(stored)).max() < 1.6


@pytest.mark.parametrize("tones", [TONES, decoded(np.linspace(0, 1, 4096))], ids=["1024", "4096"])
def test_a_profile_of_srgb_changes_no_bit(tmp_path, tones):
    pixels = np.random.default_rng(1).integers(0, 256, (256, 256, 3), np.uint8)
    got = loaded(tmp_path, "a.png", Image.fromarray(pixels), icc_profile=rgb_profile(SRGB, tones))
    np.testing.assert_array_equal(got, pixels)


def test_profiles_with_transparency_and_palettes(tmp_path):
    profile = rgb_profile(DISPLAY_P3, TONES)
    color = (200, 90, 40)
    expected = p3_as_srgb(np.array(color))
    rgba = Image.new("RGBA", (8, 8), (*color, 255))
    rgba.paste((*color, 0), (0, 0, 8, 4))
    rgba.putpixel((0, 7), (*color, 128))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, *color])
    palette.paste(0, (0, 0, 8, 4))
    for name, image, options in [("a.png", rgba, {}), ("p.png", palette, {"transparency": 0})]:
        got = loaded(tmp_path, name, image, icc_profile=profile, **options)
        assert (got[:4] == 255).all(), name
        assert np.abs(got[4, 4] - expected).max() < 1.6, name
    half = expected * 128 / 255 + 127
    assert np.abs(np.asarray(read_picture(tmp_path / "a.png"))[7, 0] - half).max() < 1.6


def test_profiles_of_grey(tmp_path):
    profile = icc(b"GRAY", {b"kTRC": curve(1.8)})
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = to_levels((levels / 255.0) ** 1.8)
    deep = Image.fromarray(levels.astype(np.uint16) * 257)
    clear = Image.merge("LA", (Image.fromarray(levels), Image.new("L", (16, 16), 255)))
    for name, image in [("l.png", Image.fromarray(levels)), ("deep.png", deep), ("la.png", clear)]:
        got = loaded(tmp_path, name, image, icc_profile=profile)
        assert np.abs(got - expected[..., None]).max() < 1.6, name
    # Grey with a profile of RGB: the same tones in every channel, and these are sRGB's.
    got = loaded(tmp_path, "rgb.png", Image.fromarray(levels), icc_profile=rgb_profile(DISPLAY_P3, TONES))
    assert np.abs(got - levels[..., None]).max() < 1.01


def cmyk_profile():
    """Four inks to Lab: paper is white, full ink of any kind is a given colour, and mixtures are the darkest of them.

    A lut8Type (ICC.1:2001-04, 6.5.8) of two points for each ink.
    """
    inks = {0: (55, -37, -50), 1: (48, 70, -3), 2: (89, -5, 93), 3: (0, 0, 0)}  # nearly a printer's C, M, Y, K
    table = b""
    for number in range(16):
        used = [inks[ink] for ink in range(4) if number >> (3 - ink) & 1] or [(100, 0, 0)]
        lightness, a, b = min(used)
        table += bytes([round(lightness * 2.55), a + 128, b + 128])
    identity = b"".join(fixed(value) for value in np.eye(3).flat)
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + table + ramp * 3
    return icc(b"CMYK", {b"A2B0": lut, b"A2B1": lut}, kind=b"prtr", pcs=b"Lab ")


def lab_to_srgb(lightness, a, b):
    y = (lightness + 16) / 116
    cube = np.array([y + a / 500, y, y - b / 200])
    xyz = np.where(cube > 6 / 29, cube**3, (cube - 4 / 29) * 108 / 841) * (0.9642, 1, 0.8249)
    return to_levels(np.linalg.inv(SRGB) @ xyz)


@pytest.mark.parametrize("name", ["a.jpg", "a.tiff"])
def test_profiles_of_print(tmp_path, name):
    for ink, lab in [((0, 255, 0, 0), (48, 70, -3)), ((0, 0, 0, 255), (0, 0, 0)), ((0, 0, 0, 0), (100, 0, 0))]:
        got = loaded(tmp_path, name, Image.new("CMYK", (8, 8), ink), icc_profile=cmyk_profile())
        assert np.abs(got - lab_to_srgb(*lab)).max() < 2, (ink, got[0, 0])
    # Without the profile full magenta is another one.
    assert np.abs(lab_to_srgb(48, 70, -3) - (255, 0, 255)).max() > 30


@pytest.mark.parametrize(
    "profile",
    [
        b"nothing",
        bytes(200),
        rgb_profile(DISPLAY_P3, TONES)[:300],
        rgb_profile(DISPLAY_P3, TONES)[:150],
        icc(b"RGB ", {}),
        icc(b"GRAY", {b"kTRC": curve(2.2)}),
        icc(b"Lab ", {}, kind=b"abst"),
        icc(b"????", {}),
        cmyk_profile(),
    ],
    ids=["text", "zeros", "cut", "cut in the table", "no tags", "grey", "Lab", "unknown", "print"],
)
def test_profiles_that_cannot_be_used_leave_the_pixels(tmp_path, profile):
    np.testing.assert_array_equal(loaded(tmp_path, "a.png", Image.fromarray(PIXELS), icc_profile=profile), PIXELS)


def test_damaged_profiles_never_refuse_a_picture(tmp_path):
    rng, whole = random.Random(5), rgb_profile(DISPLAY_P3, TONES)
    print_profile = cmyk_profile()
    for number in range(300):
        source = bytearray(print_profile if number % 3 == 0 else whole)
        for _ in range(rng.randint(1, 8)):
            source[rng.randrange(min(len(source), 300))] = rng.randrange(256)
        image = Image.new("CMYK", (8, 8)) if number % 3 == 0 else Image.fromarray(PIXELS)
        assert loaded(tmp_path, "a.tiff", image, icc_profile=bytes(source)).shape == (*image.size[::-1], 3)


def test_a_picture_that_is_saved_again_has_no_profile_of_before(tmp_path):
    for number, profile in enumerate([rgb_profile(DISPLAY_P3, TONES), rgb_profile(SRGB, TONES), b"broken"]):
        Image.fromarray(PIXELS).save(tmp_path / "a.png", icc_profile=profile)
        once = read_picture(tmp_path / "a.png")
        once.save(tmp_path / f"{number}.png")
        np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / f"{number}.png")), np.asarray(once))
        with Image.open(tmp_path / f"{number}.png") as image:
            assert "icc_profile" not in image.info


def test_a_folder_is_read_through_all_of_this(tmp_path):
    for path in CASES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    pictures = load_images(tmp_path, 64, on_skip=pytest.fail)
    assert len(pictures.names) == 7
    assert pictures.original_sizes.tolist() == [[64, 64]] + [[40, 30]] * 6
