"""LLaVA-NeXT and LLaVA-OneVision: outputs equal to transformers', exact export."""

import numpy as np
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests.hub.parity import SMALL
from tests.hub.unified import IMAGE_COUNTS, MIXED, NEW, UnifiedLaws, padded
from vlm_jax.config import Experiment, UserError, Vision
from vlm_jax.hub.families.multimodal import llava_next
from vlm_jax.hub.image_inputs import count_map_tokens
from vlm_jax.hub.inputs import to_batch

IMAGE, SIDE = 60, 24
TOWER = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": SIDE,
    "patch_size": 8,
}
PINPOINTS = [[rows * SIDE, columns * SIDE] for rows, columns in [(1, 2), (2, 1), (2, 2), (3, 1)]]
# (height, width): on 2 x 2 tiles with padding on the left, on 1 x 2 with padding above, on 3 x 1.
SIZES = [(41, 29), (7, 33), (100, 31)]


class TileMapLaws(UnifiedLaws):
    """Laws of a family whose images have different numbers of tokens."""

    # Decoding with the KV cache is compared in test_processor.py.
    test_cached_greedy_tokens_are_those_of_transformers = None

    def config_keys(self, pair):
        return {"image_token_index": IMAGE}

    def sizes_of_rows(self, pair, counts: str) -> list[list]:
        """Sizes of the images of each row, as `count_map_tokens` takes them."""
        sizes = iter(SIZES)
        return [[next(sizes) for _ in range(count)] for count in IMAGE_COUNTS[counts]]

    def inputs(self, pair, side, room=NEW, counts=MIXED):
        texts = np.random.default_rng(0).integers(1, 50, (3, 7)).tolist()
        rows, longest = [], 0
        for text, sizes in zip(texts, self.sizes_of_rows(pair, counts), strict=True):
            images = [[IMAGE] * count_map_tokens(pair.cfg, size) for size in sizes]
            for position, image in zip((4, 1), images):
                text[position:position] = image
            rows.append(text)
        for sizes in self.sizes_of_rows(pair, MIXED):
            longest = max(longest, 7 + sum(count_map_tokens(pair.cfg, size) for size in sizes))
        return padded(rows, side, longest + room) | self.images(pair, counts)

    def images(self, pair, counts: str) -> dict[str, np.ndarray]:
        """Random views of all images, with blank ones up to the most tiles."""
        row_counts = IMAGE_COUNTS[counts]
        number = sum(row_counts)
        if not number:
            return {}
        shape = (number, 1 + pair.cfg.vision.tiles, 3, SIDE, SIDE)
        pixels = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        return {"pixel_values": pixels, "image_sizes": np.array(SIZES[:number])}

    def test_image_features_are_those_of_transformers(self, pair):
        inputs = self.inputs(pair, "left")
        images = {
            name: x for name, x in inputs.items() if name not in ("input_ids", "attention_mask")
        }
        tensors = {name: torch.tensor(x) for name, x in images.items()}
        expected = torch.cat(tuple(pair.hf.get_image_features(**tensors).pooler_output))
        embeddings = pair.intermediates(**inputs)["decoder"]["embeddings"][0]
        found = np.asarray(embeddings)[inputs["input_ids"] == IMAGE]
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-4)


class TestLlavaNext(TileMapLaws):
    MODELS = {
        "clip and llama": (
            LlavaNextForConditionalGeneration,
            LlavaNextConfig(
                vision_config=CLIPVisionConfig(**TOWER),
                text_config=LlamaConfig(**SMALL),
                image_token_index=IMAGE,
                image_grid_pinpoints=PINPOINTS,
            ),
        ),
        "two layers of clip, and mistral": (
            LlavaNextForConditionalGeneration,
            LlavaNextConfig(
                vision_config=CLIPVisionConfig(**TOWER),
                text_config=MistralConfig(**SMALL, sliding_window=40),
                vision_feature_layer=[1, -1],
                multimodal_projector_bias=False,
                image_token_index=IMAGE,
                image_grid_pinpoints=PINPOINTS[::-1],
            ),
        ),
    }


class TestLlavaOnevision(TileMapLaws):
    MODELS = {
        "siglip and tied qwen2": (
            LlavaOnevisionForConditionalGeneration,
            LlavaOnevisionConfig(
                vision_config=SiglipVisionConfig(**TOWER),
                text_config=Qwen2Config(**SMALL, tie_word_embeddings=True),
                image_token_index=IMAGE,
                image_grid_pinpoints=PINPOINTS,
                vision_aspect_ratio="anyres_max_2",
            ),
        ),
    }

    def sizes_of_rows(self, pair, counts):
        """Several images of a row are not cut."""
        rows = super().sizes_of_rows(pair, counts)
        return [row if len(row) == 1 else [None] * len(row) for row in rows]

    def images(self, pair, counts):
        row_counts = [count for count in IMAGE_COUNTS[counts] if count]
        images = super().images(pair, counts)
        return images | {"batch_num_images": np.array(row_counts)} if images else {}


@pytest.mark.parametrize(
    "config, found",
    [
        ({"image_grid_pinpoints": [[336, 500]]}, r"\[336, 500\] .* whole tiles of 336 px"),
        ({"image_grid_pinpoints": [336]}, "image_grid_pinpoints 336 is not supported"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints is empty"),
        ({"vision_feature_select_strategy": "full"}, "'full' keeps the class token"),
        ({"vision_aspect_ratio": "pad"}, "vision_aspect_ratio 'pad' .* only 'anyres_max_N'"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(config, found):
    tower = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
    with pytest.raises(UserError, match=found):
        llava_next.LLAVA_NEXT.config_from_hf({"vision_config": tower} | config, ())


PIXELS = np.zeros((1, 3, 3, SIDE, SIDE), np.float32)


@pytest.mark.parametrize(
    "images, found",
    [
        ({}, r"image_sizes must have the shape \(any, 2\)"),
        ({"image_sizes": np.zeros((0, 2))}, "image_sizes is empty"),
        ({"image_sizes": [[9, 0]]}, "a height and a width are at least 1"),
        ({"image_sizes": [[41, 29]]}, "3 views of an image, but image_sizes needs 5"),
        ({"image_sizes": [[7, 33]]}, "0 image tokens in the rows .* images of 16 tokens"),
        ({"image_sizes": [[7, 33]], "batch_num_images": [2]}, "does not match the 1 images"),
    ],
)
def test_images_that_do_not_match_are_refused(images, found):
    vision = Vision(
        image_size_px=SIDE, patch_size_px=8, tiles=4, tile_grids=((1, 2), (2, 2)), thumbnail=True
    )
    cfg = Experiment(vision=vision)
    inputs = {"input_ids": np.ones((1, 4), int), "pixel_values": PIXELS}
    with pytest.raises(UserError, match=found):
        to_batch(cfg, inputs | {name: np.array(x) for name, x in images.items()}, IMAGE)
