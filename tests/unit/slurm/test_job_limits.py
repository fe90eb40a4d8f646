"""Limits on a user's jobs: what the doctor says, and how a reproduction gets through them."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.manifest import ManifestEntry, record_entry
from pipeline.spec import ConfigError, Resources, StageRun
from slurm import keeper
from slurm.shared import queue
from slurm.shared.limits import JobLimit, JobLimits, read_job_limits
from slurm.submission import preflight
from slurm.submission import submit as submission
from slurm.submission.profile import ClusterProfile
from stages import STAGES

NO = JobLimits()
OWN = "your association"
# As `sacctmgr -n -P` prints them; the names of accounts, partitions and QOS are made up.
QOS = "normal||||\nlong|8|20||\nshared|2|||40\nhold|0|||\n"
ASSOCIATIONS = "vision||normal|||30|60\nvision|gpu|long|5|||\nbio||hold||||\n"
FULL = (
    "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job "
    "violates accounting/QOS policy (job submit limit, user's size and/or time limits)\n"
)
TOO_LONG = FULL.replace("QOSMaxSubmitJobPerUserLimit", "QOSMaxWallDurationPerJobLimit")


def sacctmgr(monkeypatch: pytest.MonkeyPatch, **answers: str) -> None:
    """Let sacctmgr show these rows; without any, there is no accounting."""

    def call(*command: str, **_: Any) -> tuple[int, str, str]:
        if command[:4] == ("sacctmgr", "-n", "-P", "show") and command[4] in answers:
            return 0, answers[command[4]], ""
        return 1, "", "sacctmgr: error: Problem talking to the database"

    monkeypatch.setattr(queue, "call_slurm", call)


@pytest.mark.parametrize(
    ("account", "partition", "qos", "expected"),
    [
        # The usual account; a QOS without limits leaves it to the association.
        (None, "cpu", None, JobLimits(JobLimit(60, OWN), JobLimit(30, OWN))),
        # An association of the partition comes before the general one, and its QOS before both.
        (None, "gpu", None, JobLimits(JobLimit(20, "QOS long"), JobLimit(8, "QOS long"))),
        (None, "gpu", "shared", JobLimits(JobLimit(40, "QOS shared"), JobLimit(2, "QOS shared"))),
        ("bio", "cpu", None, JobLimits(None, JobLimit(0, "QOS hold"))),
        ("other", "cpu", None, NO),
        # The QOS of a partition comes before that of the job, limit by limit.
        (None, "limited", "long", JobLimits(JobLimit(40, "QOS shared"), JobLimit(2, "QOS shared"))),
        (None, "held", "long", JobLimits(JobLimit(20, "QOS long"), JobLimit(0, "QOS hold"))),
    ],
)  # fmt: skip
def test_the_limits_in_effect(
    monkeypatch: pytest.MonkeyPatch,
    account: str | None,
    partition: str,
    qos: str | None,
    expected: JobLimits,
) -> None:
    sacctmgr(monkeypatch, qos=QOS, associations=ASSOCIATIONS, user="vision\n")
    fields = {"PartitionName": partition}
    fields |= {"QoS": {"limited": "shared", "held": "hold"}.get(partition, "N/A")}
    assert read_job_limits("me", account=account, partition=fields, qos=qos) == expected
    sacctmgr(monkeypatch)
    assert read_job_limits("me", account=account, partition=fields, qos=qos) == NO


@pytest.mark.parametrize(
    ("submitted", "running", "states", "words"),
    [
        (None, None, [], ""),
        (5, None, ["ok"], "at most 5 of your jobs may be in the queue (QOS q); these are 3 and"),
        (4, 2, ["ok", "ok"], "submit queues what fits, the keeper the others as jobs end"),
        (2, None, ["wrong"], "too few for a keeper"),
        (None, 2, ["ok"], "at most 2 of your jobs run at a time (QOS q); the others wait"),
        (None, 0, ["wrong"], "at most 0 of your jobs run"),
    ],
)
def test_the_doctor_says_what_will_happen(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    submitted: int | None,
    running: int | None,
    states: list[str],
    words: str,
) -> None:
    limits = [None if count is None else JobLimit(count, "QOS q") for count in (submitted, running)]
    monkeypatch.setattr(preflight, "read_job_limits", lambda *_, **__: JobLimits(*limits))
    profile = ClusterProfile(run_root=tmp_path)
    found = preflight._check_job_limits(profile, RUNS[:3], {"day": {"Default": "YES"}})
    assert [finding.state for finding in found] == states
    assert words in "\n".join(finding.detail for finding in found)


@pytest.mark.parametrize(
    ("grace", "kill_wait", "save_s", "words"),
    [
        ("60", "30 sec", 12.4, "90 s to save (with KillWait=30 s), a save takes about 12 s"),
        ("0", "30 sec", 25.0, "a save takes about 25 s"),
        ("0", "30 sec", 25.1, "not enough, so what it did since its last checkpoint is lost"),
        ("0", "", 1.0, ""),
        ("?", "30 sec", 1.0, ""),
    ],
)
def test_time_to_save(grace: str, kill_wait: str, save_s: float, words: str) -> None:
    found = preflight._describe_time_to_save(grace, kill_wait, save_s)
    assert words in found and bool(words) == bool(found)
    assert ("not enough" in found) == (save_s == 25.1)


def make_run(number: int, *needs: int) -> StageRun:
    """Return a run that needs others, by their numbers."""
    roles = {f"role{need}": f"{need:012d}" for need in needs}
    need = Resources(gpu=False, hours=1)
    stage = STAGES["knn"]  # the keeper reads the runs from their files
    return StageRun(
        "knn", f"r{number}", f"{number:012d}", stage.config(), roles, need, stage.entrypoint
    )


RUNS = [
    make_run(0),
    make_run(1, 0),
    *(make_run(number, 1) for number in range(2, 7)),
    make_run(7, 3),
]


class LimitedSlurm:
    """A queue with so many places; jobs wait for those they depend on, and end one by one."""

    def __init__(self, places: int, taken: int = 0) -> None:
        self.places = places
        self.taken = taken  # by jobs of other reproductions
        self.jobs: dict[str, dict[str, str]] = {}
        self.number = 100
        self.most = 0  # runs that were in the queue at the same time

    def call(self, *command: str, stdin: str | None = None, **_: Any) -> tuple[int, str, str]:
        """Answer a command."""
        return getattr(self, f"_{command[0]}", self._unknown)(command, stdin or "")

    def _unknown(self, command: tuple[str, ...], stdin: str) -> tuple[int, str, str]:
        return 1, "", "Invalid job id specified"

    def _sbatch(self, command: tuple[str, ...], stdin: str) -> tuple[int, str, str]:
        if len(self.jobs) + self.taken >= self.places:
            return 1, "", FULL
        self.number += 1
        options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", stdin, re.MULTILINE))
        options |= dict(option[2:].split("=", 1) for option in command if "=" in option)
        options["state"] = "PENDING"
        self.jobs[str(self.number)] = options
        names = [job["job-name"] for job in self.jobs.values()]
        self.most = max(self.most, sum("keep" not in name for name in names))
        return 0, f"{self.number}\n", ""

    def _squeue(self, command: tuple[str, ...], stdin: str) -> tuple[int, str, str]:
        lines = [
            f"{job_id}|{job['job-name']}|{job['state']}|None|{job.get('dependency', '')}|"
            f"{os.geteuid()}|(null)|{job.get('comment', '(null)')}"
            for job_id, job in self.jobs.items()
            if f"{job['job-name']}," in f"{command[2].removeprefix('--name=')},"
        ]
        return 0, "\n".join(lines), ""

    def _scancel(self, command: tuple[str, ...], stdin: str) -> tuple[int, str, str]:
        for job_id in command[1:]:
            if "--state=PENDING" not in command or self._state(job_id) == "PENDING":
                self.jobs.pop(job_id, None)
        return 0, "", ""

    def _state(self, job_id: str) -> str:
        return self.jobs.get(job_id, {}).get("state", "")

    def find_next(self) -> str:
        """Return the first job that may start."""

        def may_start(job: dict[str, str]) -> bool:
            kinds = job.get("dependency", "").strip("'")
            ids = re.findall(r"\d+", kinds)
            gone = [job_id not in self.jobs for job_id in ids]
            return (any if "?" in kinds else all)(gone) if ids else True

        # Keepers come first: they are the ones that may do harm.
        jobs = sorted(self.jobs, key=lambda job_id: "keep" not in self.jobs[job_id]["job-name"])
        return next(job_id for job_id in jobs if may_start(self.jobs[job_id]))


@pytest.fixture
def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LimitedSlurm]:
    """Slurm with so many places in its queue."""

    def make(places: int, taken: int = 0) -> LimitedSlurm:
        made = LimitedSlurm(places, taken)
        monkeypatch.setattr(queue, "call_slurm", made.call)
        return made

    for module in (submission, keeper):
        monkeypatch.setattr(module, "take_snapshot", lambda _: tmp_path / "code")
        monkeypatch.setattr(module, "checking_lines", lambda _: ["check"])
    monkeypatch.setattr("shutil.which", lambda name, *_, **__: f"/usr/bin/{name}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return make


def end_all_jobs(slurm: LimitedSlurm, root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every job start and end well, keepers too; return the names of runs in this order."""
    order = []
    for _ in range(200):
        if not slurm.jobs:
            return order
        job_id = slurm.find_next()
        slurm.jobs[job_id]["state"] = "RUNNING"
        if "keep" in slurm.jobs[job_id]["job-name"]:
            (note,) = (path for path in root.glob("keepers/*/*.json") if path.stem.count(".") == 0)
            with monkeypatch.context() as patch:
                patch.setenv("SLURM_JOB_ID", job_id)
                keeper.keep_going(note, str(keeper.read_json(note)["sha256"]))  # type: ignore[index]
        else:
            run_id = slurm.jobs[job_id]["comment"].rpartition("-")[2]
            run = next(run for run in RUNS if run.run_id == run_id)
            record_entry(root, ManifestEntry(stage="knn", name=run.name, run_id=run_id))
            order.append(run.name)
        slurm.jobs.pop(job_id, None)
    raise AssertionError(f"no end: {slurm.jobs}")


