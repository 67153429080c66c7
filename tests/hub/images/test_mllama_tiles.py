"""Tiles (Llama 3.2 Vision, InternVL) and patches (Fuyu, Qwen2-VL) equal transformers'."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.fuyu.processing_fuyu import FuyuProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from vlm_jax.config import UserError, Vision
from vlm_jax.data import tiling
from vlm_jax.hub.images.mllama_tiles import best_canvas, layouts, shape_on_canvas
from vlm_jax.hub.images.processor import ImageProcessor

RNG = np.random.default_rng(0)
MLLAMA = {
    "image_processor_type": "MllamaImageProcessor",
    "size": {"height": 12, "width": 12},
    "resample": 2,
}
FUYU = {
    **{
        "image_processor_type": "FuyuImageProcessor",
        "size": {"height": 24, "width": 40},
        "image_mean": 0.5,
    },
    **{"image_std": 0.5, "patch_size": {"height": 4, "width": 4}},
}
SHAPES = [
    (12, 12),
    (7, 9),
    (1, 1),
    (1, 70),
    (70, 1),
    (13, 12),
    (24, 23),
    (25, 25),
    (11, 50),
    (50, 13),
    (100, 300),
    (300, 100),
]


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def folder_of(tmp_path, config):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    return tmp_path


def assert_tiles_same(folder, rows):
    ours = ImageProcessor.load(folder)(rows)
    reference = AutoImageProcessor.from_pretrained(folder, backend="pil")(images=rows)
    assert ours.pixel_values.dtype == np.float32
    np.testing.assert_allclose(
        ours.pixel_values, np.moveaxis(reference["pixel_values"], -3, -1), atol=1e-5, rtol=0
    )
    np.testing.assert_array_equal(ours.aspect_ratio_ids, reference["aspect_ratio_ids"])
    np.testing.assert_array_equal(ours.aspect_ratio_mask, reference["aspect_ratio_mask"])
    assert ours.num_tiles == reference["num_tiles"]


@pytest.mark.parametrize("most", [1, 2, 4, 6, 12, 16])
def test_the_grid_of_tiles_is_that_of_internvl(most):
    """Its processor in transformers is GOT-OCR2's. Small sizes, so that many layouts tie."""
    vision = Vision(image_size_px=8, tiles=most)
    for width, height in RNG.integers(1, 40, (2000, 2)).tolist():
        columns, rows = get_optimal_tiled_canvas((height, width), (8, 8), 1, most)
        assert tiling.best_layout(width, height, vision) == (rows, columns), (width, height)


@pytest.mark.parametrize("max_tiles", [1, 4, 6])
@pytest.mark.parametrize("resample", [2, 3])
def test_tiles_of_every_shape(tmp_path, max_tiles, resample):
    config = MLLAMA | {"max_image_tiles": max_tiles, "resample": resample}
    assert_tiles_same(folder_of(tmp_path, config), [[picture(*shape)] for shape in SHAPES])


def test_rows_with_none_one_and_more_images_and_a_flat_list(tmp_path):
    a, b, c = (
        picture(10, 30),
        Image.new("RGBA", (20, 20), (0, 99, 0, 99)),
        Image.new("L", (40, 10), 7),
    )
    c.info["transparency"] = 7
    d = Image.new("RGB", (9, 9), (1, 2, 3))
    d.info["transparency"] = (1, 2, 3)
    folder = folder_of(tmp_path, MLLAMA)
    assert_tiles_same(folder, [[a], [b, c, d], []])
    assert_tiles_same(folder, [a, b])
    nothing = ImageProcessor.load(folder)([[], []])
    assert (nothing.pixel_values.shape, nothing.num_tiles) == ((2, 0, 4, 12, 12, 3), [[], []])


