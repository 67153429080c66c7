"""Phi-3: our outputs are those of transformers for short and long texts, and what is exported is what was loaded."""

import numpy as np
import pytest
from transformers import Phi3Config, Phi3ForCausalLM

from tests.hub.parity import SMALL
from tests.hub.unified import (
    assert_an_export_is_what_was_loaded,
    assert_blocks_are_equal,
    assert_greedy_tokens_are_equal,
    assert_logits_are_equal,
    new_pair,
    padded,
)
from vlm_jax.config import UserError
from vlm_jax.hub.families import phi3
from vlm_jax.hub.families.llama import HEAD

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
every_model = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture
def model(kind, tmp_path):
    return new_pair(Phi3ForCausalLM(CONFIGS[kind]), tmp_path / "hub")


def texts(longest: int) -> list[list[int]]:
    rng = np.random.default_rng(longest)
    return [rng.integers(1, 64, length).tolist() for length in (longest // 2, longest)]


@every_model
def test_logits_are_those_of_transformers(model):
    for longest in (ORIGINAL, ORIGINAL + 8):
        for side in ("left", "right"):
            assert_logits_are_equal(model, 1e-4, **padded(texts(longest), side))


@every_model
def test_blocks_are_those_of_transformers_in_order(model):
    assert_blocks_are_equal(model, 1e-4, **padded(texts(ORIGINAL + 8), "right"))


@every_model
def test_an_export_is_what_was_loaded_and_transformers_loads_it(model, tmp_path):
    inputs = padded(texts(ORIGINAL + 8), "right")
    assert_an_export_is_what_was_loaded(model, tmp_path / "ours", 1e-4, inputs, pad_token_id=0)


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
        ({"rope_type": "dynamic"}, "dynamic"),
    ]:
        config = CONFIGS["longrope"].to_dict() | {"rope_parameters": LONGROPE | change}
        with pytest.raises(UserError, match=f"config.json.*{word}"):
            phi3.config_from_hf(config, {HEAD})


@every_model
def test_greedy_tokens_are_those_of_transformers_across_the_original_length(model):
    assert_greedy_tokens_are_equal(model, **padded(texts(ORIGINAL - 2), "left"))


@pytest.mark.parametrize("kind", ["longrope"])
@pytest.mark.parametrize("longest", [ORIGINAL - 8, ORIGINAL, ORIGINAL + 4])
def test_greedy_tokens_are_those_of_transformers_on_both_sides_and_at_the_end_of_it(model, longest):
    assert_greedy_tokens_are_equal(model, **padded(texts(longest), "left"))
