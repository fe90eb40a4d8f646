"""What torch.compile, Triton and numba have compiled: on the node's own disk, kept over requeues.

    <temporary folder>/mugs-compiled-<user id>/<key>-<boot of the node>/   inductor, triton, numba
    <run_root>/compiled-<user id>/<key>.tar                                a copy of it

The compilers' own folders are in the home folder, or wherever the job happens to be. The home
folder is shared by nodes as a rule, and numba's index is not safe against two nodes that write it
at once: kernels of one CPU could be loaded on another. A folder of the node cannot be shared, but a
requeued job comes to another node. So rank 0 copies it into the run root once nothing was compiled
for a while, and each job fills its node's folder from there. Files get their names when they are
complete, so that jobs and ranks may do so at the same time.

The key is of code, packages, CPU and GPUs: nothing that fits another machine is loaded. Results do
not change, so whatever fails here is only a warning, and the job compiles again. After an attempt
that failed, the next one starts with an empty folder: the file at fault may be one of these.
"""

import fcntl
import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import shutil
import stat
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO

from pipeline import attempts
from pipeline.files import open_regular_file, replace_atomically
from pipeline.ownership import OTHERS_WRITE, ForeignOwnerError, check_mine, is_mine
from pipeline.provenance import code_root
from slurm.node.rendezvous import in_slurm_job

logger = logging.getLogger(__name__)
# A variable that the profile or the user has set stays as it is.
VARIABLES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "NUMBA_CACHE_DIR": "numba",
}
_PACKAGES = ("torch", "numba")
# Compiling a training takes minutes, and no file appears for up to one of them.
_PAUSE_S = 60.0
_LARGEST = 4 << 30  # bytes of a copy; what compilers leave has some MB
_UNUSED_DAYS = 14
_REMEDY = "so everything is compiled again; have it removed, or set TMPDIR to another folder"
# All ranks of a job start within this time. Later, a cleaner of /tmp may have taken files away.
_START_S = 600.0
# Names of what compilers write before the rename, and of their locks.
_UNFINISHED = re.compile(r"\.tmp(\.|$)|^tmp\.|\.lock$")
# Compilers of C++ write a library under its last name, so one this young may not be complete.
_YOUNG_S = 30.0

Files = dict[str, int]


class CompileCache:
    """The node's folder of compiled code, and its copy in the run root."""

    def __init__(self, folder: Path, archive: Path, *, restores: bool = True) -> None:
        self.folder = folder
        self.archive = archive
        self.restores = restores
        # Names and sizes of what the copy holds, and of what was there at the last look.
        self._copied: Files = {}
        self._seen: Files = {}

    def prepare(self) -> None:
        """Make the folder, fill it from the copy, and remove what was long unused beside it.

        Raises:
            OSError: there is no such place, or it belongs to somebody else.
        """
        make_private_folder(self.folder.parent)
        with _locked(self.folder.with_suffix(".lock")):
            make_private_folder(self.folder)
            os.utime(self.folder)
            remove_unused(self.folder.parent, keep=self.folder)
            if self.restores:
                self._fill()

    def _fill(self) -> None:
        """Unpack the copy, once for all ranks of the node. What is there already stays."""
        try:
            with open(open_regular_file(self.archive), "rb") as file:
                found = os.fstat(file.fileno())
                if not is_mine(found, self.archive.parent) or found.st_mode & OTHERS_WRITE:
                    raise ForeignOwnerError(f"{self.archive}: is not this user's alone, {_REMEDY}")
                mark = self.folder.with_suffix(".from")
                wanted = f"{found.st_mtime_ns} {found.st_size} {self.archive}"
                done = _is_young(mark) and mark.read_text() == wanted  # by another rank
                self._copied = unpack_missing(file, self.folder, only_list=done)
                mark.write_text(wanted)
        except FileNotFoundError:
            return
        except (tarfile.TarError, EOFError) as error:
            logger.warning("%s is damaged, so it is not used: %s", self.archive, error)

    def save_if_settled(self) -> bool:
        """Copy the folder into the run root if it has something new, and did not change since the
        last call. Return whether it was copied.
        """
        with suppress(OSError):
            os.utime(self.folder)
        files = list_compiled(self.folder)
        settled = files == self._seen
        self._seen = files
        return settled and self._save(files)

    def save_now(self) -> bool:
        """Copy the folder into the run root if it has something new; return whether it was."""
        return self._save(list_compiled(self.folder))

    def _save(self, files: Files) -> bool:
        if files.items() <= self._copied.items():
            return False
        self._copied = files  # also if it fails: not again and again
        size = sum(files.values())
        if size > _LARGEST:
            logger.warning("%s holds %.1f GB, too much to be copied", self.folder, size / 1e9)
            return False
        try:
            make_private_folder(self.archive.parent)
            with replace_atomically(self.archive) as temporary:
                pack(self.folder, files, temporary)
            remove_unused(self.archive.parent, keep=self.archive)
        except OSError as error:
            logger.warning("compiled code is not kept for the next attempt: %s", error)
            return False
        logger.info("kept %d files of compiled code, %.1f MB", len(files), size / 1e6)
        return True


