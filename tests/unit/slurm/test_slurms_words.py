"""What Slurm's commands print, as numbers and names of ours."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import attempts
from pipeline.files import write_json_atomic
from pipeline.manifest import ManifestEntry, record_entry
from pipeline.spec import Resources, StageConfig, StageRun
from slurm import status
from slurm.node.signals import LEAD_SECONDS_VARIABLE
from slurm.node.time_limit import reached_time_limit
from slurm.shared import costs, nodes, queue
from slurm.shared.costs import Cost, sum_attempts
from slurm.shared.logs import find_newest_log, log_path, rank_output_path, read_last_line
from slurm.shared.queue import QueuedJob, SlurmError

RUN = StageRun("tiny", "one", "0123456789ab", StageConfig(), {}, Resources(gpu=False), "x:run")
Say = Callable[[int, str, str], list[tuple[str, ...]]]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """Let every command of Slurm end with a code, an output and errors; return the calls."""

    def set_answer(code: int, out: str, err: str) -> list[tuple[str, ...]]:
        calls: list[tuple[str, ...]] = []

        def call(*command: str, **_: Any) -> tuple[int, str, str]:
            calls.append(command)
            return code, out, err

        monkeypatch.setattr(queue, "call_slurm", call)
        return calls

    return set_answer


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("4:05", 245),
        (" 36:01:02\n", 36 * 3600 + 62),
        ("2-12:30:01", 2 * 86400 + 12 * 3600 + 1801),
        ("UNLIMITED", math.inf),
        ("infinite", math.inf),
        ("Partition_Limit", 0),
        ("", 0),
    ],
)
def test_durations_of_slurm(text: str, seconds: float) -> None:
    assert queue.parse_duration_s(text) == seconds


@pytest.mark.parametrize(
    ("code", "out", "seconds"),
    [(0, "1-00:00:00\n", 86400), (0, "\n", math.inf), (1, "1-00:00:00", math.inf)],
)
def test_the_limit_of_a_qos(say: Say, code: int, out: str, seconds: float) -> None:
    calls = say(code, out, "")
    assert queue.query_qos_limit_s("long") == seconds
    assert calls[0][:6] == ("sacctmgr", "-n", "-P", "show", "qos", "long")


def test_associations_of_a_user(say: Say) -> None:
    calls = say(0, "vision\nbio,chem\nvision\n", "")
    assert queue.list_associations("me", "Account") == ["bio", "chem", "vision"]
    assert calls[0][-2:] == ("user=me", "format=Account")
    say(1, "vision", "no accounting")
    assert queue.list_associations("me", "QOS") == []


def test_partitions_by_name(say: Say) -> None:
    say(0, "PartitionName=a State=UP\n\nPartitionName=b MaxTime=1:00 State=DOWN\n", "")
    assert queue.list_partitions() == {
        "a": {"PartitionName": "a", "State": "UP"},
        "b": {"PartitionName": "b", "MaxTime": "1:00", "State": "DOWN"},
    }
    for out, err, words in (("", "cannot contact", "cannot contact"), ("said", "", "said")):
        say(1, out, err)
        with pytest.raises(SlurmError, match=words):
            queue.list_partitions()
    say(3, "", "")
    with pytest.raises(SlurmError, match="scontrol exit 3"):
        queue.list_partitions()


@pytest.mark.parametrize(
    ("code", "out", "err", "expected"),
    [
        (0, "", "note\nsbatch: Job 7 to start at noon", (True, "Job 7 to start at noon")),
        (1, "", "sbatch: error: invalid partition", (False, "invalid partition")),
        (1, "", "", (False, "exit code 1")),
    ],
)
def test_a_dry_run(say: Say, code: int, out: str, err: str, expected: tuple[bool, str]) -> None:
    calls = say(code, out, err)
    assert queue.dry_run_script("#!/bin/sh") == expected
    assert calls == [("sbatch", "--test-only")]


def test_the_address_of_a_node(say: Say) -> None:
    say(0, "NodeName=n1 NodeAddr=10.0.0.1 State=IDLE", "")
    assert queue.query_node_address("n1") == "10.0.0.1"
    say(1, "NodeAddr=10.0.0.1", "")
    assert queue.query_node_address("n1") is None


@pytest.mark.parametrize(
    ("code", "err", "refused"),
    [
        (0, "", None),
        (1, "scancel: error: Kill job error on job id 7: Invalid job id specified", None),
        (1, "already completing or completed\nInvalid job id 8", None),
        (1, "Invalid job id 7\nAccess denied", "Access denied"),
        (1, "", "scancel exit 1"),
    ],
)
def test_what_has_ended_is_canceled_already(
    say: Say, code: int, err: str, refused: str | None
) -> None:
    calls = say(code, "", err)
    if refused is None:
        queue.cancel_jobs(["7", "8"])
    else:
        with pytest.raises(SlurmError, match=f"cannot cancel 7 8: {refused}"):
            queue.cancel_jobs(["7", "8"])
    assert calls == [("scancel", "7", "8")]
    calls.clear()
    queue.cancel_jobs([])
    assert calls == []


@pytest.mark.parametrize(
    ("state", "reason", "words"),
    [
        ("PENDING", "Priority", ""),
        ("PENDING", "BadConstraints", "no node of the cluster fits"),
        ("RUNNING", "BadConstraints", ""),
        ("PENDING", "QOSMaxWallDurationPerJobLimit", "set max_hours"),
        ("PENDING", "AssocMaxGRESPerJob", "more than a limit allows one job"),
        ("PENDING", "QOSMaxCpuPerJobLimit", "more than a limit allows one job"),
        ("PENDING", "QOSMaxJobsPerUserLimit", ""),
        ("PENDING", "AssocGrpCpuLimit", ""),
    ],
)
def test_reasons_that_waiting_does_not_cure(state: str, reason: str, words: str) -> None:
    job = QueuedJob("7", "mugs-x", state, reason)
    assert words in job.why_never and job.can_run == (words == "") == (job.why_never == "")


@pytest.mark.parametrize(
    ("state", "reason", "held"),
    [("PENDING", "JobHeldUser", True), ("RUNNING", "JobHeldUser", False), ("PENDING", "x", False)],
)
def test_held_jobs(state: str, reason: str, held: bool) -> None:
    assert QueuedJob("7", "mugs-x", state, reason).is_held == held


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("", {}),
        ("gpu", {"gpu": 1}),
        ("gres:gpu:4", {"gpu": 4}),
        ("gres/gpu:a100=3", {"gpu": 3, "gpu:a100": 3}),
        (
            "gpu:a100:8(S:0,1), gpu:v100:2,nvme",
            {"gpu": 10, "gpu:a100": 8, "gpu:v100": 2, "nvme": 1},
        ),
    ],
)
def test_generic_resources(text: str, counts: dict[str, int]) -> None:
    assert nodes.parse_gres(text) == counts


@pytest.mark.parametrize(
    ("text", "mb"),
    [
        ("512", 512),
        ("2048K", 2),
        ("3Mn", 3),
        ("1.5G", 1536),
        ("2Tc", 2 << 20),
        ("0", 0),
        ("?", 0),
        ("1.2.3G", 0),
    ],
)
def test_memory(text: str, mb: float) -> None:
    assert nodes.parse_memory_mb(text) == mb


@pytest.mark.parametrize(
    ("expression", "fits"),
    [
        ("", True),
        ("(null)", True),
        ("a", True),
        ("x", False),
        ("a&x", False),
        ("a,b", True),
        ("x|a", True),
        ("x|a&x", False),  # from left to right: (x|a)&x
        ("a|x&x", False),
        ("x&x|a", True),
        ("x|(a&b)", True),
        ("a&(x|y)", False),
        ("[x|b]&a", True),
    ],
)
def test_constraints(expression: str, fits: bool) -> None:
    assert nodes.matches_features(expression, frozenset({"a", "b"})) == fits


NODES = """NodeName=n1 CPUEfctv=62 CPUTot=64 RealMemory=500000 State=IDLE Partitions=p,q Gres=gpu:a100:8
NodeName=n2 CPUTot=62 RealMemory=500000 State=DOWN* Partitions=p Gres=gpu:a100:8
NodeName=n3 CPUTot=8 RealMemory=1500 State=IDLE+CLOUD~ Partitions=p Gres=(null)
NodeName=n4 CPUTot=8 RealMemory=1500 State=IDLE Partitions=q Gres=(null)"""  # noqa: E501


@pytest.mark.parametrize(
    ("partitions", "words"),
    [
        ({"p"}, "2 x 62 CPUs, 500 GB, gpu:a100:8 (1 down or drained); 1 x 8 CPUs, 2 GB"),
        ({"q"}, "1 x 62 CPUs, 500 GB, gpu:a100:8; 1 x 8 CPUs, 2 GB"),
        ({"r"}, "none"),
    ],
)
def test_nodes_in_words(partitions: set[str], words: str) -> None:
    assert nodes.describe_nodes(partitions, lambda *_: (0, NODES)) == words


@pytest.mark.parametrize(
    ("state", "takes_jobs"),
    [
        ("MIXED", True),
        ("IDLE+PLANNED", True),
        ("IDLE#", True),
        ("IDLE*", False),  # it does not respond
        ("MIXED+DRAIN", False),
        ("RESERVED+MAINT", False),
        ("", False),
    ],
)
def test_nodes_that_take_jobs(state: str, takes_jobs: bool) -> None:
    text = f"NodeName=n1 Partitions=p {f'State={state}' if state else ''}"
    (found,) = nodes.list_nodes(lambda *_: (0, text))
    assert found.takes_jobs == takes_jobs and found.cpus == 0


@pytest.mark.parametrize(
    ("lead", "ran", "reached"),
    [
        # Of an hour: the lead time and 90 s before the end.
        (None, "56:30", True),
        (None, "56:29", False),
        ("600", "48:30", True),
        ("600", "48:29", False),
    ],
)
def test_when_the_time_limit_is_why(
    monkeypatch: pytest.MonkeyPatch, lead: str | None, ran: str, reached: bool
) -> None:
    monkeypatch.delenv(LEAD_SECONDS_VARIABLE, raising=False)
    if lead is not None:
        monkeypatch.setenv(LEAD_SECONDS_VARIABLE, lead)
    assert reached_time_limit({"RunTime": ran, "TimeLimit": "1:00:00"}) == reached
    assert not reached_time_limit({"RunTime": ran})
    assert not reached_time_limit({"TimeLimit": "1:00:00"})


def test_what_attempts_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ended by its log, the second has no log, the third still runs."""
    monkeypatch.setattr(costs, "time", SimpleNamespace(time=lambda: 10_000.0))
    for began, facts in ((1000.0, {"gpus": 4}), (5000.0, {}), (9000.0, {})):
        attempts.start_attempt(tmp_path, time=began, **facts)
    log = log_path(tmp_path, 1, 0)
    log.parent.mkdir()
    log.touch()

    os.utime(log, (1900, 1900))
    found = sum_attempts(tmp_path, gpus=2, running=3)
    assert found.seconds == 900 + 0 + 1000
    assert found.gpu_hours == pytest.approx((900 * 4 + 1000 * 2) / 3600)
    os.utime(log, (400, 400))  # the clock of another machine: no cost is negative
    assert sum_attempts(tmp_path, gpus=2) == Cost(0.0, 0.0)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"seconds": 3725.0}, "1h02m"),
        ({"seconds": 60.0, "gpus": 8, "gpu_hours": 0.26}, "1m00s, 0.3 GPU-hours"),
        ({"seconds": 5.0, "gpu_hours": 1.0, "attempt": 3, "restarts": 2}, "5s, 2 restarts"),
    ],
)
def test_the_cost_of_a_run_that_is_done(
    tmp_path: Path, say: Say, facts: dict[str, Any], words: str
) -> None:
    say(127, "", "not found")
    entry = ManifestEntry(stage="tiny", name="one", run_id=RUN.run_id, **facts)
    record_entry(tmp_path, entry)
    (found,) = status.collect_status([RUN], tmp_path)
    assert (found.state, found.detail) == ("done", words)
    assert found.cost == Cost(entry.seconds, entry.gpu_hours)


