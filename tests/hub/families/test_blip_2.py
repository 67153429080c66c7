"""BLIP-2: outputs equal to transformers', exact export."""

import pytest
from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig

from tests.hub.families.test_opt import TEXT
from tests.hub.unified import IMAGE_COUNTS, UnifiedLaws, assert_logits_are_equal
from vlm_jax.config import UserError
from vlm_jax.hub.export import matching_family
from vlm_jax.hub.families.multimodal import blip_2

TOWER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"intermediate_size": 40, "image_size": 16, "patch_size": 8}
QFORMER = {"hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}
QFORMER |= {"intermediate_size": 28, "layer_norm_eps": 1e-3}


class TestBlip2(UnifiedLaws):
    MODELS = {
        "opt": (
            Blip2ForConditionalGeneration,
            Blip2Config(
                vision_config=TOWER,
                qformer_config=QFORMER,
                text_config=OPTConfig(**TEXT | {"max_position_embeddings": 64}).to_dict(),
                num_query_tokens=3,
                image_token_index=60,
            ),
        )
    }
    # Decoding with the KV cache is compared in test_processor.py.
    test_cached_greedy_tokens_are_those_of_transformers = None

    def config_keys(self, pair):
        return {"image_token_index": pair.checkpoint.image_token}

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_logits_are_those_of_transformers(self, pair, counts, side):
        """Without an image of the language model, as transformers' takes no text alone."""
        if not any(IMAGE_COUNTS[counts]):
            pair = pair._replace(hf=pair.hf.language_model)
        assert_logits_are_equal(pair, self.ATOL, **self.inputs(pair, side, counts=counts))

    def test_a_run_of_this_architecture_is_exported_to_it(self, pair):
        assert matching_family(pair.cfg) is blip_2.BLIP_2


@pytest.mark.parametrize(
    "config, message",
    [
        ({"text_config": {"model_type": "t5"}}, "'t5' .* opt"),
        ({"qformer_config": {"use_qformer_text_input": True}}, "use_qformer_text_input True"),
        ({"num_query_tokens": 0}, "num_query_tokens is 0"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(config, message):
    with pytest.raises(UserError, match=message):
        blip_2.config_from_hf(config, ())
