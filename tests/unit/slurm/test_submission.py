"""Submission lock: one holder at a time, stale ones are noticed. And what a job starts with."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline import attempts
from pipeline.files import list_numbered
from pipeline.ownership import ForeignOwnerError
from pipeline.provenance import read_git_state
from pipeline.spec import Resources, StageConfig, StageRun
from slurm.node.rendezvous import resolve_master_address
from slurm.shared import queue
from slurm.submission import lock, snapshot
from slurm.submission.profile import ClusterProfile
from slurm.submission.submit import (
    Dependencies,
    QueueState,
    find_other_code,
    why_held_back,
)


def edit(run_dir: Path, number: int, *, age_s: float = 0, **facts: Any) -> None:
    """Change a claim, and how long ago the file server says it was written."""
    path = run_dir / "claims" / f"{number:04d}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    os.utime(path, (time.time() - age_s, time.time() - age_s))


def leave_a_dead_claim(run_dir: Path) -> None:
    """A claim of a process that is gone, some time ago."""
    code = (
        "import sys; from pathlib import Path; from slurm.submission.lock import _take; "
        "_take(Path(sys.argv[1]), 5)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(run_dir)], check=True, cwd=Path(__file__).parents[3]
    )
    edit(run_dir, 1, age_s=60)


def test_one_at_a_time(tmp_path: Path) -> None:
    inside, most = 0, 0

    def enter(_: int) -> None:
        nonlocal inside, most
        with lock.submission_lock(tmp_path):
            inside += 1
            most = max(most, inside)
            time.sleep(0.001)
            inside -= 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(enter, range(30)))
    assert most == 1
    assert {path.name for path in (tmp_path / "claims").iterdir()} == {
        f"{number:04d}.{end}" for number in range(1, 31) for end in ("json", "released.json")
    }


def test_who_learns_late_of_a_release_is_not_given_a_number_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock._take(tmp_path, 0).release(None)
    released = lock._released

    def late(run_dir: Path, number: int) -> bool:
        monkeypatch.setattr(lock, "_released", released)
        for _ in range(2):  # two others come and go before the answer arrives
            lock._take(run_dir, 0).release(None)
        return True

    monkeypatch.setattr(lock, "_released", late)
    assert lock._take(tmp_path, 5).number == 4


def test_a_live_claim_is_waited_for_and_named(tmp_path: Path) -> None:
    with (
        lock.submission_lock(tmp_path),
        pytest.raises(queue.SlurmError, match=f"being submitted by process {os.getpid()} on"),
    ):
        lock._take(tmp_path, 0)


def test_the_claim_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    leave_a_dead_claim(tmp_path)
    edit(tmp_path, 1, age_s=1)
    with pytest.raises(queue.SlurmError):
        lock._take(tmp_path, 0.2)  # its sbatch may have been heard just now
    edit(tmp_path, 1, age_s=60)
    assert lock._take(tmp_path, 0).number == 2


def test_the_number_of_a_process_may_have_been_given_to_another(tmp_path: Path) -> None:
    lock._take(tmp_path, 0)
    edit(tmp_path, 1, age_s=60)
    with pytest.raises(queue.SlurmError):
        lock._take(tmp_path, 0)
    edit(tmp_path, 1, began="1", age_s=60)
    assert lock._take(tmp_path, 0).number == 2


@pytest.mark.parametrize("which", [0, 1])
def test_an_sbatch_that_outlives_its_submission_is_waited_for(tmp_path: Path, which: int) -> None:
    """Also one of an earlier version, whose jobs have another name."""
    leave_a_dead_claim(tmp_path)
    option = f"--job-name={queue.list_job_names(tmp_path)[which]}"
    sbatch = subprocess.Popen(["sh", "-c", "sleep 60; true", "sbatch", option])
    try:
        with pytest.raises(queue.SlurmError):
            lock._take(tmp_path, 0.2)
    finally:
        sbatch.send_signal(signal.SIGKILL)
        sbatch.wait()
    assert lock._take(tmp_path, 0).number == 2


@pytest.mark.parametrize("age_s", [700, -700, -86400])
@pytest.mark.parametrize("place", [{"host": "elsewhere"}, {"user": -1}, {"pid": "x"}])
def test_a_claim_of_another_host_or_user_is_stale_after_minutes(
    tmp_path: Path, place: dict[str, Any], age_s: float
) -> None:
    """By the file server's clock, and also if that was ahead for a while."""
    leave_a_dead_claim(tmp_path)
    edit(tmp_path, 1, **place, age_s=300)
    with pytest.raises(queue.SlurmError, match="is being submitted by"):
        lock._take(tmp_path, 0)
    edit(tmp_path, 1, age_s=age_s)
    assert lock._take(tmp_path, 0).number == 2


