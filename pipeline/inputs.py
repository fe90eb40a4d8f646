"""Files and folders from outside that a run reads: what they were, and whether they are others now.

Their paths are not part of a run id, so that data may be moved. So a finished run remembers what it
read, and a command that finds it done tells if its settings lead to something else today.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.files import expand_home, hash_file
from pipeline.folder_content import compare_folder, describe_folder
from pipeline.manifest import ManifestEntry
from pipeline.settings import Mark, Settings, setting_fields


def list_input_paths(settings: Settings, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield name and value of each setting that is a path from outside and that is set."""
    for field in setting_fields(type(settings)).values():
        value = getattr(settings, field.name)
        if isinstance(value, Settings):
            yield from list_input_paths(value, f"{prefix}{field.name}.")
        elif value and Mark.INPUT in field.marks:
            yield f"{prefix}{field.name}", str(value)


_CONTENT = ("sha256", "sampled", "files", "names", "sizes", "lists")
# Weights have less. To read all of a tar file of 138 GB takes minutes at each start.
_LARGE_BYTES = 16 << 30
_NUM_SAMPLES = 256
_SAMPLE_BYTES = 4096


class InputChangedError(ValueError):
    """A file or folder was replaced while a run read it; the message names the setting."""


def record_inputs(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return, for each input path, where it leads to and facts of its content."""
    return {name: _describe(value) for name, value in list_input_paths(settings)}


def _describe(value: str) -> dict[str, Any]:
    path = _absolute(value)
    try:
        if path.is_dir():
            return {"path": str(path), **describe_folder(path)}
        # `builtin:` and `download` are no paths.
        if not path.is_file():
            return {"path": value}
    except OSError as error:
        # Whoever reads it says what is wrong.
        return {"path": str(path), "unreadable": str(error)}
    found = path.stat()
    facts = {"size": found.st_size, "mtime_ns": found.st_mtime_ns}
    kind = "sha256" if found.st_size <= _LARGE_BYTES else "sampled"
    return {"path": str(path), **facts, kind: _hash_content(path, kind)}


def _hash_content(path: Path, kind: str) -> str:
    """Return the SHA-256 of a file, or of its size and some parts of it if that is `sampled`."""
    if kind == "sha256":
        return hash_file(path)
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for number in range(_NUM_SAMPLES):
            stream.seek(number * max(0, size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _absolute(value: str) -> Path:
    # Not resolved: a link that leads elsewhere today is noticed by what it leads to.
    return Path(os.path.normpath(expand_home(value).absolute()))


def find_changed_inputs(settings: Settings, entry: ManifestEntry) -> list[str]:
    """Return a line for each input of a finished run that is another one now.

    Nothing is said of a path that is not set now, or of a run that recorded none.
    """
    recorded = entry.provenance.get("inputs")
    if not isinstance(recorded, Mapping):
        return []
    lines = []
    for name, value in list_input_paths(settings):
        before = recorded.get(name)
        if not isinstance(before, Mapping):
            continue
        if difference := _compare(value, before):
            lines.append(f"{name}: {difference}")
    return lines


def find_mixed_inputs(entry: ManifestEntry) -> list[str]:
    """Return a line for each input of which attempts of a finished run read different contents."""
    recorded = entry.provenance.get("inputs")
    if not isinstance(recorded, Mapping):
        return []
    return [
        f"{name}: {facts['earlier']}"
        for name, facts in recorded.items()
        if isinstance(facts, Mapping) and "earlier" in facts
    ]


def note_earlier_inputs(
    inputs: Mapping[str, Mapping[str, Any]], earlier: Mapping[str, Mapping[str, Any]], attempt: int
) -> dict[str, dict[str, Any]]:
    """Return the inputs, with a note where an earlier attempt of the run read another content."""
    noted = {name: dict(facts) for name, facts in inputs.items()}
    for name, facts in noted.items():
        before = earlier.get(name)
        if before is None:
            continue
        if _is_other_content(before, facts):
            facts["earlier"] = f"attempt {attempt} of the run read another content"
        elif "earlier" in before:
            facts["earlier"] = before["earlier"]
    return noted


def _is_other_content(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if any(before.get(key) != now.get(key) for key in _CONTENT):
        return True
    contents = (before.get("content"), now.get("content"))
    # Older records do not have it.
    return None not in contents and contents[0] != contents[1]


def check_unchanged(inputs: Mapping[str, Mapping[str, Any]], remedy: str) -> None:
    """Raise InputChangedError, with what to do, if a recorded input is not what it was."""
    for name, before in inputs.items():
        path = str(before.get("path", ""))
        if {"sha256", "sampled", "files"} & before.keys() and (line := _compare(path, before)):
            raise InputChangedError(f"{name}: {line}; {remedy}")


def _compare(value: str, before: Mapping[str, Any]) -> str:
    """Return how a path differs from what was recorded; "" if it is the same, or was only moved."""
    path = _absolute(value)
    if "files" in before:
        return _compare_folder(value, before)
    kind = next((kind for kind in ("sha256", "sampled") if kind in before), None)
    if kind is None:
        if before.get("path") in (value, str(path)):
            return ""
        return f"is {value} now, the finished run read {before.get('path')}"
    try:
        found = path.stat()
        # Hashing gigabytes of weights at each command would be slow.
        facts = {"path": str(path), "size": found.st_size, "mtime_ns": found.st_mtime_ns}
        if facts.items() <= before.items() or _hash_content(path, kind) == before[kind]:
            return ""
    except OSError:
        # The file may be gone, or on compute nodes only: the result is still that of the run.
        if before.get("path") == str(path):
            return ""
        return f"is {value} now, which cannot be read here; the finished run read {before['path']}"
    return (
        f"{value} has another content than the file that the finished run read ({before['path']}, "
        f"SHA-256 {str(before[kind])[:12]})"
    )


def _compare_folder(value: str, before: Mapping[str, Any]) -> str:
    path = _absolute(value)
    try:
        difference = compare_folder(path, before)
    except OSError:
        if before.get("path") == str(path):
            return ""
        return f"is {value} now, which cannot be read here; the finished run read {before['path']}"
    if not difference:
        return ""
    return f"{value} has {difference} in the folder that the finished run read ({before['path']})"
