"""One thread per process: the tensors are tiny,
and threads that wait for a busy core cost minutes.
"""

import os
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")


class FileScheduling(LoadScopeScheduling):
    """A file stays on one worker, and one worker has all of Slurm, which comes first.

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put Slurm's tests first: they mostly wait, while the other worker computes."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