@pytest.mark.parametrize("kind", ["empty", "folder", "list"])
def test_a_claim_that_cannot_be_read_does_not_lock_for_ever(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "claims/0001.json"
    path.parent.mkdir()
    path.mkdir() if kind == "folder" else path.write_text("" if kind == "empty" else "[1]")
    with pytest.raises(queue.SlurmError, match="--break-lock"):
        lock._take(tmp_path, 0)
    os.utime(path, (time.time() - 700,) * 2)
    assert lock._take(tmp_path, 0).number == 2


def test_a_lock_can_be_broken(tmp_path: Path) -> None:
    mine = lock._take(tmp_path, 0)
    assert lock._take(tmp_path, 0, break_lock=True).number == 2 and not mine.is_current()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives files to another user")
@pytest.mark.parametrize("folder", ["claims", "attempts"])
def test_numbers_that_another_user_planted_do_not_count(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "0001.json").write_text("{}")
    (tmp_path / folder / "0099.json").write_text("{}")
    os.chown(tmp_path / folder / "0099.json", 4321, 4321)
    assert list_numbered(tmp_path / folder) == [1]


def test_claims_that_cannot_be_made_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "claims").write_text("")
    with pytest.raises(FileExistsError, match="claims"):
        lock._take(tmp_path, 5)


def test_who_was_overtaken_notices(tmp_path: Path) -> None:
    mine = lock._take(tmp_path, 0)
    assert mine.is_current()
    edit(tmp_path, 1, host="elsewhere", age_s=1e6)
    lock._take(tmp_path, 0)
    assert not mine.is_current()


def run(name: str, *needs: str) -> StageRun:
    return StageRun(
        "x",
        name,
        name,
        StageConfig(),
        {f"in{i}": n for i, n in enumerate(needs)},
        Resources(),
        "x:run",
    )


def job(
    number: str, state: str = "PENDING", reason: str = "Dependency", parents: tuple[str, ...] = ()
) -> Any:
    return queue.QueuedJob(number, "mugs-x", state, reason, parents)


RUNS = {"a": run("a"), "b": run("b", "a"), "c": run("c", "b", "a")}


@pytest.mark.parametrize(
    ("jobs", "done", "expected"),
    [
        ({"a": [job("1")], "b": [job("2", parents=("1",))]}, set(), "2"),
        ({"b": [job("2", parents=("1",))]}, set(), None),  # job 1 is gone and a is not done
        ({"b": [job("2", parents=("1",))]}, {"a"}, "2"),  # Slurm will notice that job 1 is over
        ({"a": [job("3")], "b": [job("2", parents=("1",))]}, set(), None),  # a was submitted anew
        ({"a": [job("3")], "b": [job("2", "RUNNING")]}, set(), "2"),
        ({"b": [job("2", reason=queue.NEVER_SATISFIED)]}, {"a"}, None),
        ({"a": [job("1")], "b": [job("2", parents=("0",)), job("4", parents=("1",))]}, set(), "4"),
    ],
)
def test_jobs_that_can_still_run(
    jobs: dict[str, Any], done: set[str], expected: str | None
) -> None:
    assert QueueState(RUNS, jobs, done).usable_job_id("b") == expected


@dataclass(frozen=True, kw_only=True)
class Watching(StageConfig):
    def concurrent_roles(self) -> frozenset[str]:
        return frozenset({"in0"})


