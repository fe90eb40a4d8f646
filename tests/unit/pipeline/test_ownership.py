"""Whose a file is: run folders are their owner's alone, and nothing is written through links."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import attempts, runfile
from pipeline.files import list_numbered, open_to_append, read_bounded, read_json, write_atomic
from pipeline.manifest import read_entry
from pipeline.ownership import (
    ForeignOwnerError,
    close_to_others,
    keep_others_from_writing,
    open_folder_below,
)
from pipeline.run_root import is_run_root
from pipeline.spec import ConfigError, Resources, StageConfig, StageRun, is_plain_name
from slurm.shared.logs import log_path, start_logging

RUN = StageRun("knn", "mine", "0123456789ab", StageConfig(), {}, Resources(), "x:run")
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives files to another user")


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The umask of the test, which is put back after it."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077], indirect=True)
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o2775, 0o777])
def test_a_run_folder_is_its_owners_alone_and_the_others_are_shared(
    tmp_path: Path, umask: int, mode: int
) -> None:
    """A private and a group's run root, with the usual umasks: nobody is hindered."""
    root = tmp_path / "runs"
    root.mkdir()
    root.chmod(mode)
    keep_others_from_writing()
    run_dir = runfile.write_run_file(root, RUN)
    attempts.start_attempt(run_dir)
    assert [path for path in (run_dir, *run_dir.rglob("*")) if path.stat().st_mode & 0o022] == []
    assert is_run_root(root)
    for name in ("knn", "manifest"):
        found = (root / name).stat().st_mode & 0o7777
        assert found & 0o022 == mode & 0o022, "who may write in the run root may add runs"
        assert bool(found & 0o1000) == bool(mode & 0o022), "but not remove or replace others'"


def test_an_old_run_folder_is_closed_to_others(tmp_path: Path) -> None:
    """Also what is deep in it, and its files: a checkpoint could be replaced, or written into."""
    run_dir = RUN.run_dir(tmp_path)
    deep = run_dir / "checkpoints/step_00000001"
    deep.mkdir(parents=True)
    (deep / "state.json").touch()
    (run_dir / "link").symlink_to(tmp_path)
    tmp_path.chmod(0o775)
    for path in (deep / "state.json", deep, deep.parent, run_dir):
        path.chmod(0o664 if path.is_file() else 0o2775)
    runfile.prepare_run_dir(tmp_path, RUN)
    for path in (run_dir, deep.parent, deep):
        assert path.stat().st_mode & 0o7777 == 0o2755
    assert (deep / "state.json").stat().st_mode & 0o777 == 0o644
    assert tmp_path.stat().st_mode & 0o777 == 0o775, "a link is not followed"


@AS_ROOT
def test_the_run_folder_of_another_user_is_refused_by_name(tmp_path: Path) -> None:
    run_dir = runfile.write_run_file(tmp_path, RUN)
    os.chown(run_dir, 4321, 4321)
    with pytest.raises(ForeignOwnerError, match=r"belongs to user 4321.*run root of your own"):
        runfile.write_run_file(tmp_path, RUN)


@AS_ROOT
def test_a_run_root_of_another_user_is_explained(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:2]:
        parent.chmod(0o755)
    root = tmp_path / "runs"
    root.mkdir(mode=0o755)
    child = os.fork()
    if child == 0:
        os.setuid(4321)
        try:
            runfile.prepare_run_dir(root, RUN)
        except ConfigError as error:
            os._exit(
                0 if "you may not write there; use a run root of your own" in str(error) else 1
            )
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe", "folder"])
def test_no_log_is_written_to_where_somebody_else_wants_it(tmp_path: Path, kind: str) -> None:
    (tmp_path / "home").mkdir()
    target = tmp_path / "home/.bashrc"
    target.write_text("mine\n")
    path = log_path(tmp_path, 1, 0)
    path.parent.mkdir()
    if kind == "hard link":
        path.hardlink_to(target)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(target if kind == "link" else tmp_path / "home/.profile")
    with pytest.raises(OSError, match=r"nothing is written|directory"):
        start_logging(path, screen=False)
    assert [file.read_text() for file in (tmp_path / "home").iterdir()] == ["mine\n"]


