"""Phi-3: outputs equal to transformers' for short and long texts, exact export."""

import numpy as np
import pytest
from transformers import Phi3Config, Phi3ForCausalLM

from tests.hub.parity import SMALL
from tests.hub.unified import (
    NEW,
    DecoderLaws,
    assert_cached_greedy_tokens_are_equal,
    assert_logits_are_equal,
    padded,
)
from vlm_jax.config import UserError
from vlm_jax.hub.families.decoders import phi3
from vlm_jax.hub.families.decoders.llama import HEAD

ORIGINAL = 16  # positions that the short factors are for
FACTORS = {
    "short_factor": [1.0, 1.3, 1.6],
    "long_factor": [1.5, 4.0, 9.0],
}  # of heads of 8 numbers, 6 of them turned
LONGROPE = {"rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.75, **FACTORS}
PARTIAL = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
TEXT = SMALL | {"pad_token_id": 0, "original_max_position_embeddings": ORIGINAL}
CONFIGS = {
    "as many kv heads as heads": Phi3Config(**TEXT | {"num_key_value_heads": None}),
    "partly turned, tied, a window": Phi3Config(
        **TEXT, rope_parameters=PARTIAL, tie_word_embeddings=True, sliding_window=4
    ),
    "longrope": Phi3Config(**TEXT, rope_parameters=LONGROPE),
    "longrope and a window": Phi3Config(**TEXT, rope_parameters=LONGROPE, sliding_window=6),
}
LONG = ORIGINAL + 8  # tokens of a text that needs the long factors


def texts(longest: int, side: str = "left", length: int | None = None) -> dict[str, np.ndarray]:
    """Two texts, the second of `longest` tokens, padded to `length`."""
    rng = np.random.default_rng(longest)
    rows = [rng.integers(1, 64, count).tolist() for count in (longest // 2, longest)]
    return padded(rows, side, length)


class TestPhi3(DecoderLaws):
    MODELS = {kind: (Phi3ForCausalLM, config) for kind, config in CONFIGS.items()}
    CACHED = ("longrope", "longrope and a window")

    def config_keys(self, pair):
        return {"pad_token_id": 0}

    def inputs(self, pair, side, room=NEW):
        return texts(LONG - NEW + room, side)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_logits_of_texts_of_the_original_length_are_those_of_transformers(self, pair, side):
        """The largest position chooses the factors."""
        inputs = texts(ORIGINAL, side, LONG)
        positions = np.maximum(np.cumsum(inputs["attention_mask"], axis=1) - 1, 0)
        assert_logits_are_equal(pair, self.ATOL, **inputs, position_ids=positions)

    def test_cached_greedy_tokens_are_those_of_transformers(self, pair):
        """The texts outgrow the original length while they are decoded."""
        assert_cached_greedy_tokens_are_equal(pair, **texts(ORIGINAL - 2))

    @pytest.mark.parametrize("longest", [ORIGINAL - 8, ORIGINAL, ORIGINAL + 4])
    def test_greedy_tokens_around_the_original_length_are_those_of_transformers(
        self, pairs, longest
    ):
        assert_cached_greedy_tokens_are_equal(pairs("longrope"), **texts(longest))


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
def test_the_keys_of_the_first_files_mean_the_same(name):
    old = {key: TEXT[key] for key in SMALL} | {"rope_theta": 100.0, "partial_rotary_factor": 0.75}
    old |= {"original_max_position_embeddings": ORIGINAL, "rope_scaling": {"type": name, **FACTORS}}
    cfg = phi3.config_from_hf(CONFIGS["longrope"].to_dict(), {HEAD})
    assert phi3.config_from_hf(old, {HEAD}) == cfg
    assert phi3.config_to_hf(cfg)["rope_scaling"] == {
        "type": "longrope",
        **FACTORS,
    }  # 4.x wants these three keys and no other


def test_another_factor_than_the_ratio_of_the_lengths_is_kept():
    cfg = phi3.config_from_hf(
        Phi3Config(**TEXT, rope_parameters=LONGROPE | {"factor": 3.0}).to_dict(), {HEAD}
    )
    assert cfg.decoder.rope.factor == 3.0
    assert phi3.config_from_hf(phi3.config_to_hf(cfg), {HEAD}) == cfg


def test_a_rope_that_cannot_be_is_refused():
    for change, word in [
        ({"short_factor": [1.0]}, "short_factor"),
        ({"attention_factor": 2.0}, "attention_factor"),
        ({"rope_type": "proportional"}, "proportional"),
    ]:
        config = CONFIGS["longrope"].to_dict() | {"rope_parameters": LONGROPE | change}
        with pytest.raises(UserError, match=f"config.json.*{word}"):
            phi3.config_from_hf(config, {HEAD})