WATCH = StageRun("x", "w", "w", Watching(), {"in0": "a", "in1": "b"}, Resources(), "x:run")


@pytest.mark.parametrize(
    ("jobs", "expected"),
    [
        ({"a": [job("1")], "w": [job("9", parents=("1", "2"))]}, "9"),
        ({"a": [job("1")], "w": [job("9", parents=("2",))]}, None),  # would start before a does
        (
            {"a": [job("1", "RUNNING")], "w": [job("9", parents=("2",))]},
            "9",
        ),  # Slurm has noticed that a began
        ({"a": [job("1", "RUNNING")], "w": [job("9")]}, None),  # b has to end first
        ({"w": [job("9", parents=("2",))]}, None),  # a is neither queued nor done
    ],
)
def test_what_watches_waits_for_a_beginning(jobs: dict[str, Any], expected: str | None) -> None:
    runs = {"a": run("a"), "b": run("b"), "w": WATCH}
    assert QueueState(runs, {"b": [job("2")], **jobs}, set()).usable_job_id("w") == expected


@pytest.mark.parametrize(
    ("jobs", "done", "limit", "expected"),
    [
        ({"a": [job("1")]}, {"b"}, 2, ""),  # it may start beside a
        ({"a": [job("1")]}, {"b"}, 1, "at most 1 at once, and 1 are in the queue"),
        ({"a": [job("1", reason="BadConstraints")]}, {"a", "b"}, 1, ""),
        ({"c": [job("1", reason="BadConstraints")]}, {"a", "b"}, 1, ""),  # it never runs
        ({}, {"b"}, 2, "at most 2 at once, and it needs runs that are not done"),
        ({"a": [job("1")]}, set(), 3, "at most 3 at once, and it needs runs that are not done"),
        ({"a": [job("1")]}, set(), None, ""),
    ],
)
def test_runs_that_are_held_back(
    jobs: dict[str, Any], done: set[str], limit: int | None, expected: str
) -> None:
    runs = {"a": run("a"), "b": run("b"), "c": run("c"), "w": WATCH}
    assert why_held_back(WATCH, QueueState(runs, jobs, done), limit) == expected


def test_dependencies_as_sbatch_spells_them() -> None:
    assert Dependencies().dependency == "singleton"
    assert Dependencies(["1", "2"], ["3"]).dependency == "afterok:1:2,after:3,singleton"


def test_what_the_queue_says_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir, me = RUNS["b"].run_dir(tmp_path), os.geteuid()
    waits = "afterok:41(unfulfilled),afterok:42(unfulfilled),singleton(unfulfilled)"
    name, former = queue.list_job_names(run_dir)
    assert former == "mugs-b"
    lines = [
        f"7|{name}|PENDING|Dependency|{waits}|{me}|(null)|{queue.comment_of(run_dir)}",
        f"8|{former}|RUNNING|None|(null)|{me}|(null)|{queue.comment_of(tmp_path / 'other')}",
        f"9|{former}|RUNNING|None|(null)|{me}|{run_dir.parent}/{queue.SCRIPT}|(null)",
        f"10|{name}|PENDING|JobHeldUser|(null)|{me + 1}|(null)|{queue.comment_of(run_dir)}",
        f"11|{former}|RUNNING|None|(null)|{me}|(null)|{queue.comment_of(run_dir)}",
    ]
    monkeypatch.setattr(queue, "call_slurm", lambda *_: (0, "\n".join(lines), ""))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    found, older = queue.find_jobs(RUNS.values(), tmp_path)["b"]
    assert (found.job_id, found.parents) == ("7", ("41", "42"))
    assert older.job_id == "11", "queued by an earlier version"
    assert "job 10 of " in caplog.text and f"named {name} like ours" in caplog.text


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("pretrain/pretrain-6928abcdef01", "mugs-pretrain-6928-"),
        ("knn/knn_initial-6928abcdef01", "mugs-knn_initial-6928-"),
        ("convert/imagenet-6928abcdef01", "mugs-convert-imagenet-6928-"),
        ("convert/two-parts-6928abcdef01", "mugs-convert-two-parts-6928-"),
    ],
)
def test_a_job_says_stage_and_run(folder: str, said: str) -> None:
    name = queue.job_name(Path("/data/runs") / folder)
    assert name.startswith(said) and len(name) == len(said) + 6


