"""The record of a checkpoint: what is accepted, what is refused by name, what lies beside it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mugs.checkpoint import record
from mugs.checkpoint.record import CheckpointError, CheckpointRecord, StoredFile
from pipeline.files import FormatVersionError, with_checksum

CONTENT = {"student": b"one", "teacher": b"three"}


def write(folder: Path, step: int = 7, /, **changed: Any) -> Path:
    """A checkpoint of two files; `changed` replaces fields of its record."""
    path = folder / record.checkpoint_name(step)
    path.mkdir(parents=True)
    files = {}
    for name, content in CONTENT.items():
        (path / f"{name}.safetensors").write_bytes(content)
        stored = StoredFile(len(content), hashlib.sha256(content).hexdigest())
        files[f"{name}.safetensors"] = stored
    record.write_record(path, CheckpointRecord(step, {"epoch": (1, 2)}, files))
    if changed:
        file = path / record.RECORD_NAME
        content = json.loads(file.read_text()) | changed
        del content["sha256"]
        file.write_text(json.dumps(with_checksum(content)))
    return path


def test_it_reads_back(tmp_path: Path) -> None:
    found = record.verify_checkpoint(write(tmp_path))
    assert (found.step, found.meta) == (7, {"epoch": [1, 2]})
    assert {name: facts.size for name, facts in found.files.items()} == {
        "student.safetensors": 3,
        "teacher.safetensors": 5,
    }


def listing(name: str = "x.safetensors", size: Any = 3, sha256: Any = "0" * 64) -> dict[str, Any]:
    return {"files": {name: {"size": size, "sha256": sha256}}}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"step": 8}, "is the record of step_00000008"),
        ({"step": "7"}, "not a readable checkpoint record"),
        ({"files": {"x.safetensors": {"size": 3}}}, "not a readable checkpoint record"),
        ({"files": 3}, "not a readable checkpoint record"),
        (listing(name="../x.safetensors"), "lists '../x.safetensors'"),
        (listing(name="x.pth"), r"lists 'x.pth'.*expected NAME.safetensors"),
        (listing(name="é.safetensors"), "lists 'é.safetensors'"),
        (listing(size="3"), "lists 'x.safetensors'"),
        (listing(sha256="0" * 63), "lists 'x.safetensors'"),
        (listing(sha256="A" * 64), "lists 'x.safetensors'"),
        (listing(sha256=None), "lists 'x.safetensors'"),
    ],
)
def test_a_record_that_is_not_good_is_refused(
    tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    path = write(tmp_path, **changed)
    with pytest.raises(CheckpointError, match=rf"state\.json: {words}"):
        record.read_record(path)


@pytest.mark.parametrize("version", [1, 3])
def test_another_format_is_told_apart_from_damage(tmp_path: Path, version: int) -> None:
    with pytest.raises(FormatVersionError, match=r"state\.json"):
        record.read_record(write(tmp_path, format=version))


def test_a_record_is_read_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    size = (path / record.RECORD_NAME).stat().st_size
    monkeypatch.setattr(record, "RECORD_LIMIT", size)
    record.read_record(path)
    monkeypatch.setattr(record, "RECORD_LIMIT", size - 1)
    with pytest.raises(CheckpointError, match=f"{size} bytes, at most {size - 1} are read"):
        record.read_record(path)


def test_only_one_file_is_verified_where_one_is_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    (path / "student.safetensors").write_bytes(b"two")
    record.verify_checkpoint(path, "teacher.safetensors")
    for only in (None, "student.safetensors"):
        with pytest.raises(CheckpointError, match=r"student\.safetensors: SHA-256 differs"):
            record.verify_checkpoint(path, only)
    with pytest.raises(CheckpointError, match=r"has no x \(it has: student.*, teacher"):
        record.verify_checkpoint(path, "x")
    (path / "student.safetensors").write_bytes(b"more")
    with pytest.raises(CheckpointError, match=r"student\.safetensors: 4 bytes, 3 were written"):
        record.verify_checkpoint(path)


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_links_are_not_followed(tmp_path: Path, linked: str) -> None:
    path = write(tmp_path / "a")
    if linked == "file":
        (path / record.RECORD_NAME).rename(tmp_path / "real")
        (path / record.RECORD_NAME).symlink_to(tmp_path / "real")
    else:
        (tmp_path / path.name).symlink_to(path)
        path = tmp_path / path.name
    with pytest.raises(CheckpointError, match="through a symbolic link"):
        record.read_record(path)


def test_checkpoints_are_listed_by_number(tmp_path: Path) -> None:
    assert record.list_checkpoints(tmp_path / "none") == []
    steps = (123456789, 5, 99999999)
    for step in steps:
        write(tmp_path, step)
    for other in ("step_0000005", "step_000000050x", "bad_step_00000006", ".step_00000007.a.tmp"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "x").write_bytes(b"x" * 999)
    found = record.list_checkpoints(tmp_path)
    assert [record.checkpoint_step(path) for path in found] == sorted(steps)
    (found[0] / "folder").mkdir()
    sizes = [len((path / record.RECORD_NAME).read_bytes()) + 3 + 5 for path in found]
    assert record.total_checkpoint_bytes(tmp_path) == sum(sizes)


@pytest.mark.parametrize(("attempt", "count"), [(None, 5), (1, 3), (2, 4), (3, 5)])
def test_leftovers_of_newer_attempts_may_be_in_use(
    tmp_path: Path, attempt: int | None, count: int
) -> None:
    names = [
        ".room.abcd.tmp",
        ".step_00000003.abcd.tmp",
        ".step_00000004.attempt1.abcd.tmp",
        ".step_00000004.attempt2.abcd.tmp",
        ".step_00000005.attempt3.abcd.tmp",
    ]
    for name in (*names, "step_00000003", "room", ".step_00000003", ".other.tmp"):
        (tmp_path / name).mkdir()
    found = record.list_leftovers(tmp_path, attempt)
    assert [path.name for path in found] == names[:count]
    record.remove_leftovers(tmp_path, attempt)
    assert len(list(tmp_path.iterdir())) == 4 + len(names) - count
    assert record.list_leftovers(tmp_path / "none") == []


def test_what_is_removed_never_looks_like_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    monkeypatch.setattr(record.shutil, "rmtree", lambda *_, **__: None)  # as if killed before it
    record.remove_checkpoint(path)
    assert record.list_checkpoints(tmp_path) == [] and len(record.list_leftovers(tmp_path)) == 1


def test_bad_checkpoints_of_one_step_are_all_kept(tmp_path: Path) -> None:
    found = [record.quarantine_checkpoint(write(tmp_path)) for _ in range(3)]
    assert found[0].name == "bad_step_00000007" and len(set(found)) == 3
    assert all(path.is_dir() and path.name.startswith("bad_step_00000007") for path in found)
