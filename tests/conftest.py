import pytest


@pytest.fixture(scope="session")
def datasets_dir(tmp_path_factory) -> str:
    """Where this run of the tests prepares its datasets, once."""
    return str(tmp_path_factory.mktemp("datasets"))
