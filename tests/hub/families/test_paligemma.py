"""PaliGemma 1 and 2: our outputs are those of transformers, and what is exported is what was loaded."""

import jax
import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from tests.hub.parity import SMALL, forward, reference
from tests.hub.unified import (
    IMAGE_COUNTS,
    Pair,
    assert_an_export_is_what_was_loaded,
    assert_blocks_are_equal,
    assert_greedy_tokens_are_equal,
    assert_image_features_are_equal,
    assert_logits_are_equal,
    images_of,
    new_pair,
    padded,
    rows_of,
)
from vlm_jax.config import UserError
from vlm_jax.hub.families import paligemma
from vlm_jax.nn.vlm import VLM, empty_cache

ATOL = 3e-4
SUFFIX = 3  # tokens at the end of every row that see only what stands before them
TOWER = SiglipVisionConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=40,
    image_size=16,
    patch_size=8,
    vision_use_head=False,
)
GEMMA2 = {
    "sliding_window": 4,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 5.0,
}
MODELS = {
    "paligemma": (GemmaConfig(**SMALL, head_dim=16), 999),  # an image token beyond the vocabulary
    "paligemma 2": (Gemma2Config(**SMALL, head_dim=16, **GEMMA2), 60),
}


@pytest.fixture(scope="module", params=MODELS)
def both(request, tmp_path_factory):
    torch.manual_seed(0)
    text, image = MODELS[request.param]
    config = PaliGemmaConfig(
        vision_config=TOWER, text_config=text, projection_dim=32, image_token_index=image
    )
    config._attn_implementation = "eager"  # the others leave the softcap out
    return new_pair(PaliGemmaForConditionalGeneration(config), tmp_path_factory.mktemp("paligemma"))


def inputs_of(both, counts, side="left", suffix=SUFFIX):
    inputs = padded(rows_of(counts, [both.checkpoint.image_token] * 4), side) | images_of(
        counts, 3, 16, 16
    )
    behind = np.cumsum(inputs["attention_mask"][:, ::-1], axis=1)[
        :, ::-1
    ]  # tokens from here to the end of the row
    types = (behind <= suffix) & (inputs["attention_mask"] == 1)
    return inputs | {"token_type_ids": types.astype(int)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("counts", IMAGE_COUNTS.values(), ids=IMAGE_COUNTS)
def test_logits_are_those_of_transformers(both, counts, side):
    assert_logits_are_equal(both, ATOL, **inputs_of(both, counts, side))


def test_without_token_types_all_is_prefix(both):
    inputs = inputs_of(both, (2, 0, 1), suffix=0)
    assert not inputs["token_type_ids"].any()
    expected = reference(both.theirs, **inputs)
    del inputs["token_type_ids"]
    there = inputs["attention_mask"] == 1
    np.testing.assert_allclose(both.logits(**inputs)[there], expected[there], atol=ATOL)


def test_blocks_are_those_of_transformers(both):
    assert_blocks_are_equal(both, ATOL, **inputs_of(both, (2, 0, 1)))


def test_image_features_are_those_of_transformers(both):
    inputs = inputs_of(both, (2, 0, 1))
    features = both.theirs.get_image_features(torch.tensor(inputs["pixel_values"])).pooler_output
    assert_image_features_are_equal(both, features.flatten(0, 1), 1e-4, **inputs)


def test_greedy_tokens_are_those_of_transformers(both):
    assert_greedy_tokens_are_equal(both, **inputs_of(both, (2, 0, 1), suffix=0))


def test_cached_is_uncached(both):
    """A prefix goes into the cache at once, and the suffix behind it token by token."""
    whole = both.batch(generating=True, **inputs_of(both, (2, 0, 1)))
    length = whole.tokens.shape[1]

    def part(start, end):
        return jax.tree.map(lambda x: x[:, start:end], whole.replace(images=None))

    def said(batch, *cache):
        return forward(VLM(both.cfg.model), both.params, batch, *cache)

    prefix = part(0, length - SUFFIX).replace(images=whole.images)
    cache = said(prefix, empty_cache(both.cfg.model, prefix, SUFFIX)).cache
    expected = said(whole).logits
    for i in range(length - SUFFIX, length):
        out = said(part(i, i + 1), cache)
        cache = out.cache
        np.testing.assert_allclose(out.logits[:, 0], expected[:, i], atol=1e-4)


def test_an_export_is_what_was_loaded_and_transformers_loads_it(both, tmp_path):
    config = {"image_token_index": both.checkpoint.image_token}
    assert_an_export_is_what_was_loaded(both, tmp_path, ATOL, inputs_of(both, (2, 0, 1)), **config)


def test_the_names_that_transformers_has_in_memory_load_too(both, tmp_path):
    both.theirs.save_pretrained(tmp_path, save_original_format=False)
    assert_logits_are_equal(Pair.of(both.theirs, tmp_path), ATOL, **inputs_of(both, (1, 1, 1)))


@pytest.mark.parametrize(
    "config, found",
    [
        (
            {"text_config": {"model_type": "llama"}},
            "text_config.model_type 'llama' .* gemma, gemma2",
        ),
        (
            {"vision_config": {"model_type": "clip_vision_model"}},
            "'clip_vision_model' .* siglip_vision_model",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(config, found):
    with pytest.raises(UserError, match=found):
        paligemma.read(config, ())
