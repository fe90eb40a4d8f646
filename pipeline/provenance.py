"""Where a number came from: commit, versions, machine; and that all our packages share one root."""

import hashlib
import importlib.metadata
import logging
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.files import read_json

logger = logging.getLogger(__name__)
PACKAGES = ("pipeline", "mugs", "results", "slurm", "stages")
SNAPSHOT_NOTE = "SNAPSHOT.json"
_DISTRIBUTIONS = ("torch", "torchvision", "timm", "numpy", "pydantic", "submitit", "ffcv", "numba")


class ForeignPackageError(RuntimeError):
    """One of our package names leads to a package of another distribution."""


def code_root() -> Path:
    """Return the folder of our packages: a checkout, a snapshot of one, or site-packages."""
    return Path(__file__).resolve().parents[1]


def check_one_root() -> None:
    """Check that all our packages would be imported from the same root as this one.

    `pipeline`, `slurm`, `stages` and `results` are also names of public distributions. Nothing is
    imported.

    Raises:
        ForeignPackageError: names the path, and the distribution that it belongs to.
    """
    root = code_root()
    for name in PACKAGES:
        spec = find_spec(name)  # finds the file and imports nothing
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin and origin.parent != root / name:
            owners = importlib.metadata.packages_distributions().get(name, [])
            whose = f" of the distribution {', '.join(sorted(set(owners)))}" if owners else ""
            raise ForeignPackageError(
                f"package {name!r} would be imported from {origin}{whose}, expected {root / name}; "
                "uninstall that distribution, or use a new environment"
            )


def read_git_state(root: Path) -> dict[str, Any]:
    """Return commit and dirty flag of the code, from git or a snapshot's note; None if unknown."""
    # A snapshot has no .git, so `take_snapshot` leaves a note of the checkout it was taken from.
    if (note := read_json(root / SNAPSHOT_NOTE)) is not None:
        return {
            "git_sha": note.get("git_sha"),
            "git_dirty": note.get("git_dirty"),
            "snapshot": root.name,
        }
    if not (root / ".git").exists():
        return {"git_sha": None, "git_dirty": None}
    changes = run_git(root, "status", "--porcelain")
    state: dict[str, Any] = {
        "git_sha": run_git(root, "rev-parse", "--verify", "--quiet", "HEAD") or None,
        "git_dirty": None if changes is None else bool(changes),
    }
    if changes and state["git_sha"]:
        # Of two runs with uncommitted changes, this tells whether they are the same ones.
        content = f"{changes}\n{run_git(root, 'diff', 'HEAD')}".encode(errors="surrogateescape")
        state["git_changes"] = hashlib.sha256(content).hexdigest()[:12]
    return state


def run_git(root: Path, *args: str) -> str | None:
    """Return what git says about a checkout; None, and a warning, if it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *args],
            capture_output=True,
            # Names of files need not be text.
            encoding="utf-8",
            errors="surrogateescape",
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        _warn_of_git(root, str(error))
        return None
    if done.returncode == 0:
        return done.stdout.strip()
    _warn_of_git(root, done.stderr)
    return None


@cache
def _warn_of_git(root: Path, error: str) -> None:
    """Log why git says nothing about a checkout, once, and what to do."""
    reason = next(iter(error.strip().splitlines()), "")
    if not reason:
        return  # it has no commit yet
    remedy = ""
    if "dubious ownership" in reason:
        # The owner, such as whoever set up a shared checkout, could have put commands there that
        # git would run as us.
        remedy = (
            "; if you trust its owner, run "
            f"`git config --global --add safe.directory {shlex.quote(str(root))}`"
        )
    logger.warning("%s: the commit is not known: %s%s", root, reason, remedy)


def collect_versions() -> dict[str, str]:
    """Return the versions of Python and of the distributions that can change a number."""
    versions = {name: version for name in _DISTRIBUTIONS if (version := find_version(name))}
    return {"python": platform.python_version(), **versions}


def find_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def list_cuda_devices() -> list[str]:
    """Return the name of the CUDA device of this process, or nothing without torch or CUDA."""
    # Not an import: a stage that needs no torch must not pay for it.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return []
    return [str(torch.cuda.get_device_name(torch.cuda.current_device()))]


def collect_provenance() -> dict[str, Any]:
    """Return the provenance of a run that starts now."""
    return {
        **read_git_state(code_root()),
        "code_root": str(code_root()),
        "versions": collect_versions(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "job_id": os.environ.get("SLURM_JOB_ID"),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
