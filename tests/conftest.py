"""How the suite runs: threads, the order and workers of tests, and which skips are accepted."""

import os
import tempfile
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# One thread per process: the tensors are tiny, and threads that wait for a busy core cost minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Not the cache of whoever runs the tests; the workers of xdist share that of their controller.
CACHE = tempfile.TemporaryDirectory(prefix="mugs-tests-cache-")
os.environ.setdefault("MUGS_CACHE_DIR", CACHE.name)


class FileScheduling(LoadScopeScheduling):
    """A file stays on one worker, and one worker has all of Slurm.

    xdist's own `--dist loadgroup` reads the group from the node id, which pytest 9.2 no longer lets
    it change: every worker then builds every shared fixture, Slurm clusters included.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "slurm" if file.startswith("tests/slurm/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling:
    """Take the place of the scheduler that `--dist` names."""
    config.option.loadscopereorder = False
    return FileScheduling(config, log)


# Runs before `-m` takes tests out, so that the order does not depend on the choice.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put Slurm's tests first, which mostly wait, and then the files that hold slow tests.

    A long file that came last would leave the other worker without work.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def rank(item: pytest.Item) -> tuple[bool, bool]:
        return item.get_closest_marker("slurm") is None, item.path not in slow

    items.sort(key=rank)


# Reasons to skip that say nothing about the machine's set-up, and how many tests may give each.
EXPECTED_SKIPS = {
    "needs a GPU": 11,
    "needs root": 0 if os.geteuid() == 0 else 40,
    "needs the extra": 3,  # of `make test-all`: W&B, MLflow, trackio
}
SKIPPED: list[tuple[str, str]] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep bytes of file names that are no text out of reports, which end xdist's workers."""
    report = yield
    report.sections = [(name, make_printable(text)) for name, text in report.sections]
    if report.failed and (words := str(report.longrepr)) != make_printable(words):
        report.longrepr = make_printable(words)
    return report


def make_printable(text: str) -> str:
    """Return a text in which each surrogate is written as an escape, in letters."""
    return text.encode(errors="backslashreplace").decode()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect why tests were skipped; with xdist this runs on the controller as well."""
    if report.skipped and isinstance(report.longrepr, tuple):
        SKIPPED.append((report.nodeid, report.longrepr[2]))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Collect why whole files were skipped."""
    if report.skipped and isinstance(report.longrepr, tuple):
        SKIPPED.append((report.nodeid, report.longrepr[2]))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail on a skip that was not expected, where MUGS_NO_UNEXPECTED_SKIPS is set."""
    if not os.environ.get("MUGS_NO_UNEXPECTED_SKIPS") or hasattr(session.config, "workerinput"):
        return
    unexpected = find_unexpected_skips(SKIPPED)
    if unexpected:
        print("\nSkipped though nobody expected it:", *unexpected, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def find_unexpected_skips(skipped: Sequence[tuple[str, str]]) -> list[str]:
    """Return the skips, given as test and reason, for no expected reason or for one too often."""
    found = []
    counts: Counter[str] = Counter()
    for test, reason in skipped:
        expected = next((words for words in EXPECTED_SKIPS if words in reason), None)
        if expected is None:
            found.append(f"{test}: {reason}")
            continue
        counts[expected] += 1
        if counts[expected] > EXPECTED_SKIPS[expected]:
            found.append(f"{test}: {reason} (more than {EXPECTED_SKIPS[expected]} such tests)")
    return found


@pytest.fixture
def meetings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[set[Path]]:
    """What there is below `tmp_path` each time that the ranks wait for each other."""
    found: list[set[Path]] = []
    monkeypatch.setattr("mugs.distributed.barrier", lambda: found.append(set(tmp_path.rglob("*"))))
    return found
