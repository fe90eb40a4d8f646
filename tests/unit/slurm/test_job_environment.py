"""What a job starts with: a copy of the code, a meeting point, an environment without leftovers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
