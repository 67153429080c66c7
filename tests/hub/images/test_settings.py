"""Image settings are read in every form that transformers and OpenCLIP have written."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessorPil

from tests.hub.parity import reference_pixels
from vlm_jax.config import UserError, Vision
from vlm_jax.hub.images.conversion import processor_config, vision_settings
from vlm_jax.hub.images.defaults import CLASS_OF_MODEL_TYPE, CLIP_MEAN, CLIP_STD, DEFAULTS
from vlm_jax.hub.images.files import read_settings
from vlm_jax.hub.images.processor import ImageProcessor
from vlm_jax.hub.images.tile_cutters import TILE_CUTTERS

RNG = np.random.default_rng(0)
PREPROCESSOR, PROCESSOR, OPEN_CLIP = (
    "preprocessor_config.json",
    "processor_config.json",
    "open_clip_config.json",
)
VIT = {"image_processor_type": "ViTImageProcessor", "size": {"height": 9, "width": 9}}
OTHERS = {
    "FuyuImageProcessor",
    "MllamaImageProcessor",
    "DINOv3ViTImageProcessor",  # needs torchvision
    "LlavaNextImageProcessor",  # its default tiles do not have its default size
}
PIXELS = sorted(DEFAULTS.keys() - OTHERS)
LIMITED = {"PixtralImageProcessor", "Qwen2VLImageProcessor"}  # their size is a limit


def folder_of(tmp_path, **files):
    """A folder with these JSON files, by the first part of their names."""
    for name, content in files.items():
        (tmp_path / f"{name}_config.json").write_text(json.dumps(content))
    return tmp_path


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_same_as_reference(folder, image=None):
    image = image or picture(40, 61)
    expected = reference_pixels(folder, [image])
    # Idefics3's are rows of images.
    expected = expected.reshape(-1, *expected.shape[-3:]) if expected.ndim == 5 else expected
    np.testing.assert_allclose(
        ImageProcessor.load(folder)([image]).pixel_values, expected, atol=1e-5, rtol=0
    )


# InternVL's processor cuts images into tiles unless it is told otherwise.
CUT = {"crop_to_patches": True}


def of_whole_tiles(side: int) -> dict:
    """Sizes for LLaVA-NeXT's default tile of 224 px or another; its default sizes fit neither."""
    return {"image_grid_pinpoints": [[side, 2 * side], [2 * side, side]]}


@pytest.mark.parametrize("kind", [*PIXELS, "MllamaImageProcessor"])
def test_a_missing_or_null_key_means_the_class_default(tmp_path, kind):
    nulls = dict.fromkeys(
        [
            "size",
            "resample",
            "image_mean",
            "crop_size",
            "do_center_crop",
            "do_pad",
            "rescale_factor",
        ]
    )
    stated = {"image_processor_type": kind}
    if kind == "LlavaNextImageProcessor":
        stated |= of_whole_tiles(224)
    folder = folder_of(tmp_path, preprocessor=stated | CUT)
    assert_same_as_reference(folder)
    settings = read_settings(folder)
    assert read_settings(folder_of(tmp_path, preprocessor=stated | nulls)) == settings


def test_fuyus_defaults(tmp_path):
    folder = folder_of(tmp_path, preprocessor={"image_processor_type": "FuyuImageProcessor"})
    reference, settings = (
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
        read_settings(folder),
    )
    assert settings.size == dict(reference.size)
    assert dict(zip(("height", "width"), settings.patch_size)) == dict(reference.patch_size)
    for key in (
        "resample",
        "do_resize",
        "do_pad",
        "padding_value",
        "padding_mode",
        "do_rescale",
        "rescale_factor",
    ):
        assert getattr(settings, key) == getattr(reference, key), key
    assert set(settings.image_mean) == {reference.image_mean}
    assert set(settings.image_std) == {reference.image_std}


@pytest.mark.parametrize(
    "spelling",
    [
        {"feature_extractor_type": "ViTFeatureExtractor", "size": 9},
        {
            "feature_extractor_type": "ViTFeatureExtractor",
            "image_processor_type": "ViTImageProcessor",
            "size": [9, 9],
        },
        VIT
        | {
            "image_processor_type": "ViTImageProcessorFast",
            "processor_class": "ViTProcessor",
            "device": None,
        },
        VIT | {"image_processor_type": "ViTImageProcessorPil", "data_format": "channels_first"},
    ],
)
def test_spellings_of_one_processor(tmp_path, spelling):
    expected = read_settings(folder_of(tmp_path, preprocessor=VIT))
    folder = folder_of(tmp_path, preprocessor=spelling)
    assert read_settings(folder) == expected
    assert_same_as_reference(folder)


@pytest.mark.parametrize("kind", sorted({*PIXELS} - {*TILE_CUTTERS} - LIMITED))
def test_a_size_of_one_number_is_both_sides_or_the_shorter(tmp_path, kind):
    given = {"image_processor_type": kind, "size": 30, "crop_size": 8}
    assert_same_as_reference(folder_of(tmp_path, preprocessor=given))
    for square in (True, False):
        assert_same_as_reference(
            folder_of(tmp_path, preprocessor=given | {"default_to_square": square})
        )


