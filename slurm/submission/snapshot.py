"""A copy of our code per content, so that a job requeued next week runs what was submitted."""

import shutil
from pathlib import Path

from pipeline.files import hash_named_files, replace_atomically, write_json_atomic
from pipeline.provenance import PACKAGES, SNAPSHOT_NOTE, code_root, read_git_state, run_git

_ROOT_FILES = ("run_stage.py", "pyproject.toml")


def list_code_files(root: Path) -> list[Path]:
    """Return the files of our packages, relative to `root`.

    In a git checkout these are the files that git tracks or would track; elsewhere all but caches.
    """
    listed = _list_git_files(root)
    if listed is None:
        listed = [Path(name) for name in _ROOT_FILES]
        for package in PACKAGES:
            listed += [path.relative_to(root) for path in (root / package).rglob("*")]
    # git also lists files that were deleted but not committed.
    return sorted(
        path for path in set(listed) if "__pycache__" not in path.parts and (root / path).is_file()
    )


def _list_git_files(root: Path) -> list[Path] | None:
    if not (root / ".git").exists():
        return None
    options = ("-z", "--cached", "--others", "--exclude-standard", "--")
    listed = run_git(root, "ls-files", *options, *PACKAGES, *_ROOT_FILES)
    return None if listed is None else [Path(name) for name in listed.split("\0") if name]


def take_snapshot(run_root: Path, root: Path | None = None) -> Path:
    """Copy the code to `<run_root>/code/<hash>`, once per content, and return that folder.

    It is filled under a temporary name and renamed: the folder is complete or absent, whoever else
    is copying.
    """
    source = code_root() if root is None else root
    files = list_code_files(source)
    target = run_root / "code" / hash_named_files(source, files)[:12]
    if target.is_dir():
        return target
    try:
        with replace_atomically(target) as temporary:
            for file in files:
                (temporary / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / file, temporary / file)
            write_json_atomic(temporary / SNAPSHOT_NOTE, read_git_state(source))
    except OSError:
        # A rename onto a folder that has content fails: another process was faster with the same.
        if not target.is_dir():
            raise
    return target
