"""Image files of all kinds become upright RGB pixels in -1..1."""

import io
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from vlm_jax.config import UserError, Vision
from vlm_jax.data import images, tiling
from vlm_jax.hub.images import steps

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8)


def test_pixels_run_from_minus_one_to_one():
    picture = np.array([[[0, 127.5, 255]] * 2] * 2).astype(np.uint8)
    pixels = tiling.to_pixels(Image.fromarray(picture), Vision(image_size_px=2))
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[0, 0], [-1, 127 / 127.5 - 1, 1], atol=1e-6)


def test_images_are_resized_where_they_differ():
    plain = Image.new("RGB", (30, 20), (255, 0, 0))
    assert tiling.to_pixels(plain, Vision(image_size_px=8)).shape == (8, 8, 3)
    np.testing.assert_allclose(
        tiling.to_pixels(plain, Vision(image_size_px=8)), np.broadcast_to([1.0, -1, -1], (8, 8, 3))
    )
    np.testing.assert_array_equal(images.fit(Image.fromarray(PICTURE), 4), PICTURE)


def test_a_file_reads_as_it_was_written(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(images.read_image(tmp_path / "a.png")), PICTURE)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    Image.fromarray(PICTURE).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(
        np.asarray(images.read_image(tmp_path / "a.png")), np.rot90(PICTURE, -1)
    )


SHORT, ASCII, LONG, UNDEFINED = 3, 2, 4, 7
TURNED = (0x0112, SHORT, 1, struct.pack("<HH", 6, 0))


def exif_block(*entries) -> bytes:
    """EXIF of (tag, type, count, 4 bytes of value) entries, and two more that are sound."""
    sound = [(0x0128, SHORT, 1, b"\2\0\0\0"), (0x0213, SHORT, 1, b"\1\0\0\0")]
    entries = sorted({entry[0]: entry for entry in [*sound, *entries]}.values())
    packed = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + b"\0\0\0\0"


def with_exif(block: bytes, kind: str = "JPEG") -> bytes:
    """A photo of 8 x 4 px with an EXIF block, in a file."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (4, 8, 3), dtype=np.uint8)
    frames = (
        {"save_all": True, "append_images": [Image.new("RGB", (8, 4))]} if kind == "MPO" else {}
    )
    Image.fromarray(pixels).save(buffer, kind, exif=block, **frames)
    return buffer.getvalue()


def tiff(*entries) -> bytes:
    """An uncompressed TIFF of 8 x 4 px with more (tag, type, count, 4 bytes of value) entries."""
    pixels, count = bytes(range(96)), 9 + len(entries)
    bits = 8 + 2 + 12 * count + 4  # where the bits per sample are, and behind them the pixels
    longs = {0x100: 8, 0x101: 4, 0x111: bits + 6, 0x116: 4, 0x117: len(pixels)}
    fields = [(tag, LONG, 1, struct.pack("<I", value)) for tag, value in longs.items()]
    fields += [
        (tag, SHORT, 1, struct.pack("<HH", value, 0))
        for tag, value in {0x103: 1, 0x106: 2, 0x115: 3}.items()
    ]
    fields += [(0x102, SHORT, 3, struct.pack("<I", bits)), *entries]
    packed = b"".join(struct.pack("<HHI", *field[:3]) + field[3] for field in sorted(fields))
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", count)
    return head + packed + b"\0\0\0\0" + struct.pack("<HHH", 8, 8, 8) + pixels


MALFORMED = {
    "ResolutionUnit as text": (0x0128, ASCII, 3, b"in\0\0"),
    "XResolution as text": (0x011A, ASCII, 3, b"72\0\0"),
    "ImageWidth as bytes": (0x0100, UNDEFINED, 4, b"\0\0\0\x28"),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "MPO"])
@pytest.mark.parametrize("entry", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_exif_entry_changes_nothing(entry, kind, tmp_path):
    odd, sound = with_exif(exif_block(TURNED, entry), kind), with_exif(exif_block(TURNED), kind)
    assert images.upright_size(odd) == images.decode(odd).size == (4, 8)
    np.testing.assert_array_equal(np.asarray(images.decode(odd)), np.asarray(images.decode(sound)))
    (tmp_path / "photo").write_bytes(odd)
    np.testing.assert_array_equal(
        np.asarray(steps.read(tmp_path / "photo")), np.asarray(images.decode(sound))
    )


UPRIGHT = {
    "none": (0x010E, ASCII, 1, b"\0\0\0\0"),
    "text": (0x0112, ASCII, 2, b"6\0\0\0"),
    "bytes": (0x0112, UNDEFINED, 4, b"\6\0\0\0"),
    "float": (0x0112, 11, 1, struct.pack("<f", 6)),
    "0": (0x0112, SHORT, 1, b"\0\0\0\0"),
    "9": (0x0112, SHORT, 1, b"\x09\0\0\0"),
    "unknown type": (0x0112, 99, 1, b"\6\0\0\0"),
    "beyond the end": (0x0112, ASCII, 99, b"\xff\xff\xff\x7f"),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "MPO"])
@pytest.mark.parametrize("entry", UPRIGHT.values(), ids=UPRIGHT)
def test_without_a_valid_orientation_an_image_is_upright(entry, kind):
    encoded = with_exif(exif_block(entry), kind)
    assert images.upright_size(encoded) == images.decode(encoded).size == (8, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "MPO", "TIFF"])
def test_every_orientation_is_that_of_pillow(kind, orientation):
    entry = (0x0112, SHORT, 1, struct.pack("<HH", orientation, 0))
    encoded = tiff(entry) if kind == "TIFF" else with_exif(exif_block(entry), kind)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")
    assert images.upright_size(encoded) == expected.size
    np.testing.assert_array_equal(np.asarray(images.decode(encoded)), np.asarray(expected))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "MPO"])
def test_no_bytes_in_exif_make_an_image_unreadable(kind):
    """A PNG has a checksum of its EXIF, which is written anew."""
    whole = with_exif(exif_block(TURNED, (0x011A, ASCII, 3, b"72\0\0")), kind)
    turned = np.asarray(images.decode(with_exif(exif_block(TURNED), kind)))
    block = exif_block(TURNED, (0x011A, ASCII, 3, b"72\0\0"))[6:]
    start, rng = whole.index(block), random.Random(0)
    end = start + len(block)
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(start, end)] = rng.randrange(256)
        if kind == "PNG":
            changed[end : end + 4] = struct.pack(">I", zlib.crc32(changed[start - 4 : end]))
        image = images.decode(bytes(changed))
        assert image.size == images.upright_size(bytes(changed))
        assert image.size == (8, 4) or np.array_equal(np.asarray(image), turned)


def test_a_malformed_pointer_in_a_tiff_changes_nothing():
    odd, sound = tiff(TURNED, (0x8769, 9, 1, struct.pack("<i", -20))), tiff(TURNED)
    assert images.upright_size(odd) == (4, 8)
    np.testing.assert_array_equal(np.asarray(images.decode(odd)), np.asarray(images.decode(sound)))


def png_of_size(width: int, height: int) -> bytes:
    """The header of a PNG in one bit a pixel, and no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", len(header) - 4)
        + header
        + checksum
        + b"\0\0\1\0IDAT"
    )


