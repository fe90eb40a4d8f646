"""The spine on a real Slurm: submit, order, status, idempotence, failure and repair,
with tiny stages.
"""

import csv
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import write_module

from pipeline import config, manifest
from pipeline.plan import build_plan
from pipeline.provenance import code_root
from pipeline.spec import Resources, StageRun, StageSpec
from slurm.shared import queue
from slurm.status import RunStatus, collect_status
from slurm.submission.profile import ClusterProfile
from slurm.submission.submit import submit
from stages import STAGES

pytestmark = pytest.mark.slurm

STAGE = '''
"""Tiny stages: note who ran when, fail while a file is there, wait while another is not."""
import csv, os, time
from dataclasses import dataclass
from pathlib import Path
from pipeline.settings import Runtime
from pipeline.spec import StageConfig
from pipeline.stage import StageOutput

@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    text: str = "x"
    gate: Runtime[str | None] = None
    poison: Runtime[str | None] = None
    watch: bool = False

    def concurrent_roles(self):
        return frozenset({"data"}) if self.watch else frozenset()

def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)

def run(ctx, cfg):
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    (ctx.run_dir / f"here-{ctx.attempt}-{rank}").touch()
    while len(list(ctx.run_dir.glob(f"here-{ctx.attempt}-*"))) < int(world):
        time.sleep(0.1)
    while cfg.gate and not Path(cfg.gate).exists():
        time.sleep(0.1)
    if cfg.poison and Path(cfg.poison).exists():
        raise ValueError(f"{cfg.poison} is in the way")
    note = ctx.run_dir / f"rank{rank}.txt"
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    note.write_text(f"{rank}/{world} {address} {time.time()}")
    below = [entry.output("note").read_text() for entry in ctx.inputs.values()]
    for folder in ctx.running.values():
        while not (folder / "here-1-0").exists():  # its job has begun, its rank not yet
            time.sleep(0.1)
    info = {"world": int(world), "watched": sorted(ctx.running)}
    return StageOutput(outputs={"note": note}, rows=[(ctx.name, len(below))], info=info)
'''

REPRODUCTION = """
name: tiny
runs:
  first:  {{stage: make, text: a, gate: {gate}, resources: {{ranks_per_node: 2, nodes: 2}}}}
  middle: {{stage: use, needs: {{data: first}}, text: b, poison: {poison}}}
  side:   {{stage: use, needs: {{data: first}}, text: c}}
  last:   {{stage: use, needs: {{data: middle}}, text: d}}
"""


WATCHING = """
name: tiny
runs:
  first:   {{stage: make, text: a, gate: {gate}, poison: {poison}}}
  watcher: {{stage: use, needs: {{data: first}}, text: e, watch: true}}
"""


