"""Disks that are full, stumble or are read-only, at every call of a run that changes them."""

import errno
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import processes
from outcome import Outcome
from shim import Action, failing, intercepted
from tiny_stage import tiny_run

import mugs.engine.loop
import mugs.weights.backbone_file  # noqa: F401  here, so that not every process imports them anew
from mugs.checkpoint.record import CheckpointError
from mugs.checkpoint.save_load import load_latest
from pipeline import manifest, runfile
from results.store import read_results
from slurm.node import job

NAME = "3_disk_errors"
LASTING = {errno.ENOSPC: True, errno.EDQUOT: True, errno.EIO: False, errno.EROFS: True}


def attempt(root: Path, action: Action | None, said: Path) -> int:
    """The exit code of one attempt of the run in a process of its own;
    what it says goes into a file.
    """
    folder = tiny_run().run_dir(root)

    def work() -> int:
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)  # pytest's own would keep it
        logging.getLogger().handlers.clear()
        with intercepted(action) if action else nullcontext():
            return job.main([str(folder)])

    return processes.run(work)


def calls_of_a_run(root: Path) -> int:
    """How many calls that change the disk an undisturbed run makes."""
    runfile.write_run_file(root, tiny_run())

    def work() -> None:
        with intercepted() as calls:
            assert job.main([str(tiny_run().run_dir(root))]) == 0
        (root / "calls").write_text(str(len(calls.log)))

    assert processes.run(work) == 0
    return int((root / "calls").read_text())


def sound(root: Path) -> str:
    """What is wrong with what a stopped attempt left; nothing, when all of it can be used."""
    folder = tiny_run().run_dir(root)
    try:
        found = load_latest(folder / "checkpoints")
    except CheckpointError as error:
        return str(error)
    if found is not None and found[2]["sum"] != float(sum(range(found[0]))):
        return f"checkpoint {found[0]} holds {found[2]}"
    entry = manifest.find_done(root, tiny_run().run_id)
    return "; ".join(manifest.find_problems(entry, hashes=True)) if entry else ""


def finished(root: Path) -> bool:
    """Whether the run is done, with the right result."""
    entry = manifest.find_done(root, tiny_run().run_id)
    if entry is None or manifest.find_problems(entry, hashes=True) or entry.rows_path is None:
        return False
    found, refused = read_results(entry.rows_path)
    return not refused and [result.row.value for result in found] == [15.0]


def disturbed(outcome: Outcome, root: Path, where: str, code: int, action: Action | None) -> bool:
    """One attempt that meets the error: it must fail with exit code 1 and say so, or succeed,
    and harm nothing.

    Whether it succeeded.
    """
    said = root.parent / f"{root.name}.said"
    ended = attempt(root, action, said)
    text = said.read_text(errors="replace")
    outcome.expect(ended in (0, 1), f"{where}: exit code {ended}: {text[-300:]}")
    why = os.strerror(code) in text or (code == errno.ENOSPC and "not enough room" in text)
    outcome.expect(ended == 0 or why, f"{where}: does not say why: {text[-300:]}")
    outcome.expect(ended == 1 or finished(root), f"{where}: exit code 0, not finished")
    outcome.expect(not (wrong := sound(root)), f"{where}: {wrong}")
    return ended == 0


def repaired(outcome: Outcome, root: Path, where: str, *, was_done: bool = False) -> None:
    """The next attempt, with room again, must end as if nothing had happened.

    Where the first one succeeded there is no more to do, and what it could not remove stays.
    """
    said = root.parent / f"{root.name}.said"
    outcome.expect(
        attempt(root, None, said) == 0 and finished(root),
        f"{where}: not repaired: {said.read_text(errors='replace')[-300:]}",
    )
    names = {path.name for path in (tiny_run().run_dir(root) / "checkpoints").iterdir()}
    expected = {"step_00000004", "step_00000006"}
    fine = names >= expected if was_done else names == expected
    outcome.expect(fine, f"{where}: left {sorted(names)}")
    outcome.trials += 1


def injected(outcome: Outcome, root: Path, stride: int = 1) -> None:
    """Every `stride`-th call of a run fails, with each error in turn."""
    total = calls_of_a_run(root / "count")
    for code, lasting in LASTING.items():
        for number in range(1, total + 1, stride):
            place = root / f"{errno.errorcode[code]}_{number}"
            runfile.write_run_file(place, tiny_run())
            where = f"{errno.errorcode[code]} at call {number} of {total}"
            done = disturbed(outcome, place, where, code, failing(number, code, lasting=lasting))
            repaired(outcome, place, where, was_done=done)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of this many bytes in memory; OSError where one may not be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Change the size or the mode of a small disk."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def real(outcome: Outcome, root: Path, sizes: range) -> int:
    """Disks of real sizes that are too small, then grow; and one that is read-only,
    then not. How many.
    """
    for size in sizes:
        disk, where = root / f"disk_{size}", f"a disk of {size} bytes"
        with small_disk(disk, size):
            runfile.write_run_file(disk, tiny_run())
            done = disturbed(outcome, disk, where, errno.ENOSPC, None)
            remount(disk, "size=64m")
            repaired(outcome, disk, where, was_done=done)
    with small_disk(root / "locked", 1 << 26):
        runfile.write_run_file(root / "locked", tiny_run())
        remount(root / "locked", "ro")
        disturbed(outcome, root / "locked", "read-only", errno.EROFS, None)
        remount(root / "locked", "rw")
        repaired(outcome, root / "locked", "read-only")
    return len(sizes) + 1


def run() -> Outcome:
    """All of it, in a temporary folder."""
    outcome = Outcome(NAME)
    with tempfile.TemporaryDirectory() as folder:
        injected(outcome, Path(folder))
        by_shim = outcome.trials
        try:
            number = real(outcome, Path(folder), range(16 << 10, 256 << 10, 4 << 10))
            on_disks = f"{number} on real small disks"
        except OSError as error:
            on_disks = f"none on real small disks ({error})"
    outcome.note = f"ENOSPC, EDQUOT, EIO, EROFS at every call of a run ({by_shim}), {on_disks}"
    return outcome