@pytest.mark.parametrize("read", [images.decode, images.upright_size, images.check])
def test_an_image_of_too_many_pixels_is_refused_with_the_limit(read):
    with pytest.raises(
        UserError, match=r"scan.png is too large: .*196000000 pixels.* 178956970 pixels; scale it"
    ):
        read(png_of_size(14_000, 14_000), "scan.png")


def test_metadata_beyond_a_limit_of_pillow_is_named():
    buffer, text = io.BytesIO(), PngInfo()
    text.add_text("workflow", "x" * (2 << 20), zip=True)
    Image.new("RGB", (2, 2)).save(buffer, "PNG", pnginfo=text)
    with pytest.raises(
        UserError,
        match="a.png has metadata beyond a limit of Pillow .*; save it without metadata",
    ):
        images.decode(buffer.getvalue(), "a.png")


def test_a_large_image_is_read_without_a_warning(tmp_path):
    Image.new("1", (9_500, 9_500)).save(tmp_path / "scan.png")
    code = "import sys; from vlm_jax.data import images; print(images.read_image(sys.argv[1]).size)"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "scan.png"], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("(9500, 9500)\n", "")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_the_check_finds_every_file_that_is_cut_short(kind):
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, kind)
    whole = buffer.getvalue()
    images.check(whole)
    for length in (0, 9, len(whole) // 3, len(whole) * 9 // 10):
        with pytest.raises(UserError, match="7.img is not a readable image"):
            images.check(whole[:length], "7.img")


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("LA", (2, 2), (9, 0)), (255, 255, 255)),
        (Image.new("L", (2, 2), 77), (77, 77, 77)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("RGB", (2, 2), (1, 2, 3)).quantize(4), (1, 2, 3)),
        (Image.fromarray(np.full((2, 2), 0x4D00, np.uint16)), (77, 77, 77)),
    ],
    ids=["transparent", "opaque", "gray_alpha", "gray", "bits", "palette", "gray16"],
)
def test_every_mode_becomes_rgb(image, expected):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    read = images.decode(buffer.getvalue())
    assert read.mode == "RGB"
    assert read.getpixel((0, 0)) == expected


