"""Resumable state on disk.

    <folder>/step_00001234/      one safetensors file per part, and
                           state.json   step, meta, and size and SHA-256 of every file
A folder is filled under a temporary name, synced and renamed, so it is complete or absent. The newest one that
verifies is loaded; a bad one is named in the log and skipped.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mugs.atomic import replacing

logger = logging.getLogger(__name__)
FORMAT = 1
Parts = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Writer:
    """Who writes: the number of the attempt, part of temporary names, and a check that raises when it may not.

    The check comes right before the rename, and a newer attempt removes what older ones have begun before it reads
    (`remove_leftovers`). So an older one's rename either comes before that, and is seen, or finds nothing to rename.
    What remains is a shared file system that shows an old listing of the attempts for longer than a save takes.
    """

    attempt: int = 1
    check: Callable[[], None] = lambda: None


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file and the reason."""


def save_checkpoint(
    folder: Path, step: int, parts: Parts, meta: dict[str, Any], *, keep: int = 2, writer: Writer | None = None
) -> Path:
    """Write `step_XXXXXXXX` and remove all but the newest `keep`; an existing folder of that step is left as it is."""
    writer = writer or Writer()
    writer.check()
    target = folder / f"step_{step:08d}"
    if not target.exists():
        with replacing(target, f"attempt{writer.attempt}", writer.check) as temporary:
            temporary.mkdir()
            files = {}
            for name, tensors in parts.items():
                path = temporary / f"{name}.safetensors"
                save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, path)
                files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
            record = {"format": FORMAT, "step": step, "meta": meta, "files": files}
            (temporary / "state.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def remove_leftovers(folder: Path, attempt: int) -> None:
    """Remove what attempts before this one began to write and did not finish."""
    for path in folder.glob(".step_*.tmp"):
        found = re.search(r"\.attempt(\d+)\.", path.name)
        if found is None or int(found[1]) < attempt:
            shutil.rmtree(path, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, unverified; leftovers of interrupted writes are not among them."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if re.fullmatch(r"step_\d{8}", p.name))


def load_latest(folder: Path) -> tuple[int, Parts, dict[str, Any]] | None:
    """Step, parts and meta of the newest checkpoint that verifies, None when there is none at all.

    Raises CheckpointError when there are checkpoints and none of them is good: starting over in silence would throw
    the work away.
    """
    reasons = []
    for path in reversed(checkpoints(folder)):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            logger.warning("%s; falling back to the checkpoint before it", error)
            reasons.append(str(error))
    if reasons:
        listed = "; ".join(reasons)
        raise CheckpointError(f"none of the {len(reasons)} checkpoints is good, remove them to start over: {listed}")
    return None


def load_checkpoint(path: Path) -> tuple[int, Parts, dict[str, Any]]:
    """Verify and read one checkpoint. Raises CheckpointError naming the bad file."""
    try:
        record = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files, step, meta = record["files"], int(record["step"]), record["meta"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'state.json'}: not a readable checkpoint record ({error})") from error
    if record.get("format") != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {record.get('format')}, this code reads {FORMAT}")
    parts = {}
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != expected["size"]:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, {expected['size']} were written")
        if sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{file}: SHA-256 differs from the one recorded")
        try:
            parts[file.stem] = load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: {error}") from error
    return step, parts, meta


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
