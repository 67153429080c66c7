"""Pixel values equal those of transformers' processors for images of every mode and size."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor

from tests.hub.parity import reference_pixels
from vlm_jax.config import UserError
from vlm_jax.hub.images.processor import ImageProcessor

RNG = np.random.default_rng(0)
SHAPES = [
    (37, 50),
    (50, 37),
    (24, 24),
    (23, 26),
    (1, 1),
    (1, 60),
    (60, 1),
    (9, 200),
    (200, 9),
    (31, 32),
]  # height, width

# Small versions of published settings, and other values of the keys.
SMALL = {"size": 24, "crop_size": 24}
CONFIGS = {
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 24},
        "crop_size": 24,
    },
    "clip_odd_crop": {
        "image_processor_type": "CLIPImageProcessor",
        "size": 24,
        "crop_size": {"height": 17, "width": 29},
    },
    "clip_crop_larger": {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": False,
        "crop_size": 33,
    },
    "clip_nearest": {"image_processor_type": "CLIPImageProcessor", **SMALL, "resample": 0},
    "clip_lanczos": {"image_processor_type": "CLIPImageProcessor", **SMALL, "resample": 1},
    "clip_raw": {
        "image_processor_type": "CLIPImageProcessor",
        **SMALL,
        "do_normalize": False,
        "do_rescale": False,
    },
    "clip_only_mean": {
        "image_processor_type": "CLIPImageProcessor",
        **SMALL,
        "do_rescale": False,
        "image_mean": 99.0,
    },
    "clip_padded": {
        **{
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 4, "longest_edge": 80},
        },
        **{"do_center_crop": False, "do_pad": True, "pad_size": {"height": 81, "width": 80}},
    },
    "clip_padded_alike": {
        **{
            "image_processor_type": "CLIPImageProcessor",
            "size": {"max_height": 60, "max_width": 300},
        },
        **{"do_center_crop": False, "do_pad": True},
    },
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 20, "width": 30}},
    "paligemma": {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 24, "width": 24},
        "resample": 3,
    },
    "vit": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 24, "width": 24},
        "resample": 2,
    },
    "vit_factor": {
        "image_processor_type": "ViTImageProcessor",
        "size": [24, 18],
        "rescale_factor": 1 / 127.5,
    },
    "trocr": {
        "image_processor_type": "DeiTImageProcessor",
        "size": 32,
        "crop_size": 25,
        "do_center_crop": True,
    },
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 28},
        "crop_size": 24,
    },
    "siglip2": {
        "image_processor_type": "Siglip2ImageProcessorFast",
        "patch_size": 4,
        "max_num_patches": 30,
    },
    "pixtral": {
        "image_processor_type": "PixtralImageProcessor",
        "size": {"longest_edge": 60},
        "patch_size": {"height": 6, "width": 6},
    },
    "gemma3": {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": 24, "width": 24},
        "do_pan_and_scan": None,
    },
    "blip-2": {"image_processor_type": "BlipImageProcessor", "size": {"height": 24, "width": 24}},
    "idefics": {"image_processor_type": "IdeficsImageProcessor", "image_size": 24},
    "idefics3": {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 59},
        "max_image_size": {"longest_edge": 16},
    },
    "smolvlm_whole": {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"height": 40, "width": 30},
        "max_image_size": {"longest_edge": 16},
        "do_image_splitting": False,
    },
    "internvl": {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": 16, "width": 16},
        "crop_to_patches": True,
        "min_patches": 2,
        "max_patches": 6,
    },
    "llava": {"image_processor_type": "LlavaImageProcessor", **SMALL, "do_pad": True},
    "llava_onevision": {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": 24, "width": 24},
        "image_grid_pinpoints": [[24, 24], [24, 48], [48, 24], [48, 48], [48, 72]],
    },
    "llava_next": {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": 27},
        "crop_size": 24,
        "image_grid_pinpoints": [[24, 48], [48, 24], [48, 48], [72, 24]],
    },
    "llava_unpadded": {"image_processor_type": "LlavaImageProcessor", **SMALL},
}


def picture(height: int, width: int, bands: int = 3) -> np.ndarray:
    """Slopes with some noise: every kind of resampling shows."""
    rows, columns = np.mgrid[:height, :width]
    slopes = [rows * (3 + band) + columns * (5 - band) for band in range(bands)]
    return (np.stack(slopes, axis=-1) + RNG.integers(0, 60, (height, width, bands)) & 255).astype(
        np.uint8
    )


def folder_of(tmp_path, config, name="preprocessor_config.json"):
    (tmp_path / name).write_text(json.dumps(config))
    return tmp_path


def assert_same(folder, *batches):
    """Our pixel values of every batch are the reference's, but for the place of the channels."""
    processor = ImageProcessor.load(folder)
    for images in batches:
        processed, expected = processor(images), reference_pixels(folder, images)
        ours = processed.pixel_values
        if processed.grids is None:
            # Tiles of a row of images, as one list.
            expected = expected.reshape(-1, *expected.shape[-3:])
        else:
            reference = AutoImageProcessor.from_pretrained(folder, backend="pil")(images=images)
            np.testing.assert_array_equal(processed.grids, reference["spatial_shapes"])
        assert (ours.dtype, ours.shape) == (np.float32, expected.shape), images
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0, err_msg=str(images))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_shape_of_image(tmp_path, config):
    assert_same(
        folder_of(tmp_path, config), *[[Image.fromarray(picture(*shape))] for shape in SHAPES]
    )


