"""Two real users in one run root: what another one plants neither runs as us nor stops us.

We are root, who runs the test. The other is a user whom the test makes and removes; he has a shell
only, since he may not be able to reach our Python. His files have our names, which everybody can
compute. See docs/security.md.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import write_module

from pipeline import manifest, runfile
from pipeline.ownership import ForeignOwnerError
from pipeline.spec import Resources, StageConfig, StageRun
from slurm.shared.active_runs import find_active_runs
from slurm.status import collect_status
from slurm.submission.profile import ClusterProfile
from slurm.submission.snapshot import find_snapshot_folder
from slurm.submission.submit import submit
from stages.commands.clean import clean_run_root

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

STAGE = '''
"""A stage that says who ran it."""
import os
from dataclasses import dataclass
from pipeline.spec import StageConfig
from pipeline.stage import StageOutput

@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    text: str = "x"

def run(ctx, cfg):
    out = ctx.run_dir / "note"
    out.write_text(str(os.geteuid()))
    return StageOutput(outputs={"note": out})
'''
SAVED = "checkpoints/step_00000001"
OLD = time.time() - 10 * 86400


@dataclass(frozen=True)
class OtherUser:
    """A user of this machine who has a shell."""

    name: str
    user_id: int

    def call(self, script: str, folder: Path, umask: int, **env: str) -> tuple[bool, str]:
        """Run a shell script as this user; return whether every command of it went well."""
        ids = [f"--reuid={self.user_id}", f"--regid={self.user_id}", "--clear-groups"]
        done = subprocess.run(
            ["setpriv", *ids, "sh", "-euc", f"umask {umask:03o}\n{script}"],
            cwd=folder,
            env={"PATH": os.environ["PATH"], **env},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def other() -> Iterator[OtherUser]:
    """Another user, with a group of the same number."""
    name = f"mugs{os.getpid()}"
    user_id = next(number for number in range(40000, 60000) if not _is_taken(number))
    subprocess.run(["groupadd", "-g", str(user_id), name], check=True, capture_output=True)
    subprocess.run(
        ["useradd", "-M", "-N", "-u", str(user_id), "-g", name, "-s", "/bin/sh", name],
        check=True,
        capture_output=True,
    )
    try:
        yield OtherUser(name, user_id)
    finally:
        subprocess.run(["userdel", "-f", name], check=False, capture_output=True)
        subprocess.run(["groupdel", name], check=False, capture_output=True)


def _is_taken(number: int) -> bool:
    lookups = [["getent", database, str(number)] for database in ("passwd", "group")]
    return any(subprocess.run(call, capture_output=True).returncode == 0 for call in lookups)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that other users can reach; those of pytest are private."""
    folder = Path(tempfile.mkdtemp(prefix="two-users-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


class RunRoot:
    """A run root, shared or private, with three runs of ours."""

    def __init__(self, folder: Path, module: Any, other: OtherUser, umask: int, mode: int) -> None:
        self.path = folder / f"runs-{umask:03o}-{mode:o}"
        self.path.mkdir()
        os.chown(self.path, 0, other.user_id if mode & 0o020 else 0)
        self.path.chmod(mode)
        self.is_shared = bool(mode & 0o020)
        self.umask = umask
        self.other = other
        self.profile = ClusterProfile(run_root=self.path, partition="low")
        self.runs = {name: self._make_run(module, name) for name in ("taken", "older", "linked")}
        if not self.is_shared:
            self.runs = {"older": self.runs["older"]}

    def _make_run(self, module: Any, name: str) -> StageRun:
        # Another id in each run root: jobs of one name do not run at the same time.
        run_id = hashlib.sha256(f"{self.path.name}{name}".encode()).hexdigest()[:12]
        needs = Resources(gpu=False, ranks_per_node=1, cpus_per_rank=1, hours=0.5, memory_gb=1)
        return StageRun("make", name, run_id, module.Config(), {}, needs, "two_users:run")

    def folder(self, name: str) -> Path:
        """Return the folder of a run."""
        return self.runs[name].run_dir(self.path)

    def plant(self, script: str) -> bool:
        """Run a script as the other user in the run root; return whether he was let."""
        return self.other.call(script, self.path, self.umask)[0]

    def submit(self) -> dict[str, str]:
        """Submit the runs; return the actions by name."""
        before = os.umask(self.umask)
        try:
            found = submit([*self.runs.values()], self.profile)
        finally:
            os.umask(before)
        return {each.run.name: each.action for each in found}

    def states(self) -> dict[str, str]:
        """Return the states of the runs."""
        found = collect_status([*self.runs.values()], self.path)
        return {each.run.name: each.state for each in found}

    def has_ended(self) -> bool:
        """Return whether all runs are done but the one that is another user's."""
        return all(state == "done" for name, state in self.states().items() if name != "taken")

    def make_older_run(self, name: str) -> Path:
        """Make a run's folder as an earlier version did with umask 002: the group may write."""
        folder = self.folder(name)
        inner = (folder / each for each in ("attempts", "logs", "checkpoints", SAVED))
        for path in (folder.parent, folder, *inner):
            path.mkdir(exist_ok=True)
            os.chown(path, 0, self.other.user_id)
            path.chmod(0o2775 if self.is_shared else 0o755)
        state = folder / SAVED / "state.json"
        state.touch()
        os.chown(state, 0, self.other.user_id)
        state.chmod(0o664 if self.is_shared else 0o644)
        return folder


def plant_in_older_runs(root: RunRoot, secret: Path) -> None:
    """Findings 4 and 6: numbers, links and a checkpoint in folders that were left open."""
    older = root.make_older_run("older")
    assert root.is_shared == root.plant(
        f"cd {older}\n"
        "mkdir claims\n"
        "touch claims/0007.json\n"
        """echo '{"launch": "x"}' > attempts/0099.json\n"""
        """echo '{"error": "no", "verdict": "no"}' > attempts/0001.failed.json\n"""
        f"echo planted > {SAVED}/student.safetensors\n"
    )
    if root.is_shared:
        linked = root.make_older_run("linked")
        assert root.plant(f"ln -s {secret} {linked}/logs/attempt_0001_rank0.log")


def plant_before_us(root: RunRoot, secret: Path, cluster: Any) -> None:
    """Findings 1, 2, 3, 5 and 9: what is there before our first submission."""
    code = find_snapshot_folder(root.path).name
    scripts = (
        f"mkdir -p {code}/0123456789ab/pipeline",
        f"mkdir -p {root.folder('taken')}/logs\n"
        f"echo 'entrypoint: os:abort' > {root.folder('taken')}/config.yaml"
        if root.is_shared
        else "touch config.yaml",
        "mkdir -p knn/theirs-00000000000b features/0b5d9f0e-7c3a-4d8f-9f3e-0123456789ab\n"
        f"touch .cache.{'0' * 32}\n touch knn/theirs-00000000000b/config.yaml\n"
        f"ln -s {secret.parent} pretrain",
    )
    for script in scripts:
        assert root.plant(script) == root.is_shared, script
    went_well, said = root.other.call(
        "".join(
            f"sbatch --hold -p low --mem=1 -J mugs-{run.run_id} --wrap true -o /dev/null\n"
            for run in root.runs.values()
        ),
        Path("/"),
        root.umask,
        SLURM_CONF=cluster.env["SLURM_CONF"],
    )
    assert went_well, said


@pytest.fixture
def roots(
    slurm_cluster: Any, place: Path, other: OtherUser, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[RunRoot]]:
    """Run roots of a group, with both usual umasks, and a private one."""
    module = write_module(monkeypatch, place / "package", "two_users", STAGE)
    kinds = ((0o002, 0o3775), (0o022, 0o3775), (0o022, 0o755))
    yield [RunRoot(place, module, other, umask, mode) for umask, mode in kinds]
    slurm_cluster.run("scancel", "-u", other.name)


def test_what_another_user_plants_neither_runs_as_us_nor_stops_us(
    roots: list[RunRoot], place: Path, slurm_cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    secret = place / "home/.bashrc"
    secret.parent.mkdir()
    secret.write_text("mine\n")
    for root in roots:
        plant_in_older_runs(root, secret)
        plant_before_us(root, secret, slurm_cluster)
        submit_among_plants(root)
        check_that_nothing_can_be_planted_now(root)
        assert f"of {root.other.name} is named mugs-{root.runs['older'].run_id}" in caplog.text
    end = time.monotonic() + 120
    while not all(root.has_ended() for root in roots):
        assert time.monotonic() < end, ([root.states() for root in roots], slurm_cluster.describe())
        time.sleep(0.5)
    for root in roots:
        entry = manifest.find_done(root.path, root.runs["older"].run_id)
        assert entry is not None and entry.attempt == 1, "planted numbers do not count"
        assert entry.output("note").read_text() == "0"
        saved = [path.name for path in (root.folder("older") / SAVED).iterdir()]
        assert "student.safetensors" not in saved, "what was planted deep in it is set aside"
        check_clean(root)
    assert secret.read_text() == "mine\n", "a planted link is not written through"
    assert list(secret.parent.iterdir()) == [secret]


def submit_among_plants(root: RunRoot) -> None:
    """Submit: what is another's is named and not used, and the rest goes on."""
    if not root.is_shared:
        assert root.submit() == {"older": "submitted"}
        return
    code = find_snapshot_folder(root.path)
    with pytest.raises(ForeignOwnerError, match=f"{code}: belongs to {root.other.name}"):
        root.submit()
    shutil.rmtree(code)  # as whoever owns the run root can, or he himself
    assert root.submit() == {"taken": "skipped", "older": "submitted", "linked": "submitted"}
    (taken,) = collect_status([root.runs["taken"]], root.path)
    assert taken.detail.startswith(f"begun by {root.other.name}: ")


def check_that_nothing_can_be_planted_now(root: RunRoot) -> None:
    """Findings 1 to 4 and 6, and 9 from the other side: our folders are ours alone."""
    older = root.folder("older")
    (snapshot,) = find_snapshot_folder(root.path).iterdir()
    for script in (
        f"echo 'raise SystemExit' >> {snapshot}/run_stage.py",
        f"touch {snapshot}/sitecustomize.py",
        f"mv {snapshot} {snapshot}.old",
        f"mv {snapshot.parent} {snapshot.parent}.old",
        f"echo exit > {older}/submission.sh",
        f"cat {older}/submission.sh",
        f"echo x >> {older}/{runfile.FILE_NAME}",
        f"ln -s /x {older}/logs/x.log",
        f"touch {older}/attempts/0100.json",
        f"touch {older}/claims/0100.json",
        f"echo x >> {older}/attempts/0001.json",
        f"touch {older}/{SAVED}/x",
        f"echo x >> {older}/{SAVED}/state.json",
        f"mv {older} {older}.old",
        f"rm {older}/{runfile.FILE_NAME}",
    ):
        assert not root.plant(script), script


def check_clean(root: RunRoot) -> None:
    """Finding 9: `clean` leaves alone what is not ours, and what was never a run."""
    ours = StageRun("knn", "ours", "00000000000c", StageConfig(), {}, Resources(), "x:run")
    folder = runfile.write_run_file(root.path, ours)
    for path in (*root.path.rglob("*"), root.path):
        os.utime(path, (OLD, OLD), follow_symlinks=False)
    before = {path for path in root.path.rglob("*") if not path.is_relative_to(folder)}
    lines = list(clean_run_root(root.path, set(), find_active_runs, yes=True))
    assert not folder.exists(), lines
    assert {path for path in before if not os.path.lexists(path)} == set(), lines
    if root.is_shared:
        assert any(f"theirs-00000000000b: belongs to {root.other.name}" in line for line in lines)
