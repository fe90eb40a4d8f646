"""Checksums of records, so that a flipped bit is noticed before the record is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

KEY = "sha256"


class ChecksumError(ValueError):
    """A record is not what was written."""


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of JSON-able content, however it is spelled in a file."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content and, under the key `sha256`, its checksum."""
    return {**content, KEY: digest(content)}


def unsealed(content: Any) -> dict[str, Any]:
    """The content without its checksum. Raises ChecksumError when that is missing or of something else."""
    if not isinstance(content, dict) or KEY not in content:
        raise ChecksumError("it has no checksum")
    rest = {key: value for key, value in content.items() if key != KEY}
    try:
        found = digest(rest)
    except TypeError as error:
        raise ChecksumError(f"it holds what no record holds: {error}") from error
    if found != content[KEY]:
        raise ChecksumError(
            "it is not what was written: its SHA-256 differs from the one recorded in it"
        )
    return rest