def test_run_roots_do_not_block_each_other(tmp_path: Path) -> None:
    """Slurm runs one job of a name at a time; the name is the same by whatever path."""
    folder = "pretrain/pretrain-6928abcdef01"
    (tmp_path / "one").mkdir()
    (tmp_path / "link").symlink_to("one")
    names = [queue.job_name(tmp_path / root / folder) for root in ("one", "two", "link")]
    assert names[0] != names[1] and names[0] == names[2]
    long = queue.job_name(tmp_path / "pretrain" / ("x" * 200 + "-6928abcdef01"))
    assert len(long) < 100


@pytest.mark.parametrize(
    ("origin", "belongs"),
    [
        ("(null)|(null)", True),  # Slurm does not tell
        ("(null)|a comment of the user", True),
        ("|", True),
        ("{run_dir}/submission.sh|(null)", True),  # submitted by an earlier version
        ("/other/x/submission.sh|(null)", False),
        ("(null)|mugs-run-dir={run_dir}", True),
        ("(null)|mugs-run-dir=/other/x", False),
    ],
)
def test_run_roots_are_told_apart(tmp_path: Path, origin: str, belongs: bool) -> None:
    job = queue.QueuedJob("1", "mugs-b", "PENDING", "", (), origin.format(run_dir=tmp_path))
    assert job.belongs_to(tmp_path) == belongs


def test_thousands_of_runs_are_asked_for_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(queue, "call_slurm", lambda *command: asked.extend(command) or (0, "", ""))
    long = "x" * 200
    queue.find_jobs_of_folders(Path(f"/r/x/{long}-{number:012d}") for number in range(4000))
    names = [word for word in asked if word.startswith("--name=")]
    assert sum(word.count("mugs-") for word in names) == 8000
    assert max(map(len, names)) < 128 * 1024, "more is refused by Linux"


def test_snapshot_is_whole_reused_and_by_content(tmp_path: Path) -> None:
    source = tmp_path / "src"
    (source / "pipeline" / "__pycache__").mkdir(parents=True)
    (source / "pipeline" / "__init__.py").write_text("x = 1\n")
    (source / "pipeline" / "__pycache__" / "a.pyc").touch()
    (source / "tests").mkdir()
    (source / "tests" / "t.py").touch()
    first = snapshot.take_snapshot(tmp_path / "runs", source)
    assert snapshot.take_snapshot(tmp_path / "runs", source) == first
    files = sorted(str(p.relative_to(first)) for p in first.rglob("*") if p.is_file())
    assert files == ["SHA256SUMS", "SNAPSHOT.json", "pipeline/__init__.py"]
    assert (first / "pipeline/__init__.py").stat().st_mode & 0o222 == 0
    (source / "pipeline" / "__init__.py").write_text("x = 2\n")
    second = snapshot.take_snapshot(tmp_path / "runs", source)
    assert second != first and (first / "pipeline" / "__init__.py").read_text() == "x = 1\n"
    assert not [p for p in first.parent.iterdir() if p.name.startswith(".")]


@pytest.fixture
def taken(tmp_path: Path) -> Path:
    """A snapshot of a package with a private file."""
    (tmp_path / "src/pipeline").mkdir(parents=True)
    (tmp_path / "src/pipeline/__init__.py").write_text("x = 1\n")
    (tmp_path / "src/pipeline/secret.yaml").touch(mode=0o600)
    return snapshot.take_snapshot(tmp_path / "runs", tmp_path / "src")


