"""A copy of our code per content, so that a job requeued next week runs what was submitted."""

import logging
import shlex
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.files import (
    hash_file,
    hash_named_files,
    make_folder,
    replace_atomically,
    write_atomic,
    write_json_atomic,
)
from pipeline.ownership import OTHERS_WRITE, ForeignOwnerError, check_mine
from pipeline.provenance import PACKAGES, SNAPSHOT_NOTE, code_root, read_git_state, run_git
from pipeline.run_root import make_shared_folder, name_snapshot_folder
from pipeline.text import clean_line

logger = logging.getLogger(__name__)
CHECKSUMS = "SHA256SUMS"
_ROOT_FILES = ("run_stage.py", "pyproject.toml")
_REMEDY = "have it removed, or use a run root of your own"


class SnapshotError(ValueError):
    """A snapshot of the code is not what was copied."""


def list_code_files(root: Path) -> list[Path]:
    """Return the files of our packages, relative to `root`.

    In a git checkout these are the files that git tracks: others could be notes, or secrets.
    Elsewhere all but caches. Python files that are left out are named in a warning.
    """
    listed = _list_git_files(root, "--cached")
    left_out = _list_git_files(root, "--others", "--exclude-standard") or []
    if not listed:  # no checkout, or one to which nothing was added yet
        left_out = []
        listed = [Path(name) for name in _ROOT_FILES]
        for package in PACKAGES:
            listed += [path.relative_to(root) for path in (root / package).rglob("*")]
    if python_files := sorted(str(path) for path in left_out if path.suffix == ".py"):
        logger.warning(
            "not in the snapshot, since git does not track them: %s; if a run needs them, run"
            " `git add` on them and submit again",
            clean_line(", ".join(python_files)),
        )
    # git also lists files that were deleted but not committed.
    return sorted(
        path for path in set(listed) if "__pycache__" not in path.parts and (root / path).is_file()
    )


def _list_git_files(root: Path, *kinds: str) -> list[Path] | None:
    """Return what `git ls-files` lists of our packages; None if `root` is no checkout."""
    if not (root / ".git").exists():
        return None
    listed = run_git(root, "ls-files", "-z", *kinds, "--", *PACKAGES, *_ROOT_FILES)
    return None if listed is None else [Path(name) for name in listed.split("\0") if name]


def take_snapshot(run_root: Path, root: Path | None = None) -> Path:
    """Copy the code to `<run_root>/code-<user id>/<hash>`, once per content; return that folder.

    It is filled under a temporary name and renamed: the folder is complete or absent, whoever else
    is copying. Files keep the rights of the originals, but for writing.

    Raises:
        ForeignOwnerError: another user has put something there: it would run as us.
        SnapshotError: a snapshot of this hash is there, but with other content.
    """
    source = code_root() if root is None else root
    files = list_code_files(source)
    target = find_snapshot_folder(run_root) / hash_named_files(source, files)[:12]
    make_own_folder(run_root, target.parent)
    if not target.is_dir():
        _fill_snapshot(source, files, target)
    for path in (target.parent, target):
        check_mine(path, _REMEDY)
        if path.stat().st_mode & OTHERS_WRITE:
            raise ForeignOwnerError(f"{path}: others may write there, so it is not used; {_REMEDY}")
    if problem := find_difference(target):
        raise SnapshotError(f"{target}: {problem}, so no job may run it; remove it, submit again")
    return target


def find_snapshot_folder(run_root: Path) -> Path:
    """Return the folder of this user's snapshots."""
    return run_root / name_snapshot_folder()


def make_own_folder(run_root: Path, folder: Path) -> None:
    """Make a folder of this user in the run root, or check that it is ours alone.

    `folder` is `<run_root>/<name>` or `<run_root>/<kind>/<user id>`.

    Raises:
        ForeignOwnerError: another user made it, or it is a link.
    """
    if folder.parent == run_root:
        make_folder(run_root)
    else:
        make_shared_folder(run_root, folder.parent.name)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o755)
    check_mine(folder, _REMEDY)
    if folder.is_symlink():
        raise ForeignOwnerError(f"{folder}: is a link, so it is not used; {_REMEDY}")


def _fill_snapshot(source: Path, files: Sequence[Path], target: Path) -> None:
    try:
        with replace_atomically(target) as temporary:
            temporary.mkdir(mode=0o755)
            for file in files:
                (temporary / file).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                shutil.copyfile(source / file, temporary / file)
            write_json_atomic(temporary / SNAPSHOT_NOTE, read_git_state(source))
            write_atomic(temporary / CHECKSUMS, _list_checksums(temporary, files))
            # Last, since read-only files cannot be written. A private file stays private.
            for file in (*files, Path(SNAPSHOT_NOTE), Path(CHECKSUMS)):
                mode = (source / file if file in files else temporary / file).stat().st_mode
                (temporary / file).chmod(mode & 0o555)
            for folder in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
                folder.chmod(0o755)
    except OSError:
        # A rename onto a folder that has content fails: another process was faster with the same.
        if not target.is_dir():
            raise


def _list_checksums(folder: Path, files: Sequence[Path]) -> str:
    """Return the SHA-256 of files in the format of `sha256sum`."""
    names = sorted(file.as_posix() for file in (*files, Path(SNAPSHOT_NOTE)))
    return "".join(f"{hash_file(folder / name)}  {name}\n" for name in names)


def find_difference(snapshot: Path) -> str | None:
    """Return what differs from the checksums of a snapshot; None if nothing does.

    Compiled files of Python are not looked at: jobs write them.
    """
    try:
        lines = (snapshot / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"it has no {CHECKSUMS}"
    recorded = {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
    found = {
        path.relative_to(snapshot).as_posix()
        for path in snapshot.rglob("*")
        if not path.is_dir() and path.parent.name != "__pycache__"
    }
    if extra := sorted(found - set(recorded) - {CHECKSUMS}):
        return f"{extra[0]} was added"
    for name, sha256 in recorded.items():
        if name not in found:
            return f"{name} is missing"
        if hash_file(snapshot / name) != sha256:
            return f"{name} was changed"
    return None


def checking_lines(snapshot: Path) -> list[str]:
    """Return the shell lines that end a job whose snapshot is not as it was when it was taken.

    They need no Python: what would check the code must not come from the code.
    """
    sha256 = hash_file(snapshot / CHECKSUMS)
    return [
        f"( cd {shlex.quote(str(snapshot))} && echo '{sha256}  {CHECKSUMS}' | sha256sum -c --status"
        f" && sha256sum -c --quiet {CHECKSUMS} >&2 )"
        " || { echo 'the snapshot of the code has changed since submission: submit again' >&2;"
        " exit 1; }"
    ]