GRAYS = {
    "PGM": b"P5\n2 1\n65535\n" + np.array([0x4D00, 0x8000], ">u2").tobytes(),
    "PGM of 12 bits": b"P5\n2 1\n4095\n" + np.array([0x4D1, 0x800], ">u2").tobytes(),
}


def gray_tiff(dtype, *values) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.array([values], dtype)).save(buffer, "TIFF")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "encoded",
    [
        *GRAYS.values(),
        gray_tiff(np.int32, 0x4D00, 0x8000),
        gray_tiff(np.int32, 77, 128),
        gray_tiff(np.float32, 77, 128),
    ],
    ids=[*GRAYS, "int32", "int32 of 8 bits", "float32 of 8 bits"],
)
def test_gray_values_of_more_than_8_bits_are_scaled(encoded):
    """Pillow clips them at 255: the image was white."""
    assert np.asarray(images.decode(encoded))[0, :, 1].tolist() == [77, 128]


@pytest.mark.parametrize(
    "encoded",
    [gray_tiff(np.float32, 0, 0.5), gray_tiff(np.int32, -5, 9), gray_tiff(np.int32, 0, 70_000)],
    ids=["shares", "negative", "more than 16 bits"],
)
def test_gray_values_without_a_known_scale_are_refused(encoded):
    with pytest.raises(UserError, match="a.tif is not .* scale of which is unknown: save it with"):
        images.decode(encoded, "a.tif")


def test_bad_files_are_named(tmp_path):
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "whole.png")
    noise.save(tmp_path / "whole.jpg")
    for kind in ("png", "jpg"):
        whole = (tmp_path / f"whole.{kind}").read_bytes()
        (tmp_path / f"cut.{kind}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name in ("missing.png", "cut.png", "cut.jpg", "text.png", "empty.png", "folder"):
        with pytest.raises(UserError, match=name):
            images.read_image(tmp_path / name)


@pytest.mark.parametrize(("kinds", "results"), [((), 1), (("mirror",), 2), (("mirror", "turn"), 8)])
def test_augmentation_only_moves_pixels(kinds, results):
    rng = np.random.default_rng(0)
    seen = {images.augment(PICTURE, kinds, rng).tobytes() for _ in range(200)}
    assert len(seen) == results
    assert PICTURE.tobytes() in seen
    for moved in seen:
        pixels = np.frombuffer(moved, np.uint8).reshape(PICTURE.shape)
        assert sorted(map(tuple, pixels.reshape(-1, 3))) == sorted(
            map(tuple, PICTURE.reshape(-1, 3))
        )


def test_a_mirror_turns_left_and_right():
    rng = np.random.default_rng(0)
    seen = [images.augment(PICTURE, ("mirror",), rng) for _ in range(400)]
    turned = [not np.array_equal(pixels, PICTURE) for pixels in seen]
    assert 150 < sum(turned) < 250
    np.testing.assert_array_equal(seen[turned.index(True)], PICTURE[:, ::-1])


def test_a_shift_moves_what_stands_on_a_plain_background_to_every_place_and_never_cuts_it():
    background, thing = (
        np.full((6, 8, 3), 9, np.uint8),
        np.arange(18, dtype=np.uint8).reshape(2, 3, 3) + 20,
    )
    background[1:3, 4:7] = thing
    rng = np.random.default_rng(0)
    seen = {images.augment(background, ("shift",), rng).tobytes() for _ in range(600)}
    whole = set()
    for row in range(5):
        for column in range(6):
            moved = np.full_like(background, 9)
            moved[row : row + 2, column : column + 3] = thing
            whole.add(moved.tobytes())
    assert seen == whole


def test_a_shift_leaves_an_image_without_a_plain_border_as_it_is():
    seen = images.augment(PICTURE, ("shift",), np.random.default_rng(0))
    np.testing.assert_array_equal(seen, PICTURE)


@pytest.mark.parametrize(("side", "exact"), [(48, True), (128, False)])
def test_a_large_jpeg_is_decoded_smaller_and_hardly_differs(side, exact):
    smooth = Image.fromarray(RNG.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    smooth.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    whole, fast = images.decode(buffer.getvalue()), images.decode(buffer.getvalue(), needed_px=16)
    assert fast.size == ((side, side) if exact else (side // 4, side // 4))
    difference = np.abs(images.fit(whole, 16).astype(int) - images.fit(fast, 16))
    assert difference.max() == 0 if exact else 0 < difference.mean() < 4
