"""transformers' arguments as a batch: image positions, prefix masks, mismatched arguments."""

from dataclasses import replace

import numpy as np
import pytest

from vlm_jax.config import ConfigError, Fusion, UserError
from vlm_jax.hub.inputs import to_batch
from vlm_jax.structs import NO_IMAGE
from vlm_jax.testing import tiny, variants

IMAGE = 999  # beyond the vocabulary, as PaliGemma's may be
N = NO_IMAGE
CFG = tiny("unified")  # images of 16 px, 4 tokens each
PALIGEMMA = replace(CFG, fusion=Fusion("unified", prefix="bidirectional"))
GEMMA3 = replace(CFG, fusion=Fusion("unified", prefix="bidirectional_images"))
FUYU = variants()["encoder_free"]


def ids_of(*rows: str) -> np.ndarray:
    """'i' stands for an image token, any other letter for text."""
    return np.array([[IMAGE if letter == "i" else 5 for letter in row] for row in rows])


def images_of(count: int) -> np.ndarray:
    """Image number n, from 1, is n all over."""
    return np.broadcast_to(
        np.arange(1, count + 1, dtype=np.float32).reshape(-1, 1, 1, 1), (count, 3, 16, 16)
    )


def test_every_row_takes_the_images_that_its_tokens_fill_in_reading_order():
    ids = ids_of("iiiitiiiit", "tttttttttt", "ttttiiiitt")
    batch = to_batch(CFG, {"input_ids": ids, "pixel_values": images_of(3)}, IMAGE)
    assert batch.images.shape == (3, 2, 16, 16, 3)
    assert batch.images[..., 0, 0, 0].tolist() == [[1, 2], [0, 0], [3, 0]]
    assert batch.image_token_index.tolist() == [
        [0, 1, 2, 3, N, 4, 5, 6, 7, N],
        [N] * 10,
        [N, N, N, N, 0, 1, 2, 3, N, N],
    ]
    assert batch.tokens.max() < CFG.decoder.vocab_size


def test_channels_go_last():
    image = np.zeros((1, 3, 16, 16), np.float32)
    image[0, 2, 5, 7] = 1
    batch = to_batch(CFG, {"input_ids": ids_of("iiiit"), "pixel_values": image}, IMAGE)
    assert np.argwhere(batch.images).tolist() == [[0, 0, 5, 7, 2]]


def test_patches_without_an_encoder_are_shared_out_one_by_one():
    patches = np.arange(1, 6, dtype=np.float32).reshape(5, 1) * np.ones((1, 192), np.float32)
    ids = ids_of("iitit", "ttttt", "tiitt")
    batch = to_batch(FUYU, {"input_ids": ids, "pixel_values": patches}, IMAGE)
    assert batch.images.shape == (3, 1, 3, 192)
    assert batch.images[..., 0].tolist() == [[[1, 2, 3]], [[0, 0, 0]], [[4, 5, 0]]]
    assert batch.image_token_index.tolist() == [[0, 1, N, 2, N], [N] * 5, [N, 0, 1, N, N]]


@pytest.mark.parametrize(
    "rows, count, found",
    [
        (["iiiit", "iiiit"], 1, "4 [+] 4 image tokens .* 1 images of 4 tokens"),
        (["iiiit"], 2, "4 image tokens .* 2 images of 4 tokens"),
        (
            ["iiitt", "iiiii"],
            2,
            "3 [+] 5 image tokens .* 2 images",
        ),  # the sum is right, the rows are not
        (["iiiit"], 0, "image tokens .* without an image"),
    ],
)
def test_image_tokens_that_do_not_match_the_images_are_refused(rows, count, found):
    images = {"pixel_values": images_of(count)} if count else {}
    with pytest.raises(UserError, match=found):
        to_batch(CFG, {"input_ids": ids_of(*rows), **images}, IMAGE)


def test_patches_that_do_not_match_the_image_tokens_are_refused():
    with pytest.raises(UserError, match="2 image tokens .* 3 patches"):
        to_batch(
            FUYU,
            {"input_ids": ids_of("iit"), "pixel_values": np.zeros((1, 3, 192), np.float32)},
            IMAGE,
        )


@pytest.mark.parametrize(
    "cfg, shape, found",
    [
        (CFG, (1, 3, 16, 8), "pixel_values .* [(]any, 3, 16, 16[)], not [(]1, 3, 16, 8[)]"),
        (CFG, (1, 1, 3, 16, 8), "pixel_values .* [(]any, 3, 16, 16[)]"),
        (FUYU, (1, 4, 12), "pixel_values .* [(]any, 192[)]"),
    ],
)
def test_images_of_another_shape_are_refused(cfg, shape, found):
    with pytest.raises(UserError, match=found):
        to_batch(
            cfg, {"input_ids": ids_of("iiiit"), "pixel_values": np.zeros(shape, np.float32)}, IMAGE
        )


LEFT = np.array([[0, 0, 1, 1, 1]])


