"""CPU seconds of the command line before it does any work, against importing torch."""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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
