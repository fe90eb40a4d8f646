"""Whether this Python can run the code: versions, imports, and disk space for the results."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from pipeline.findings import Finding, ok, skipped, wrong
from pipeline.import_memory import recall_import, remember_import
from pipeline.provenance import code_root, find_version

_LEAST_FREE = 1e8  # bytes; also runs that write next to nothing have records and logs
_LEAST_FILES = 10_000  # those of the mini reproduction, its logs and code are 4,000
_PROBE_BYTES = 1 << 20
DISTRIBUTION = "mugs-repro"
SETUP = "make setup, and use .venv/bin/python"
_TIMEOUT_S = 300  # the first import of torch from a shared file system takes minutes
_DESCRIBE_TORCH = (
    "import torch, torchvision, timm; "
    "print(torch.__version__ + ',', torch.cuda.device_count(), 'GPUs here')"
)
_DESCRIBE_JOB = (
    "import platform, slurm.node.job, torch; "
    "print('Python ' + platform.python_version() + ', torch ' + torch.__version__)"
)


def check_environment(*, ffcv_required: bool) -> list[Finding]:
    """Check Python, the packages, and the imports that may fail although a package is installed."""
    try:
        known = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return [wrong("packages", f"{DISTRIBUTION} is not installed for {sys.executable}", SETUP)]
    requires = SpecifierSet(known["Requires-Python"] or "")
    version = platform.python_version()
    return [
        ok("python", version)
        # `prereleases`: without it, packaging accepts no version such as 3.13.0rc1.
        if requires.contains(version, prereleases=True)
        else wrong("python", f"{version}, expected {requires}", SETUP),
        *check_packages(metadata.requires(DISTRIBUTION) or []),
        _check_torch(),
        _check_ffcv(required=ffcv_required),
    ]


def check_packages(requirements: list[str]) -> list[Finding]:
    """Return a finding for each distribution that is not as required, or one for all of them."""
    # Markers leave out what other platforms and the optional extras need.
    wanted = [
        need
        for need in map(Requirement, requirements)
        if need.marker is None or need.marker.evaluate()
    ]
    problems = [finding for need in wanted if (finding := _find_unmet(need))]
    return problems or [ok("packages", f"{len(wanted)} as required{_describe_untested()}")]


def _find_unmet(need: Requirement) -> Finding | None:
    found = find_version(need.name)
    if found and need.specifier.contains(found, prereleases=True):
        return None
    detail = f"{found}, expected {need.specifier}" if found else "not installed"
    return wrong(need.name, detail, SETUP)


def _describe_untested() -> str:
    """Return which versions differ from those that the code is tested with; none in a snapshot."""
    pins = code_root() / "constraints.txt"
    lines = pins.read_text(encoding="utf-8").splitlines() if pins.is_file() else []
    differences = []
    for line in lines:
        name, pinned, tested = line.partition("==")
        found = find_version(name) if pinned and not line.startswith("#") else None
        # `public` leaves out the build, such as +cu128.
        if found and Version(found).public != Version(tested.strip()).public:
            differences.append(f"{name} {found} (tested with {tested})")
    listed = f"; other versions than in constraints.txt: {', '.join(differences)}"
    return listed if differences else ""


def _check_torch() -> Finding:
    code, out = _try_import(_DESCRIBE_TORCH)
    return ok("torch", out) if code == 0 else wrong("torch", f"cannot be imported: {out}", SETUP)


def _check_ffcv(*, required: bool) -> Finding:
    version = find_version("ffcv")
    if version is None and required:
        return wrong("ffcv", "not installed", f"{SETUP}; or set loader: auto")
    if version is None:
        return ok("ffcv", "not installed: the other loader gives the same batches")
    code, out = _try_import("import ffcv")
    if code == 0:
        return ok("ffcv", f"{version} can be imported")
    remedy = "install its system libraries (make setup names them)"
    return wrong("ffcv", f"cannot be imported: {out}", remedy)


def check_job_python(command: str) -> Finding:
    """Check the Python that a cluster profile names for jobs: it must import what a job imports.

    It is started here, so a login node without the file systems or the image of the compute nodes
    cannot tell.
    """
    code, out = _run_python(_DESCRIBE_JOB, shlex.split(command))
    if code == 0:
        return ok("job python", f"{command}: {out}")
    remedy = "correct python of the profile, or install the packages there (make setup)"
    return wrong("job python", f"{command}: {out or f'exit code {code}'}", remedy)


def _try_import(code: str) -> tuple[int, str]:
    """Run code as `_run_python` does, unless it is known to succeed."""
    if (known := recall_import(code)) is not None:
        return 0, known
    status, out = _run_python(code)
    if status == 0:
        remember_import(code, out)
    return status, out


def _run_python(code: str, command: Sequence[str] = (sys.executable,)) -> tuple[int, str]:
    """Run code in a new Python; return its exit code and last line of output.

    A new process, because the commands themselves never import torch.
    """
    path = os.pathsep.join(filter(None, [str(code_root()), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [*command, "-c", code],
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=_TIMEOUT_S,
            env={**os.environ, "PYTHONPATH": path},
        )
    except OSError as error:
        return 127, f"cannot be started: {error.strerror}"
    except subprocess.TimeoutExpired:
        return 124, f"no answer in {_TIMEOUT_S} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode, lines[-1] if lines else ""


def check_free_space(run_root: Path, needed: float) -> list[Finding]:
    """Check that the run root can be written to and has `needed` bytes free."""
    folder = next(path for path in (run_root, *run_root.parents) if path.exists())
    try:
        _try_to_write(folder)
        free = shutil.disk_usage(folder).free
        status = os.statvfs(folder)
    except OSError as error:
        found = f"{folder}: cannot be written to ({error.strerror})"
        remedy = "choose another with --run-root, or run_root in the cluster profile"
        return [wrong("run root", found, remedy)]
    # Some file systems make room for files as they come, and say that they have none.
    if status.f_files > 0 and status.f_favail < _LEAST_FILES:
        found = f"{folder}: room for {status.f_favail} more files only (inodes)"
        return [wrong("disk", found, "remove files, or choose another run root")]
    sizes = f"{free / 1e9:.1f} GB free, the pending runs write {needed / 1e9:.1f} GB or more"
    remedy = "free space (see the command clean), or choose another run root"
    return [
        ok("run root", f"{run_root} can be written to"),
        ok("disk", sizes)
        if max(needed, _LEAST_FREE) <= free
        else wrong("disk", f"{folder}: {sizes}", remedy),
    ]


def _try_to_write(folder: Path) -> None:
    """Write and remove a file: mode bits tell neither of read-only mounts nor of quotas.

    A full quota lets an empty file be made, and file servers may tell only at the end.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".room.", suffix=".tmp") as file:
        file.write(bytes(_PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())


def check_folders(folders: Iterable[Path]) -> list[Finding]:
    """Check that files can be written in folders of the run root, as far as they exist.

    Another user may have made some of them: the run root may be written to and `manifest/` not, and
    a run would fail at its last line.
    """
    problems = []
    for folder in folders:
        try:
            if folder.is_dir():
                with tempfile.NamedTemporaryFile(dir=folder, prefix=".room.", suffix=".tmp"):
                    pass
        except OSError as error:
            remedy = f"chmod g+w {folder}, as its owner, or choose another run root"
            problems.append(wrong("run root", f"{folder}: {error.strerror}", remedy))
    return problems


def skip_cluster_check() -> Finding:
    """Return the finding for the case that no cluster was named."""
    return skipped("slurm", "not checked; name the cluster with --cluster")
