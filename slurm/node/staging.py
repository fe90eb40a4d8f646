"""Copies of converted data on a node's own disk (`stage_to` of the cluster profile).

    <stage_to>/mugs-staged-<user id>/<SHA-256, 16 digits>/   train.beton, train.beton.json
    <stage_to>/mugs-staged-<user id>/<SHA-256, 16 digits>.lock

A file is copied when a stage first asks for its path, once for all ranks and jobs on the node: who
holds the lock alone copies, and checks size and SHA-256 on the way; who uses a copy shares the
lock. The last one to end removes the copy. The kernel gives up the locks of a process that is
killed; what it leaves is removed by the next one that ends there. Results do not change, so a disk
that is missing or full is only a warning, and the file is read where it is.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.manifest import DamagedError, ManifestEntry, Output
from pipeline.ownership import ForeignOwnerError, check_mine

logger = logging.getLogger(__name__)
STAGE_TO_VARIABLE = "MUGS_STAGE_TO"
_SUFFIX = ".beton"
_CHUNK = 16 << 20
_SPARE = 1.02  # of the size: file systems need some room of their own
_REMEDY = "set stage_to of the cluster profile to another folder"


class Stager:
    """Copies converted splits into a folder of this node, and holds them until `release`."""

    def __init__(self, folder: Path, *, pause_s: float = 0.5) -> None:
        self.folder = folder / f"mugs-staged-{os.geteuid()}"
        self.pause_s = pause_s
        # Descriptors of shared locks, by the folder of the copy.
        self._held: dict[Path, int] = {}

    def stage(self, entry: ManifestEntry) -> ManifestEntry:
        """Return the entry with outputs that are copied when their path is asked for."""
        return entry.redirect(lambda label: self.find_copy(entry, label))

    def find_copy(self, entry: ManifestEntry, label: str) -> Path | None:
        """Return the copy of a converted split, made now if there is none.

        None for other outputs, and if there is no place for a copy.

        Raises:
            DamagedError: the file is not what the conversion made.
        """
        output = entry.outputs[label]
        sidecar = entry.outputs.get(f"{label}_sidecar")
        if not output.path.endswith(_SUFFIX) or sidecar is None:
            return None
        place = self.folder / output.sha256[:16]
        if place not in self._held:
            try:
                self._make_folder()
                self._held[place] = self._obtain(place, entry.run_root, (output, sidecar))
            except (OSError, ForeignOwnerError) as error:
                logger.warning("%s is read where it is, not from this node: %s", label, error)
                return None
        return place / Path(output.path).name

    def release(self) -> None:
        """Give up all copies, and remove those that nobody on this node uses any more."""
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()
        for path in self.folder.glob("*.lock"):
            with suppress(OSError):
                self._remove_unused(path)
        with suppress(OSError):  # another job has a copy there, or there was none
            self.folder.rmdir()

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700, parents=False, exist_ok=True)
        check_mine(self.folder, _REMEDY)
        if self.folder.is_symlink():
            raise ForeignOwnerError(f"{self.folder}: is a link, so it is not used; {_REMEDY}")

    def _obtain(self, place: Path, run_root: Path, files: Sequence[Output]) -> int:
        """Return a descriptor that shares the lock of a complete copy; make the copy if need be."""
        while True:
            descriptor = self._lock(place, fcntl.LOCK_SH)
            if _is_complete(place, files):
                return descriptor
            os.close(descriptor)
            descriptor = self._lock(place, fcntl.LOCK_EX)
            try:
                if not _is_complete(place, files):
                    _copy_files(place, run_root, files)
            finally:
                os.close(descriptor)
            # Between the two locks, who ends may remove the copy: then once more.

    def _lock(self, place: Path, kind: int) -> int:
        """Wait for a lock, and return its descriptor; a signal to stop ends the wait."""
        path = place.with_name(f"{place.name}.lock")
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                if _is_at(descriptor, path):
                    return descriptor
            except BlockingIOError:
                time.sleep(self.pause_s)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # held by another, or its file was removed meanwhile

    def _remove_unused(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                path.unlink()
        finally:
            os.close(descriptor)


@contextmanager
def staged_inputs(inputs: Mapping[str, ManifestEntry]) -> Iterator[Mapping[str, ManifestEntry]]:
    """Give inputs whose converted splits are read from this node's disk, if the profile says so."""
    asked = os.environ.get(STAGE_TO_VARIABLE, "")
    folder = Path(os.path.expandvars(asked))
    if not asked:
        yield inputs
        return
    if "$" in str(folder) or not folder.is_dir():
        logger.warning("stage_to %s: no such folder on this node, so nothing is copied", asked)
        yield inputs
        return
    stager = Stager(folder)
    try:
        yield {role: stager.stage(entry) for role, entry in inputs.items()}
    finally:
        stager.release()


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _is_complete(place: Path, files: Sequence[Output]) -> bool:
    """Return whether a copy has all its files, which got their names once they were right."""
    try:
        return all((place / Path(file.path).name).stat().st_size == file.size for file in files)
    except FileNotFoundError:
        return False


def _copy_files(place: Path, run_root: Path, files: Sequence[Output]) -> None:
    size = sum(file.size for file in files)
    free = shutil.disk_usage(place.parent).free
    if size * _SPARE > free:
        raise OSError(f"{place.parent} has {free / 1e9:.1f} GB free, {size / 1e9:.1f} are needed")
    shutil.rmtree(place, ignore_errors=True)  # what a process that was killed has left
    place.mkdir(mode=0o700)
    began = time.monotonic()
    try:
        for file in files:
            _copy_checked(run_root / file.path, place / Path(file.path).name, file)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    seconds = time.monotonic() - began
    logger.info("copied %.1f GB to %s in %.0f s", size / 1e9, place, seconds)


def _copy_checked(source: Path, target: Path, expected: Output) -> None:
    """Copy a file, and give it its name if size and SHA-256 are right.

    Raises:
        DamagedError: they are not.
    """
    digest = hashlib.sha256()
    size = 0
    part = target.with_name(f"{target.name}.part")
    with open(source, "rb", buffering=0) as reading, open(part, "xb", buffering=0) as writing:
        while chunk := reading.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            view = memoryview(chunk)
            while view:
                view = view[writing.write(view) :]
    if size != expected.size or digest.hexdigest() != expected.sha256:
        raise DamagedError(
            f"{source}: is not what the conversion made (size or SHA-256 differ); "
            "verify --deep says more, and convert again"
        )
    part.rename(target)
