"""A copy of our code per content, so that a job requeued next week runs what was submitted."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from pipeline.files import replace_atomically, write_json_atomic
from pipeline.provenance import PACKAGES, SNAPSHOT_NOTE, code_root, read_git_state

_ROOT_FILES = ("run_stage.py", "pyproject.toml")


def list_code_files(root: Path) -> list[Path]:
    """Files of our packages, relative to `root`: what git tracks or would, or all but caches without git."""
    listed = _git_files(root)
    if listed is None:
        found = (p for name in PACKAGES for p in (root / name).rglob("*") if p.is_file())
        listed = [p.relative_to(root) for p in found if "__pycache__" not in p.parts]
        listed += [Path(name) for name in _ROOT_FILES]
    keep = [p for p in listed if p.parts[0] in PACKAGES or str(p) in _ROOT_FILES]
    return sorted(p for p in set(keep) if (root / p).is_file())


def _git_files(root: Path) -> list[Path] | None:
    if not (root / ".git").exists():
        return None
    command = [
        "git",
        "-C",
        str(root),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    try:
        done = subprocess.run(
            [*command, "--", *PACKAGES, *_ROOT_FILES], capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return [
        Path(name)
        for name in done.stdout.decode().split("\0")
        if name and "__pycache__" not in name
    ]


def hash_code(root: Path, files: Iterable[Path]) -> str:
    """12 hex digits over names and contents."""
    digest = hashlib.sha256()
    for file in files:
        content = hashlib.sha256((root / file).read_bytes()).hexdigest()
        digest.update(f"{file.as_posix()} {content}\n".encode())
    return digest.hexdigest()[:12]


def take_snapshot(run_root: Path, root: Path | None = None) -> Path:
    """Copy the code to `<run_root>/code/<hash>`, once per content, and return that folder.

    Filled under a temporary name and renamed: the folder is whole or absent, whoever else is copying.
    """
    source = code_root() if root is None else root
    files = list_code_files(source)
    target = run_root / "code" / hash_code(source, files)
    if target.is_dir():
        return target
    try:
        with replace_atomically(target) as temporary:
            for file in files:
                (temporary / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / file, temporary / file)
            write_json_atomic(temporary / SNAPSHOT_NOTE, read_git_state(source))
    except OSError:
        if not target.is_dir():  # else somebody else was faster with the same content
            raise
    return target
