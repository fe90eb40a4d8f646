"""A group in one run root: what another member has begun is read and named, nothing more."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import attempts, manifest, runfile
from pipeline.files import write_atomic
from pipeline.manifest import ManifestEntry
from pipeline.ownership import ForeignOwnerError
from pipeline.spec import Resources, StageConfig, StageRun
from slurm import console
from slurm.local.executor import run_locally
from slurm.shared import queue
from slurm.status import collect_status
from slurm.submission import submit as submission
from slurm.submission.lock import submission_lock
from slurm.submission.profile import ClusterProfile
from stages.commands.verify import verify_runs

COLLEAGUE = 4321


def make_run(name: str, needs: dict[str, str]) -> StageRun:
    """Return a run whose id is its name, repeated."""
    run_id = (name * 12)[:12]
    return StageRun("knn", name, run_id, StageConfig(), needs, Resources(gpu=False), "x:run")


THEIRS = make_run("theirs", {})
WAITING = make_run("waiting", {"weights": THEIRS.run_id})
OWN = make_run("own", {})


class FakeSlurm:
    """Takes every job, and knows none. Keeps what it was told."""

    def __init__(self) -> None:
        self.scripts: list[str] = []
        self.commands: list[tuple[str, ...]] = []

    def call(
        self, *command: str, stdin: str | None = None, **options: object
    ) -> tuple[int, str, str]:
        """Answer a command."""
        self.commands.append(command)
        if command[0] == "sbatch":
            self.scripts.append(stdin or "")
        answers = {"squeue": (0, "", ""), "sbatch": (0, "17\n", "")}
        return answers.get(command[0], (1, "", "Invalid job id"))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Slurm, and a snapshot of no code in each run root below `tmp_path`."""

    def take_snapshot(root: Path) -> Path:
        return write_atomic(root / "code/SHA256SUMS", "").parent

    fake = FakeSlurm()
    monkeypatch.setattr(queue, "call_slurm", fake.call)
    monkeypatch.setattr(submission, "take_snapshot", take_snapshot)
    return fake


