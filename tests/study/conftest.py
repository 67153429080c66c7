"""Folders of studies, written once and copied for each test."""

import shutil
from pathlib import Path

import pytest

from tests.study import studies
from vlm_jax.study import planning
from vlm_jax.study.planning import Plan


@pytest.fixture(scope="session")
def study_folder(datasets_dir, tmp_path_factory) -> Path:
    """The folder of `studies.study` with all runs but the last finished; not to be changed."""
    path = tmp_path_factory.mktemp("study") / "study"
    studies.write_study(studies.study(datasets_dir), path)
    return path


@pytest.fixture
def copy_study(study_folder, datasets_dir):
    """`copy_study(path)` copies that folder and returns its plan."""

    def copy(path: Path) -> Plan:
        shutil.copytree(study_folder, path)
        return planning.build_plan(studies.study(datasets_dir), path, False, {})

    return copy
