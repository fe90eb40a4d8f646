"""The `.beton` file that the tests of both front ends read."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from loader_cases import write_images

    return write_images(tmp_path_factory.mktemp("images"))
