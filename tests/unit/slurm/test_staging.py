"""Copies of converted data on a node's disk: whole, made once, removed by the last user."""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.manifest import DamagedError, ManifestEntry, describe_output
from slurm.node import staging
from slurm.node.staging import STAGE_TO_VARIABLE, Stager, staged_inputs


@pytest.fixture
def entry(tmp_path: Path) -> ManifestEntry:
    """A conversion of two splits, in `tmp_path / "runs"`."""
    root = tmp_path / "runs"
    folder = root / "convert/photos-0123"
    folder.mkdir(parents=True)
    outputs = {}
    for split in ("train", "val"):
        path = folder / f"{split}.beton"
        path.write_bytes(hashlib.sha256(split.encode()).digest() * 5000)
        side = folder / f"{split}.beton.json"
        side.write_text(f'"{split}"')
        outputs |= {split: describe_output(root, path)}
        outputs |= {f"{split}_sidecar": describe_output(root, side)}
    made = ManifestEntry(stage="convert", name="photos", run_id="0123", outputs=outputs)
    return made.at(root)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the node's disk, named by a variable as in a profile."""
    folder = tmp_path / "node"
    folder.mkdir()
    monkeypatch.setenv("NODE_DISK", str(folder))
    monkeypatch.setenv(STAGE_TO_VARIABLE, "$NODE_DISK")
    return folder


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_what_is_asked_for_is_copied_and_removed(entry: ManifestEntry, node: Path) -> None:
    original = entry.output("train")
    with staged_inputs({"data": entry}) as inputs:
        staged = inputs["data"]
        assert not files_below(node)  # nothing was asked for yet
        copy = staged.output("train")
        assert copy.is_relative_to(node) and copy.read_bytes() == original.read_bytes()
        assert copy.with_name("train.beton.json").read_text() == '"train"'
        assert len(files_below(node)) == 3  # with the lock
        assert staged.output("train") == copy
        # Other files stay where they are, and so does what the entry says.
        assert staged.output("val_sidecar") == entry.output("val_sidecar")
        assert staged.model_dump() == entry.model_dump() and staged.run_dir == entry.run_dir
    assert not list(node.iterdir())
    assert entry.output("train") == original


def test_without_the_key_nothing_changes(
    entry: ManifestEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(STAGE_TO_VARIABLE, raising=False)
    with staged_inputs({"data": entry}) as inputs:
        assert inputs["data"] is entry


@pytest.mark.parametrize("value", ["$NOT_SET_HERE/x", "/nowhere/at/all"])
def test_a_folder_that_is_not_there_is_only_a_warning(
    entry: ManifestEntry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    value: str,
) -> None:
    monkeypatch.setenv(STAGE_TO_VARIABLE, value)
    with caplog.at_level(logging.WARNING), staged_inputs({"data": entry}) as inputs:
        assert inputs["data"] is entry
    assert f"stage_to {value}: no such folder on this node" in caplog.text


def test_a_full_disk_is_only_a_warning(
    entry: ManifestEntry,
    node: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: SimpleNamespace(free=160_000))
    with caplog.at_level(logging.WARNING), staged_inputs({"data": entry}) as inputs:
        assert inputs["data"].output("train") == entry.output("train")
    assert "has 0.0 GB free" in caplog.text and not list(node.iterdir())


def test_a_damaged_file_is_not_used(entry: ManifestEntry, node: Path) -> None:
    path = entry.output("train")
    content = bytearray(path.read_bytes())
    content[77] ^= 1
    path.write_bytes(content)
    words = "is not what the conversion made"
    with pytest.raises(DamagedError, match=words), staged_inputs({"data": entry}) as inputs:
        inputs["data"].output("train")
    assert not list(node.iterdir())


@pytest.mark.parametrize("name", ["train.beton.part", "train.beton"])
def test_what_a_killed_process_left_is_replaced(
    entry: ManifestEntry, node: Path, name: str
) -> None:
    stager = Stager(node)
    place = stager.folder / entry.outputs["train"].sha256[:16]
    place.mkdir(parents=True)
    (place / name).write_bytes(b"half")
    copy = stager.find_copy(entry, "train")
    assert copy is not None and copy.read_bytes() == entry.output("train").read_bytes()
    stager.release()
    assert not list(node.iterdir())


def test_a_copy_in_use_stays(entry: ManifestEntry, node: Path) -> None:
    one, other = Stager(node), Stager(node)
    copies = [stager.find_copy(entry, "train") for stager in (one, other)]
    assert copies[0] == copies[1] is not None
    one.release()
    assert copies[1].is_file()
    other.release()
    assert not list(node.iterdir())


def test_the_folder_of_another_user_is_not_used(
    entry: ManifestEntry, node: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    stager = Stager(node)
    stager.folder.mkdir()
    os.chown(stager.folder, 4321, 4321)
    with caplog.at_level(logging.WARNING):
        assert stager.find_copy(entry, "train") is None
    assert "belongs to user 4321" in caplog.text


def test_a_lock_whose_file_was_removed_counts_for_nothing(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last job on the node removes the file between our opening and locking it."""
    answers = iter([False, True])
    monkeypatch.setattr(staging, "_is_at", lambda *_: next(answers))
    os.close(Stager(node)._lock(node / "x", staging.fcntl.LOCK_SH))
    assert next(answers, None) is None


@pytest.fixture
def fork() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Do something in a process of its own; all must end well."""
    children = []

    def start(act: Callable[[], None]) -> None:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                act()
                code = 0
            finally:
                os._exit(code)
        children.append(child)

    yield start
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]


def test_jobs_at_once_make_one_copy(
    entry: ManifestEntry,
    node: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fork: Callable[[Callable[[], None]], None],
) -> None:
    copy_checked = staging._copy_checked

    def copy_slowly(source: Path, target: Path, expected: staging.Output) -> None:
        (tmp_path / f"copied-{target.name}-{os.getpid()}").touch()
        time.sleep(0.1)
        copy_checked(source, target, expected)

    monkeypatch.setattr(staging, "_copy_checked", copy_slowly)

    def read() -> None:
        stager = Stager(node, pause_s=0.01)
        copy = stager.find_copy(entry, "train")
        assert copy is not None and copy.read_bytes() == entry.output("train").read_bytes()
        (tmp_path / f"read-{os.getpid()}").touch()
        end = time.monotonic() + 60
        while len(list(tmp_path.glob("read-*"))) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        stager.release()

    for _ in range(3):
        fork(read)
    end = time.monotonic() + 120
    while list(node.iterdir()) or len(list(tmp_path.glob("read-*"))) < 3:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert len(list(tmp_path.glob("copied-train.beton-*"))) == 1
    assert len(list(tmp_path.glob("copied-train.beton.json-*"))) == 1
