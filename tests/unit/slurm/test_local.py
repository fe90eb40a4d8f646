"""The local executor and what status says about its runs,
with tiny stages in a package of their own.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from commands import write_module

from pipeline import attempts, manifest, runfile
from pipeline.files import write_json_atomic
from pipeline.identity import run_id
from pipeline.provenance import code_root, read_git_state
from pipeline.spec import ConfigError, Resources, StageConfig, StageRun
from pipeline.stage import StageOutput
from results.runs import run_from_entry
from slurm import console
from slurm.local import executor as local
from slurm.local import processes
from slurm.local.executor import run_locally
from slurm.node import publish
from slurm.node.job import warn_of_other_code
from slurm.shared import queue
from slurm.shared.logs import log_path, rank_output_path
from slurm.status import collect_status, format_duration
from stages.coco_data import CocoDataConfig
from stages.logistic import LogisticConfig
from stages.shared.image_data import ConvertConfig
from stages.shared.imported_weights import ImportConfig
from stages.shared.labelled import LabelledPart

STAGE = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
from pipeline.settings import InputPath, Runtime
from pipeline.spec import StageConfig
from pipeline.stage import StageOutput

@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    text: str = "x"
    fault: Runtime[str] = ""
    file: InputPath[str | None] = None

    def concurrent_roles(self):
        return frozenset({"in0"}) if self.fault == "watch" else frozenset()

def run(ctx, cfg):
    rank = os.environ["RANK"]
    (ctx.run_dir / f"rank{rank}").touch()
    while len(list(ctx.run_dir.glob("rank?"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.02)
    while cfg.fault == "wait":
        time.sleep(0.1)
    for folder in ctx.running.values():
        (folder / "watched").write_text(str(os.nice(0)))
        while not list(ctx.run_dir.parents[1].glob("manifest/*")):
            time.sleep(0.02)
    if cfg.fault.startswith("until watched"):
        end = time.monotonic() + 500
        while not (ctx.run_dir / "watched").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        if cfg.fault.endswith("interrupted"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert cfg.fault == "until watched", "no such luck"
    if cfg.fault == "replace":
        Path(cfg.file).write_text("another")
    if cfg.fault == "raise":
        raise ValueError("no such luck\\nsecond line")
    while cfg.fault.startswith("kill") and rank == "1":
        if cfg.fault == "kill" or list(ctx.run_dir.parents[1].glob("manifest/*")):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
    while cfg.fault == "kill":  # as at a collective
        time.sleep(0.1)
    below = [entry.output("out").read_text() for entry in ctx.inputs.values()]
    (ctx.run_dir / "out.txt").write_text(cfg.text + "".join(below))
    info = {"threads": os.environ["OMP_NUM_THREADS"]}
    return StageOutput(outputs={"out": Path("out.txt")}, info=info)
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module with the tiny stages, found here and in the processes."""
    monkeypatch.setattr(queue, "call_slurm", lambda *_: (127, "", "not found"))
    return write_module(monkeypatch, tmp_path / "package", "tiny_local", STAGE)


def make(tiny: Any, name: str, *needs: StageRun, fault: str = "") -> StageRun:
    config = tiny.Config(text=name, fault=fault)
    inputs = {f"in{i}": need.run_id for i, need in enumerate(needs)}
    return StageRun(
        "tiny",
        name,
        run_id("tiny", config, inputs),
        config,
        inputs,
        Resources(gpu=False),
        "tiny_local:run",
    )


