"""Files that are whole or absent, what is read of files of others, and checksums of records."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import files
from pipeline.files import ChecksumError, FormatVersionError, OverwriteError


@pytest.fixture
def umask() -> Iterator[None]:
    """New files are readable by everybody, writable by their owner and its group."""
    before = os.umask(0o002)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("fails", ["block", "check"])
def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path: Path, fails: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def check() -> None:
        if fails == "check":
            raise KeyError(fails)

    def replace() -> None:
        with files.replace_atomically(path, "attempt7", check) as temporary:
            temporary.write_text("new")
            assert temporary.parent == tmp_path and ".attempt7." in temporary.name
            assert path.read_text() == "old"
            if fails == "block":
                raise KeyError(fails)

    with pytest.raises(KeyError, match=fails):
        replace()
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_folder_takes_its_place_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "below" / "folder"

    def replace(error: Exception | None) -> None:
        with files.replace_atomically(path) as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "inner" / "x").write_text("1")
            if error is not None:
                raise error

    with pytest.raises(KeyError):
        replace(KeyError())
    assert names(path.parent) == []
    replace(None)
    assert (path / "inner" / "x").read_text() == "1" and names(path.parent) == ["folder"]


def test_a_link_is_replaced_and_a_pipe_is_not(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files.write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "real").read_text() == "kept" and not (tmp_path / "link").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"not a regular file, it is not replaced.*pipe"):
        files.write_atomic(tmp_path / "pipe", "new")


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize(("private", "expected"), [(False, 0o664), (True, 0o600)])
def test_who_can_read_a_file(tmp_path: Path, private: bool, expected: int) -> None:
    path = files.write_atomic(tmp_path / "a", b"\xff", private=private)
    assert path.read_bytes() == b"\xff" and mode(path) == expected
    path.chmod(0o600)
    files.follow_umask(path)
    assert mode(path) == 0o664 and names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("content", "force", "allowed"),
    [
        (None, False, True),
        (b"... mark ...", False, True),
        (b"x" * 4092 + b"mark", False, True),
        (b"x" * 4093 + b"mark", False, False),  # too far from the start
        (b"mine", False, False),
        (b"mine", True, True),
    ],
)
def test_only_files_of_ours_are_overwritten(
    tmp_path: Path, content: bytes | None, force: bool, allowed: bool
) -> None:
    path = tmp_path / "a"
    if content is not None:
        path.write_bytes(content)
    if allowed:
        files.check_overwrite(path, "mark", force=force)
        return
    with pytest.raises(OverwriteError, match="/a: was not written by this command"):
        files.check_overwrite(path, "mark", force=force)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_never_overwritten(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(OverwriteError, match="not a regular file, it is not overwritten"):
        files.check_overwrite(path, "mark", force=True)


def test_a_disk_that_takes_a_few_bytes_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, rest: write(descriptor, rest[:3]))
    found = files.write_new_file(tmp_path / "a", [b"0123456789", b"", memoryview(b"ab")])
    assert (tmp_path / "a").read_bytes() == b"0123456789ab"
    assert found == hashlib.sha256(b"0123456789ab").hexdigest()
    assert found == files.hash_file(tmp_path / "a")
    with pytest.raises(FileExistsError, match="/a"):
        files.write_new_file(tmp_path / "a", [b"x"])
    assert (tmp_path / "a").read_bytes() == b"0123456789ab"


@pytest.mark.parametrize("links", [True, False])
def test_one_of_several_creates_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "below" / "0001.json"
    files.create_json(path, {"a": 1})
    with pytest.raises(FileExistsError):
        files.create_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1} and names(path.parent) == ["0001.json"]


def test_a_disk_that_fails_creates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(OSError, match="broken"):
        files.create_json(tmp_path / "a.json", {})
    assert names(tmp_path) == []


def test_records_are_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert files.read_bounded(path, 5) == files.read_bounded(path, 6) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes, so it is not read"):
        files.read_bounded(path, 4)
    # Files of /proc say that they have no bytes.
    endless = Path("/proc/self/status")
    assert b"Name:" in files.read_bounded(endless)
    with pytest.raises(OSError, match="more than 10 bytes"):
        files.read_bounded(endless, 10)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            files.read_bounded(other)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        ("[1]", None),
        ("{", None),
        ("", None),
        ("[" * 100_000, None),
        ("\udcff", None),
        (None, None),
    ],
)
def test_what_is_no_json_object_is_none(
    tmp_path: Path, content: str | None, expected: dict[str, Any] | None
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    assert files.read_json(path) == expected


def test_numbers_of_records(tmp_path: Path) -> None:
    assert files.list_numbered(tmp_path / "none") == []
    others = ("0003.failed.json", "x.json", "1234567890.json", "4.jsonx", "\u0663.json")
    for name in ("0010.json", "2.json", "0001.json", "123456789.json", *others):
        (tmp_path / name).touch()
    assert files.list_numbered(tmp_path) == [1, 2, 10, 123456789]


@pytest.mark.parametrize("kind", ["link", "second name", "pipe", "folder"])
def test_logs_go_nowhere_else(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "log"
    (tmp_path / "real").touch()
    match kind:
        case "link":
            path.symlink_to(tmp_path / "real")
        case "second name":
            path.hardlink_to(tmp_path / "real")
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
    with pytest.raises(OSError, match="log"):
        files.open_to_append(path)
    assert (tmp_path / "real").read_bytes() == b""


def test_a_log_is_appended_to(tmp_path: Path) -> None:
    for line in ("é\n", "two\n"):
        with files.open_to_append(tmp_path / "log") as log:
            log.write(line)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "é\ntwo\n"


@pytest.mark.parametrize(
    ("kind", "code", "fails"),
    [
        ("folder", errno.EINVAL, False),  # a file system that cannot flush folders
        ("folder", errno.EIO, True),
        ("file", errno.EINVAL, True),
    ],
)
def test_a_flush_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, code: int, fails: bool
) -> None:
    def fail(_: int) -> None:
        raise OSError(code, "no")

    path = tmp_path if kind == "folder" else tmp_path / "a"
    (tmp_path / "a").touch()
    monkeypatch.setattr(os, "fsync", fail)
    if not fails:
        files.sync_path(path)
        return
    with pytest.raises(OSError, match=str(path)):
        files.sync_path(path)


def test_the_clock_of_the_file_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "fstat", lambda _: os.stat_result((*[0] * 8, 77, 0)))
    assert files.read_server_time(tmp_path) == 77.0
    monkeypatch.undo()
    monkeypatch.setattr(files, "time", type("Clock", (), {"time": lambda: 5.0}))
    assert files.read_server_time(tmp_path / "none") == 5.0


def test_a_record_keeps_its_checksum_through_json() -> None:
    record = files.with_checksum({"b": [1, 2], "a": {"x": None, "é": 0.1}})
    again = json.loads(json.dumps(record, indent=3))
    reordered = dict(reversed(list(again.items())))
    assert files.verify_checksum(reordered) == {"b": [1, 2], "a": {"x": None, "é": 0.1}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1], "it has no checksum"),
        (None, "it has no checksum"),
        ({"a": 1}, "it has no checksum"),
        ({"a": 2, "sha256": files.hash_json({"a": 1})}, "differs from the one recorded"),
        ({"a": 1, "b": 1, "sha256": files.hash_json({"a": 1})}, "differs from the one recorded"),
        ({"a": {1}, "sha256": ""}, "a value that is not JSON"),
    ],
)
def test_other_content_is_noticed(content: Any, words: str) -> None:
    with pytest.raises(ChecksumError, match=words):
        files.verify_checksum(content)


@pytest.mark.parametrize(
    ("found", "oldest", "words"),
    [
        (1, 1, None),
        (3, 1, None),
        (4, 1, "format version 4, this code reads versions 1 to 3; it was written by newer code"),
        (1, 2, "format version 1, this code reads versions 2 to 3; use the code that wrote it"),
        (2, 3, "this code reads version 3; use the code"),
        (True, 1, "format version True"),
        ("3", 1, "format version '3'"),
        (None, 1, "format version None"),
    ],
)
def test_versions_of_records(found: Any, oldest: int, words: str | None) -> None:
    if words is None:
        files.check_format_version("x.json", found, newest=3, oldest=oldest)
        return
    with pytest.raises(FormatVersionError, match=rf"^x\.json: .*{words}"):
        files.check_format_version("x.json", found, newest=3, oldest=oldest)


def test_a_hash_of_files_is_of_names_order_and_contents(tmp_path: Path) -> None:
    for name, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(content)
    lists = (["a"], ["b"], ["c"], ["a", "c"], ["c", "a"], [])
    found = {files.hash_named_files(tmp_path, map(Path, chosen)) for chosen in lists}
    assert len(found) == len(lists)
