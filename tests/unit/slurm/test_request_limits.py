"""Limits on the size of one job: partition, QOS, association and reservation."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.findings import Finding
from pipeline.spec import Resources, StageConfig, StageRun
from slurm.shared import queue
from slurm.submission import preflight
from slurm.submission.profile import ClusterProfile
from slurm.submission.request_limits import find_refusal

# 2 nodes with 4 GPUs, 24 CPUs and 100 GB each, for 24 hours.
NEED = Resources(nodes=2, ranks_per_node=4, cpus_per_rank=6, memory_gb=100, hours=24)
BARE = NEED.model_copy(update={"memory_gb": None})
NOW = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - 3600))
SOON = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 3600 * 20))
LATER = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 3600 * 72))


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What Slurm's commands print, by a word of their arguments; else they fail."""
    found: dict[str, str] = {}

    def call(*command: str, **_: Any) -> tuple[int, str, str]:
        for word, text in found.items():
            if word in command:
                return 0, text, ""
        return 1, "", "no accounting"

    monkeypatch.setattr(queue, "call_slurm", call)
    return found


def refuse(
    partitions: dict[str, dict[str, str]], need: Resources = NEED, **options: Any
) -> str | None:
    profile = ClusterProfile(run_root=Path("/nowhere"), **options)
    run = StageRun("tiny", "one", "0123456789ab", StageConfig(), {}, need, "x:run")
    return find_refusal(profile, run, partitions, "me")


@pytest.mark.parametrize(
    ("fields", "options", "words"),
    [
        ({}, {}, None),
        ({"MaxNodes": "UNLIMITED", "MaxMemPerNode": "UNLIMITED"}, {}, None),
        ({"MaxNodes": "2"}, {}, None),
        ({"MaxNodes": "1"}, {}, "at most 1 nodes (MaxNodes), it asks for 2"),
        ({"MaxNodes": "2"}, {"gpus_per_node": 2}, "(MaxNodes), it asks for 4"),
        ({"MinNodes": "4"}, {}, "at least 4 nodes (MinNodes), it asks for 2"),
        ({"MinNodes": "0"}, {}, None),
        ({"MaxCPUsPerNode": "23"}, {}, "at most 23 CPUs of a node (MaxCPUsPerNode)"),
        ({"MaxCPUsPerNode": "16"}, {"cpus_per_rank": 4}, None),
        ({"MaxMemPerNode": "102400"}, {}, None),
        ({"MaxMemPerNode": "64000"}, {}, "at most 62.5 GB of a node (MaxMemPerNode)"),
        ({"MaxMemPerCPU": "4096"}, {}, "at most 96 GB of a node (MaxMemPerCPU)"),
        ({"MaxMemPerCPU": "0"}, {}, None),
        ({"DefMemPerCPU": "100"}, {}, None),  # the run says how much it needs
        ({"AllowAccounts": "ALL"}, {"account": "mine"}, None),
        ({"AllowAccounts": "mine,ours"}, {"account": "Mine"}, None),
        (
            {"AllowAccounts": "theirs"},
            {"account": "mine"},
            "no jobs of mine (AllowAccounts=theirs)",
        ),
        ({"AllowAccounts": "theirs"}, {}, None),  # the default account is not known
        ({"DenyAccounts": "mine"}, {"account": "mine"}, "no jobs of mine (DenyAccounts)"),
        ({"AllowQos": "long"}, {"qos": "short"}, "no jobs of short (AllowQos=long)"),
        ({"DenyQos": "short"}, {"qos": "short"}, "no jobs of short (DenyQos)"),
        ({"RootOnly": "YES"}, {}, "takes jobs of root only"),
        ({"ReqResv": "YES"}, {}, "takes jobs with a reservation only"),
        ({"ReqResv": "YES"}, {"reservation": "mine"}, None),
    ],
)
def test_limits_of_a_partition(
    fields: dict[str, str], options: dict[str, Any], words: str | None
) -> None:
    found = refuse({"gpu": fields}, **options)
    if words is None:
        assert found is None
    else:
        assert found is not None and found.startswith("partition gpu ") and words in found
    # Slurm takes another partition that has no such limit.
    assert refuse({"gpu": fields, "open": {}}, **options) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"DefMemPerNode": "UNLIMITED"}, None),
        ({"DefMemPerNode": "8000"}, None),
        ({"DefMemPerNode": "1000"}, "gives 0.977 GB of a node to a job that does not say"),
        ({"DefMemPerCPU": "100"}, "(DefMemPerCPU), too little for 4 ranks: set memory_gb"),
        ({"DefMemPerCPU": "4000"}, None),
    ],
)
def test_the_usual_memory_of_a_partition(fields: dict[str, str], words: str | None) -> None:
    found = refuse({"gpu": fields}, BARE)
    assert found is None if words is None else found is not None and words in found


