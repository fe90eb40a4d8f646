"""The run ids of every bundled reproduction stay: finished runs stay done,
and published numbers valid.
"""

from pathlib import Path

from pipeline import config
from stages.commands.reproduction import all_runs

FILE = Path(__file__).with_name("run_ids.txt")


def test_run_ids_are_those_of_the_list() -> None:
    """A line is `reproduction run stage id`.
    Change the list only with a change that is meant to change results, or for a new run.
    A reproduction that joins others has no lines: its ids are those of its parts
    (tests/unit/pipeline/test_joining.py).
    """
    lines = [
        f"{name} {run.name} {run.stage} {run.run_id}"
        for name in config.list_bundled()
        if not config.read_reproduction(name).origins
        for run in all_runs(name)
    ]
    assert lines == FILE.read_text(encoding="utf-8").splitlines()