def in_state(state: str) -> status.RunStatus:
    return status.RunStatus(RUN, state)


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["done", "waiting", "queued"], 0),
        (["done", "unknown"], 75),
        (["unknown", "failed"], 1),
        (["blocked"], 1),
        ([], 0),
    ],
)
def test_exit_codes_of_status(states: list[str], code: int) -> None:
    assert status.exit_code([in_state(state) for state in states]) == code


@pytest.mark.parametrize("state", ["running", "queued", "unknown", "done", "waiting", "blocked"])
def test_status_is_watched_while_something_may_happen(
    monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    answers = iter([[in_state(state)], [in_state("done")]])
    pauses: list[float] = []
    monkeypatch.setattr(status, "collect_status", lambda *_: next(answers))
    monkeypatch.setattr(status, "time", SimpleNamespace(sleep=pauses.append))
    seen = [found[0].state for found in status.watch_status([RUN], Path(), pause_s=3.0)]
    goes_on = state in ("running", "queued", "unknown")
    assert (seen, pauses) == (([state, "done"], [3.0]) if goes_on else ([state], []))


@pytest.mark.parametrize(
    ("note", "words"),
    [
        ({}, "starting"),
        ({"done": 3, "total": 9, "time": 99.0}, "starting"),  # of an earlier attempt
        ({"done": 3, "total": 9, "time": 100.0}, "3/9 steps, no news for 3m20s"),
        ({"done": 3, "total": 9, "unit": "shards", "phase": "test"}, "test: 3/9 shards"),
        ({"done": 3, "total": 9, "rate": 0.123456, "rate_unit": "it/s"}, "3/9 steps, 0.1235 it/s"),
        ({"done": 3, "total": 9, "rate": 7, "eta_s": 0}, "3/9 steps, 7 img/s, 0s left"),
        ({"done": 3, "total": 9, "time": 120.0}, "3/9 steps"),  # three minutes ago
        ({"done": 3, "total": 9, "time": 119.0}, "3/9 steps, no news for 3m01s"),
    ],
)
def test_progress_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: dict[str, Any], words: str
) -> None:
    # The times of the files count: the hosts that wrote them may have other clocks.
    run_dir = RUN.run_dir(tmp_path)
    attempts.start_attempt(run_dir, job_id="7", time=1e9)
    os.utime(run_dir / "attempts/0001.json", (100.0, 100.0))
    if note:
        write_json_atomic(run_dir / "progress.json", {**note, "time": 1e9})
        os.utime(run_dir / "progress.json", (note.get("time", 250.0),) * 2)
    monkeypatch.setattr("pipeline.files.read_server_time", lambda folder: 300.0)
    job = QueuedJob("7", queue.job_name(run_dir), "RUNNING", "None")
    monkeypatch.setattr(queue, "find_jobs", lambda *_, **__: {RUN.run_id: [job]})
    (found,) = status.collect_status([RUN], tmp_path)
    assert (found.state, found.detail) == ("running", words)


