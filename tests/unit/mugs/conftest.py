"""Images that all tests of the core train on."""

import pytest

from mugs.data.mini.digits import materialize_digits
from mugs.data.sources.folder import FolderSource


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    """The validation images of the digits data set."""
    folder = tmp_path_factory.mktemp("digits") / "images"
    materialize_digits(folder)
    return FolderSource(folder / "val")