def change(taken: Path, how: str) -> None:
    """Do something to a snapshot that no job may run after that."""
    file = taken / "pipeline/__init__.py"
    file.chmod(0o644)
    if how == "changed":
        file.write_text("x = 2\n")
    elif how == "missing":
        file.unlink()
    elif how == "added":
        (taken / "pipeline/torch.py").touch()
    elif how == "listed":
        file.write_text("x = 2\n")
        (taken / "SHA256SUMS").chmod(0o644)
        (taken / "SHA256SUMS").write_text(
            snapshot._list_checksums(taken, [Path("pipeline/__init__.py")])
        )


@pytest.mark.parametrize("how", ["changed", "missing", "added"])
def test_a_snapshot_that_was_changed_is_not_used(taken: Path, tmp_path: Path, how: str) -> None:
    change(taken, how)
    with pytest.raises(snapshot.SnapshotError, match=how):
        snapshot.take_snapshot(tmp_path / "runs", tmp_path / "src")


@pytest.mark.parametrize("how", ["", "changed", "missing", "listed"])
def test_a_job_does_not_start_with_a_snapshot_that_was_changed(taken: Path, how: str) -> None:
    lines = snapshot.checking_lines(taken)
    change(taken, how)
    done = subprocess.run(["sh", "-c", "\n".join([*lines, "echo ran"])], capture_output=True)
    assert (done.returncode, done.stdout) == ((1, b"") if how else (0, b"ran\n"))
    assert (b"submit again" in done.stderr) == bool(how)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives files to another user")
@pytest.mark.parametrize("depth", [0, 1])
def test_a_snapshot_that_another_user_put_there_is_not_used(
    taken: Path, tmp_path: Path, depth: int
) -> None:
    place = (taken, *taken.parents)[depth]
    os.chown(place, 4321, 4321)
    with pytest.raises(ForeignOwnerError, match="belongs to user 4321"):
        snapshot.take_snapshot(tmp_path / "runs", tmp_path / "src")


@pytest.mark.parametrize("depth", [0, 1])
def test_a_snapshot_that_others_may_write_is_not_used(
    taken: Path, tmp_path: Path, depth: int
) -> None:
    (taken, *taken.parents)[depth].chmod(0o775)
    with pytest.raises(ForeignOwnerError, match="others may write there"):
        snapshot.take_snapshot(tmp_path / "runs", tmp_path / "src")


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o2775])
def test_a_snapshot_is_ours_alone_whatever_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    (tmp_path / "src/pipeline").mkdir(parents=True)
    (tmp_path / "src/pipeline/__init__.py").touch(mode=0o640)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(mode)
    before = os.umask(umask)
    try:
        first = snapshot.take_snapshot(tmp_path / "runs", tmp_path / "src")
        assert snapshot.take_snapshot(tmp_path / "runs", tmp_path / "src") == first
    finally:
        os.umask(before)
    assert [path for path in first.parent.rglob("*") if path.stat().st_mode & 0o022] == []
    # Right in the run root: the owner of a folder in between could rename it.
    assert first.parent.parent == tmp_path / "runs"
    source = (tmp_path / "src/pipeline/__init__.py").stat().st_mode
    assert (first / "pipeline/__init__.py").stat().st_mode == source & ~0o222


def test_a_job_that_goes_on_with_other_code_is_told(tmp_path: Path) -> None:
    run_dir = WATCH.run_dir(tmp_path)
    profile = ClusterProfile(run_root=tmp_path)
    assert find_other_code(WATCH, profile, tmp_path / "code" / "abc") == ""
    attempts.record_provenance(run_dir, attempts.start_attempt(run_dir), {"snapshot": "abc"})
    assert find_other_code(WATCH, profile, tmp_path / "code" / "abc") == ""
    assert find_other_code(WATCH, profile, tmp_path / "code" / "def") == "abc"


