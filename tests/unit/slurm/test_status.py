"""What status says about runs, from their records and what Slurm answers."""

import time
from pathlib import Path

import pytest

from pipeline import attempts, runfile
from pipeline.files import write_json_atomic
from pipeline.spec import Resources, StageConfig, StageRun
from slurm.shared import queue
from slurm.status import collect_status, format_duration

RUN = StageRun("tiny", "one", "0123456789ab", StageConfig(), {}, Resources(gpu=False), "x:run")


def test_progress_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = queue.QueuedJob("7", queue.job_name(RUN.run_id), "RUNNING", "None")
    monkeypatch.setattr(queue, "find_jobs", lambda *_, **__: {RUN.run_id: [job]})
    assert collect_status([RUN], tmp_path)[0].detail == "starting"
    attempts.start_attempt(RUN.run_dir(tmp_path), job_id="7")
    note = {
        "done": 3,
        "total": 9,
        "unit": "steps",
        "rate": 1234.5,
        "eta_s": 125,
        "time": time.time(),
    }
    write_json_atomic(RUN.run_dir(tmp_path) / "progress.json", note)
    found = collect_status([RUN], tmp_path)[0]
    assert (found.state, found.job_id, found.detail) == (
        "running",
        "7",
        "3/9 steps, 1234 img/s, 2m05s left",
    )


@pytest.mark.parametrize(("slurm", "state"), [("PENDING", "queued"), ("FAILED", "failed")])
def test_a_failed_attempt_whose_job_slurm_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: str, state: str
) -> None:
    """Where squeue does not answer for a moment, scontrol may."""
    run_dir = runfile.write_run_file(tmp_path, RUN)
    attempts.record_failure(
        run_dir,
        attempts.start_attempt(run_dir, job_id="7"),
        error="RuntimeError: it broke",
        log=run_dir / "log",
    )
    monkeypatch.setattr("slurm.shared.queue.find_jobs", lambda runs, root: {})
    monkeypatch.setattr("slurm.shared.queue.query_job_state", {"7": slurm}.get)
    (found,) = collect_status([RUN], tmp_path)
    assert (found.state, found.job_id) == (state, "7")


def test_durations() -> None:
    assert [format_duration(s) for s in (0, 59.4, 185, 7800, 100800)] == [
        "0s",
        "59s",
        "3m05s",
        "2h10m",
        "1d04h",
    ]
