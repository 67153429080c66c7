"""Public checkpoints are loaded on one device."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def on_one_device(one_device):
    """tests/hub/test_load.py loads on eight."""
