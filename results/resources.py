"""Files that come with this package: specs, templates, and the numbers that the paper prints."""

import csv
from importlib.resources import files
from typing import Any

import yaml

# The C loader reads the same YAML about ten times faster; some builds of PyYAML lack it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_resource(*path: str) -> str:
    """Return the text of a file below `results/`."""
    return files("results").joinpath(*path).read_text(encoding="utf-8")


def read_yaml(*path: str) -> dict[str, Any]:
    """Return a YAML mapping below `results/`."""
    content: dict[str, Any] = yaml.load(read_resource(*path), Loader=_Loader)
    return content


def read_csv(*path: str) -> list[dict[str, str]]:
    """Return the lines of a CSV file below `results/`."""
    return list(csv.DictReader(read_resource(*path).splitlines()))


def list_names(folder: str, suffix: str) -> list[str]:
    """Return the names, without suffix, of the files in a folder below `results/`, sorted."""
    found = (path.name for path in files("results").joinpath(folder).iterdir())
    return sorted(name.removesuffix(suffix) for name in found if name.endswith(suffix))
