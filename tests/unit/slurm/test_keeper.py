"""The keeper: what it submits, when it stops and why, and that there is always one."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from commands import write_commands

from pipeline import attempts, runfile
from pipeline.files import CHECKSUM_KEY, with_checksum
from pipeline.spec import ConfigError, Resources, StageRun
from slurm import keeper
from slurm.budget import check_budget
from slurm.shared import queue
from slurm.shared.costs import Cost
from slurm.shared.exit_codes import EXIT_INTERNAL, EXIT_INTERRUPTED
from slurm.shared.keeper_notes import list_ended_keepers
from slurm.status import RunStatus, collect_status
from slurm.submission.profile import ClusterProfile
from slurm.submission.submit import Submission
from stages.commands.reproduction import all_runs


class FakeSlurm:
    """The states of runs, by name, and the jobs of keepers; counts what is submitted."""

    def __init__(self, runs: Sequence[StageRun]) -> None:
        self.states = {run.name: "waiting" for run in runs}
        self.submitted: list[str] = []
        self.keepers: dict[str, tuple[str, tuple[str, ...], str]] = {}
        self.refuses = ""
        self.number = 100

    def collect_status(self, runs: Sequence[StageRun], _: Path) -> list[RunStatus]:
        return [
            RunStatus(run, state, f"{state}!", f"j-{run.name}" if state == "queued" else None)
            for run in runs
            for state in [self.states[run.name]]
        ]

    def find_jobs(self, runs: Sequence[StageRun], _: Path) -> dict[str, list[queue.QueuedJob]]:
        return {
            run.run_id: [queue.QueuedJob(f"j-{run.name}", run.name, "PENDING", "Priority")]
            for run in runs
            if self.states[run.name] == "queued"
        }

    def submit(
        self, runs: Sequence[StageRun], _: ClusterProfile, *, leave_room: bool = False
    ) -> list[Submission]:
        if self.refuses:
            raise queue.SlurmError(self.refuses)
        made = []
        for run in runs:
            state = self.states[run.name]
            action = {"done": "done", "queued": "queued"}.get(state, "submitted")
            if action == "submitted":
                self.submitted.append(run.name)
                self.states[run.name] = "queued"
            made.append(Submission(run, action, None if action == "done" else f"j-{run.name}"))
        return made

    def submit_text(self, text: str, *options: str, what: str) -> str:
        self.number += 1
        name = text.partition("--job-name=")[2].partition("\n")[0]
        self.keepers[str(self.number)] = (name, options, text)
        return str(self.number)

    def find_jobs_named(self, names: Sequence[str]) -> list[queue.QueuedJob]:
        return [
            queue.QueuedJob(job_id, name, "PENDING", "Dependency")
            for job_id, (name, _, _) in self.keepers.items()
            if name in names
        ]

    def cancel_jobs(self, job_ids: Sequence[str]) -> None:
        for job_id in list(job_ids):
            del self.keepers[job_id]

    @property
    def waiting(self) -> tuple[str, tuple[str, ...], str]:
        """The one keeper in the queue."""
        (found,) = self.keepers.values()
        return found


@pytest.fixture
def runs() -> list[StageRun]:
    return list(all_runs("mini", ["knn.resources.hours=0.25"]))


@pytest.fixture
def fake(runs: list[StageRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    found = FakeSlurm(runs)
    monkeypatch.setattr("shutil.which", lambda name, *_, **__: f"/usr/bin/{name}")
    for name in ("collect_status", "submit"):
        monkeypatch.setattr(keeper, name, getattr(found, name))
    for name in ("submit_text", "find_jobs", "find_jobs_named", "cancel_jobs"):
        monkeypatch.setattr(queue, name, getattr(found, name))
    monkeypatch.setattr(keeper, "take_snapshot", lambda _: tmp_path / "code")
    monkeypatch.setattr(keeper, "checking_lines", lambda _: ["check"])
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for run in runs:
        runfile.write_run_file(tmp_path, run)
    return found


@pytest.fixture
def profile(tmp_path: Path) -> ClusterProfile:
    stages = {"keeper": {"partition": "small"}}
    return ClusterProfile.model_validate(
        {"run_root": tmp_path, "partition": "gpu", "env": {"A": "b"}, "stages": stages}
    )


def note_of(root: Path) -> tuple[Path, str]:
    (path,) = (path for path in root.glob("keepers/*/*.json") if path.stem.count(".") == 0)
    return path, json.loads(path.read_text())[CHECKSUM_KEY]


def test_it_waits_for_whichever_job_ends_first(
    fake: FakeSlurm, runs: list[StageRun], profile: ClusterProfile
) -> None:
    fake.submit(runs, profile)
    assert keeper.queue_keeper(runs, profile) == "101"
    name, options, text = fake.waiting
    assert "--dependency='" in text or "--dependency=" in text
    assert "?".join(f"afterany:j-{run.name}" for run in runs) in text
    for words in ("--partition=small", "--cpus-per-task=1", "slurm.keeper", 'A="b"', "check"):
        assert words in text
    assert "gpu" not in text.replace("mugs", "") and options == ()
    path, sha256 = note_of(profile.run_root)
    assert path.stem == name and f"{path} {sha256}" in text
    assert path.stat().st_mode & 0o077 == 0
    # The next submission replaces it.
    assert keeper.queue_keeper(runs, profile) == "102" and list(fake.keepers) == ["102"]


def test_a_note_that_is_swapped_after_it_was_written_is_not_the_one_of_the_job(
    fake: FakeSlurm, runs: list[StageRun], profile: ClusterProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who made the folder `keepers` can rename what is in it; a note says what runs as us."""
    fake.submit(runs, profile)
    ours: list[str] = []

    def swap(root: Path) -> Path:
        path, sha256 = note_of(root)
        ours.append(sha256)
        content = json.loads(path.read_text())
        del content[CHECKSUM_KEY]
        content["profile"]["setup"] = ["touch /tmp/theirs"]
        path.write_text(json.dumps(with_checksum(content)))
        return root / "code"

    monkeypatch.setattr(keeper, "take_snapshot", swap)
    keeper.queue_keeper(runs, profile)
    path, _ = note_of(profile.run_root)
    assert f"{path} {ours[0]}" in fake.waiting[2]
    with pytest.raises(ConfigError, match="a newer submission has a keeper of its own"):
        keeper.keep_going(path, ours[0])