@AS_ROOT
def test_no_log_is_written_into_the_file_of_another_user(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.touch()
    os.chown(path, 4321, 4321)
    with pytest.raises(OSError, match="nothing is written"):
        open_to_append(path)


def test_a_log_of_ours_is_appended_to(tmp_path: Path) -> None:
    for text in ("a\n", "b\n"):
        with open_to_append(tmp_path / "x.log") as log:
            log.write(text)
    assert (tmp_path / "x.log").read_text() == "a\nb\n"


def test_a_private_file_is_private_whatever_was_there(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x.sh", "old")
    assert write_atomic(tmp_path / "x.sh", "new", private=True).stat().st_mode & 0o777 == 0o600


def test_a_job_refuses_another_run_file_than_it_was_submitted_with(tmp_path: Path) -> None:
    run_dir = runfile.write_run_file(tmp_path, RUN)
    sha256 = runfile.describe_run(RUN)["sha256"]
    assert runfile.read_run_file(run_dir, sha256).run_id == RUN.run_id
    with pytest.raises(ConfigError, match="is not what this job was submitted with"):
        runfile.read_run_file(run_dir, "0" * 64)


def test_the_stage_is_looked_up_by_its_name(tmp_path: Path) -> None:
    """What the file says of code is not imported: whoever may write it could name any module."""
    planted = StageRun(
        "knn", "mine", "0123456789ab", StageConfig(), {}, Resources(), "os:abort", "os:abort"
    )
    found = runfile.read_run_file(runfile.write_run_file(tmp_path, planted))
    built = found.build()
    assert (built.entrypoint, built.rows_writer) == ("stages.knn:run", "results.store:write_rows")


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse", "deep", "folder"])
def test_a_record_that_is_none_neither_hangs_nor_fills_the_memory(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "manifest/0123456789ab.json"
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 1 << 40)
    elif kind == "deep":
        path.write_text('{"a":' * 100_000)
    else:
        path.mkdir()
    assert read_json(path) is None
    assert read_entry(tmp_path, "0123456789ab") is None


def test_a_file_that_says_it_is_empty_is_read_all_the_same() -> None:
    assert b"VmPeak" in read_bounded(Path("/proc/self/status"))


def test_a_folder_is_reached_without_following_links(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/link").symlink_to(tmp_path / "a/b")
    with open_folder_below(tmp_path, ("a", "b")) as folder:
        assert os.listdir(folder) == []
    with pytest.raises(OSError, match="link"), open_folder_below(tmp_path, ("a", "link")):
        pass


@pytest.mark.parametrize("gone", ["0001.json", "0002.json", "inner"])
def test_what_another_process_removes_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """Submissions of one run look into its folder while others write temporary files there."""
    for name in ("0001.json", "0002.json", "inner/x"):
        write_atomic(tmp_path / name, "{}")
        (tmp_path / name).chmod(0o666)

    lstat = os.lstat

    def find(path: os.PathLike[str] | str) -> os.stat_result:
        if Path(path).name == gone:
            raise FileNotFoundError(path)
        return lstat(path)

    monkeypatch.setattr(os, "lstat", find)
    monkeypatch.setattr(Path, "lstat", find)
    assert close_to_others(tmp_path) == []
    modes = {
        name: os.stat(tmp_path / name).st_mode & 0o777
        for name in ("0001.json", "0002.json", "inner/x")
    }
    assert modes == {name: 0o666 if name.startswith(gone) else 0o644 for name in modes}
    assert list_numbered(tmp_path) == [n for n in (1, 2) if gone != f"{n:04d}.json"]


@pytest.mark.parametrize("name", ["a", "a-b_c.d", "1", "_x", "über", "x" * 200])
def test_a_plain_name(name: str) -> None:
    assert is_plain_name(name)


@pytest.mark.parametrize(
    "name", ["", ".x", "-x", "x²", "x/y", "x y", "x\n", "x\0", "..", "½", "x" * 201, 1, None]
)
def test_no_plain_name(name: object) -> None:
    assert not is_plain_name(name)