def test_commit_and_changes_are_noted(tmp_path: Path) -> None:
    source = tmp_path / "src"
    (source / "pipeline").mkdir(parents=True)
    file = source / "pipeline" / "__init__.py"
    file.touch()
    git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    for dirty in (False, True):
        state = {"git_sha": commit, "git_dirty": dirty}
        found = read_git_state(source)
        assert ("git_changes" in found) == dirty
        assert {key: found[key] for key in state} == state
        copy = snapshot.take_snapshot(tmp_path / "runs", source)
        assert read_git_state(copy) == {**state, "snapshot": copy.name}
        file.write_text("x = 1\n")
    # Two runs of one commit with other changes are of other code.
    changes = {read_git_state(source)["git_changes"]}
    file.write_text("x = 2\n")
    changes.add(read_git_state(source)["git_changes"])
    file.write_text("x = 1\n")
    changes.add(read_git_state(source)["git_changes"])
    assert len(changes) == 2
    assert read_git_state(tmp_path) == {"git_sha": None, "git_dirty": None}


def test_a_checkout_that_git_does_not_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert read_git_state(tmp_path) == {"git_sha": None, "git_dirty": False}
    assert not caplog.text  # no commit yet
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    for _ in range(2):
        assert read_git_state(tmp_path) == {"git_sha": None, "git_dirty": None}
    (line,) = caplog.messages
    assert "dubious ownership" in line
    assert f"git config --global --add safe.directory {tmp_path}`" in line


def test_a_snapshot_holds_what_git_tracks_and_names_what_it_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "src"
    (source / "slurm").mkdir(parents=True)
    for name, mode in (("a.py", 0o644), ("b.sh", 0o755), ("private.yaml", 0o600)):
        (source / "slurm" / name).touch(mode=mode)
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", str(source), *command], check=True)
    for name in ("mine.py", "token.yaml", "ä b.py", "l\udce4ufe.py"):  # the last is no UTF-8
        (source / "slurm" / name).touch()
    copy = snapshot.take_snapshot(tmp_path / "runs", source)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (copy / "slurm").iterdir()}
    assert modes == {"a.py": 0o444, "b.sh": 0o555, "private.yaml": 0o400}
    assert "not track them: slurm/l?ufe.py, slurm/mine.py, slurm/ä b.py; if" in caplog.text
    assert "token" not in caplog.text
    subprocess.run(["git", "-C", str(source), "add", "slurm/mine.py", "slurm/ä b.py"], check=True)
    caplog.clear()
    copy = snapshot.take_snapshot(tmp_path / "runs", source)
    assert (copy / "slurm/mine.py").exists() and "mine.py" not in caplog.text


@pytest.mark.parametrize("other_is_faster", [True, False])
def test_two_snapshots_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_is_faster: bool
) -> None:
    (tmp_path / "src" / "pipeline").mkdir(parents=True)
    (tmp_path / "src" / "pipeline" / "__init__.py").touch()

    def replace(source: Path, target: Path) -> None:
        if other_is_faster:
            shutil.copytree(source, target)
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "rename", replace)
    monkeypatch.setattr(snapshot, "write_json_atomic", lambda path, _: path.touch())
    monkeypatch.setattr(snapshot, "write_atomic", lambda path, text: path.write_text(text))
    if other_is_faster:
        copy = snapshot.take_snapshot(tmp_path / "runs", tmp_path / "src")
        assert (copy / "pipeline" / "__init__.py").exists()
    else:
        with pytest.raises(OSError, match="not empty"):
            snapshot.take_snapshot(tmp_path / "runs", tmp_path / "src")
    assert len(list(snapshot.find_snapshot_folder(tmp_path / "runs").iterdir())) == other_is_faster


def test_meeting_point_falls_back_to_what_slurm_knows() -> None:
    assert resolve_master_address("localhost", lambda _: "10.0.0.1") == "localhost"
    assert resolve_master_address("no-such-host.invalid", lambda _: "10.0.0.1") == "10.0.0.1"


def test_submission_environment_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"SLURM_CONF": "/c", "OTHER": "1"}
    for key, value in {**kept, "SLURM_JOB_ID": "3", "SBATCH_QOS": "x", "RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    clean = queue.clean_environment()
    assert {k: clean.get(k) for k in kept} == kept
    assert not {"SLURM_JOB_ID", "SBATCH_QOS", "RANK"} & set(clean)
    assert os.environ["SLURM_JOB_ID"] == "3"