@pytest.fixture(params=[0o755, 0o700], ids=["readable", "private"])
def root(request: pytest.FixtureRequest, tmp_path: Path, slurm: FakeSlurm) -> Path:
    """A run root in which a colleague has begun a run."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    run_dir = runfile.write_run_file(tmp_path, THEIRS)
    attempts.start_attempt(run_dir, job_id="7")
    attempts.record_failure(run_dir, 1, error="it failed", log=run_dir / "x.log")
    for path in (run_dir, *run_dir.rglob("*")):
        os.chown(path, COLLEAGUE, COLLEAGUE)
    run_dir.chmod(request.param)
    return tmp_path


def test_sbatch_gets_the_script_itself(tmp_path: Path, slurm: FakeSlurm) -> None:
    """A file in between could be swapped; what is there to read, only its owner can read."""
    submission.submit([OWN], ClusterProfile(run_root=tmp_path, partition="low"))
    (script,) = slurm.scripts
    (sbatch,) = (command for command in slurm.commands if command[0] == "sbatch")
    assert all(argument.startswith("--") for argument in sbatch[1:])
    assert runfile.describe_run(OWN)["sha256"] in script
    copy = OWN.run_dir(tmp_path) / queue.SCRIPT
    assert (copy.read_text(), copy.stat().st_mode & 0o777) == (script, 0o600)


def test_what_submit_writes_only_its_owner_can_change(tmp_path: Path, slurm: FakeSlurm) -> None:
    before = os.umask(0o002)
    try:
        submission.submit([OWN], ClusterProfile(run_root=tmp_path, partition="low"))
    finally:
        os.umask(before)
    run_dir = OWN.run_dir(tmp_path)
    assert (run_dir / queue.JOB_NOTE).exists()
    assert [path for path in (run_dir, *run_dir.rglob("*")) if path.stat().st_mode & 0o022] == []


def as_user(user_id: int, act: Callable[[], object]) -> int:
    """Do something as another user; return 0 if it went well, 1 if it raised."""
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(user_id)
        os.setuid(user_id)
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_submit_names_who_has_begun_a_run_and_goes_on_with_the_rest(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = ClusterProfile(run_root=root, partition="low")
    found = submission.submit([THEIRS, WAITING, OWN], profile)
    assert [each.action for each in found] == ["skipped", "skipped", "submitted"]
    assert console.show_submissions(found) == 1
    said = capsys.readouterr().out
    assert "note: theirs: begun by user 4321: use a run root of your own, or let its owner" in said
    assert "note: waiting: needs theirs; submit again once that is done" in said
    assert not WAITING.run_dir(root).exists()
    # What would be written is not shown for it either.
    scripts = list(submission.preview_scripts([THEIRS, OWN], profile))
    assert scripts[0].startswith("==> theirs: begun by user 4321")


def test_what_a_colleague_has_done_is_everybodys(root: Path) -> None:
    """Their result is used: an entry has no key, and belongs to whoever wrote it."""
    entry = ManifestEntry(
        stage=THEIRS.stage, name=THEIRS.name, run_id=THEIRS.run_id, upstream={}, outputs={}
    )
    os.chown(manifest.record_entry(root, entry), COLLEAGUE, COLLEAGUE)
    profile = ClusterProfile(run_root=root, partition="low")
    found = submission.submit([THEIRS, WAITING], profile)
    assert [each.action for each in found] == ["done", "submitted"]
    (theirs,) = collect_status([THEIRS], root)
    assert theirs.state == "done" and theirs.detail.endswith(", by user 4321")


def test_run_names_who_has_begun_a_run(root: Path) -> None:
    theirs, waiting = run_locally([THEIRS, WAITING], root)
    assert (theirs.state, waiting.state) == ("not run", "not run")
    assert theirs.detail.startswith("begun by user 4321: ")
    assert waiting.detail == "needs theirs"


def test_status_names_whose_a_run_is(root: Path) -> None:
    theirs, own = collect_status([THEIRS, OWN], root)
    # As root, the test can look into a private folder.
    assert (theirs.state, theirs.detail) == ("failed", "begun by user 4321: it failed")
    assert (own.state, own.detail) == ("waiting", "not started")


@pytest.mark.parametrize("linked", ["", "checkpoints", "run", "stage"])
def test_nothing_of_a_colleague_is_repaired_nor_where_their_link_leads(
    root: Path, linked: str
) -> None:
    """Else `verify --repair` would tidy up any folder of ours that they name."""
    run = THEIRS if not linked else OWN
    folder = run.run_dir(root) / "checkpoints"
    if linked:
        elsewhere = root / "elsewhere"
        link = {"checkpoints": folder, "run": folder.parent, "stage": folder.parent.parent}[linked]
        (elsewhere / folder.relative_to(link)).mkdir(parents=True)
        if linked == "stage":
            link.rename(root / "before")
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(elsewhere)
        os.chown(link, COLLEAGUE, COLLEAGUE, follow_symlinks=False)
    folder.mkdir(exist_ok=True)
    if not linked:
        os.chown(folder, COLLEAGUE, COLLEAGUE)
    left = write_atomic(folder / ".step_00000002.01234567.tmp/x", "").parent
    for path in (left / "x", left):
        os.utime(path, (1e9, 1e9))
    found = verify_runs([run], root, repair=True)
    assert left.exists() and found.repaired == []
    said = f"belongs to user 4321, so nothing of run {run.name} is repaired"
    assert any(said in problem for problem in found.problems)
    if linked == "stage":
        with pytest.raises(ForeignOwnerError, match="have the link removed"):
            runfile.prepare_run_dir(root, OWN)


def test_a_private_folder_of_a_colleague_does_not_stop_status(root: Path) -> None:
    """The same as a user who may not look into it."""
    for parent in (root, *root.parents):
        if parent.is_relative_to(tempfile.gettempdir()) and parent != Path(tempfile.gettempdir()):
            parent.chmod(0o755)
    is_private = THEIRS.run_dir(root).stat().st_mode & 0o777 == 0o700

    def act() -> None:
        theirs, own = collect_status([THEIRS, OWN], root)
        assert own.state == "waiting"
        assert theirs.detail.startswith("begun by user 4321: ")
        assert ("unreadable: " in theirs.detail) == is_private

    assert as_user(1234, act) == 0


def test_a_copy_of_a_colleagues_run_is_ones_own(root: Path, tmp_path: Path) -> None:
    """How to go on where a colleague stopped, as docs/security.md says."""
    mine = tmp_path / "mine"
    mine.mkdir()
    assert os.system(f"cp -r --no-preserve=all {root}/knn {mine}/knn") == 0
    profile = ClusterProfile(run_root=mine, partition="low")
    assert [each.action for each in submission.submit([THEIRS], profile)] == ["submitted"]
    assert attempts.latest_attempt(THEIRS.run_dir(mine)) == 1


def test_what_another_user_put_into_an_open_run_folder_does_not_stop_us(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Folders of earlier versions were open to a group."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    run_dir = OWN.run_dir(tmp_path)
    for name in ("claims/0007.json", "attempts/0099.json", "checkpoints/step_9/x"):
        write_atomic(run_dir / name, "{}")
    (run_dir / "config.yaml").symlink_to("/etc/passwd")
    for path in (*run_dir.rglob("*"),):
        os.chown(path, COLLEAGUE, COLLEAGUE, follow_symlinks=False)
    run_dir.chmod(0o775)
    write_atomic(run_dir / "metrics.jsonl", "ours")
    for name in ("state.json", "student.safetensors"):
        write_atomic(run_dir / "saved/step_8" / name, "{}")
    os.chown(run_dir / "saved/step_8/student.safetensors", COLLEAGUE, COLLEAGUE)
    runfile.write_run_file(tmp_path, OWN)
    assert runfile.read_run_file(run_dir).run_id == OWN.run_id
    assert (run_dir / "metrics.jsonl").read_text() == "ours"
    assert attempts.start_attempt(run_dir) == 1
    with submission_lock(run_dir, patience_s=0) as lock:
        assert lock.number == 1
    aside = sorted(path.name for path in run_dir.glob("*.of-4321-1"))
    assert aside == [
        f"{name}.of-4321-1" for name in ("attempts", "checkpoints", "claims", "config.yaml")
    ]
    # One that took the place of a file of ours, deep in a folder of ours.
    inner = [path.name for path in (run_dir / "saved/step_8").iterdir()]
    assert sorted(inner) == ["state.json", "student.safetensors.of-4321-1"]
    assert caplog.text.count("another user put this here") == 5
    # They stay where they are the next time.
    runfile.write_run_file(tmp_path, OWN)
    assert not list(run_dir.glob("*.of-4321-*.of-*"))
    # And are there again, beside the first ones, if they were put there again.
    write_atomic(run_dir / "claims.new", "")
    os.chown(run_dir / "claims.new", COLLEAGUE, COLLEAGUE)
    os.rename(run_dir / "claims", run_dir / "claims.mine")
    os.rename(run_dir / "claims.new", run_dir / "claims")
    runfile.write_run_file(tmp_path, OWN)
    assert (run_dir / "claims.of-4321-2").is_file()
