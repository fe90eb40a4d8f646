"""Open a data set in either of its forms."""

from pathlib import Path

from mugs.data.sources.base import Source
from mugs.data.sources.folder import FolderSource


def open_source(path: Path) -> Source:
    """Return a `.beton` file with its sidecar, or an image folder, as a source."""
    if path.suffix == ".beton":
        from mugs.data.sources.beton import BetonSource

        return BetonSource(path)
    return FolderSource(path)
