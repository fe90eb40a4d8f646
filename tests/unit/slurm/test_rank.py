"""What one rank of a job decides: its watchdog, its inputs, who requeues, where the ranks meet."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import attempts, manifest, runfile
from pipeline.control import Interrupted
from pipeline.spec import Resources, StageConfig, StageRun
from slurm.node import job, rendezvous
from slurm.node.requeue import RequeueError
from slurm.node.signals import LEAD_SECONDS_VARIABLE
from slurm.node.watchdog import JobControl
from slurm.shared import queue
from stages.commands.reproduction import all_runs

RUN = StageRun("tiny", "one", "0123456789ab", StageConfig(), {}, Resources(gpu=False), "x:run")


class Watched:
    """Stands for the watchdog; notes what it is made with."""

    made: dict[str, Any]

    def __init__(self, **options: Any) -> None:
        Watched.made = options

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def watch(monkeypatch: pytest.MonkeyPatch, folder: Path, **launch: Any) -> dict[str, Any]:
    monkeypatch.setattr(job, "Watchdog", Watched)
    context: Any = SimpleNamespace(
        run_file=SimpleNamespace(resources=launch.pop("resources", {})),
        launch=SimpleNamespace(**{"rank": 0, "job_id": "7"} | launch),
        control="the control",
        log=folder / "log",
    )
    with job._with_watchdog(context):
        assert not Watched.made["log"].closed
    assert Watched.made["log"].closed and Watched.made["control"] == "the control"
    return Watched.made


@pytest.mark.parametrize(
    ("lead", "grace_s"), [(None, 60), ("120", 60), ("119", 59.5), ("20", 10), ("600", 540)]
)
def test_a_minute_of_the_lead_time_is_kept_for_the_requeue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lead: str | None, grace_s: float
) -> None:
    monkeypatch.delenv(LEAD_SECONDS_VARIABLE, raising=False)
    if lead is not None:
        monkeypatch.setenv(LEAD_SECONDS_VARIABLE, lead)
    assert watch(monkeypatch, tmp_path)["grace_s"] == grace_s


@pytest.mark.parametrize(("resources", "hang_s"), [({}, 1800), ({"hang_minutes": 0.5}, 30)])
def test_minutes_without_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resources: dict[str, Any], hang_s: float
) -> None:
    assert watch(monkeypatch, tmp_path, resources=resources)["hang_s"] == hang_s


@pytest.mark.parametrize(
    ("rank", "job_id", "expected"),
    [(0, "7", (True, True)), (0, None, (False, True)), (1, "7", (False, False))],
)
def test_one_rank_speaks_for_the_job_and_each_for_its_hanging(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    job_id: str | None,
    expected: tuple[bool, bool],
) -> None:
    made = watch(monkeypatch, tmp_path, rank=rank, job_id=job_id)
    found = made["on_grace_expired"] is not None, made["on_superseded"] is not None
    assert found == expected and made["on_hang"].func is job._on_hang


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run whose first attempt is stopped in job 7 by a preemption."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(job, "read_job", lambda _: ({"RunTime": "1:00", "TimeLimit": "9:00:00"}, 1))
    folder = runfile.write_run_file(tmp_path, RUN)
    attempts.start_attempt(folder, job_id="7")
    return folder


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(job, "requeue_job", found.append)
    return found


def test_a_stopped_job_is_requeued_by_its_rank(run_dir: Path, requeued: list[str]) -> None:
    assert job._requeue_from_rank(run_dir) is True
    assert requeued == ["7"]


def test_the_batch_script_decides_about_a_canceled_run(run_dir: Path, requeued: list[str]) -> None:
    queue.record_cancel(run_dir, "7")
    assert job._requeue_from_rank(run_dir) is False and requeued == []


@pytest.mark.parametrize("saved", [False, True])
def test_and_about_one_that_would_stop_there_again(
    run_dir: Path, requeued: list[str], monkeypatch: pytest.MonkeyPatch, saved: bool
) -> None:
    at_the_end = {"RunTime": "8:59:00", "TimeLimit": "9:00:00"}
    monkeypatch.setattr(job, "read_job", lambda _: (at_the_end, 1))
    if saved:
        attempts.record_save(run_dir, 1, step=3, seconds=1.0)
    assert job._requeue_from_rank(run_dir) is saved
    assert requeued == (["7"] if saved else [])


def test_and_where_slurm_refuses(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise RequeueError("no")

    monkeypatch.setattr(job, "requeue_job", refuse)
    assert job._requeue_from_rank(run_dir) is False


class ExitError(Exception):
    """The process would be gone."""


@pytest.mark.parametrize(
    ("rank", "facts", "requeues", "code"),
    [
        (None, {"warned": True}, 1, 75),
        ("0", {"saved": True}, 1, 75),
        ("0", {}, 0, 75),  # a rank died; the batch script decides
        ("3", {"warned": True, "saved": True}, 0, 0),
    ],
)
def test_rank_0_requeues_and_the_others_wait(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: str | None,
    facts: dict[str, bool],
    requeues: int,
    code: int,
) -> None:
    asked: list[Path] = []
    waited: list[float] = []

    def leave(code: int) -> None:
        raise ExitError(code)

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        signals.got_sigterm = len(waited) == 3

    signals: Any = SimpleNamespace(warned=False, saved=False, got_sigterm=False)
    vars(signals).update(facts)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    if rank is not None:
        monkeypatch.setenv("SLURM_PROCID", rank)
    monkeypatch.setattr(job, "_requeue_from_rank", asked.append)
    monkeypatch.setattr(job, "_exit", leave)
    monkeypatch.setattr(job, "time", SimpleNamespace(sleep=sleep))
    with pytest.raises(ExitError, match=f"^{code}$"):
        job._exit_interrupted(tmp_path, signals)
    assert len(asked) == requeues and len(waited) == (3 if rank == "3" else 0)


@pytest.mark.parametrize("suspended", [True, False])
def test_an_error_after_a_suspension_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suspended: bool
) -> None:
    """Time goes on while a job is stopped, so its connections may be at an end."""

    def fail(_: object) -> None:
        raise ConnectionError("Connection closed by peer")

    run = next(run for run in all_runs("mini", []) if run.name == "digits")
    run_dir = runfile.prepare_run_dir(tmp_path, run)
    runfile.write_run_file(tmp_path, run)
    monkeypatch.setattr(job, "_run_stage", fail)
    monkeypatch.setattr(job, "start_logging", lambda log, screen: log.parent.mkdir(exist_ok=True))
    monkeypatch.setattr(JobControl, "was_suspended", lambda *_, within_s: suspended)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        # First set, so that what the rank sets is taken back after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with pytest.raises(Interrupted if suspended else ConnectionError):
        job.run_job(run_dir)
    interruption = attempts.read_interruption(run_dir, 1)
    assert (attempts.read_failure(run_dir, 1) is None) == suspended == bool(interruption)
    if suspended:
        assert interruption == "suspended, then ConnectionError: Connection closed by peer"


@pytest.mark.parametrize("checkpoint", [False, True])
def test_inputs_that_an_earlier_attempt_read_otherwise(
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    checkpoint: bool,
) -> None:
    """Of the attempts before this third one, the second counts; without a checkpoint, none."""
    for number, content in ((1, "c"), (2, "b"), (3, "c")):
        if number > 1:
            attempts.start_attempt(run_dir)
        inputs = {"list": {"path": "p", "sha256": content}}
        attempts.record_provenance(run_dir, number, {"inputs": inputs})
    monkeypatch.setattr(job, "record_inputs", lambda _: {"list": {"path": "p", "sha256": "c"}})
    if checkpoint:
        (run_dir / "checkpoints" / "step_00000001").mkdir(parents=True)
    found = job._record_inputs(RUN, run_dir, 3)
    words = "attempt 2 of the run read another content"
    assert found["list"].get("earlier") == (words if checkpoint else None)
    assert (words in caplog.text) == checkpoint
    assert "earlier" not in job._record_inputs(RUN, run_dir, 1)["list"]


@pytest.mark.parametrize(
    ("parent", "watched", "expected"),
    [("done", False, "input"), ("done", True, "input"), ("there", True, "running"), ("", True, "")],
)
def test_inputs_are_done_or_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parent: str, watched: bool, expected: str
) -> None:
    run: Any = SimpleNamespace(
        key="use/x", needs={"data": RUN.run_id}, watched={RUN.run_id} if watched else set()
    )
    if parent:
        runfile.write_run_file(tmp_path, RUN)
    if parent == "done":
        entry = manifest.ManifestEntry(stage="tiny", name="one", run_id=RUN.run_id)
        manifest.record_entry(tmp_path, entry)
    if not expected:
        with pytest.raises(job.MissingInputError, match=r"input 'data' of use/x: run 0123456789ab"):
            job._find_inputs(run, tmp_path)
        return
    inputs, running = job._find_inputs(run, tmp_path)
    assert list(inputs) == (["data"] if expected == "input" else [])
    assert running == ({"data": RUN.run_dir(tmp_path)} if expected == "running" else {})


@pytest.mark.parametrize(
    ("arguments", "error", "code"),
    [
        ([], None, 2),
        (["a", "b", "c"], None, 2),
        (["a"], None, 0),
        (["a", "sum"], Interrupted("x"), 75),
        (["a"], OSError("x"), 1),
    ],
)
def test_exit_codes_of_a_rank(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], error: Exception | None, code: int
) -> None:
    seen: list[tuple[Any, ...]] = []

    def run(*given: Any) -> None:
        seen.append(given)
        if error is not None:
            raise error

    monkeypatch.setattr(job, "run_job", run)
    monkeypatch.setattr(job, "keep_others_from_writing", lambda: None)
    assert job.main(arguments) == code
    assert seen == ([] if code == 2 else [(Path("a").absolute(), *arguments[1:])])


def test_ports_of_jobs_and_restarts_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks of a start find the same port, and a start that follows another one."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "from another launcher")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setattr(rendezvous, "resolve_master_address", lambda host: f"{host}.cluster")
    ports = {}
    for job_id, restart in (("7", None), ("7", "1"), ("8", None), ("7_2", "1")):
        environment = SimpleNamespace(
            job_id=job_id, global_rank=5, num_tasks=8, local_rank=1, hostnames=["n1", "n2"]
        )
        monkeypatch.setattr(rendezvous.submitit, "JobEnvironment", lambda e=environment: e)
        monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
        if restart is not None:
            monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        found = rendezvous.join_rendezvous()
        assert found == rendezvous.Launch(f"slurm-{job_id}-{restart or 0}", 5, 8, job_id)
        *rest, port = (os.environ[name] for name in names)
        assert rest == ["5", "8", "1", "n1.cluster"]
        ports[job_id, restart] = int(port)
    assert ports["7", None] == 12000 + 7 * 7919 % 20000
    assert ports["7", "1"] == 12000 + (7 * 7919 + 104729) % 20000
    assert ports["7_2", "1"] == 12000 + (72 * 7919 + 104729) % 20000
    assert len(set(ports.values())) == 4


@pytest.mark.parametrize(
    ("environment", "key"),
    [
        ({"MUGS_LAUNCH": "ours", "TORCHELASTIC_RUN_ID": "x"}, "ours"),
        ({"TORCHELASTIC_RUN_ID": "x"}, "torchrun-x-12345-0"),
        (
            {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "2"},
            "torchrun-x-12345-2",
        ),
        ({}, "pid-77-"),
    ],
)
def test_keys_of_starts_without_slurm(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], key: str
) -> None:
    monkeypatch.setattr("os.getpid", lambda: 77)
    for name in ("MUGS_LAUNCH", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    given = {"RANK": "2", "WORLD_SIZE": "3", "MASTER_PORT": "12345", **environment}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    for name in ("LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")
    found = rendezvous.join_rendezvous()
    assert found.key.startswith(key) and (found.rank, found.world_size) == (2, 3)
    assert found.job_id is None


def test_a_name_that_does_not_resolve_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(host: str, _: object) -> None:
        if host != "good":
            raise OSError(host)

    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", resolve)
    known = {"n1": "10.0.0.1"}.get
    found = [rendezvous.resolve_master_address(host, known) for host in ("good", "n1", "n2")]
    assert found == ["good", "10.0.0.1", "n2"]