@contextmanager
def compile_cache(run_dir: Path, attempt: int, *, leads: bool) -> Iterator[None]:
    """Let compilers keep their results on this node, and in the run root for other nodes.

    Only in jobs of Slurm: elsewhere the usual folders are on this machine's disk. `leads` is true
    on the one rank that copies into the run root. An attempt that is stopped copies nothing: it
    has its grace time for the checkpoint.
    """
    cache = _prepare_cache(run_dir, attempt) if in_slurm_job() else None
    if cache is None or not leads:
        yield
        return
    stopped = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(cache, stopped), name="compile-cache", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stopped.set()
    thread.join()
    cache.save_now()


def _watch(cache: CompileCache, stopped: threading.Event) -> None:
    while not stopped.wait(_PAUSE_S):
        cache.save_if_settled()


def _prepare_cache(run_dir: Path, attempt: int) -> CompileCache | None:
    """Return the cache of this node, named to the compilers; None if all have a folder already."""
    unset = {name: part for name, part in VARIABLES.items() if not os.environ.get(name)}
    if not unset:
        return None
    key = compute_key()
    name = f"{key}-{_boot_of_node()}"
    failed = attempt > 1 and attempts.read_failure(run_dir, attempt - 1) is not None
    if failed:
        name += f"-{run_dir.name}-{attempt}"
    mine = os.geteuid()
    cache = CompileCache(
        Path(tempfile.gettempdir()) / f"mugs-compiled-{mine}" / name,
        run_dir.parents[1] / f"compiled-{mine}" / f"{key}.tar",
        restores=not failed,
    )
    try:
        cache.prepare()
    except OSError as error:
        logger.warning("no folder of this node for compiled code: %s", error)
        return None
    os.environ |= {name: str(cache.folder / part) for name, part in unset.items()}
    return cache


def compute_key(processors: str | None = None) -> str:
    """Return a hash of what compiled code depends on: our code, packages, CPU and GPUs."""
    facts = [str(code_root().name), platform.python_version(), platform.machine()]
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            facts.append(f"{package} {importlib.metadata.version(package)}")
    facts.append(describe_processors() if processors is None else processors)
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def describe_processors(proc: Path = Path("/proc")) -> str:
    """Return the models of CPU and GPUs, and what the CPU can do.

    From files of the kernel, as torch would start CUDA before the stage has chosen its GPU.
    """
    lines = set()
    paths = [proc / "cpuinfo", *proc.glob("driver/nvidia/gpus/*/information")]
    for path in [*paths, proc / "driver/nvidia/version"]:
        with suppress(OSError):
            lines |= {
                " ".join(line.split())
                for line in path.read_text(errors="replace").splitlines()
                if line.lower().startswith(("model", "flags", "features", "nvrm"))
            }
    return "\n".join(sorted(lines))


def _boot_of_node() -> str:
    """Return what tells this node from others, should its temporary folder be on a shared disk."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    return platform.node()


def make_private_folder(folder: Path) -> None:
    """Make a folder that only this user may use, or check that it is one.

    Compilers run what lies there.

    Raises:
        ForeignOwnerError: it belongs to another user, others may write there, or it is a link.
    """
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    check_mine(folder, _REMEDY)
    if folder.is_symlink() or folder.stat().st_mode & OTHERS_WRITE:
        raise ForeignOwnerError(f"{folder}: is not this user's alone, {_REMEDY}")


def list_compiled(folder: Path) -> Files:
    """Return the finished files below a folder, with their sizes."""
    files = {}
    newest = time.time() - _YOUNG_S
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            with suppress(FileNotFoundError):  # a temporary one
                found = path.lstat()
                relative = path.relative_to(folder)
                if (
                    stat.S_ISREG(found.st_mode)
                    and found.st_mtime <= newest
                    and not any(_UNFINISHED.search(part) for part in relative.parts)
                ):
                    files[str(relative)] = found.st_size
    return files


def pack(folder: Path, files: Files, target: Path) -> None:
    """Write files of a folder into a tar that only this user can read."""
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as writing, tarfile.open(fileobj=writing, mode="w") as tar:
        for name in sorted(files):
            with suppress(FileNotFoundError), open(folder / name, "rb") as file:
                tar.addfile(tar.gettarinfo(arcname=name, fileobj=file), file)


def unpack_missing(archive: IO[bytes], folder: Path, *, only_list: bool = False) -> Files:
    """Unpack the files of a tar that a folder does not have; return all, with their sizes."""
    files = {}
    with tarfile.open(fileobj=archive, mode="r:") as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if not member.isreg() or not parts or ".." in parts or parts[0] == "/":
                continue
            files[member.name] = member.size
            target = folder / member.name
            if only_list or target.exists():
                continue
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            part = target.with_name(f"{target.name}.{os.getpid()}.tmp")
            content = tar.extractfile(member)
            assert content is not None  # a regular file
            with content, open(part, "wb") as writing:
                shutil.copyfileobj(content, writing)
            # A shared library may have to be executable.
            part.chmod(0o600 | member.mode & 0o100)
            part.rename(target)
    return files


def remove_unused(place: Path, *, keep: Path) -> None:
    """Remove what nobody has used in a folder for two weeks: that of other versions of the code."""
    oldest = time.time() - _UNUSED_DAYS * 86400
    for path in place.iterdir():
        with suppress(OSError):
            if not path.name.startswith(keep.stem) and path.lstat().st_mtime < oldest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_young(path: Path) -> bool:
    with suppress(OSError):
        return abs(time.time() - path.stat().st_mtime) < _START_S
    return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file on this node; the kernel gives it up if the process dies."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
