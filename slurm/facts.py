"""What commands print with --json, for programs; AGENTS.md describes it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.findings import Finding
    from pipeline.manifest import SplitRuns
    from pipeline.spec import StageRun
    from slurm.submission.submit import Submission


def describe_plan(
    runs: Sequence[StageRun], split: SplitRuns, root: Path, **lines: Sequence[str]
) -> dict[str, Any]:
    """Return the runs with their states and costs; `lines` are further lists of text."""
    return {
        "run_root": str(root),
        "runs": [_describe_run(run, split.done) for run in runs],
        "done": len(split.done),
        "not_done": len(split.pending),
        "gpu_hours_at_most": sum(run.resources.gpu_hours for run in split.pending),
        **{name: list(texts) for name, texts in lines.items()},
    }


def _describe_run(run: StageRun, done: Mapping[str, Any]) -> dict[str, Any]:
    need = run.resources
    return {
        "run": run.name,
        "run_id": run.run_id,
        "stage": run.stage,
        "state": "done" if run.run_id in done else "not done",
        "needs": dict(run.needs),
        "nodes": need.nodes,
        "gpus": need.gpus,
        "hours": need.hours,
        "gpu_hours": need.gpu_hours,
        "remarks": list(run.remarks),
    }


def describe_findings(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """Return what `doctor` found."""
    return [dataclasses.asdict(finding) for finding in findings]


def describe_submissions(made: Sequence[Submission], keeper: str | None) -> dict[str, Any]:
    """Return what `submit` did with each run, and the job of the keeper."""
    runs = [
        {
            "run": each.run.name,
            "run_id": each.run.run_id,
            "stage": each.run.stage,
            "action": each.action,
            "job_id": each.job_id,
            "other_code": each.other_code or None,
        }
        for each in made
    ]
    return {"runs": runs, "keeper": keeper}


def format_json(value: Any) -> str:
    """Return JSON of many lines."""
    return json.dumps(value, indent=1, default=str)