def test_what_transformers_5_keeps_in_one_file_comes_first(tmp_path):
    other = VIT | {"size": {"height": 5, "width": 6}}
    nested = {"image_processor": other, "processor_class": "AnyProcessor"}
    folder = folder_of(tmp_path, processor=nested, preprocessor=VIT, open_clip={})
    assert read_settings(folder).size == {"height": 5, "width": 6}
    assert_same_as_reference(folder)
    folder_of(tmp_path, processor={"processor_class": "AnyProcessor"})
    assert read_settings(folder).size == {"height": 9, "width": 9}
    assert_same_as_reference(folder)


OTHER_MODELS = {"dinov3_vit", "fuyu", "llava_next", "llava_onevision"}
OTHER_MODELS |= {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "trocr"}


@pytest.mark.parametrize("model_type", sorted(CLASS_OF_MODEL_TYPE.keys() - OTHER_MODELS))
def test_a_file_without_a_type_is_read_for_the_model(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    settings = {"size": {"height": 9, "width": 9}} | CUT
    settings |= of_whole_tiles(9 if model_type == "llava_onevision" else 224)
    assert_same_as_reference(folder_of(tmp_path, preprocessor=settings))


@pytest.mark.parametrize("conversion", ["convert", "convert_composite"])
@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_an_exported_processor_keeps_the_rgb_conversion(tmp_path, conversion, resize):
    vision = Vision(rgb_conversion=conversion, resize=resize)
    settings = read_settings(folder_of(tmp_path, preprocessor=processor_config(vision)))
    assert vision_settings(settings, vision)["rgb_conversion"] == conversion


def open_clip(size, **preprocess) -> dict:
    return {
        "model_cfg": {"vision_cfg": {"image_size": size, "patch_size": 4}},
        "preprocess_cfg": preprocess,
    }


def test_open_clip_is_clip_where_the_crop_is_even(tmp_path):
    image = picture(
        30, 40
    )  # the shorter side to 15, the longer to 20: one of five columns more before than after
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 15}, crop_size=15, image_mean=[0.4] * 3, image_std=[0.2] * 3
    )
    expected = np.moveaxis(processor(images=[image])["pixel_values"][0], 0, -1)
    folder = folder_of(tmp_path, open_clip=open_clip(15, mean=[0.4] * 3, std=[0.2] * 3))
    np.testing.assert_allclose(
        ImageProcessor.load(folder)([image]).pixel_values[0], expected, atol=1e-5, rtol=0
    )


def in_numbers(image: Image.Image) -> np.ndarray:
    return (np.asarray(image.convert("RGB")) / 255 - CLIP_MEAN) / CLIP_STD


def test_open_clip_rounds_half_a_pixel_to_even_and_its_settings_may_be_missing(tmp_path):
    pixels = ImageProcessor.load(folder_of(tmp_path, open_clip={"model_cfg": {"vision_cfg": {}}}))
    assert pixels([picture(3, 5)]).pixel_values.shape == (1, 224, 224, 3)
    processor = ImageProcessor.load(
        folder_of(tmp_path, open_clip=open_clip(10, interpolation="random"))
    )
    for more, before in [(1, 0), (2, 1), (3, 2), (5, 2), (7, 4)]:
        image = picture(10, 10 + more)
        expected = in_numbers(image.crop((before, 0, before + 10, 10)))
        np.testing.assert_allclose(processor([image]).pixel_values[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "L", "CMYK"])
