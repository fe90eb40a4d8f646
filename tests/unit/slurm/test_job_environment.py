"""What a job starts with: a copy of the code, a meeting point, an environment without leftovers."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.provenance import read_git_state
from slurm.node.rendezvous import resolve_master_address
from slurm.shared import queue
from slurm.submission import snapshot


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
    assert files == ["SNAPSHOT.json", "pipeline/__init__.py"]
    (source / "pipeline" / "__init__.py").write_text("x = 2\n")
    second = snapshot.take_snapshot(tmp_path / "runs", source)
    assert second != first and (first / "pipeline" / "__init__.py").read_text() == "x = 1\n"
    assert not [p for p in (tmp_path / "runs" / "code").iterdir() if p.name.startswith(".")]


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
        assert read_git_state(source) == state
        copy = snapshot.take_snapshot(tmp_path / "runs", source)
        assert read_git_state(copy) == {**state, "snapshot": copy.name}
        file.write_text("x = 1\n")
    assert read_git_state(tmp_path) == {"git_sha": None, "git_dirty": None}


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
    monkeypatch.setattr(snapshot, "write_json_atomic", lambda *_: None)
    if other_is_faster:
        copy = snapshot.take_snapshot(tmp_path / "runs", tmp_path / "src")
        assert (copy / "pipeline" / "__init__.py").exists()
    else:
        with pytest.raises(OSError, match="not empty"):
            snapshot.take_snapshot(tmp_path / "runs", tmp_path / "src")
    assert len(list((tmp_path / "runs" / "code").iterdir())) == other_is_faster


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