def test_runs_in_order_and_again_does_nothing(tiny: Any, tmp_path: Path) -> None:
    a = make(tiny, "a")
    b = make(tiny, "b", a)
    assert [s.state for s in collect_status([a, b], tmp_path)] == ["waiting", "waiting"]
    outcomes = run_locally([a, b], tmp_path, ranks=2, env={"OMP_NUM_THREADS": "5"})
    assert [o.state for o in outcomes] == ["finished", "finished"]
    assert [o.state for o in run_locally([a, b], tmp_path)] == ["done", "done"]
    assert [s.state for s in collect_status([a, b], tmp_path)] == ["done", "done"]
    entry = manifest.find_done(tmp_path, b.run_id)
    assert entry is not None and entry.output("out").read_text() == "ba"
    assert (entry.ranks, entry.attempt, entry.gpus) == (2, 1, 0)
    assert entry.info["threads"] == "5"
    assert entry.provenance["versions"]["python"]
    assert entry.provenance.items() >= read_git_state(code_root()).items()
    assert entry.provenance["earlier"] == []
    environment = entry.provenance["environment"]
    assert environment["packages"]["numpy"] and environment["variables"]["OMP_NUM_THREADS"] == "5"
    (code,) = attempts.list_code_versions(b.run_dir(tmp_path))
    assert code.items() >= {"attempt": 1, **read_git_state(code_root())}.items()


