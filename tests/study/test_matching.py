"""The field that is solved for brings an arm as near to the reference as a whole number can."""

import pytest

from vlm_jax.config import ConfigError, UserError
from vlm_jax.cost.flops import train_flops
from vlm_jax.study import changed, matching
from vlm_jax.study.matching import AXES, Match
from vlm_jax.testing import tiny


def nearest(cfg, free, value, target, numbers):
    """By trying all."""
    return min(numbers, key=lambda number: abs(value(changed(cfg, {free: number})) - target))


@pytest.mark.parametrize("steps", [1, 3, 40, 4000])
def test_steps_match_training_flops(steps):
    cfg, target = tiny("cross_attention"), steps * train_flops(tiny())
    solved = matching.solve(cfg, "train.steps", matching.training_flops, target)
    expected = max(1, round(target / train_flops(cfg)))
    assert solved.train.steps == expected
    assert solved == changed(cfg, {"train.steps": expected})


@pytest.mark.parametrize("free", ["decoder.mlp_width", "projector.queries"])
@pytest.mark.parametrize("target", [70_000, 71_234, 90_001])
def test_a_width_matches_parameters(free, target):
    cfg = tiny(**{"projector": changed(tiny(), {"projector.kind": "resampler"}).projector})
    axis = "parameters" if free == "decoder.mlp_width" else "training_flops"
    target = target if axis == "parameters" else AXES[axis](cfg) * target / 71_000
    solved = matching.solve(cfg, free, AXES[axis], target)
    section, name = free.split(".")
    found = getattr(getattr(solved, section), name)
    around = range(max(1, found - 3), found + 4)
    assert nearest(cfg, free, AXES[axis], target, around) == found


def test_only_valid_experiments_are_tried():
    """A width must be a multiple of the heads, with an even number of numbers a head."""
    cfg = tiny()
    wider = changed(cfg, {"decoder.width": 56})
    solved = matching.solve(
        cfg, "decoder.width", matching.parameters, matching.parameters(wider) + 9
    )
    assert solved.decoder.width == 56


def test_an_arm_that_is_equal_already_stays():
    cfg = tiny()
    assert matching.solve(cfg, "train.steps", matching.examples, matching.examples(cfg)) == cfg


@pytest.mark.parametrize("free", ["optim.warmup_steps", "vision.patch_size_px"])
def test_a_field_with_which_the_value_does_not_grow_is_refused(free):
    """The first changes no token, of the second a larger one makes fewer."""
    cfg = tiny()
    assert matching.solve(cfg, free, matching.image_tokens, matching.image_tokens(cfg)) == cfg
    with pytest.raises(UserError, match=f"{free} cannot be solved for: .* which is no more"):
        matching.solve(cfg, free, matching.image_tokens, 2 * matching.image_tokens(cfg))


def test_the_axes_say_what_they_say():
    cfg = tiny()  # 4 steps of 8 rows, 4 patches
    assert matching.examples(cfg) == 4 * 8
    assert matching.image_tokens(cfg) == 4
    assert matching.image_tokens(changed(cfg, {"projector.kind": "resampler"})) == 3
    assert matching.training_flops(cfg) == 4 * train_flops(cfg)
    assert matching.seconds(cfg, step_seconds=0.5) == 2.0


def test_an_arm_that_misses_is_refused_with_how_far():
    matches = [
        Match("examples", "near", "train.steps", 5, 101.0, 100.0),
        Match("examples", "far", "train.steps", 7, 120.0, 100.0),
        Match("parameters", "other", "", None, 50.0, 100.0),
    ]
    matching.check(matches, 0.5)
    with pytest.raises(
        ConfigError,
        match=r"far misses examples by \+20.0%.* train.steps 7 .*other .*-50.0%.*nothing",
    ) as e:
        matching.check(matches, 0.02)
    assert "near misses" not in str(e.value)
