"""The guide, walked through once for all who look at it."""

import pytest

from tests.deploy.guide import Walk, walk_through


@pytest.fixture(scope="session")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    return walk_through(tmp_path_factory.mktemp("guide"))
