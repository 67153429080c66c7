"""The folder in which commands are called."""

import pytest


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to stand in, where `runs/` would appear."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
