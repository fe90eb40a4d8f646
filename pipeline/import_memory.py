"""Which imports succeeded on this host, remembered as long as nothing changed that they depend on.

Importing torch and FFCV takes ten seconds and most of a GB, so `doctor` does it once a day. Python,
the packages, their shared libraries, the system's, the driver and the devices are compared each
time. Failures are not remembered.
"""

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from pydantic import BaseModel, ValidationError

from pipeline.files import cache_folder, read_bounded, write_json_atomic

PACKAGES = ("torch", "torchvision", "timm", "ffcv")
VARIABLES = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "PYTHONHOME", "CUDA_VISIBLE_DEVICES")
# Not for ever: a file may be damaged without another time.
MAX_AGE_S = 86400.0


class _Entry(BaseModel):
    """What code printed, when, and the environment it ran in."""

    time: float
    environment: str
    output: str


class _Known(BaseModel):
    """The content of a file: entries by code."""

    entries: dict[str, _Entry] = {}


def recall_import(code: str) -> str | None:
    """Return what this code printed when it ran last; None if it has to be run again."""
    path = _memory_path()
    entry = _read_known(path).entries.get(code) if path and path.is_file() else None
    if entry is None or not 0 <= time.time() - entry.time < MAX_AGE_S:
        return None
    return entry.output if entry.environment == describe_environment() else None


def remember_import(code: str, output: str) -> None:
    """Note what code printed that ran without error."""
    path = _memory_path()
    if path is None:
        return
    known = _read_known(path)
    known.entries[code] = _Entry(
        time=time.time(), environment=describe_environment(), output=output
    )
    # A folder that cannot be written is no reason to fail: the next check imports again.
    with suppress(OSError):
        write_json_atomic(path, known.model_dump())


def _read_known(path: Path) -> _Known:
    """Return the entries of a file; none if it is missing, damaged, or of another version."""
    try:
        return _Known.model_validate_json(read_bounded(path))
    except (OSError, ValidationError):
        return _Known()


def describe_environment() -> str:
    """Return a hash of what decides which packages can be imported and how many GPUs they see."""
    driver = Path("/proc/driver/nvidia/version")
    facts = [
        platform.python_version(),
        [os.environ.get(name) for name in VARIABLES],
        driver.read_text(encoding="utf-8") if driver.is_file() else "",
        sorted(str(path) for path in Path("/dev").glob("nvidia*")),
        [(str(path), *_stamp(path)) for path in _list_files()],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _memory_path() -> Path | None:
    """Return the file of this host and Python: hosts may share the folder."""
    folder = cache_folder()
    mark = hashlib.sha256(f"{platform.node()}\0{sys.executable}".encode()).hexdigest()[:16]
    return folder and folder / "imports" / f"{mark}.json"


def _list_files() -> Iterator[Path]:
    """Yield what has another time or size once packages or libraries are other ones."""
    # The linker writes its cache after each installation of system libraries.
    yield Path("/etc/ld.so.cache")
    yield Path(sys.prefix, "lib")
    folders = [Path(folder) for folder in sys.path if folder.endswith("-packages")]
    for name in PACKAGES:
        spec = find_spec(name)
        places = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
        folders += [*places, *(place / "lib" for place in places)]
    for folder in folders:
        yield folder
        yield from sorted(folder.glob("*.so*"))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