@pytest.mark.parametrize("places", [3, 4, 9])
def test_a_reproduction_gets_through_a_full_queue_by_itself(
    limited: Callable[..., LimitedSlurm],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    places: int,
) -> None:
    slurm = limited(places)
    profile = ClusterProfile(run_root=tmp_path)
    made = submission.submit(RUNS, profile, leave_room=True)
    actions = [each.action for each in made]
    fit = min(len(RUNS), places - 1)
    assert actions == ["submitted"] * fit + ["deferred"] * (len(RUNS) - fit)
    assert keeper.queue_keeper(RUNS, profile)
    order = end_all_jobs(slurm, tmp_path, monkeypatch)
    assert sorted(order) == sorted(run.name for run in RUNS)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_at_most_so_many_runs_are_in_the_queue(
    limited: Callable[..., LimitedSlurm],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at_once: int,
) -> None:
    slurm = limited(99)
    profile = ClusterProfile(run_root=tmp_path, max_at_once=at_once)
    made = submission.submit(RUNS, profile, leave_room=True)
    assert [each.action for each in made] == ["submitted"] + ["deferred"] * (len(RUNS) - 1)
    assert made[1].reason == f"at most {at_once} at once, and it needs runs that are not done"
    assert keeper.queue_keeper(RUNS, profile)
    del slurm.jobs[str(made[0].job_id)]
    preempted = (0, "PREEMPTED\n", "")
    monkeypatch.setattr(slurm, "_sacct", lambda *_: preempted, raising=False)
    order = end_all_jobs(slurm, tmp_path, monkeypatch)
    assert sorted(order) == sorted(run.name for run in RUNS) and slurm.most == at_once