def test_open_clip_resizes_in_the_images_own_mode(tmp_path, mode):
    image = Image.fromarray(RNG.integers(0, 256, (30, 20, 4), dtype=np.uint8)).convert(mode)
    processor = ImageProcessor.load(
        folder_of(tmp_path, open_clip=open_clip(10, interpolation="bilinear"))
    )
    expected = in_numbers(image.resize((10, 15), Image.Resampling.BILINEAR).crop((0, 2, 10, 12)))
    np.testing.assert_allclose(processor([image]).pixel_values[0], expected, atol=1e-5, rtol=0)
    if mode == "P":
        assert len(np.unique(expected.reshape(-1, 3), axis=0)) <= len(image.getcolors())
    squashing = ImageProcessor.load(
        folder_of(tmp_path, open_clip=open_clip([10, 10], resize_mode="squash"))
    )
    expected = in_numbers(image.resize((10, 10), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(squashing([image]).pixel_values[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"image_processor_type": "LevitImageProcessor"},
            ["LevitImageProcessor", "CLIPImageProcessor, "],
        ),
        ({"image_processor_type": None}, ["image_processor_type is None", "CLIPImageProcessor, "]),
        ({"image_processor_type": ["a"]}, ["image_processor_type", "CLIPImageProcessor, "]),
        ({"resample": 99}, ["resample is 99", "3 (bicubic)"]),
        ({"resample": "bicubic"}, ["resample is 'bicubic'", "3 (bicubic)"]),
        ({"size": {"height": 3}}, ["size is {'height': 3}", "height and width; shortest_edge"]),
        ({"size": {"height": 3, "width": 0}}, ["size is", "px from 1 to 8192"]),
        ({"size": 10**7}, ["size is", "px from 1 to 8192"]),
        ({"padding_value": 256}, ["padding_value is 256", "0 to 255"]),
        ({"image_std": [0.5, 0, 0.5]}, ["image_std is", "divided by it"]),
        ({"size": {"longest_edge": 3}}, ["size is", "shortest_edge and longest_edge"]),
        ({"size": "224"}, ["size is '224'"]),
        ({"size": True}, ["size is True"]),
        ({"size": [1, 2, 3]}, ["size is [1, 2, 3]"]),
        (
            {"crop_size": {"shortest_edge": 4}, "do_center_crop": True},
            ["crop_size is", "a height and a width"],
        ),
        ({"do_center_crop": True}, ["crop_size is None"]),
        ({"do_resize": "yes"}, ["do_resize is 'yes'", "true or false"]),
        ({"default_to_square": 1}, ["default_to_square is 1", "true or false"]),
        ({"image_mean": [0.5, float("nan"), 0.5]}, ["image_mean is [0.5, nan, 0.5]", "finite"]),
        ({"image_std": float("inf")}, ["image_std is inf", "finite"]),
        ({"image_mean": [0.5]}, ["image_mean is [0.5]", "three channels"]),
        ({"image_std": [0.5, 0.5, "x"]}, ["image_std is", "three channels"]),
        ({"rescale_factor": "1/255"}, ["rescale_factor is '1/255'", "a number"]),
        (
            {"image_processor_type": "FuyuImageProcessor", "size": {"shortest_edge": 9}},
            ["size is", "height and a width"],
        ),
        (
            {"image_processor_type": "FuyuImageProcessor", "padding_mode": "wrap"},
            ["padding_mode is 'wrap'", "reflect"],
        ),
        (
            {"image_processor_type": "MllamaImageProcessor", "size": {"height": 8, "width": 9}},
            ["size is", "a square"],
        ),
        (
            {"image_processor_type": "MllamaImageProcessor", "do_pad": False},
            ["do_resize and do_pad"],
        ),
        (
            {"image_processor_type": "MllamaImageProcessor", "max_image_tiles": 0},
            ["tiles is 0", "from 1 to 8192"],
        ),
        (
            {"image_processor_type": "Gemma3ImageProcessor", "do_pan_and_scan": True},
            ["do_pan_and_scan is True", "must be false"],
        ),
        (
            {"image_processor_type": "Idefics3ImageProcessor", "size": {"shortest_edge": 9}},
            ["size is", "a longest_edge, or a height and a width"],
        ),
        (
            {"image_processor_type": "Idefics3ImageProcessor", "max_image_size": 9},
            ["max_image_size is", "longest_edge"],
        ),
        (
            {"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 8, "width": 9}},
            ["size is", "a square"],
        ),
    ],
)
def test_settings_that_are_not_understood_are_named_with_the_choices(tmp_path, change, words):
    with pytest.raises(UserError) as error:
        read_settings(folder_of(tmp_path, preprocessor=VIT | change))
    for word in [str(tmp_path / PREPROCESSOR), *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ["model_cfg"]),
        ({"model_cfg": {"vision_cfg": 3}}, ["vision_cfg"]),
        (open_clip("large"), ["image_size is 'large'"]),
        (open_clip([3, 4]), ["image_size is [3, 4]", "square"]),
        (open_clip(9, resize_mode="longest"), ["resize_mode is 'longest'", "shortest, squash"]),
        (
            open_clip(9, interpolation=["nearest"]),
            ["interpolation is ['nearest']", "bicubic, bilinear"],
        ),
        (open_clip(9, std=[0.5, 0.5, -float("inf")]), ["std is [0.5, 0.5, -inf]", "finite"]),
        (open_clip(9, mean=[1, 2]), ["mean is [1, 2]", "three channels"]),
        (open_clip(9) | {"preprocess_cfg": []}, ["preprocess_cfg"]),
    ],
)
def test_open_clip_settings_that_are_not_understood(tmp_path, config, words):
    with pytest.raises(UserError) as error:
        read_settings(folder_of(tmp_path, open_clip=config))
    for word in [str(tmp_path / OPEN_CLIP), *words]:
        assert word in str(error.value)


def test_folders_and_files_that_say_nothing_are_named(tmp_path):
    with pytest.raises(UserError, match=f"{PREPROCESSOR}, {PROCESSOR} .* {OPEN_CLIP}"):
        read_settings(tmp_path)
    with pytest.raises(UserError, match="missing"):
        read_settings(tmp_path / "missing")
    for text in ("", "[1]", "{", '{"size": '):
        (tmp_path / PREPROCESSOR).write_text(text)
        with pytest.raises(UserError, match=f"{PREPROCESSOR} is .*JSON"):
            read_settings(tmp_path)
    (tmp_path / PREPROCESSOR).unlink()
    with pytest.raises(UserError, match=f"{PROCESSOR}: image_processor is 3"):
        read_settings(folder_of(tmp_path, processor={"image_processor": 3}))
