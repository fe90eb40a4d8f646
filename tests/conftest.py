"""One thread per process: the tensors are tiny,
and threads that wait for a busy core cost minutes.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: a file stays on one worker, and one worker has all of Slurm,
    which comes first.
    """
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
    for item in items:
        group = "slurm" if item.get_closest_marker("slurm") else item.location[0]
        item.add_marker(pytest.mark.xdist_group(group))
