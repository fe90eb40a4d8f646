"""Files that are either whole or absent: written beside their place, flushed, then renamed."""

import os
import uuid
from pathlib import Path


def write(path: Path, content: str | bytes) -> Path:
    """Replace a file, text as UTF-8; a reader sees the old one or the new one, never a part. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        return temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