def test_the_layouts_of_the_published_models():
    assert layouts(4) == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    assert best_canvas(560, 560, 4, 560) == (1, 1)
    assert best_canvas(561, 561, 4, 560) == (2, 2)
    assert best_canvas(300, 2000, 4, 560) == (1, 4)
    assert shape_on_canvas(300, 2000, (560, 2240), 560) == (
        300,
        2000,
    )  # larger than a tile: not enlarged
    assert shape_on_canvas(50, 100, (560, 560), 560) == (280, 560)


def fuyu_reference(folder, images):
    """(patches, grids) of `FuyuProcessor`, which needs tensors; its Pillow backend gives arrays."""
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    class WithTensors:
        patch_size, get_num_patches = processor.patch_size, staticmethod(processor.get_num_patches)

        def __call__(self, images):
            return processor([[image] for image in images], return_tensors="np")

        def patchify_image(self, image, patch_size):
            return torch.from_numpy(processor.patchify_image(image, patch_size))[None]

    grids = []

    def replace_image_token(_, image_idx, num_patches, row_width):
        grids.append((num_patches // row_width, row_width))

    holder = SimpleNamespace(image_processor=WithTensors(), replace_image_token=replace_image_token)
    outputs, _ = FuyuProcessor._process_images(holder, images, return_legacy_image_output=False)
    return outputs["pixel_values"].numpy(), grids


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"padding_mode": "edge"},
        {"padding_value": 200, "resample": 3},
        {"patch_size": {"height": 8, "width": 5}},
    ],
)
def test_patches_of_every_shape(tmp_path, changes):
    folder = folder_of(tmp_path, FUYU | changes)
    images = [
        picture(*shape)
        for shape in [(24, 40), (13, 17), (5, 4), (100, 50), (60, 900), (24, 41), (9, 33)]
    ]
    ours = ImageProcessor.load(folder)(images)
    patches, grids = fuyu_reference(folder, images)
    np.testing.assert_allclose(ours.pixel_values, patches, atol=1e-5, rtol=0)
    assert ours.pixel_values.dtype == np.float32
    np.testing.assert_array_equal(ours.grids, grids)


def test_an_image_that_patches_do_not_cover_is_refused(tmp_path):
    with pytest.raises(UserError, match="multiple of patch_size"):
        ImageProcessor.load(folder_of(tmp_path, FUYU | {"do_pad": False}))([picture(9, 8)])
    with pytest.raises(UserError, match="cannot be padded"):
        ImageProcessor.load(folder_of(tmp_path, FUYU | {"do_resize": False}))([picture(25, 8)])


@pytest.mark.parametrize("limits", [{"min_pixels": 600, "max_pixels": 4000}, {"merge_size": 1}])
def test_patches_of_qwen2_vl_are_those_of_transformers(tmp_path, limits):
    config = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 6, **limits}
    folder = folder_of(tmp_path, config)
    images = [picture(*shape) for shape in SHAPES]
    ours = ImageProcessor.load(folder)(images)
    reference = AutoImageProcessor.from_pretrained(folder, backend="pil")(images=images)
    np.testing.assert_array_equal(ours.grids, np.asarray(reference["image_grid_thw"])[:, 1:])
    np.testing.assert_allclose(ours.pixel_values, reference["pixel_values"], atol=1e-5)


@pytest.mark.parametrize(
    ("size", "settings", "found"),
    [
        ((1, 201), {}, "too long: its aspect ratio must be at most 200"),
        ((13, 12), {"do_resize": False}, "not made of squares of 12 px"),
        ((12, 12), {"max_pixels": "many"}, "size is .* must be a shortest_edge and longest_edge"),
        ((12, 12), {"patch_size": [6, 7]}, r"patch_size is \(6, 7\), but must be the side"),
    ],
)
def test_an_image_that_has_no_patches_is_refused(tmp_path, size, settings, found):
    config = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 6, **settings}
    with pytest.raises(UserError, match=found):
        ImageProcessor.load(folder_of(tmp_path, config))([picture(*size)])
