"""What a finished attempt leaves: its result rows and then, last, the manifest entry that makes the run done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import attempts, manifest, provenance, runfile
from pipeline.spec import StageRun
from pipeline.stage import StageOutput
from slurm.shared.logs import log_path


def publish_results(
    run: StageRun,
    run_dir: Path,
    output: StageOutput,
    *,
    attempt: int,
    ranks: int,
    facts: Mapping[str, Any],
) -> None:
    """Write the rows and record the run with its provenance; StaleAttemptError when a newer attempt has started."""
    run_root = run_dir.parents[1]
    if not attempts.is_newest_attempt(run_dir, attempt):
        raise attempts.StaleAttemptError(
            f"{run_dir}: attempt {attempt} is not the newest, it may not publish"
        )
    rows = None
    if output.rows:
        path = run_dir / "rows.csv"
        runfile.resolve(run.rows_writer)(path, list(output.rows))
        rows = path.relative_to(run_root).as_posix()
    described = {
        k: manifest.describe_output(run_root, run_dir / v) for k, v in output.outputs.items()
    }
    gpus = run.resources.gpus if (devices := provenance.list_cuda_devices()) else 0
    seconds = _seconds(run_dir, attempt)
    entry = manifest.ManifestEntry(
        stage=run.stage,
        name=run.name,
        run_id=run.run_id,
        upstream=dict(run.needs),
        config=run.config.model_dump(mode="json"),
        outputs=described,
        rows=rows,
        info=dict(output.info),
        provenance=facts,
        attempt=attempt,
        restarts=len(attempts.list_attempts(run_dir)) - 1,
        device=devices[0] if devices else "cpu",
        ranks=ranks,
        gpus=gpus,
        seconds=round(seconds, 3),
        gpu_hours=round(gpus * seconds / 3600, 4),
        finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    manifest.record_entry(run_root, entry)


def _seconds(run_dir: Path, attempt: int) -> float:
    """Running time of all attempts: earlier ones from their start to their last log line."""
    total = 0.0
    for number in attempts.list_attempts(run_dir):
        began = float(attempts.read_attempt(run_dir, number).get("time", 0.0))
        log = log_path(run_dir, number, 0)
        ended = time.time() if number == attempt else log.stat().st_mtime if log.exists() else began
        total += max(0.0, ended - began) if began else 0.0
    return total
