"""Image files of all kinds become upright RGB pixels in -1..1."""

import io

import numpy as np
import pytest
from PIL import Image

from vlm_jax.config import ConfigError, Vision
from vlm_jax.data import images, tiles

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8)


def test_pixels_run_from_minus_one_to_one():
    picture = np.array([[[0, 127.5, 255]] * 2] * 2).astype(np.uint8)
    pixels = tiles.to_pixels(Image.fromarray(picture), Vision(image_size_px=2))
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[0, 0], [-1, 127 / 127.5 - 1, 1], atol=1e-6)


def test_images_are_resized_where_they_differ():
    plain = Image.new("RGB", (30, 20), (255, 0, 0))
    assert tiles.to_pixels(plain, Vision(image_size_px=8)).shape == (8, 8, 3)
    np.testing.assert_allclose(
        tiles.to_pixels(plain, Vision(image_size_px=8)), np.broadcast_to([1.0, -1, -1], (8, 8, 3))
    )
    np.testing.assert_array_equal(images.fit(Image.fromarray(PICTURE), 4), PICTURE)


def test_a_file_reads_as_it_was_written(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(images.read_image(tmp_path / "a.png")), PICTURE)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    Image.fromarray(PICTURE).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(images.read_image(tmp_path / "a.png")), np.rot90(PICTURE, -1))


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
    ids=["transparent", "opaque", "grey_alpha", "grey", "bits", "palette", "grey16"],
)
def test_every_mode_becomes_rgb(image, expected):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    read = images.decode(buffer.getvalue())
    assert read.mode == "RGB"
    assert read.getpixel((0, 0)) == expected


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
        with pytest.raises(ConfigError, match=name):
            images.read_image(tmp_path / name)


@pytest.mark.parametrize(("kinds", "results"), [((), 1), (("mirror",), 2), (("mirror", "turn"), 8)])
def test_augmentation_only_moves_pixels(kinds, results):
    rng = np.random.default_rng(0)
    seen = {images.augment(PICTURE, kinds, rng).tobytes() for _ in range(200)}
    assert len(seen) == results
    assert PICTURE.tobytes() in seen
    for moved in seen:
        pixels = np.frombuffer(moved, np.uint8).reshape(PICTURE.shape)
        assert sorted(map(tuple, pixels.reshape(-1, 3))) == sorted(map(tuple, PICTURE.reshape(-1, 3)))


def test_a_mirror_turns_left_and_right():
    rng = np.random.default_rng(0)
    seen = [images.augment(PICTURE, ("mirror",), rng) for _ in range(400)]
    turned = [not np.array_equal(pixels, PICTURE) for pixels in seen]
    assert 150 < sum(turned) < 250
    np.testing.assert_array_equal(seen[turned.index(True)], PICTURE[:, ::-1])


def test_a_shift_moves_what_stands_on_a_plain_background_to_every_place_and_never_cuts_it():
    background, thing = np.full((6, 8, 3), 9, np.uint8), np.arange(18, dtype=np.uint8).reshape(2, 3, 3) + 20
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
