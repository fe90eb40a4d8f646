"""Campaign: every fault of tests/slurm/test_faults.py on a throw-away Slurm, the slow ones too."""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from outcome import Outcome

NAME = "6_slurm"
ROOT = Path(__file__).resolve().parents[2]


def run() -> Outcome:
    """The tests, in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "tests/slurm/test_faults.py"]
        subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, stdout=sys.stderr)
        cases = list(ET.parse(report).getroot().iter("testcase"))
    skipped = [case for case in cases if case.find("skipped") is not None]
    outcome = Outcome(NAME, len(cases) - len(skipped))
    for case in cases:
        wrong = case.find("failure") if case.find("failure") is not None else case.find("error")
        outcome.expect(
            wrong is None, f"{case.get('name')}: {'' if wrong is None else wrong.get('message')}"
        )
    seconds = sum(float(case.get("time", 0)) for case in cases)
    names = ", ".join(
        str(case.get("name")).partition("[")[2].rstrip("]") for case in cases if case not in skipped
    )
    outcome.note = f"{names}; {len(skipped)} skipped, {seconds:.0f} s"
    return outcome