def test_groups_of_a_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    found = refuse({"gpu": {"AllowGroups": "nobody_is_in_it"}})
    assert found == "partition gpu takes jobs of the groups nobody_is_in_it only (AllowGroups)"
    monkeypatch.setattr("slurm.submission.request_limits._list_groups", lambda: {"lab"})
    assert refuse({"gpu": {"AllowGroups": "lab,others"}}) is None


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("||||", None),
        ("|gres/gpu=8,node=2|||", None),
        ("|gres/gpu=4|||", "at most 4 gres/gpu, it asks for 8 (MaxTRES=gres/gpu=4)"),
        ("||node=1||", "at most 1 node, it asks for 2 (MaxTRESPU=node=1)"),
        ("|||cpu=40|", "at most 40 cpu, it asks for 48 (MaxTRESPA"),
        ("||||mem=150G", "at most 150 GB mem, it asks for 200 GB (GrpTRES"),
        ("||||mem=200G", None),
        ("||||gres/gpu:a100=4", "at most 4 gres/gpu:a100"),
        ("||||gres/gpu:v100=4,billing=3,license/x=1", None),
        ("gres/gpu=16||||", "at least 16 gres/gpu, it asks for 8 (MinTRES"),
        ("gres/gpu=1||||", None),
        ("not what was asked for", None),
    ],
)
def test_limits_of_a_qos(answers: dict[str, str], row: str, words: str | None) -> None:
    answers["qos"] = f"{row}\n"
    for partitions, options in (({}, {"qos": "long"}), ({"gpu": {"QoS": "long"}}, {})):
        found = refuse(partitions, gpu_type="a100", **options)
        assert found is None if words is None else found is not None and words in found
    assert refuse({"gpu": {"QoS": "N/A"}}) is None


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("|||\n", None),
        ("|12:00:00||\n", "account mine allows a job 12 h (MaxWall), it asks for 24 h"),
        ("|2-00:00:00|gres/gpu=4|\n", "account mine gives a job at most 4 gres/gpu"),
        ("|||node=1\n", "at most 1 node, it asks for 2 (GrpTRES=node=1)"),
        ("cpu||node=1|\n", None),  # in another partition
        ("cpu||node=1|\ngpu||cpu=8|\n", "at most 8 cpu"),
    ],
)
def test_limits_of_an_account(answers: dict[str, str], rows: str, words: str | None) -> None:
    answers["associations"] = rows
    found = refuse({"GPU": {}}, account="mine")
    assert found is None if words is None else found is not None and words in found
    assert refuse({"GPU": {}}) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("StartTime={NOW} EndTime={LATER} NodeCnt=2", None),
        ("StartTime={NOW} EndTime={LATER} NodeCnt=1", "has 1 nodes, it asks for 2"),
        ("StartTime={NOW} EndTime={SOON} NodeCnt=2", "h left until it ends, it asks for 24 h"),
        ("StartTime={SOON} EndTime={LATER} NodeCnt=2", None),
        ("StartTime={NOW} EndTime={NOW} NodeCnt=2", "has 0 h left"),
        ("StartTime={NOW} EndTime={SOON} NodeCnt=1 Flags=FLEX,MAINT", None),
        ("StartTime=Unknown EndTime=n/a", None),
        ("", None),
    ],
)
def test_limits_of_a_reservation(answers: dict[str, str], fields: str, words: str | None) -> None:
    fields = fields.format(NOW=NOW, SOON=SOON, LATER=LATER)
    answers["reservation"] = f"ReservationName=mine {fields} State=ACTIVE"
    found = refuse({"gpu": {}}, reservation="mine")
    assert found is None if words is None else found is not None and words in found


@pytest.mark.parametrize(
    ("choice", "states", "state"),
    [
        ("gpu", {"gpu": "UP"}, "ok"),
        ("gpu", {"gpu": "DOWN"}, "wrong"),
        ("gpu", {"gpu": "DRAIN"}, "wrong"),
        ("gpu", {"gpu": "INACTIVE"}, "wrong"),
        ("gpu,cpu", {"gpu": "DOWN", "cpu": "UP"}, "ok"),
        ("gpu,cpu", {"gpu": "DOWN", "cpu": "DRAIN"}, "wrong"),
        (None, {"gpu": "DOWN"}, "wrong"),
        (None, {"gpu": "UP"}, "ok"),
        (None, {}, "ok"),
    ],
)
def test_a_partition_that_starts_nothing(
    choice: str | None, states: dict[str, str], state: str
) -> None:
    partitions = {name: {"State": each, "Default": "YES"} for name, each in states.items()}
    found = preflight._check_partition(choice, partitions)
    assert isinstance(found, Finding) and found.state == state
    assert ("starts no job" in found.detail) == (state == "wrong")
