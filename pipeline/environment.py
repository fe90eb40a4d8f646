"""Whether this Python can run the code: versions, imports, and room for what will be written."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from pipeline.findings import Finding, ok, skipped, wrong
from pipeline.provenance import code_root

DISTRIBUTION = "mugs-repro"
SETUP = "make setup, and use .venv/bin/python"
_TIMEOUT_S = 300
_DEVICES = "import torch, torchvision, timm; print(torch.__version__ + ',', torch.cuda.device_count(), 'GPUs here')"


def check_environment(*, ffcv_required: bool) -> list[Finding]:
    """Python, packages, and what is costly to import, each in a process of its own."""
    try:
        known = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return [wrong("packages", f"{DISTRIBUTION} is not installed for {sys.executable}", SETUP)]
    requires = SpecifierSet(known["Requires-Python"] or "")
    version = platform.python_version()
    fits = requires.contains(version, prereleases=True)
    python = (
        ok("python", version) if fits else wrong("python", f"{version}, expected {requires}", SETUP)
    )
    return [
        python,
        *check_packages(metadata.requires(DISTRIBUTION) or []),
        _torch(),
        _ffcv(required=ffcv_required),
    ]


def check_packages(requirements: list[str]) -> list[Finding]:
    """The required distributions; a finding for each that is not as required, else one for all."""
    wanted = [
        need
        for need in map(Requirement, requirements)
        if need.marker is None or need.marker.evaluate()
    ]
    bad = [finding for need in wanted if (finding := _unmet(need))]
    return bad or [ok("packages", f"{len(wanted)} as required{''.join(_untested())}")]


def _unmet(need: Requirement) -> Finding | None:
    found = _version(need.name)
    if found is None:
        return wrong(need.name, "not installed", SETUP)
    if not need.specifier.contains(found, prereleases=True):
        return wrong(need.name, f"{found}, expected {need.specifier}", SETUP)
    return None


def _untested() -> Iterator[str]:
    """What differs from the versions that the code is tested with."""
    pins = code_root() / "constraints.txt"
    lines = pins.read_text(encoding="utf-8").splitlines() if pins.is_file() else []
    tested = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    found = {name: _version(name) for name in tested}
    differ = [
        f"{n} {v} (tested with {tested[n]})"
        for n, v in found.items()
        if v and not _same(v, tested[n])
    ]
    if differ:
        yield f"; other versions than in constraints.txt: {', '.join(differ)}"


def _same(found: str, tested: str) -> bool:
    return Version(found).public == Version(tested.strip()).public


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> Finding:
    code, out = _python(_DEVICES)
    return ok("torch", out) if code == 0 else wrong("torch", f"cannot be imported: {out}", SETUP)


def _ffcv(*, required: bool) -> Finding:
    if _version("ffcv") is None:
        found = "not installed: the thread loader gives the same batches"
        return (
            wrong("ffcv", "not installed", f"{SETUP}; or loader: auto")
            if required
            else ok("ffcv", found)
        )
    code, out = _python("import ffcv")
    if code == 0:
        return ok("ffcv", f"{_version('ffcv')} can be imported")
    return wrong(
        "ffcv", f"cannot be imported: {out}", "install its system libraries (make setup names them)"
    )


def _python(code: str) -> tuple[int, str]:
    """Exit code and last line of a Python of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer in {_TIMEOUT_S} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode, lines[-1] if lines else ""


def check_free_space(run_root: Path, needed: float) -> list[Finding]:
    """Whether the run root can be written to and holds that many bytes more."""
    folder = next(path for path in (run_root, *run_root.parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".room.", suffix=".tmp"):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        found = f"{folder}: cannot be written to ({error.strerror})"
        return [
            wrong(
                "run root",
                found,
                "name another with --run-root, or run_root in the cluster profile",
            )
        ]
    lack = f"{free / 1e9:.1f} GB free, the pending runs write {needed / 1e9:.1f} GB or more"
    written = ok("run root", f"{run_root} can be written to")
    if needed > free:
        return [
            written,
            wrong(
                "disk",
                f"{folder}: {lack}",
                "make room (the command clean helps), or another run root",
            ),
        ]
    return [written, ok("disk", lack)]


def skip_cluster_check() -> Finding:
    """Said where no cluster was named."""
    return skipped("slurm", "not checked; name the cluster with --cluster")