def test_before_each_run_the_queue_is_asked_about_what_it_needs(
    limited: Callable[..., LimitedSlurm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not about all runs, or a thousand of them would be a million questions."""
    limited(20)
    asked: list[set[str]] = []
    ask = queue.find_jobs

    def find_jobs(runs: Sequence[StageRun], root: Path) -> dict[str, list[queue.QueuedJob]]:
        asked.append({run.name for run in runs})
        return ask(runs, root)

    monkeypatch.setattr(queue, "find_jobs", find_jobs)
    submission.submit(RUNS, ClusterProfile(run_root=tmp_path))
    assert asked[0] == {run.name for run in RUNS}
    chain = {"r0", "r1"}
    assert asked[1:] == [
        {"r0"},
        chain,
        *({*chain, f"r{number}"} for number in range(2, 7)),
        {*chain, "r3", "r7"},
    ]


def test_one_run_again_needs_what_it_reads(
    limited: Callable[..., LimitedSlurm], tmp_path: Path
) -> None:
    """`submit --only RUN`: alone if its inputs are done; else nothing is queued."""
    slurm = limited(99)
    profile = ClusterProfile(run_root=tmp_path)
    with pytest.raises(ConfigError, match="submit it too"):
        submission.submit(RUNS[1:2], profile)
    assert not slurm.jobs
    record_entry(tmp_path, ManifestEntry(stage="knn", name="r0", run_id=RUNS[0].run_id))
    (made,) = submission.submit(RUNS[1:2], profile)
    assert made.action == "submitted" and list(slurm.jobs) == [made.job_id]


def test_without_a_place_nothing_is_concluded(
    limited: Callable[..., LimitedSlurm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs of another reproduction fill the queue: a keeper goes on when they end."""
    slurm = limited(4, taken=4)
    profile = ClusterProfile(run_root=tmp_path)
    made = submission.submit(RUNS, profile, leave_room=True)
    assert {each.action for each in made} == {"deferred"}
    assert keeper.queue_keeper(RUNS, profile) is None
    assert keeper.look_after(RUNS, profile).state == "working"
    slurm.taken = 2
    made = submission.submit(RUNS, profile, leave_room=True)
    keeper.queue_keeper(RUNS, profile)
    slurm.taken = 3
    (job,) = (job_id for job_id, job in slurm.jobs.items() if "keep" not in job["job-name"])
    record_entry(tmp_path, ManifestEntry(stage="knn", name="r0", run_id=RUNS[0].run_id))
    del slurm.jobs[job]
    # Only the keeper has a place: it waits for the end of its like, and looks every few minutes.
    assert end_all_jobs_until_idle(slurm, tmp_path, monkeypatch) == "now+300"
    slurm.taken = 0
    assert len(end_all_jobs(slurm, tmp_path, monkeypatch)) == len(RUNS) - 1


def end_all_jobs_until_idle(slurm: LimitedSlurm, root: Path, patch: pytest.MonkeyPatch) -> str:
    """Let the keeper look once while the queue is full; return when the next one begins."""
    (job_id,) = slurm.jobs
    slurm.jobs[job_id]["state"] = "RUNNING"
    (note,) = (path for path in root.glob("keepers/*/*.json") if path.stem.count(".") == 0)
    slurm.taken = 2  # a place for the successor
    with patch.context() as patched:
        patched.setenv("SLURM_JOB_ID", job_id)
        found = keeper.keep_going(note, str(keeper.read_json(note)["sha256"]))  # type: ignore[index]
    assert found.state == "working" and not found.job_ids
    del slurm.jobs[job_id]
    (left,) = slurm.jobs.values()
    assert left["dependency"] == "singleton"
    return left["begin"]


def test_other_limits_are_no_full_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, kind in ((FULL, queue.QueueFullError), (TOO_LONG, queue.SlurmError)):
        monkeypatch.setattr(queue, "call_slurm", lambda *_, e=error, **__: (1, "", e))
        with pytest.raises(queue.SlurmError) as raised:
            queue.submit_text("", what="it")
        assert type(raised.value) is kind
