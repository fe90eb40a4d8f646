"""A few trials of the interruption campaign, in a process of its own since it forks."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_interrupted_runs_end_with_the_same_state() -> None:
    script = Path(__file__).parent / "interruptions.py"
    done = subprocess.run([sys.executable, str(script), "6", "7"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    assert "6 trials, 0 failures" in done.stdout
