"""Write what a finished attempt leaves: its result rows and, last, the manifest entry.

The entry makes the run done.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import attempts, manifest, provenance, runfile
from pipeline.identity import dump_settings
from pipeline.spec import StageRun
from pipeline.stage import StageOutput
from slurm.shared.costs import sum_attempts, sum_energy


def publish_results(
    run: StageRun,
    run_dir: Path,
    output: StageOutput,
    *,
    attempt: int,
    ranks: int,
    facts: Mapping[str, Any],
) -> None:
    """Write the result rows and record the run with its provenance.

    That is `facts`, with the inputs as they were when the attempt began, and earlier code.

    Raises:
        StaleAttemptError: a newer attempt of the run has started.
    """
    # `record_entry` checks this once more. Here it keeps an old attempt from replacing the rows of
    # a newer one.
    attempts.check_newest(run_dir, attempt)
    run_root = run_dir.parents[1]
    path = run_dir / "rows.csv"
    if output.rows:
        runfile.import_by_name(run.rows_writer)(path, list(output.rows))
    devices = provenance.list_cuda_devices()
    # One for each rank that there was: on one machine, `run --ranks` may differ from the resources.
    gpus = ranks if devices and run.resources.gpu else 0
    spent = sum_attempts(run_dir, gpus=gpus, running=attempt)
    energy = sum_energy(run_dir)
    entry = manifest.ManifestEntry(
        stage=run.stage,
        name=run.name,
        run_id=run.run_id,
        upstream=dict(run.needs),
        config=dump_settings(run.config),
        outputs={
            label: manifest.describe_output(run_root, run_dir / path, output.checksums.get(label))
            for label, path in output.outputs.items()
        },
        rows=path.relative_to(run_root).as_posix() if output.rows else None,
        info=dict(output.info),
        provenance={
            **facts,
            **({} if energy is None else {"energy": energy}),
            # Of attempts before this one, whose work this one went on with.
            "earlier": attempts.list_code_versions(run_dir, before=attempt),
        },
        attempt=attempt,
        restarts=len(attempts.list_attempts(run_dir)) - 1,
        device=devices[0] if devices else "cpu",
        ranks=ranks,
        gpus=gpus,
        seconds=round(spent.seconds, 3),
        gpu_hours=round(spent.gpu_hours, 4) if gpus else 0.0,
        finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    manifest.record_entry(run_root, entry)