@pytest.mark.parametrize(
    "types, block",
    [
        (None, [0, 0, 1, 1, 1]),  # all of a prompt is prefix
        ([[0, 0, 0, 0, 1]], [0, 0, 1, 1, 0]),  # 1: the suffix
    ],
)
def test_the_prefix_is_one_block_without_the_padding(types, block):
    arrays = {"input_ids": ids_of("ttttt"), "attention_mask": LEFT}
    arrays |= {} if types is None else {"token_type_ids": np.array(types)}
    assert to_batch(PALIGEMMA, arrays, IMAGE).block_ids.tolist() == [block]
    assert to_batch(CFG, arrays, IMAGE).block_ids is None


def test_every_run_of_image_tokens_is_a_block_of_gemma_3():
    arrays = {"input_ids": ids_of("tttttt"), "token_type_ids": np.array([[1, 0, 1, 1, 0, 1]])}
    assert to_batch(GEMMA3, arrays, IMAGE).block_ids.tolist() == [[1, 0, 2, 2, 0, 3]]
    padded = arrays | {"attention_mask": np.array([[0, 0, 1, 1, 1, 1]])}
    assert to_batch(GEMMA3, padded, IMAGE).block_ids.tolist() == [[0, 0, 1, 1, 0, 2]]
    del arrays["token_type_ids"]
    assert to_batch(GEMMA3, arrays, IMAGE).block_ids is None


@pytest.mark.parametrize(
    "cfg, generating, positions",
    [
        (CFG, False, [0, 1, 2, 3, 4]),
        (CFG, True, [0, 0, 0, 1, 2]),
        (PALIGEMMA, False, [1, 2, 3, 4, 5]),
        (PALIGEMMA, True, [1, 1, 1, 2, 3]),
    ],
)
def test_positions_count_slots_or_while_generating_tokens(cfg, generating, positions):
    arrays = {"input_ids": ids_of("ttttt"), "attention_mask": LEFT}
    batch = to_batch(cfg, arrays, IMAGE, generating)
    assert batch.positions.tolist() == [positions]
    assert batch.segment_ids.tolist() == LEFT.tolist()
    given = to_batch(cfg, {**arrays, "position_ids": np.array([[9, 8, 7, 6, 5]])}, IMAGE)
    assert given.positions.tolist() == [[9, 8, 7, 6, 5]]


@pytest.mark.parametrize(
    "arrays, said",
    [
        ({"input_ids": np.ones((2, 3))}, r"input_ids must be whole numbers .* float64 \(2, 3\)"),
        ({"input_ids": np.array([["a"]])}, "input_ids must be whole numbers"),
        ({"input_ids": np.ones(3, int)}, r"input_ids .* \(3,\)"),
        ({"input_ids": np.ones((1, 2, 3), int)}, r"input_ids .* \(1, 2, 3\)"),
        ({"input_ids": np.ones((0, 3), int)}, r"input_ids .* \(0, 3\)"),
        (
            {"attention_mask": np.ones((2, 4), int)},
            r"attention_mask must have the shape \(2, 3\)",
        ),
        (
            {"position_ids": np.ones((3, 3), int)},
            r"position_ids must have the shape \(2, 3\)",
        ),
        ({"position_ids": np.ones(3, int)}, r"position_ids must have the shape \(2, 3\)"),
        (
            {"token_type_ids": np.ones((2, 1), int)},
            r"token_type_ids must have the shape \(2, 3\)",
        ),
        ({"input_ids": np.full((2, 3), 10**6)}, "the id 1000000, but the model has only"),
        ({"input_ids": np.full((2, 3), -7)}, "the id -7, but the model has only"),
    ],
)
def test_text_of_another_shape_or_beyond_the_vocabulary_is_refused(arrays, said):
    with pytest.raises(UserError, match=said):
        to_batch(CFG, {"input_ids": np.ones((2, 3), int)} | arrays, IMAGE)


def test_padding_may_be_any_number():
    arrays = {
        "input_ids": np.array([[-100, 5], [10**6, 5]]),
        "attention_mask": np.array([[0, 1], [0, 1]]),
    }
    batch = to_batch(CFG, arrays, IMAGE)
    assert batch.segment_ids.tolist() == [[0, 1], [0, 1]]
    assert batch.tokens.tolist() == [
        [0, 5],
        [CFG.decoder.vocab_size - 1, 5],
    ]  # NaN is looked up nowhere


LEARNED = replace(
    tiny("text_only"), decoder=replace(CFG.decoder, positions="learned", max_positions=4)
)


@pytest.mark.parametrize("position", [4, -1])
def test_a_position_outside_a_learned_table_is_refused(position):
    ids, positions = np.ones((1, 3), int), np.array([[0, 1, position]])
    with pytest.raises(
        ConfigError, match=f"at position {position}, counted from 0, but the model has only 4"
    ):
        to_batch(LEARNED, {"input_ids": ids, "position_ids": positions}, None)
    mask = np.array([[1, 1, 0]])
    batch = to_batch(
        LEARNED, {"input_ids": ids, "position_ids": positions, "attention_mask": mask}, None
    )
    assert batch.positions.tolist() == [[0, 1, min(max(position, 0), 3)]]


def test_a_text_longer_than_a_learned_table_is_refused_and_rope_has_no_end():
    ids = {"input_ids": np.ones((1, 100), int)}
    with pytest.raises(UserError, match="at position 99"):
        to_batch(LEARNED, ids, None, generating=True)
    assert to_batch(CFG, ids, IMAGE, generating=True).positions.max() == 99
