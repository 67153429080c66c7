"""Seeds by version of a prerequisite, in the tables and charts of a report."""

from types import SimpleNamespace

from vlm_jax.study.report.versions import FIRST, seed_groups, version_names
from vlm_jax.testing import tiny

CHANGE = "fusion.kind: unified -> cross_attention"


def test_seeds_are_grouped_by_the_version_that_they_take_in_turn():
    plan = SimpleNamespace(
        prerequisites={"text": [tiny()], "eye": [tiny(), tiny("cross_attention")]}
    )
    assert version_names(plan) == {"eye": [FIRST, CHANGE]}
    groups = {f"eye: {FIRST}": [0.1, 0.3], f"eye: {CHANGE}": [0.2]}
    assert seed_groups(plan, {0: 0.1, 1: 0.2, 2: 0.3}) == groups


def test_seeds_of_one_version_are_alike():
    plan = SimpleNamespace(prerequisites={"text": [tiny()]})
    assert version_names(plan) == {}
    assert seed_groups(plan, {0: 0.1, 1: 0.2}) == {"": [0.1, 0.2]}
