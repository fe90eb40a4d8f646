"""CPU seconds of the command line before it does any work, against importing torch."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from large_run_root import make_runs, plant_run_root, read_calls, write_reproduction

from pipeline.run_root import mark_run_root

ROOT = Path(__file__).resolve().parents[2]


def cpu_seconds(command: list[str], env: dict[str, str], repeats: int = 5) -> float:
    """Least user plus system time of a command over some repeats, after one to warm the caches."""
    best = float("inf")
    for repeat in range(repeats + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        best = min(best, spent) if repeat else best
    return best


def measure_large_run_root(folder: Path, submitted: int, finished: int) -> dict[str, float]:
    """CPU seconds of commands in a run root with many runs, of which 500 are of one reproduction.

    The first call of each, which fills what is remembered, is left out.
    """
    reproduction = write_reproduction(folder, 500)
    root = folder / "root"
    root.mkdir()
    plant_run_root(root, make_runs(reproduction, 1 + submitted + finished), submitted)
    mark_run_root(root)
    (folder / "cluster.yaml").write_text(f"run_root: {root}\n")
    # Files of the last seconds are not remembered.
    time.sleep(6)
    env = {**os.environ, "PATH": f"{root}/bin:{os.environ['PATH']}", "MUGS_RUN_ROOT": str(root)}
    cluster = ["--cluster", str(folder / "cluster.yaml"), "--skip-data-checks"]
    commands = {
        "status_500_cpu_s": ["status", str(reproduction)],
        "submit_500_cpu_s": ["submit", str(reproduction), *cluster],
        "status_10500_cpu_s": ["status"],
        "clean_10500_cpu_s": ["clean", str(reproduction)],
    }
    seconds = {}
    for name, command in commands.items():
        read_calls(root)
        seconds[name] = cpu_seconds([sys.executable, "run_stage.py", *command], env, repeats=2)
        asked = read_calls(root) / 3
        sys.stderr.write(f"{name}: the queue was asked {asked:g} times\n")
    return seconds


def run() -> list[dict[str, Any]]:
    """Rows {name, ours, baseline, ratio, unit, note}; ratio is baseline / ours."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "MUGS_RUN_ROOT": folder}
        script = [sys.executable, "run_stage.py"]
        ours = {
            "cli_help_cpu_s": cpu_seconds([*script, "--help"], env),
            "plan_cpu_s": cpu_seconds([*script, "plan", "mini"], env),
            # At most a second, for 90 runs out of 19 files.
            "plan_paper_cpu_s": cpu_seconds([*script, "plan", "paper"], env),
        }
        # At most a second for 500 runs, and 3 seconds for all of 10,500.
        ours |= measure_large_run_root(Path(folder), submitted=10_000, finished=500)
        torch = cpu_seconds([sys.executable, "-c", "import torch"], env, repeats=3)
    note = "baseline: python -c 'import torch'"
    return [
        {
            "name": name,
            "ours": value,
            "baseline": torch,
            "ratio": torch / value,
            "unit": "s",
            "note": note,
        }
        for name, value in ours.items()
    ]
