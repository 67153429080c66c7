"""The field that is solved for brings an arm as close to the reference as an integer can."""

import pytest

from vlm_jax.config import ConfigError, UserError
from vlm_jax.cost.flops import train_flops
from vlm_jax.study import matching, override
from vlm_jax.study.matching import Match
from vlm_jax.testing import tiny


def assert_closest(solved, field, value, target):
    """No neighbor of the solution is closer to the target."""
    section, name = field.split(".")
    solution = getattr(getattr(solved, section), name)
    distances = {
        number: abs(value(override(solved, {field: number})) - target)
        for number in range(max(1, solution - 2), solution + 3)
    }
    assert min(distances, key=distances.get) == solution


@pytest.mark.parametrize("steps", [1, 3, 40, 4000])
def test_steps_match_training_flops(steps):
    cfg, target = tiny("cross_attention"), steps * train_flops(tiny())
    solved = matching.solve(cfg, "train.steps", matching.training_flops, target)
    expected = max(1, round(target / train_flops(cfg)))
    assert solved.train.steps == expected
    assert solved == override(cfg, {"train.steps": expected})


@pytest.mark.parametrize("target", [1_000, 71_234, 90_001, 5_000_000])
def test_the_closest_integer_is_found(target):
    """Here for a value that costs nothing to compute."""

    def value(cfg):
        return 37 * cfg.decoder.mlp_width + 5

    solved = matching.solve(tiny(), "decoder.mlp_width", value, target)
    assert_closest(solved, "decoder.mlp_width", value, target)


def test_a_width_matches_parameters():
    cfg, target = tiny(), 71_234
    solved = matching.solve(cfg, "decoder.mlp_width", matching.parameters, target)
    assert_closest(solved, "decoder.mlp_width", matching.parameters, target)


def test_a_number_of_queries_matches_training_flops():
    cfg = override(tiny(), {"projector.kind": "resampler"})
    target = 1.1 * matching.training_flops(cfg)
    solved = matching.solve(cfg, "projector.queries", matching.training_flops, target)
    assert_closest(solved, "projector.queries", matching.training_flops, target)


def test_only_valid_experiments_are_tried():
    """A width must be a multiple of the heads, with an even head dim."""
    cfg = tiny()
    wider = override(cfg, {"decoder.width": 56})
    target = matching.parameters(wider) + 9
    solved = matching.solve(cfg, "decoder.width", matching.parameters, target)
    assert solved.decoder.width == 56


def test_an_arm_that_is_equal_already_is_unchanged():
    cfg = tiny()
    assert matching.solve(cfg, "train.steps", matching.examples, matching.examples(cfg)) == cfg


@pytest.mark.parametrize("field", ["optim.warmup_steps", "vision.patch_size_px"])
def test_a_field_with_which_the_value_does_not_grow_is_refused(field):
    """The first changes no token; of the second, a larger value makes fewer."""
    cfg = tiny()
    tokens = matching.image_tokens(cfg)
    assert matching.solve(cfg, field, matching.image_tokens, tokens) == cfg
    with pytest.raises(UserError, match=f"{field} cannot be solved for: .* which is not larger"):
        matching.solve(cfg, field, matching.image_tokens, 2 * tokens)


def test_values_of_the_axes():
    """tiny() has 4 steps of 8 rows, and 4 patches."""
    cfg = tiny()
    assert matching.examples(cfg) == 4 * 8
    assert matching.image_tokens(cfg) == 4
    assert matching.image_tokens(override(cfg, {"projector.kind": "resampler"})) == 3
    assert matching.training_flops(cfg) == 4 * train_flops(cfg)
    assert matching.seconds(cfg, step_seconds=0.5) == 2.0


def test_an_arm_that_misses_is_refused_with_the_distance():
    matches = [
        Match("examples", "near", "train.steps", 5, 101.0, 100.0),
        Match("examples", "far", "train.steps", 7, 120.0, 100.0),
        Match("parameters", "other", None, None, 50.0, 100.0),
    ]
    matching.check(matches, 0.5)
    message = r"far misses examples by \+20.0%.*train.steps 7.*other .*-50.0%.*solves for no field"
    with pytest.raises(ConfigError, match=message) as error:
        matching.check(matches, 0.02)
    assert "near misses" not in str(error.value)
