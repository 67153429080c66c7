import pytest

from vlm_jax.config import UserError
from vlm_jax.cost.chips import CHIPS, find_chip, parse_slice


def test_every_chip_is_found_by_the_name_of_its_device():
    assert [find_chip(chip.device_kind) for chip in CHIPS] == list(CHIPS)


def test_a_device_that_is_not_in_the_table_is_none():
    assert find_chip("cpu") is None


def test_a_slice_is_a_chip_and_their_number():
    chip, count = parse_slice("v5p:4x4x4")
    assert (chip.name, count) == ("v5p", 64)


@pytest.mark.parametrize("name", ["v5e:9x9", "v5e", "v7:2x2", "", "v5e:4x4x4", "A100-80GB:2x2"])
def test_an_unknown_slice_is_refused_with_those_that_are_known(name):
    with pytest.raises(UserError, match="v5e:1x1 .*16x16; v5p:2x2x1"):
        parse_slice(name)