def test_without_jobs_there_is_nothing_to_keep(
    fake: FakeSlurm, runs: list[StageRun], profile: ClusterProfile
) -> None:
    assert keeper.queue_keeper(runs, profile) is None and not fake.keepers


def test_what_slurm_ended_is_submitted_again_until_all_is_done(
    fake: FakeSlurm,
    runs: list[StageRun],
    profile: ClusterProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake.submit(runs, profile)
    keeper.queue_keeper(runs, profile)
    fake.submitted.clear()
    fake.states["pretrain"] = "waiting"  # preempted
    monkeypatch.setenv("SLURM_JOB_ID", "101")
    found = keeper.keep_going(*note_of(profile.run_root))
    assert found.state == "working" and fake.submitted == ["pretrain"]
    assert len(fake.keepers) == 1 and "afterany:j-pretrain" in fake.waiting[2]
    fake.states = dict.fromkeys(fake.states, "done")
    assert keeper.keep_going(*note_of(profile.run_root)).state == "finished"
    assert not fake.keepers
    assert list(list_ended_keepers(runs, profile.run_root)) == ["keeper: finished"]
    assert not list(list_ended_keepers(runs[:0], profile.run_root))


def test_a_keeper_that_ended_earlier_says_nothing_of_later_runs(
    fake: FakeSlurm, runs: list[StageRun], profile: ClusterProfile
) -> None:
    root = profile.run_root

    def end(keeps: str, state: str) -> None:
        (note,) = (path for path in root.glob("keepers/*/*.json") if path.stem == keeps)
        note.with_suffix(".end.json").write_text(json.dumps({"state": state, "reasons": []}))

    fake.submit(runs, profile)
    keeper.queue_keeper(runs[:2], profile)
    first = note_of(root)[0].stem
    end(first, "finished")
    assert list(list_ended_keepers(runs[:2], root)) == ["keeper: finished"]
    assert list(list_ended_keepers(runs, root)) == [f"keeper: finished with 2 of {len(runs)} runs"]
    # All runs were submitted later, and their keeper is at work.
    keeper.queue_keeper(runs, profile)
    assert list(list_ended_keepers(runs, root)) == []
    (second,) = {job[0] for job in fake.keepers.values()} - {first}
    end(second, "stuck")
    assert list(list_ended_keepers(runs[2:], root)) == ["keeper: stuck"]


def test_a_deferred_run_says_so(tmp_path: Path, runs: list[StageRun]) -> None:
    (data,) = (run for run in runs if run.name == "digits")
    assert collect_status([data], tmp_path)[0].detail == "not started"
    runfile.write_run_file(tmp_path, data)
    assert "deferred: the keeper or the next submit" in collect_status([data], tmp_path)[0].detail


def test_resources_of_the_command_line_still_count_more_than_the_profile(
    fake: FakeSlurm, runs: list[StageRun], profile: ClusterProfile
) -> None:
    fake.submit(runs, profile)
    keeper.queue_keeper(runs, profile)
    again, same_profile, budget = keeper._read_note(*note_of(profile.run_root))
    assert [run.run_id for run in again] == [run.run_id for run in runs]
    assert [run.needs for run in again] == [run.needs for run in runs]
    for one, other in zip(again, runs, strict=True):
        assert one.resources == other.resources
        assert one.resources.overrides_profile("hours") == (other.name == "knn")
    assert same_profile == profile and budget is None


@pytest.mark.parametrize("state", ["failed", "blocked", "canceled"])
def test_what_needs_a_person_is_left_alone_and_the_rest_goes_on(
    fake: FakeSlurm, runs: list[StageRun], profile: ClusterProfile, state: str
) -> None:
    fake.states = dict.fromkeys(fake.states, "done")
    fake.states |= {"linear": "waiting", "knn": state}
    assert keeper.look_after(runs, profile).submitted == ["linear"]
    fake.states["linear"] = "done"
    found = keeper.look_after(runs, profile)
    assert found.state == "stuck" and found.reasons == [f"knn {state}: {state}!"]


def test_a_run_that_ends_during_the_look_is_no_reason_to_stop(
    fake: FakeSlurm, runs: list[StageRun], profile: ClusterProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last run is still running when it is asked for, and done when all are submitted."""
    fake.states = {run.name: "done" for run in runs}
    fake.states["linear"] = "running"

    def collect(runs: Sequence[StageRun], root: Path) -> list[RunStatus]:
        found = fake.collect_status(runs, root)
        fake.states["linear"] = "done"
        return found

    monkeypatch.setattr(keeper, "collect_status", collect)
    assert keeper.look_after(runs, profile) == keeper.Round("finished")


def test_nothing_that_needs_a_failed_run_is_submitted(
    fake: FakeSlurm, runs: list[StageRun], profile: ClusterProfile
) -> None:
    fake.states |= {"digits": "done", "pretrain": "failed"}
    found = keeper.look_after(runs, profile)
    needing = {run.name for run in runs if "pretrain" in map(str, _needs(run, runs))}
    assert not needing & set(fake.submitted)
    assert fake.submitted == [] or found.state == "working"


def _needs(run: StageRun, runs: list[StageRun]) -> set[str]:
    """Names of all runs that one needs, also those that its inputs need."""
    by_id = {other.run_id: other for other in runs}
    direct = [by_id[need] for need in run.needs.values()]
    return {each.name for each in direct}.union(*(_needs(each, runs) for each in direct))


def cost(run: StageRun, state: str, spent: float) -> RunStatus:
    return RunStatus(run, state, cost=Cost(3600.0, spent))


@pytest.mark.parametrize(
    ("budget", "words"),
    [(24.9, "16 GPU-hours are spent and 9 are ahead"), (25, "100% of the budget"), (40, None)],
)
def test_a_budget_counts_what_is_spent_and_what_is_ahead(
    runs: list[StageRun], budget: float, words: str | None
) -> None:
    need = Resources(hours=4.5, nodes=2)
    ahead = replace(runs[0], resources=need)
    statuses = [cost(ahead, "failed", 6.0), cost(replace(runs[1], resources=need), "done", 10.0)]
    if budget < 25:
        with pytest.raises(ConfigError, match=words):
            check_budget(statuses, budget)
    else:
        notes = check_budget(statuses, budget)
        assert bool(notes) == (words is not None)
        assert all(str(words) in note for note in notes)


def test_nothing_is_submitted_again_once_the_budget_is_spent(
    fake: FakeSlurm,
    runs: list[StageRun],
    profile: ClusterProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spent = 5.0

    def collect(runs: Sequence[StageRun], root: Path) -> list[RunStatus]:
        return [replace(s, cost=Cost(1.0, spent)) for s in fake.collect_status(runs, root)]

    monkeypatch.setattr(keeper, "collect_status", collect)
    fake.submit(runs, profile)
    keeper.queue_keeper(runs, profile, budget=spent * len(runs) + 1)
    fake.states["pretrain"] = "waiting"
    assert keeper.keep_going(*note_of(profile.run_root)).submitted == ["pretrain"]
    spent = 6.0
    fake.states["pretrain"] = "waiting"
    found = keeper.keep_going(*note_of(profile.run_root))
    assert found.state == "stuck" and "GPU-hours is spent" in found.reasons[0]
    assert not found.submitted and not fake.keepers


def test_no_answer_is_not_an_end(
    fake: FakeSlurm, runs: list[StageRun], profile: ClusterProfile
) -> None:
    fake.submit(runs, profile)
    keeper.queue_keeper(runs, profile)
    fake.states["pretrain"] = "unknown"
    assert keeper.keep_going(*note_of(profile.run_root)).state == "unknown"
    fake.states["pretrain"] = "waiting"
    fake.refuses = "Job violates accounting/QOS policy"
    found = keeper.keep_going(*note_of(profile.run_root))
    assert (found.state, found.reasons) == ("unknown", [fake.refuses])
    assert len(fake.keepers) == 1
    assert not list(list_ended_keepers(runs, profile.run_root))


def test_two_keepers_at_the_same_moment_are_one_look(
    fake: FakeSlurm, runs: list[StageRun], profile: ClusterProfile
) -> None:
    """The second one sees no progress since the first; the next keeper starts without a pause."""
    fake.submit(runs, profile)
    keeper.queue_keeper(runs, profile)
    run_dir = next(run for run in runs if run.name == "pretrain").run_dir(profile.run_root)
    attempts.record_save(run_dir, attempts.start_attempt(run_dir), step=1, seconds=1)
    for _ in range(2):
        fake.states["pretrain"] = "waiting"
        assert keeper.keep_going(*note_of(profile.run_root)).state == "working"
        assert fake.waiting[1] == ()


def test_it_gives_up_without_progress_and_not_with_it(
    fake: FakeSlurm,
    runs: list[StageRun],
    profile: ClusterProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper, "_SAME_LOOK_S", -1.0)  # here they follow each other at once
    fake.submit(runs, profile)
    keeper.queue_keeper(runs, profile)
    pretrain = next(run for run in runs if run.name == "pretrain")
    run_dir = pretrain.run_dir(profile.run_root)
    for look in range(25):
        fake.states["pretrain"] = "waiting"
        number = attempts.start_attempt(run_dir)
        attempts.record_save(run_dir, number, step=look, seconds=1)
        assert keeper.keep_going(*note_of(profile.run_root)).state == "working"
        assert fake.waiting[1] == ()
    for _ in range(9):
        fake.states["pretrain"] = "waiting"
        assert keeper.keep_going(*note_of(profile.run_root)).state == "working"
        assert fake.waiting[1] == ("--begin=now+300",)
    fake.states["pretrain"] = "waiting"
    found = keeper.keep_going(*note_of(profile.run_root))
    assert found.state == "stuck" and "10 keepers one after the other" in found.reasons[0]
    # Submitting again begins to count anew.
    keeper.queue_keeper(runs, profile)
    assert not list(list_ended_keepers(runs, profile.run_root))
    assert keeper.keep_going(*note_of(profile.run_root)).state == "working"


def test_another_note_than_it_was_submitted_with_is_refused(
    fake: FakeSlurm, runs: list[StageRun], profile: ClusterProfile
) -> None:
    fake.submit(runs, profile)
    keeper.queue_keeper(runs, profile)
    path, sha256 = note_of(profile.run_root)
    with pytest.raises(ConfigError, match="has a keeper of its own"):
        keeper.keep_going(path, "0" * 64)
    path.write_text(path.read_text().replace('"small"', '"large"'))
    with pytest.raises(ConfigError, match="submit again"):
        keeper.keep_going(path, sha256)


def test_in_the_terminal_it_stays_until_all_is_done(
    fake: FakeSlurm,
    runs: list[StageRun],
    profile: ClusterProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        fake.states = dict.fromkeys(fake.states, "done")

    monkeypatch.setattr("time.sleep", pause)
    rounds: list[keeper.Round] = []
    assert keeper.watch(runs, profile, on_round=rounds.append).state == "finished"
    assert [each.state for each in rounds] == ["working", "finished"] and pauses == [60.0]


@pytest.mark.parametrize(
    ("code", "failures", "state", "asked", "again"),
    [
        (0, 0, "RUNNING", 0, False),
        (2, 0, "RUNNING", 0, False),  # the note is another one
        (EXIT_INTERNAL, 0, "RUNNING", 0, False),
        (1, 0, "RUNNING", 1, True),  # srun without a controller
        (1, 3, "RUNNING", 4, True),  # and that for a while
        (EXIT_INTERRUPTED, 0, "RUNNING", 1, True),
        (137, 1, "RUNNING", 2, True),
        (143, 0, "CANCELLED", 1, False),
        (1, 99, "RUNNING", 20, False),
    ],
)
def test_its_batch_script_starts_it_again(
    tmp_path: Path, code: int, failures: int, state: str, asked: int, again: bool
) -> None:
    notes = tmp_path / "notes"
    show = f"[ $(grep -c show {notes}) -gt {failures} ] && echo JobId=7 JobState={state}"
    path = write_commands(
        tmp_path / "bin",
        srun=f"exit {code}",
        sleep="exit 0",
        scontrol=f'echo "$*" >> {notes}; [ "$1" = requeue ] || {{ {show}; }}',
    )
    script = "\n".join(["srun", *keeper._TEARDOWN])
    environment = {"PATH": path, "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", script], env=environment, check=False)
    assert done.returncode == code
    said = notes.read_text().splitlines() if notes.exists() else []
    assert said == ["-o show job 7"] * asked + ["requeue 7"] * again
    # Whatever the cause is, not for ever.
    environment["SLURM_RESTART_COUNT"] = "100"
    subprocess.run(["bash", "-c", script], env=environment, check=False)
    assert len(notes.read_text().splitlines() if notes.exists() else []) == len(said)


def test_an_unforeseen_error_is_not_taken_for_one_of_srun(tmp_path: Path) -> None:
    """The keeper's job is not started again for it: it would meet the same error."""
    (tmp_path / "note.json").mkdir()
    call = [sys.executable, "-m", "slurm.keeper", str(tmp_path / "note.json")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_INTERNAL and "IndexError" in done.stderr
