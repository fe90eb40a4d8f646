"""Limits of a cluster that a job meets: its time, and the nodes that there are."""

import math
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.spec import Resources, StageConfig, StageRun
from slurm.shared import active_runs, queue
from slurm.submission import preflight
from slurm.submission.profile import ClusterProfile, fold_ranks, time_limit_minutes

PARTITIONS = {
    "day": {"MaxTime": "1-00:00:00", "Default": "YES"},
    "long": {"MaxTime": "2-00:00:00", "QoS": "N/A"},
    "limited": {"MaxTime": "3-00:00:00", "QoS": "short"},
    "open": {"MaxTime": "UNLIMITED"},
    "unset": {},
}


def run(hours: float = 24.0, **resources: Any) -> StageRun:
    need = Resources(hours=hours, **resources)
    return StageRun("tiny", "one", "0123456789ab", StageConfig(), {}, need, "x:run")


@pytest.fixture(autouse=True)
def qos(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"short": 3600.0 * 12, "wide": math.inf}
    monkeypatch.setattr(queue, "query_qos_limit_s", limits.__getitem__)


@pytest.mark.parametrize(
    ("hours", "options", "words"),
    [
        (24, {}, None),  # exactly the limit of the default partition
        (25, {}, "its time limit is 25 h, partition day allows 24 h"),
        (25, {"partition": "day,long"}, None),
        (49, {"partition": "day,long"}, "its time limit is 49 h, partition long allows 48 h"),
        (12, {"partition": "limited"}, None),
        (13, {"partition": "limited"}, "partition limited allows 12 h"),
        (900, {"partition": "open"}, None),
        (900, {"partition": "unset"}, None),
        (900, {"partition": "not_there"}, None),
        (12, {"qos": "short"}, None),
        (13, {"qos": "short"}, "its time limit is 13 h, QOS short allows 12 h"),
        (13, {"qos": "wide"}, None),
        (900, {"max_hours": 24}, None),
    ],
)
def test_time_limits(
    tmp_path: Path, hours: float, options: dict[str, Any], words: str | None
) -> None:
    profile = ClusterProfile(run_root=tmp_path, **options)
    found = preflight.find_exceeded_limit(profile, run(hours), PARTITIONS)
    assert found is None if words is None else found is not None and words in found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "2 nodes with 24 CPUs, 4 GPUs (any type) each; the nodes of day have: {'day'}"),
        ({"gpu_type": "a100"}, "4 GPUs (a100) each"),
        ({"cpus_per_rank": 5}, "with 20 CPUs"),
        ({"gpus_per_node": 2}, "4 nodes with 12 CPUs, 2 GPUs"),
        ({"partition": "open"}, "the nodes of open have: {'open'}"),
    ],
)
def test_what_a_job_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(preflight.nodes, "describe_nodes", lambda names, _: str(names))
    need = run(nodes=2, ranks_per_node=4, cpus_per_rank=6)
    profile = ClusterProfile(run_root=tmp_path, **options)
    assert words in preflight.describe_request(profile, need, PARTITIONS)


def test_what_a_job_without_gpus_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise queue.SlurmError("away")

    monkeypatch.setattr(preflight.nodes, "describe_nodes", refuse)
    need = run(gpu=False, nodes=1, ranks_per_node=1, cpus_per_rank=3)
    profile = ClusterProfile(run_root=tmp_path)
    found = preflight.describe_request(profile, need, PARTITIONS)
    assert found == "asked for 1 nodes with 3 CPUs each"


@pytest.mark.parametrize(
    ("asked", "limit", "folded"),
    [
        ((1, 8, 100), 8, (1, 8, 100)),
        ((3, 8, 100), 4, (6, 4, 50)),
        ((1, 8, 101), 4, (2, 4, 51)),  # rounded up
        ((1, 8, None), 2, (4, 2, None)),
        ((1, 6, 60), 4, (1, 6, 60)),  # 6 ranks do not fill nodes of 4
        ((2, 6, 60), 4, (3, 4, 40)),
        ((1, 8, 100), 0, (1, 8, 100)),
    ],
)
def test_ranks_go_to_more_nodes(
    tmp_path: Path, asked: tuple[Any, ...], limit: int, folded: tuple[Any, ...]
) -> None:
    names = ("nodes", "ranks_per_node", "memory_gb")
    need = Resources(**dict(zip(names, asked, strict=True)))
    profile = ClusterProfile(run_root=tmp_path, gpus_per_node=limit)
    found = fold_ranks(profile, need)
    assert tuple(getattr(found, name) for name in names) == folded
    on_cpus = need.model_copy(update={"gpu": False})
    assert fold_ranks(profile, on_cpus) == on_cpus


@pytest.mark.parametrize(
    ("hours", "most", "minutes"),
    [(2.0, None, 120), (2.0, 1.0, 60), (2.0, 3.0, 120), (0.001, None, 1), (1.001, None, 61)],
)
def test_minutes_of_a_job(tmp_path: Path, hours: float, most: float | None, minutes: int) -> None:
    profile = ClusterProfile(run_root=tmp_path, max_hours=most)
    assert time_limit_minutes(profile, Resources(hours=hours)) == minutes


@pytest.mark.parametrize(
    ("script", "note", "expected"),
    [
        (None, None, None),
        (10, None, "?"),  # the submission died before it recorded the job
        (10, 10, "7"),
        (10, 11, "7"),
        (11, 10, "?"),
        (None, 10, "7"),
    ],
)
def test_the_job_of_the_last_submission(
    tmp_path: Path, script: int | None, note: int | None, expected: str | None
) -> None:
    for name, text, age in ((queue.SCRIPT, "", script), (queue.JOB_NOTE, '{"job_id": "7"}', note)):
        if age is not None:
            (tmp_path / name).write_text(text)
            os.utime(tmp_path / name, (age, age))
    assert active_runs._last_job_id(tmp_path) == expected