class Spine:
    """A reproduction of tiny stages, its files, and short names for what the tests do with it."""

    def __init__(
        self, cluster: Any, folder: Path, module: Any, reproduction: str = REPRODUCTION
    ) -> None:
        self.cluster = cluster
        common: dict[str, Any] = {
            "config": module.Config,
            "entrypoint": "tiny_stages:run",
            "resources": Resources(gpu=False, cpus_per_rank=1, hours=0.5, memory_gb=1),
            "rows_writer": "tiny_stages:write_rows",
        }
        self.gate, self.poison = folder / "gate", folder / "poison"
        stages = {
            "make": StageSpec(name="make", **common),
            "use": StageSpec(name="use", needs={"data": "make|use"}, **common),
        }
        path = folder / "tiny.yaml"
        path.write_text(reproduction.format(gate=self.gate, poison=self.poison))
        self.runs: list[StageRun] = build_plan(config.load_reproduction(str(path), stages))
        self.profile = ClusterProfile(run_root=folder / "runs", partition="low", gpu_type="a100")

    def submit(self) -> dict[str, str]:
        """Submit all; action by run name."""
        return {s.run.name: s.action for s in submit(self.runs, self.profile)}

    def status(self) -> dict[str, RunStatus]:
        """Status by run name."""
        return {s.run.name: s for s in collect_status(self.runs, self.profile.run_root)}

    def states(self) -> dict[str, str]:
        """State by run name."""
        return {name: s.state for name, s in self.status().items()}

    def finish(self, timeout_s: float = 60) -> None:
        """Open the gate and wait until all are done."""
        self.gate.touch()
        self.until(lambda states: set(states.values()) == {"done"}, timeout_s)

    def until(
        self, true: Callable[[dict[str, str]], bool], timeout_s: float = 60
    ) -> dict[str, str]:
        """Poll the states until they satisfy a condition."""
        end = time.monotonic() + timeout_s
        while not true(states := self.states()):
            assert time.monotonic() < end, (states, self.status(), self.cluster.describe())
            time.sleep(0.2)
        return states


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tiny stages in a package of their own, which jobs find through PYTHONPATH."""
    return write_module(monkeypatch, tmp_path / "package", "tiny_stages", STAGE)


@pytest.fixture
def spine(slurm_cluster: Any, tmp_path: Path, tiny: Any) -> Spine:
    """A reproduction of four of them."""
    return Spine(slurm_cluster, tmp_path, tiny)


def test_order_status_and_idempotence(spine: Spine, slurm_cluster: Any) -> None:
    assert set(spine.states().values()) == {"waiting"}
    began = time.monotonic()
    assert set(spine.submit().values()) == {"submitted"}
    assert time.monotonic() - began < 20
    states = spine.until(lambda s: s["first"] == "running")
    assert [states[name] for name in ("middle", "side", "last")] == ["queued"] * 3
    assert "Dependency" in spine.status()["last"].detail
    assert set(spine.submit().values()) == {"queued"}
    jobs = slurm_cluster.run("squeue", "-h", "-o", "%j").stdout.split()
    assert sorted(jobs) == sorted(
        queue.job_name(run.run_dir(spine.profile.run_root)) for run in spine.runs
    )
    spine.finish()
    assert set(spine.submit().values()) == {"done"}
    _check_results(spine)


def _check_results(spine: Spine) -> None:
    entries = {
        run.name: manifest.read_entry(spine.profile.run_root, run.run_id) for run in spine.runs
    }
    first = entries["first"]
    assert first.info["world"] == 4 and first.attempt == 1
    ranks = [(first.run_dir / f"rank{rank}.txt").read_text().split() for rank in range(4)]
    assert [rank[0] for rank in ranks] == [f"{rank}/4" for rank in range(4)]
    assert len({rank[1] for rank in ranks}) == 1, "ranks disagree about the meeting point"
    finished: dict[str, float] = {}
    for name, entry in entries.items():
        assert entry is not None and entry.rows_path is not None and entry.rows_path.exists()
        assert entry.provenance["snapshot"] == Path(entry.provenance["code_root"]).name, (
            "not the snapshot's code"
        )
        finished[name] = float(entry.output("note").read_text().split()[-1])
        assert manifest.find_problems(entry, hashes=True) == []
    assert finished["first"] < finished["middle"] < finished["last"]


def test_failed_stage_is_explained_and_repaired(spine: Spine) -> None:
    spine.gate.touch()
    spine.poison.touch()
    spine.submit()
    states = spine.until(
        lambda s: s["middle"] == "failed" and s["side"] == "done" and s["last"] != "queued"
    )
    assert states == {"first": "done", "middle": "failed", "side": "done", "last": "waiting"}
    failed = spine.status()["middle"]
    assert f"ValueError: {spine.poison} is in the way" in failed.detail
    assert failed.log is not None and "is in the way" in Path(failed.log).read_text()
    spine.poison.unlink()
    assert spine.submit() == {
        "first": "done",
        "middle": "submitted",
        "side": "done",
        "last": "submitted",
    }
    spine.until(lambda s: set(s.values()) == {"done"})
    entry = manifest.read_entry(spine.profile.run_root, spine.runs[1].run_id)
    assert (entry.attempt, entry.restarts) == (2, 1)


def test_job_that_dies_before_it_starts_is_explained(spine: Spine, tmp_path: Path) -> None:
    submitted = tmp_path / "submitted"
    setup = f"until [ -e {submitted} ]; do sleep 0.1; done; echo no such module >&2; exit 3"
    good, spine.profile = spine.profile, spine.profile.model_copy(update={"setup": (setup,)})
    spine.submit()
    submitted.touch()
    spine.until(lambda s: list(s.values()) == ["failed", "waiting", "waiting", "waiting"])
    failed = spine.status()["first"]
    assert (
        "no such module" in failed.detail and "FAILED" in failed.detail and failed.log is not None
    )
    spine.profile = good
    assert set(spine.submit().values()) == {"submitted"}
    spine.finish()


def test_a_parent_that_slurm_has_forgotten_is_judged_by_the_manifest(
    spine: Spine, slurm_cluster: Any
) -> None:
    spine.gate.touch()
    everything, spine.runs = spine.runs, spine.runs[:1]
    assert spine.submit() == {"first": "submitted"}
    job = spine.status()["first"].job_id
    spine.until(lambda s: s["first"] == "done")
    assert job is not None and slurm_cluster.job(job)
    slurm_cluster.stop_controller()
    slurm_cluster.start_controller(forget=True)
    spine.runs = everything
    spine.until(lambda s: slurm_cluster.is_idle() and not slurm_cluster.job(job))
    assert spine.submit() == {
        "first": "done",
        "middle": "submitted",
        "side": "submitted",
        "last": "submitted",
    }
    spine.until(lambda s: set(s.values()) == {"done"})


def test_a_run_that_watches_starts_with_the_one_it_watches(
    slurm_cluster: Any, tmp_path: Path, tiny: Any
) -> None:
    spine = Spine(slurm_cluster, tmp_path, tiny, WATCHING)
    assert set(spine.submit().values()) == {"submitted"}
    assert spine.until(lambda s: s["watcher"] == "done")["first"] == "running"
    assert manifest.read_entry(spine.profile.run_root, spine.runs[1].run_id).info["watched"] == [
        "data"
    ]
    spine.finish()


def test_cancelled_runs_can_be_submitted_again(spine: Spine) -> None:
    spine.submit()
    spine.until(lambda s: s["first"] == "running")
    ids = [job_id for s in spine.status().values() if (job_id := s.job_id)]
    assert len(ids) == 4
    queue.cancel_jobs(ids)
    spine.until(lambda s: s["first"] == "canceled" and "queued" not in s.values())
    assert "CANCELLED" in spine.status()["first"].detail
    queue.cancel_jobs(ids)
    assert set(spine.submit().values()) == {"submitted"}
    spine.finish()


@pytest.mark.parametrize("name", ["USR2", "TERM"])
def test_preempted_run_is_requeued_and_finishes(
    spine: Spine, slurm_cluster: Any, name: str
) -> None:
    spine.submit()
    spine.until(lambda s: s["first"] == "running")
    first = spine.runs[0].run_dir(spine.profile.run_root)
    spine.until(lambda _: (first / "logs" / "attempt_0001_rank3.log").exists(), timeout_s=30)
    job = json.loads((first / "job.json").read_text())["job_id"]
    slurm_cluster.run("scancel", f"--signal={name}", job)
    spine.until(lambda s: s["first"] == "queued")
    assert spine.states()["last"] == "queued"
    spine.finish(timeout_s=90)
    assert manifest.read_entry(spine.profile.run_root, spine.runs[0].run_id).attempt == 2
    assert slurm_cluster.job(job)["Restarts"] == "1"


class Commands:
    """Commands about one reproduction on the cluster, with the same settings."""

    def __init__(
        self, folder: Path, reproduction: str, sets: list[str], *, memory_gb: int = 8
    ) -> None:
        profile = folder / "cluster.yaml"
        text = f"run_root: {folder}/runs\npartition: low\ncpus_per_rank: 1\n"
        profile.write_text(f"{text}memory_gb: {memory_gb}\nenv: {{OMP_NUM_THREADS: '1'}}\n")
        settings = [part for item in sets for part in ("--set", item)]
        self.options = [reproduction, "--cluster", str(profile), *settings]

    def call(self, command: str, *more: str) -> subprocess.CompletedProcess[str]:
        """Run a command."""
        line = [sys.executable, str(code_root() / "run_stage.py"), command, *self.options, *more]
        return subprocess.run(line, capture_output=True, text=True, timeout=120)

    def finish(self, timeout_s: float) -> int:
        """Submit, wait until all runs are done, and return how many there are."""
        submitted = self.call("submit")
        assert submitted.returncode == 0, submitted.stderr
        end, states = time.monotonic() + timeout_s, {""}
        while states != {"done"}:
            found = json.loads(self.call("status", "--json").stdout)
            states = {s["state"] for s in found}
            assert "failed" not in states and time.monotonic() < end, found
            assert states == {"done"} or states & {"running", "queued"}, ("nothing runs", found)
            time.sleep(5)  # each look costs the processor time of a process
        return len(found)


FEW_STEPS = ["epochs=2", "steps_per_epoch=3", "warmup_epochs=1"]
FEW_OF_DETECTION = ["epochs=1", "decay_epochs=[]", "warmup_steps=2"]
FEW_OF_SEGMENTATION = ["steps=4", "warmup_steps=2"]


def for_runs(names: Iterable[str], sets: list[str]) -> list[str]:
    """Return the settings for each of the runs."""
    return [f"{name}.{item}" for name in names for item in sets]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_mini_on_slurm(slurm_cluster: Any, tmp_path: Path) -> None:
    """Its data, a pretraining, features and k-NN."""
    check_mini_on_slurm(tmp_path, {"digits", "pretrain", "features", "knn"})


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_every_stage_of_mini_on_slurm(slurm_cluster: Any, tmp_path: Path) -> None:
    """The first run of each stage of `mini`."""
    every = config.load_reproduction("mini", STAGES).runs
    first = {run.spec.name: name for name, run in reversed(every.items())}
    assert len(first) == 15
    check_mini_on_slurm(tmp_path, set(first.values()))


def check_mini_on_slurm(tmp_path: Path, names: set[str]) -> None:
    """Follow some runs of `mini` from submission to the table; the pretraining on 2 x 2 ranks."""
    written = yaml.safe_load(config.find_reproduction("mini")[1])["runs"]
    runs = {name: run for name, run in written.items() if name in names}
    reproduction = tmp_path / "mini.yaml"
    reproduction.write_text(yaml.safe_dump({"name": "mini", "runs": runs}, sort_keys=False))
    sets = [
        "pretrain.resources.nodes=2",
        "pretrain.resources.ranks_per_node=2",
        *for_runs(["pretrain"], FEW_STEPS),
        "linear.epochs=1",
        "finetune.epochs=2",
        *for_runs(["detection"], FEW_OF_DETECTION),
        *for_runs(["segmentation"], FEW_OF_SEGMENTATION),
    ]
    sets = [item for item in sets if item.partition(".")[0] in names]
    commands = Commands(tmp_path, str(reproduction), sets)
    assert commands.finish(1200) == len(names)
    shown = commands.call("tables")
    assert shown.returncode == 0 and "|" in shown.stdout, shown.stderr


@pytest.mark.long
@pytest.mark.timeout(2700)
def test_methods_on_slurm(slurm_cluster: Any, tmp_path: Path) -> None:
    """All of `mini_methods` with a few steps of each training, from submission to the tables."""
    stages: dict[str, list[str]] = {}
    for name, run in config.load_reproduction("mini_methods", STAGES).runs.items():
        stages.setdefault(run.spec.name, []).append(name)
    sets = [
        *for_runs(stages["pretrain"], FEW_STEPS),
        *for_runs(stages["linear"], ["epochs=1"]),
        *for_runs(stages["coco_detection"], FEW_OF_DETECTION),
        *for_runs(stages["ade20k_segmentation"], FEW_OF_SEGMENTATION),
    ]
    # So much memory that four jobs run at a time, and not all pretrainings at once.
    commands = Commands(tmp_path, "mini_methods", sets, memory_gb=200)
    assert commands.finish(2400) == sum(map(len, stages.values()))
    assert read_filled(commands, "table8") >= {
        f"{method}{strength}"
        for method in ("Mugs", "DINO", "iBOT")
        for strength in ("", " strong augmentation")
    }
    for table in ("mgc_detection", "mgc_segmentation"):
        assert "MGC" in read_filled(commands, table)


def read_filled(commands: Commands, table: str) -> set[str]:
    """Return the methods that have a number of ours in a table."""
    shown = commands.call("tables", "--table", table, "--format", "csv")
    assert shown.returncode == 0, shown.stderr
    rows = csv.DictReader(io.StringIO(shown.stdout))
    return {row["method"] for row in rows if row["ours"]}