@pytest.mark.slow
def test_ranks_that_torchrun_starts_by_hand(tiny: Any, tmp_path: Path) -> None:
    """On one machine, in the folder of a run that `submit` or `run` has written."""
    made = make(tiny, "a")
    run_dir = runfile.write_run_file(tmp_path, made)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "slurm.node.job", str(run_dir)],
        cwd=code_root(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    entry = manifest.find_done(tmp_path, made.run_id)
    assert entry is not None and (entry.ranks, entry.attempt) == (2, 1)
    assert attempts.list_attempts(run_dir) == [1]
    assert attempts.read_attempt(run_dir, 1)["launch"].startswith("torchrun-")


def test_an_input_that_is_replaced_while_a_run_reads_it(tiny: Any, tmp_path: Path) -> None:
    """Nothing is recorded, and the run can be repeated with what is there now."""
    file = tmp_path / "list.txt"
    file.write_text("one")
    plain = make(tiny, "a", fault="replace")
    run = replace(plain, config=replace(plain.config, file=str(file)))
    (outcome,) = run_locally([run], tmp_path)
    assert outcome.state == "failed"
    assert "InputChangedError: file: " in outcome.detail
    assert manifest.find_done(tmp_path, run.run_id) is None
    (outcome,) = run_locally([run], tmp_path)
    assert outcome.state == "finished"
    entry = manifest.find_done(tmp_path, run.run_id)
    assert entry is not None and entry.provenance["inputs"]["file"]["size"] == len("another")
    # Nothing of the first attempt was used.
    assert "earlier" not in entry.provenance["inputs"]["file"]


def test_every_version_of_the_code_is_kept(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make(tiny, "a")
    run_dir = run.run_dir(tmp_path)
    same = {"git_sha": "b", "git_dirty": False, "snapshot": "s", "versions": {"torch": "2.1"}}
    other_torch = {**same, "versions": {"torch": "2.0"}}
    for facts in ({**other_torch, "git_sha": "a"}, other_torch, {**other_torch, "host": "n1"}):
        attempts.record_provenance(run_dir, attempts.start_attempt(run_dir), facts)
    warn_of_other_code(run_dir)
    assert "git_sha a -> b" in caplog.text and "torch" not in caplog.text
    attempt = attempts.start_attempt(run_dir)
    attempts.record_provenance(run_dir, attempt, same)
    publish.publish_results(run, run_dir, StageOutput(), attempt=attempt, ranks=1, facts=same)
    entry = manifest.find_done(tmp_path, run.run_id)
    assert entry is not None
    # The third attempt differs in its host only.
    assert [(e["attempt"], e["git_sha"]) for e in entry.provenance["earlier"]] == [
        (1, "a"),
        (2, "b"),
    ]
    finished = run_from_entry(entry.model_dump(mode="json"))
    assert [each["attempt"] for each in finished.earlier] == [1, 2]


def test_costs_are_summed_over_attempts(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(make(tiny, "a"), resources=Resources(nodes=2, ranks_per_node=3))
    run_dir, now = run.run_dir(tmp_path), time.time()
    for began, ended in ((1000, 400), (300, 280), (100, None)):
        attempt = attempts.start_attempt(run_dir, time=now - began)
        if ended is not None:  # the last line of the log tells
            log = log_path(run_dir, attempt, 0)
            log.parent.mkdir(parents=True, exist_ok=True)
            log.touch()
            os.utime(log, (now, now - ended))
    monkeypatch.setattr(publish.provenance, "list_cuda_devices", lambda: ["H200", "A100"])
    facts = {"git_sha": "c0ffee", "git_dirty": True}
    publish.publish_results(run, run_dir, StageOutput(), attempt=3, ranks=6, facts=facts)
    entry = manifest.find_done(tmp_path, run.run_id)
    assert entry is not None and entry.provenance == {**facts, "earlier": []}
    assert entry.seconds == pytest.approx(600 + 20 + 100, abs=10)
    assert entry.gpu_hours == pytest.approx(6 * entry.seconds / 3600, abs=1e-3)
    assert (entry.device, entry.gpus, entry.ranks, entry.restarts) == ("H200", 6, 6, 2)
    assert (entry.stage, entry.name, entry.attempt, entry.rows) == ("tiny", "a", 3, None)
    assert entry.config == {"text": "a", "fault": "", "file": None} and entry.upstream == {}


@pytest.mark.parametrize(("end", "state"), [("failed", "failed"), ("interrupted", "waiting")])
def test_attempts_of_a_run_that_is_not_done_cost_too(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], end: str, state: str
) -> None:
    run = make(tiny, "a")
    run_dir, now = run.run_dir(tmp_path), time.time()
    (run_dir / "logs").mkdir(parents=True)
    for began, gpus in ((7300, 4), (3700, 2)):
        attempt = attempts.start_attempt(run_dir, time=now - began, gpus=gpus)
        log = log_path(run_dir, attempt, 0)
        log.touch()
        os.utime(log, (now, now - began + 3600))
    if end == "failed":
        attempts.record_failure(run_dir, attempt, error="x", log=log)
    else:
        attempts.record_interruption(run_dir, attempt, "SIGTERM")
    (found,) = collect_status([run], tmp_path)
    assert found.state == state
    assert found.cost.seconds == pytest.approx(7200, abs=1)
    assert found.cost.gpu_hours == pytest.approx(6, abs=0.01)
    console.show_status([found])
    line = "cost so far: 6.0 GPU-hours in jobs of 2h00m together; of it in runs that are not done: "
    assert line in capsys.readouterr().out


def test_gpu_hours_are_those_of_the_ranks_that_ran(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run --ranks 2` of a run that asks for 8."""
    run = replace(make(tiny, "a"), resources=Resources(ranks_per_node=8))
    run_dir = run.run_dir(tmp_path)
    attempt = attempts.start_attempt(run_dir, time=time.time() - 3600)
    monkeypatch.setattr(publish.provenance, "list_cuda_devices", lambda: ["H200"])
    publish.publish_results(run, run_dir, StageOutput(), attempt=attempt, ranks=2, facts={})
    entry = manifest.find_done(tmp_path, run.run_id)
    assert entry is not None and entry.gpus == 2
    assert entry.gpu_hours == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize(
    ("config", "wanted", "asked", "count"),
    [
        (StageConfig(), 8, None, 2),
        (StageConfig(), 1, None, 1),
        (StageConfig(), 8, 3, 3),
        (ConvertConfig(dataset="digits"), 1, 3, 1),
        (CocoDataConfig(), 1, 3, 1),
        (ImportConfig(arch="vit_s16", epochs=1), 1, 3, 1),
        (LogisticConfig(labelled=LabelledPart(percent=1)), 1, 3, 1),
    ],
)
def test_ranks_are_for_stages_that_share_their_work(
    monkeypatch: pytest.MonkeyPatch, config: StageConfig, wanted: int, asked: int, count: int
) -> None:
    monkeypatch.setattr(local, "count_gpus_here", lambda: 2)
    resources = Resources(ranks_per_node=wanted)
    run = StageRun("stage", "a", "b", config, {}, resources, "x:run")
    assert local._count_ranks(run, asked) == count


@pytest.mark.parametrize(
    ("codes", "rank", "how"),
    [
        ([0, 1, None], 1, "ended with exit code 1"),
        ([1, 1, -9], 2, "was killed by signal 9"),  # the others lost their connection to it
    ],
)
@pytest.mark.parametrize("logged", [False, True])
def test_the_log_is_that_of_the_rank_that_failed_first(
    tmp_path: Path, codes: list[int | None], rank: int, how: str, logged: bool
) -> None:
    number = attempts.start_attempt(tmp_path, launch="x")
    (tmp_path / "logs").mkdir()
    for each in range(3):
        log = log_path(tmp_path, number, each) if logged else rank_output_path(tmp_path, each)
        log.write_text("line")
        rank_output_path(tmp_path, each).touch()
    failure = local._find_failure(tmp_path, "x", codes)
    assert failure.error == f"rank {rank} {how}"
    name = f"attempt_0001_rank{rank}.log" if logged else f"rank{rank}.err"
    assert failure.log == str(tmp_path / "logs" / name)


@pytest.mark.parametrize(("ranks", "threads"), [(1, "3"), (2, "1"), (7, "1")])
def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch, ranks: int, threads: str) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    env = processes._rank_environment("x", 0, ranks, 1, on_gpus=False)
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == threads


@pytest.mark.parametrize(
    ("on_gpus", "given", "expected"),
    [(False, None, "passive"), (False, "ACTIVE", "ACTIVE"), (True, None, None)],
)
def test_threads_on_cpus_do_not_spin_while_they_wait(
    monkeypatch: pytest.MonkeyPatch, on_gpus: bool, given: str | None, expected: str | None
) -> None:
    """Unless the user says how they shall wait."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    env = processes._rank_environment("x", 0, 1, 1, on_gpus=on_gpus)
    assert env.get("OMP_WAIT_POLICY") == expected


@pytest.mark.parametrize(("wanted", "gpus"), [(True, 1), (True, 0), (False, 1)])
def test_a_run_is_on_gpus_if_it_wants_them_and_there_are_some(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool, gpus: int
) -> None:
    monkeypatch.setattr(local, "count_gpus_here", lambda: gpus)
    run = replace(make(tiny, "a"), resources=Resources(gpu=wanted))
    started = Mock()
    local._Executor(tmp_path, 1, None, started)._start(run, beside=False)
    assert started.start.call_args.kwargs == {"beside": False, "on_gpus": wanted and gpus > 0}


def test_failure_stops_only_what_depends_on_it(tiny: Any, tmp_path: Path) -> None:
    bad = make(tiny, "bad", fault="raise")
    below, beside = make(tiny, "below", bad), make(tiny, "beside")
    assert [o.state for o in run_locally([bad, below, beside], tmp_path)] == [
        "failed",
        "not run",
        "finished",
    ]
    states = collect_status([bad, below, beside], tmp_path)
    assert [s.state for s in states] == ["failed", "waiting", "done"]
    assert states[0].detail == "ValueError: no such luck"
    assert states[0].log is not None and "Traceback" in Path(states[0].log).read_text()
    assert states[1].detail == "needs bad"
    cured = make(tiny, "bad")
    assert cured.run_id == bad.run_id, "the fault is a runtime field"
    assert [o.state for o in run_locally([cured, below], tmp_path)] == ["finished", "finished"]


def test_a_run_that_watches_another_runs_beside_it(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "count_gpus_here", lambda: 0)
    a = make(tiny, "a", fault="until watched")
    between, watch = make(tiny, "between"), make(tiny, "watch", a, fault="watch")
    told: list[str] = []
    outcomes = run_locally(
        [a, between, watch], tmp_path, ranks=1, on_start=lambda run, _: told.append(run.name)
    )
    assert [(o.run.name, o.state) for o in outcomes] == [
        (n, "finished") for n in ("a", "between", "watch")
    ]
    assert (
        told == ["a", "watch", "between"] and (a.run_dir(tmp_path) / "watched").read_text() == "19"
    )
    assert [
        o.state for o in run_locally([a, make(tiny, "after", a, fault="watch")], tmp_path, ranks=1)
    ] == ["done", "finished"]


def test_it_ends_with_a_run_that_fails(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "count_gpus_here", lambda: 0)
    bad = make(tiny, "bad", fault="until watched, raise")
    watch = make(tiny, "watch", bad, fault="watch")
    assert [
        (o.state, o.detail.split(":")[0]) for o in run_locally([bad, watch], tmp_path, ranks=1)
    ] == [
        ("failed", "AssertionError"),
        ("not run", "needs bad"),
    ]
    assert (
        not attempts.is_running_here(watch.run_dir(tmp_path))
        and attempts.read_failure(watch.run_dir(tmp_path)) is None
    )


def test_it_ends_with_a_run_that_is_interrupted(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever told that run's process to stop did not tell the other's,
    which would wait for ever.
    """
    monkeypatch.setattr(local, "count_gpus_here", lambda: 0)
    stopped = make(tiny, "stopped", fault="until watched, interrupted")
    watch = make(tiny, "watch", stopped, fault="watch")
    assert [
        (o.state, o.detail.split(" ")[0]) for o in run_locally([stopped, watch], tmp_path, ranks=1)
    ] == [
        ("interrupted", "SIGTERM"),
        ("not run", "needs"),
    ]


def test_with_gpus_it_comes_after(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "count_gpus_here", lambda: 1)
    a = make(tiny, "a")
    assert [o.state for o in run_locally([a, make(tiny, "w", a, fault="watch")], tmp_path)] == [
        "finished",
        "finished",
    ]
    assert not (a.run_dir(tmp_path) / "watched").exists()


def test_killed_rank_is_reported(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_GRACE_S", 0.2)
    (outcome,) = run_locally([make(tiny, "victim", fault="kill")], tmp_path, ranks=2)
    assert (
        outcome.state == "failed"
        and f"rank 1 was killed by signal {signal.SIGKILL:d}" in outcome.detail
    )


def test_a_rank_that_dies_once_the_run_is_done_changes_nothing(tiny: Any, tmp_path: Path) -> None:
    assert (
        run_locally([make(tiny, "done", fault="kill late")], tmp_path, ranks=2)[0].state
        == "finished"
    )


def test_a_run_that_runs_already_is_left_alone(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "is_running_here", lambda run_dir: True)
    run = make(tiny, "a")
    (outcome,) = run_locally([run], tmp_path)
    assert outcome.state == "not run" and "running on this machine already" in outcome.detail
    assert not run.run_dir(tmp_path).exists()


def test_a_signal_as_a_run_ends_keeps_the_next_one_from_starting(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(ranks: processes.Ranks) -> list[int | None]:
        codes = processes.wait_for_ranks(ranks)
        os.kill(os.getpid(), signal.SIGTERM)
        return codes

    monkeypatch.setattr(local, "wait_for_ranks", wait)
    a, b = make(tiny, "a"), make(tiny, "b")
    assert [o.state for o in run_locally([a, b], tmp_path)] == ["finished", "interrupted"]
    assert not b.run_dir(tmp_path).exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_command_takes_its_processes_along(
    tiny: Any, tmp_path: Path, signum: int
) -> None:
    """`run_locally` in a process of its own, whose run never ends."""
    code = f"""
from pathlib import Path
from pipeline.spec import *
from slurm.local.executor import run_locally
from tiny_local import *
resources = Resources(gpu=False)
run = StageRun("tiny", "w", "i" * 12, Config(fault="wait"), {{}}, resources, "tiny_local:run")
print(run_locally([run] * 2, Path({str(tmp_path)!r})))
"""
    command = subprocess.Popen(
        [sys.executable, "-c", code], cwd=code_root(), stdout=subprocess.PIPE, text=True
    )
    run_dir = tmp_path / "tiny" / f"w-{'i' * 12}"
    until(lambda: attempts.is_running_here(run_dir) and (run_dir / "rank0").exists())
    command.send_signal(signum)
    out = command.communicate(timeout=20)[0]
    assert command.returncode == 0 and out.count("Outcome(") == 1 and "'interrupted'" in out
    assert not attempts.is_running_here(run_dir) and attempts.read_failure(run_dir) is None
    found = collect_status(
        [
            StageRun(
                "tiny", "w", "i" * 12, tiny.Config(), {}, Resources(gpu=False), "tiny_local:run"
            )
        ],
        tmp_path,
    )[0]
    assert found.state == "waiting" and "interrupted (SIGTERM" in found.detail


def until(true: Callable[[], bool], timeout_s: float = 60) -> None:
    """Wait for a condition."""
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_missing_input_is_refused(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="b: its input 'in0'"):
        run_locally([make(tiny, "b", make(tiny, "a"))], tmp_path)


@pytest.mark.parametrize(
    ("trusted", "words"),
    [
        ("tiny_local,no_such_module", "no_such_module:run: there is no module 'no_such_module'"),
        ("tiny_local", "no stage 'tiny' (valid: ade20k_data"),
    ],
)
def test_code_of_a_module_that_is_missing_or_not_trusted_is_not_run(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: str, words: str
) -> None:
    monkeypatch.setenv("MUGS_STAGE_MODULES", trusted)
    (outcome,) = run_locally([replace(make(tiny, "a"), entrypoint="no_such_module:run")], tmp_path)
    assert f"ConfigError: {words}" in outcome.detail


RUN = StageRun("tiny", "one", "0123456789ab", StageConfig(), {}, Resources(gpu=False), "x:run")


def test_progress_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = queue.QueuedJob("7", "mugs-one-0123", "RUNNING", "None")
    monkeypatch.setattr(queue, "find_jobs", lambda *_, **__: {RUN.run_id: [job]})
    assert collect_status([RUN], tmp_path)[0].detail == "starting"
    attempts.start_attempt(RUN.run_dir(tmp_path), job_id="7")
    note = {
        "done": 3,
        "total": 9,
        "unit": "steps",
        "rate": 1234.5,
        "eta_s": 125,
        "time": time.time(),
    }
    write_json_atomic(RUN.run_dir(tmp_path) / "progress.json", note)
    found = collect_status([RUN], tmp_path)[0]
    assert (found.state, found.job_id, found.detail) == (
        "running",
        "7",
        "3/9 steps, 1234 img/s, 2m05s left",
    )


@pytest.mark.parametrize(("slurm", "state"), [("PENDING", "queued"), ("FAILED", "failed")])
def test_a_failed_attempt_whose_job_slurm_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: str, state: str
) -> None:
    """Where squeue does not answer for a moment, scontrol may."""
    run_dir = runfile.write_run_file(tmp_path, RUN)
    attempts.record_failure(
        run_dir,
        attempts.start_attempt(run_dir, job_id="7"),
        error="RuntimeError: it broke",
        log=run_dir / "log",
    )
    monkeypatch.setattr("slurm.shared.queue.find_jobs", lambda runs, root: {})
    monkeypatch.setattr("slurm.shared.queue.query_job_state", {"7": slurm}.get)
    (found,) = collect_status([RUN], tmp_path)
    assert (found.state, found.job_id) == (state, "7")


def test_durations() -> None:
    assert [format_duration(s) for s in (0, 59.4, 185, 7800, 100800)] == [
        "0s",
        "59s",
        "3m05s",
        "2h10m",
        "1d04h",
    ]
