"""A run root with thousands of submitted runs and hundreds of finished ones, and a Slurm that
answers for their jobs.

The records are those that submissions and jobs write; only Slurm itself is a few lines of shell.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline import attempts, config, manifest, runfile
from pipeline.files import write_json_atomic
from pipeline.identity import run_id
from pipeline.plan import build_plan
from pipeline.spec import StageRun
from slurm.shared import queue
from stages import STAGES

# One job in so many is running, the others are pending.
RUNNING_EVERY = 5
REPRODUCTION = """
name: many
runs:
  digits: {{stage: convert, dataset: mine, num_classes: 10, train_dir: /t, val_dir: /v}}
  r0: {{stage: pretrain, needs: {{data: digits}}, arch: vit_mini, epochs: 20, batch_size: 8}}
{runs}
"""


def write_reproduction(folder: Path, count: int) -> Path:
    """Write a reproduction of `count` pretrainings that differ by their seed, and their data."""
    runs = "\n".join(f"  r{seed}: {{like: r0, seed: {seed}}}" for seed in range(1, count))
    path = folder / "many.yaml"
    path.write_text(REPRODUCTION.format(runs=runs))
    return path


def make_runs(reproduction: Path, count: int) -> list[StageRun]:
    """Return the runs of a reproduction, and pretrainings of further seeds: `count` in all.

    The first is the data set that all others need.
    """
    data, *runs = build_plan(config.load_reproduction(str(reproduction), STAGES))
    count -= 1
    first = runs[0]
    for seed in range(len(runs), count):
        cfg = replace(first.config, seed=seed)  # type: ignore[call-arg]
        runs.append(
            replace(
                first,
                name=f"r{seed}",
                config=cfg,
                run_id=run_id(first.stage, cfg, first.needs),
            )
        )
    return [data, *runs]


def plant_finished(root: Path, run: StageRun) -> None:
    """Write what a run leaves that has ended well."""
    run_dir = plant_submitted(root, run, job_id="1", running=True)
    output = run_dir / "teacher.safetensors"
    output.write_bytes(run.run_id.encode() * 100)
    (run_dir / "rows.csv").write_text(f"run_id,value\n{run.run_id},1\n")
    entry = manifest.ManifestEntry(
        stage=run.stage,
        name=run.name,
        run_id=run.run_id,
        upstream=dict(run.needs),
        outputs={"teacher": manifest.describe_output(root, output)},
        rows=f"{run.stage}/{run.key}/rows.csv",
        seconds=3600.0,
    )
    manifest.record_entry(root, entry)


def plant_submitted(root: Path, run: StageRun, job_id: str, *, running: bool) -> Path:
    """Write what a submission leaves and, for a running job, what its attempt does."""
    run_dir = runfile.write_run_file(root, run)
    (run_dir / "logs").mkdir(exist_ok=True)
    (run_dir / queue.SCRIPT).write_text("#!/bin/bash\n")
    write_json_atomic(run_dir / queue.JOB_NOTE, {"job_id": job_id, "time": time.time()})
    if running:
        attempts.start_attempt(run_dir, launch=job_id, job_id=job_id)
        note = {"done": 7, "total": 100, "time": time.time() + 1, "rate": 5.0, "eta_s": 90.0}
        write_json_atomic(run_dir / "progress.json", note)
        (run_dir / "logs/attempt_0001_rank0.log").write_text("step 7\n")
    return run_dir


def plant_run_root(root: Path, runs: Sequence[StageRun], submitted: int) -> None:
    """Plant `submitted` runs as jobs, the first and the last as finished; Slurm in `bin`."""
    lines = []
    for number, run in enumerate(runs):
        if not 0 < number <= submitted:
            plant_finished(root, run)
            continue
        job_id = str(1000 + number)
        running = number % RUNNING_EVERY == 0
        run_dir = plant_submitted(root, run, job_id, running=running)
        state = "RUNNING|None" if running else "PENDING|Priority"
        comment = queue.comment_of(run_dir)
        name = queue.job_name(run_dir)
        lines.append(f"{job_id}|{name}|{state}|(null)|{os.geteuid()}|(null)|{comment}\n")
    (root / "bin").mkdir()
    (root / "jobs").write_text("".join(lines))
    # Slurm filters by name, too; each call is noted.
    answer = f"""echo call >> {root}/calls
for option; do case $option in --name=*) names=${{option#--name=}};; esac; done
printf %s "$names" | tr , '\\n' > {root}/asked.$$
awk -F'|' 'NR == FNR {{asked[$1]; next}} $2 in asked' {root}/asked.$$ {root}/jobs
rm {root}/asked.$$
"""
    for name, text in (("squeue", answer), ("scontrol", "exit 1"), ("sbatch", "echo 99999")):
        (root / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (root / "bin" / name).chmod(0o755)


def read_calls(root: Path) -> int:
    """Return how often the queue was asked, and forget it."""
    calls = root / "calls"
    count = len(calls.read_text().splitlines()) if calls.exists() else 0
    calls.unlink(missing_ok=True)
    return count
