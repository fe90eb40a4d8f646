"""Checksums of records, so that a flipped bit is noticed before the record is used."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

KEY = "sha256"


class ChecksumError(ValueError):
    """A record differs from what was written."""


def hash_json(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of JSON-able content."""
    # Sorted and without white space, so that a record that was read and written again keeps its
    # checksum.
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content and, under the key `sha256`, its checksum."""
    return {**content, KEY: hash_json(content)}


def verify_checksum(content: Any) -> dict[str, Any]:
    """Return the content without its checksum.

    Raises:
        ChecksumError: the checksum is missing, or belongs to other content.
    """
    if not isinstance(content, dict) or KEY not in content:
        raise ChecksumError("it has no checksum")
    rest = {key: value for key, value in content.items() if key != KEY}
    try:
        found = hash_json(rest)
    except TypeError as error:
        raise ChecksumError(f"it contains a value that is not JSON: {error}") from error
    if found != content[KEY]:
        raise ChecksumError("its SHA-256 differs from the one recorded in it")
    return rest
