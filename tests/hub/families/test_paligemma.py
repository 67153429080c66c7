"""PaliGemma 1 and 2: outputs equal to transformers', exact export."""

import jax
import numpy as np
import pytest
from transformers import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedConfig,
    SiglipVisionConfig,
)

from tests.hub.parity import SMALL, forward, reference
from tests.hub.unified import MIXED, NEW, UnifiedLaws
from vlm_jax.config import UserError
from vlm_jax.hub.families.multimodal import paligemma
from vlm_jax.nn.vlm import VLM, empty_cache

SUFFIX = 3  # causal tokens at the end of every row
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


def config(text: PreTrainedConfig, image_token: int) -> PaliGemmaConfig:
    config = PaliGemmaConfig(
        vision_config=TOWER, text_config=text, projection_dim=32, image_token_index=image_token
    )
    # The other implementations ignore the softcap.
    config._attn_implementation = "eager"
    return config


GEMMA_TEXT = GemmaConfig(**SMALL, head_dim=16)
GEMMA2_TEXT = Gemma2Config(**SMALL, head_dim=16, **GEMMA2)


class TestPaliGemma(UnifiedLaws):
    MODELS = {
        # An image token beyond the vocabulary.
        "paligemma": (PaliGemmaForConditionalGeneration, config(GEMMA_TEXT, 999)),
        "paligemma 2": (PaliGemmaForConditionalGeneration, config(GEMMA2_TEXT, 60)),
    }
    CACHED = ("paligemma 2",)
    ATOL = 3e-4

    def config_keys(self, pair):
        return {"image_token_index": pair.checkpoint.image_token}

    def inputs(self, pair, side, room=NEW, counts=MIXED, suffix=SUFFIX):
        inputs = super().inputs(pair, side, room, counts)
        is_token = inputs["attention_mask"]
        # Tokens from here to the end of the row.
        remaining = np.cumsum(is_token[:, ::-1], axis=1)[:, ::-1]
        types = (remaining <= suffix) & (is_token == 1)
        return inputs | {"token_type_ids": types.astype(int)}

    def prompts(self, pair):
        return self.inputs(pair, "left", room=0, suffix=0)

    def test_without_token_types_the_whole_text_is_prefix(self, pair):
        inputs = self.inputs(pair, "left", suffix=0)
        assert not inputs["token_type_ids"].any()
        expected = reference(pair.hf, **inputs)
        del inputs["token_type_ids"]
        is_token = inputs["attention_mask"] == 1
        np.testing.assert_allclose(
            pair.logits(**inputs)[is_token], expected[is_token], atol=self.ATOL
        )

    def test_cached_is_uncached(self, pair):
        """The prefix enters the cache at once, and the suffix token by token."""
        whole = pair.batch(generating=True, **self.inputs(pair, "left"))
        length = whole.tokens.shape[1]

        def part(start, end):
            return jax.tree.map(lambda x: x[:, start:end], whole.replace(images=None))

        def apply(batch, *cache):
            return forward(VLM(pair.cfg.model), pair.params, batch, *cache)

        prefix = part(0, length - SUFFIX).replace(images=whole.images)
        cache = apply(prefix, empty_cache(pair.cfg.model, prefix, SUFFIX)).cache
        expected = pair.outputs(whole)[0]
        for i in range(length - SUFFIX, length):
            output = apply(part(i, i + 1), cache)
            cache = output.cache
            np.testing.assert_allclose(output.logits[:, 0], expected[:, i], atol=1e-4)


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
        paligemma.config_from_hf(config, ())
