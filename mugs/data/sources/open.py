"""Open a data set, whichever form it has."""

from pathlib import Path

from mugs.data.sources.base import FolderSource, Source


def open_source(path: Path) -> Source:
    """A `.beton` file with its sidecar, or an image folder."""
    if path.suffix == ".beton":
        from mugs.data.sources.beton import BetonSource

        return BetonSource(path)
    return FolderSource(path)