@pytest.mark.parametrize(
    "kind", ["clip", "siglip", "vit", "trocr", "dinov2", "llava", "clip_padded_alike", "pixtral"]
)
def test_a_batch_is_its_images_one_by_one(tmp_path, kind):
    folder = folder_of(tmp_path, CONFIGS[kind])
    images = [Image.fromarray(picture(*shape)) for shape in SHAPES[:4]]
    assert_same(folder, images)
    together = ImageProcessor.load(folder)(images).pixel_values
    nested = ImageProcessor.load(folder)([images[:1], [], images[1:]]).pixel_values
    np.testing.assert_array_equal(together, nested)


@pytest.mark.parametrize(
    "kind", [kind for kind in CONFIGS if kind.startswith(("clip_padded", "clip_crop"))]
)
def test_images_that_end_in_different_sizes_are_refused(tmp_path, kind):
    config = CONFIGS[kind] | {"do_pad": False, "do_center_crop": False}
    with pytest.raises(UserError, match="one by one"):
        ImageProcessor.load(folder_of(tmp_path, config))(
            [Image.new("RGB", (30, 50)), Image.new("RGB", (50, 30))]
        )


def test_an_image_becomes_no_thinner_than_a_pixel(tmp_path):
    pixels = ImageProcessor.load(folder_of(tmp_path, CONFIGS["clip_padded"]))(
        [Image.new("RGB", (200, 1), "white")]
    )
    assert (pixels.pixel_values > 0).any(axis=-1).sum() == 80


def test_dinov3_keeps_the_fractions_of_the_resize(tmp_path):
    """Its class in transformers rescales, resizes tensors and normalizes, and needs torchvision.

    That resize is `interpolate` with antialiasing.
    """
    size = {"height": 24, "width": 20}
    config = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": size}
    processor = ImageProcessor.load(folder_of(tmp_path, config))
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    for shape in SHAPES:
        pixels = picture(*shape)
        values = torch.tensor(pixels / np.float32(255)).permute(2, 0, 1)[None]
        values = interpolate(values, size=(24, 20), mode="bilinear", antialias=True)
        expected = (np.moveaxis(values.numpy(), 1, -1) - mean) / std
        ours = processor([Image.fromarray(pixels)]).pixel_values
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0, err_msg=str(shape))


def of_every_mode() -> dict[str, Image.Image]:
    """Images in the modes that files come in, with all degrees of transparency."""
    gray, color, alpha = (
        Image.fromarray(picture(29, 40)[..., 0]),
        Image.fromarray(picture(29, 40)),
        picture(29, 40)[..., 1],
    )
    palette = color.quantize(16)
    images = {
        "L": gray,
        "1": gray.convert("1"),
        "I16": Image.fromarray(picture(29, 40)[..., 0].astype(np.uint16) * 3),
        "LA": Image.merge("LA", [gray, Image.fromarray(alpha)]),
        "RGBA": Image.merge("RGBA", [*color.split(), Image.fromarray(alpha)]),
        "P": palette,
        "P_one_transparent": palette.copy(),
        "P_transparent": palette.copy(),
        "RGB_one_transparent": palette.convert("RGB"),
        "CMYK": color.convert("CMYK"),
    }
    images["P_one_transparent"].info["transparency"] = 3
    images["P_transparent"].info["transparency"] = bytes(range(0, 256, 16))
    images["RGB_one_transparent"].info["transparency"] = palette.convert("RGB").getpixel((4, 4))
    return images


MODES = of_every_mode()


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "llava"])
def test_open_images_of_every_mode(tmp_path, kind):
    assert_same(folder_of(tmp_path, CONFIGS[kind]), *[[image] for image in MODES.values()])


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2", "vit", "trocr"])
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_files_of_every_mode(tmp_path, kind):
    paths = [str(tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}") for mode in MODES]
    for image, path in zip(MODES.values(), paths):
        image.save(path)
    assert_same(folder_of(tmp_path, CONFIGS[kind]), *[[path] for path in paths])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_in_a_file_is_upright_and_an_open_one_as_it_is(tmp_path, orientation):
    folder, path = folder_of(tmp_path, CONFIGS["siglip"]), tmp_path / "image.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(37, 50)).save(path, exif=exif)
    assert_same(folder, [str(path)])
    assert_same(folder, [Image.open(path)])
    processor = ImageProcessor.load(folder)
    upright = np.array_equal(
        processor([path]).pixel_values, processor([Image.open(path)]).pixel_values
    )
    assert upright == (orientation == 1)


def test_a_processor_that_knows_only_rgb_whitens_what_is_transparent(tmp_path):
    pixels = ImageProcessor.load(folder_of(tmp_path, CONFIGS["vit"]))(
        [Image.new("RGBA", (9, 9)), Image.new("L", (9, 9))]
    )
    np.testing.assert_array_equal(pixels.pixel_values[0], np.ones((24, 24, 3)))
    np.testing.assert_array_equal(pixels.pixel_values[1], -np.ones((24, 24, 3)))


def test_files_that_hold_no_image_are_named(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(picture(64, 64)).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:2000])
    (tmp_path / "text.png").write_text("no image")
    processor = ImageProcessor.load(folder_of(tmp_path, CONFIGS["vit"]))
    for name in ("cut.png", "text.png", "missing.png"):
        with pytest.raises(UserError, match=name):
            processor([tmp_path / name])
