"""Idefics: outputs equal to transformers', exact export."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flax import traverse_util
from flax.linen import meta
from safetensors.torch import load_file, save_file
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from tests.hub.parity import reference, saved
from tests.hub.unified import (
    MIXED,
    Pair,
    assert_an_export_is_what_was_loaded,
    assert_greedy_tokens_are_equal,
    assert_logits_are_equal,
    padded,
    random_rows,
)
from vlm_jax import axes
from vlm_jax.config import Mesh, UserError
from vlm_jax.hub.export import matching_family, with_embedding_row
from vlm_jax.hub.families.multimodal import idefics
from vlm_jax.hub.image_inputs import image_batch
from vlm_jax.hub.inputs import argument_names
from vlm_jax.hub.pretrained_parts import load_pretrained_parts
from vlm_jax.nn.blocks import needs_image
from vlm_jax.nn.models import abstract_params

ATOL = 1e-4
SIDE = 8
TEXT = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
TEXT |= {"num_hidden_layers": 4, "max_position_embeddings": 64, "cross_layer_interval": 2}
TOWER = {"embed_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"intermediate_size": 40, "image_size": SIDE, "patch_size": 4}
PERCEIVER = {"resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 2}
PERCEIVER |= {"resampler_head_dim": 10, "qk_layer_norms_perceiver": True}
PUBLISHED = IdeficsConfig(
    **TEXT,
    vision_config=TOWER,
    perceiver_config=PERCEIVER,
    use_resampler=True,
    qk_layer_norms=True,
    additional_vocab_size=2,
)
# Vector gates, tied heads, and neither a resampler nor norms of queries and keys.
OTHER = IdeficsConfig(
    **TEXT,
    vision_config=TOWER,
    alpha_type="vector",
    additional_vocab_size=2,
    tie_word_embeddings=True,
)
FAKE, IMAGE = 64, 65
COUNTS = {"one image a row": (1, 1, 1), MIXED: (2, 0, 1)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    return Pair.load(saved(IdeficsForVisionText2Text(PUBLISHED), folder), folder)


def inputs(side: str, room: int = 5, counts: str = MIXED) -> dict[str, np.ndarray]:
    """Texts with images, of which a token attends to the last before it; all have one shape."""
    numbers = COUNTS[counts]
    length = max(map(len, random_rows(COUNTS[MIXED], [FAKE, IMAGE, FAKE]))) + room
    text = padded(random_rows(numbers, [FAKE, IMAGE, FAKE]), side, length)
    is_image = np.arange(2) < np.array(numbers)[:, None]
    pixels = np.random.default_rng(1).normal(size=(3, 2, 3, SIDE, SIDE)).astype(np.float32)
    last = np.cumsum(text["input_ids"] == IMAGE, axis=1)[..., None] - 1
    return {
        **text,
        "pixel_values": pixels * is_image[..., None, None, None],
        "image_attention_mask": (last == np.arange(2)).astype(int),
    }


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("counts", COUNTS)
def test_logits_are_those_of_transformers(pair, counts, side):
    """Added tokens and tokens without an image included."""
    arrays = inputs(side, counts=counts)
    assert_logits_are_equal(pair, ATOL, **arrays)
    assert pair.logits(**arrays).shape[-1] == 66


def test_greedy_tokens_are_those_of_transformers(pair):
    assert_greedy_tokens_are_equal(pair, **inputs("left", room=0))


def test_states_of_the_blocks_are_those_of_transformers(pair):
    """transformers records the input of each self-attention, after the cross-attention before it.

    So the output of block i is the input of block i + 1 where that has no cross-attention.
    """
    arrays = inputs("left")
    with torch.no_grad():
        tensors = {name: torch.tensor(x) for name, x in arrays.items()}
        expected = pair.hf(**tensors, output_hidden_states=True).hidden_states
    layers = pair.intermediates(**arrays)["decoder"]["blocks"]["layers"]
    is_token = arrays["attention_mask"] == 1
    # Blocks 0 and 2 have cross-attention and are the first of the two in a period.
    for period, state in enumerate(layers["block_0_out"][0]):
        theirs = expected[2 * period + 1].numpy()
        np.testing.assert_allclose(state[is_token], theirs[is_token], atol=ATOL)


def test_image_features_are_those_of_transformers(pair):
    arrays = inputs("left")
    expected = reference(pair.hf, "image_hidden_states", **arrays)
    actual = pair.intermediates(**arrays)["image_tokens"][0]
    np.testing.assert_allclose(actual.reshape(expected.shape), expected, atol=ATOL)


def test_settings_of_no_published_model_are_those_of_transformers(tmp_path):
    other = Pair.load(saved(IdeficsForVisionText2Text(OTHER), tmp_path / "a"), tmp_path / "a")
    assert_an_export_is_what_was_loaded(other, tmp_path / "b", ATOL, inputs("right"))


def test_an_export_is_what_was_loaded_and_transformers_loads_it(pair, tmp_path):
    assert_an_export_is_what_was_loaded(pair, tmp_path, ATOL, inputs("right"))
    assert matching_family(pair.cfg) is idefics.IDEFICS


def test_tied_heads_that_are_stored_as_copies_are_dropped(tmp_path):
    model = saved(IdeficsForVisionText2Text(OTHER), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = "model.embed_tokens"
    tensors["lm_head.weight"] = tensors[f"{embedding}.weight"].clone()
    added = tensors[f"{embedding}.additional_embedding.weight"]
    tensors["lm_head.additional_fc.weight"] = added.clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert Pair.load(model, tmp_path).cfg.decoder.tie_word_embeddings


def test_an_image_token_beyond_the_added_ones_is_another_added_one(pair):
    cfg, params = with_embedding_row(pair.cfg, pair.params, 68)
    decoder = params["decoder"]
    assert (cfg.decoder.vocab_size, cfg.decoder.added_tokens) == (64, 5)
    assert decoder["added_embedding"]["table"].shape == (5, 32)
    assert decoder["added_head"]["kernel"].shape == (32, 5)


def test_verify_takes_the_rows_of_images_of_a_reference(pair):
    arrays = inputs("right")
    assert image_batch(pair.cfg, arrays).images.shape == (3, 2, SIDE, SIDE, 3)
    assert set(arrays) <= set(argument_names(pair.cfg))


@pytest.mark.parametrize("every", [1, 2])
def test_a_decoder_brings_its_cross_attention_where_it_fits(pair, every):
    """Under a fusion with more blocks of it, they start from random weights."""
    decoder = replace(pair.cfg.decoder, checkpoint=str(pair.checkpoint.folder))
    fusion = replace(pair.cfg.fusion, cross_every=every)
    cfg = replace(pair.cfg, decoder=decoder, fusion=fusion)
    boxes = traverse_util.flatten_dict(abstract_params(cfg), sep="/")
    shapes = meta.unbox(abstract_params(cfg))
    loaded = load_pretrained_parts(cfg, shapes, axes.make_mesh(Mesh()))
    absent = {path for path in boxes if path.startswith("decoder/") and path not in loaded}
    assert all(needs_image(path.split("/")[4]) for path in absent)
    assert bool(absent) == (every == 1)


@pytest.mark.parametrize("name", ["pixel_values", "image_attention_mask"])
def test_arrays_that_do_not_fit_together_are_named(pair, name):
    arrays = inputs("right")
    with pytest.raises(UserError, match=name):
        pair.batch(**{**arrays, name: arrays[name][:1]})


@pytest.mark.parametrize(
    "config, message",
    [
        ({"cross_layer_interval": 5}, "cross_layer_interval 5 .* num_hidden_layers 32"),
        ({"alpha_type": "matrix"}, "alpha_type 'matrix' .* float, vector"),
        ({"additional_vocab_size": -1}, "additional_vocab_size is -1"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(config, message):
    with pytest.raises(UserError, match=message):
        idefics.config_from_hf(config, ())