@pytest.mark.parametrize(
    ("reason", "state", "words"),
    [
        ("Priority", "queued", "pending: Priority, 1 attempt before, the last failed: it broke"),
        ("JobHeldUser", "queued", "held: `scontrol release 7` lets it start"),
        (queue.NEVER_SATISFIED, "waiting", "a run that it needs has failed: submit again"),
        ("PartitionTimeLimit", "blocked", "set max_hours"),
    ],
)
def test_pending_jobs_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, state: str, words: str
) -> None:
    run_dir = RUN.run_dir(tmp_path)
    number = attempts.start_attempt(run_dir, job_id="6")
    attempts.record_failure(run_dir, number, error="it broke", log=run_dir / "log")
    job = QueuedJob("7", queue.job_name(run_dir), "PENDING", reason)
    other = replace(job, job_id="5", reason=queue.NO_NODE_FITS)
    monkeypatch.setattr(queue, "find_jobs", lambda *_, **__: {RUN.run_id: [other, job]})
    (found,) = status.collect_status([RUN], tmp_path)
    assert found.state == state and words in found.detail and found.job_id == "7"


def test_status_as_json() -> None:
    found = replace(in_state("running"), cost=Cost(12.6, 0.123456), job_id="7", log="l", detail="d")
    fields = {
        "run": "one", "run_id": "0123456789ab", "state": "running", "detail": "d",
        "job_id": "7", "log": "l", "seconds": 13, "gpu_hours": 0.1235,
    }  # fmt: skip
    for forecasts in ({}, {"0123456789ab": {"epoch": 3}}):
        reasons = {} if forecasts else {"0123456789ab": "no k-NN curve"}
        shown = status.json.loads(status.format_json([found], forecasts, reasons))
        told = {"forecast": forecasts.get("0123456789ab"), "no_forecast": None, **fields}
        assert shown == [told if forecasts else {**told, "no_forecast": "no k-NN curve"}]


def test_the_log_that_says_most(tmp_path: Path) -> None:
    """That of an attempt, then standard error, then the newest; never an empty one."""
    assert find_newest_log(tmp_path) is None

    folder = tmp_path / "logs"
    folder.mkdir()
    for age, name in enumerate(
        ("7_0.out", "7_0.err", "attempt_0001_rank0.log", "8_0.err", "x.txt")
    ):
        (folder / name).write_text(name)
        os.utime(folder / name, (1000 - age, 1000 - age))
    (folder / "attempt_0002_rank0.log").touch()
    assert find_newest_log(tmp_path) == str(folder / "attempt_0001_rank0.log")
    assert find_newest_log(tmp_path, "7_*") == str(folder / "7_0.err")
    assert find_newest_log(tmp_path, "?_*") == str(folder / "7_0.err")
    assert find_newest_log(tmp_path, "*.out") == str(folder / "7_0.out")
    assert find_newest_log(tmp_path, "*.txt") is None


@pytest.mark.parametrize(
    ("text", "line"),
    [("", ""), ("one\n  two \n \n", "two"), ("x" * 9000 + "\nlast", "last"), ("\n\n", "")],
)
def test_the_last_line_of_a_log(tmp_path: Path, text: str, line: str) -> None:
    path = rank_output_path(tmp_path, 3)
    path.parent.mkdir()
    path.write_text(text)
    assert path.name == "rank3.err" and read_last_line(str(path)) == line
    assert read_last_line(None) == ""


@pytest.mark.parametrize(
    "fields",
    [
        "CPUTot=many",
        "CPUEfctv=-1 CPUTot=8",
        "RealMemory=lots",
        "RealMemory=1.2.3G",
        "Gres=gpu:\u00b2",
    ],
)
def test_what_is_no_number_counts_as_nothing(fields: str) -> None:
    (found,) = nodes.list_nodes(lambda *_: (0, f"NodeName=n1 State=IDLE {fields}"))
    assert (found.cpus, found.memory_mb) == (0, 0)


@pytest.mark.parametrize("answer", ["\udcff\udcfe\0", "7\0", "\x1b[31m7"])
def test_an_answer_that_is_no_job_id(say: Say, answer: str) -> None:
    say(0, answer, "")
    with pytest.raises(SlurmError, match="is no job id"):
        queue.submit_text("#!/bin/sh", what="x")
