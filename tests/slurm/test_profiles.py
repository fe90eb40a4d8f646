"""Each bundled cluster profile, as it is, on a Slurm of its shape: from `submit` to the tables.

GPUs are pretended, and so are modules, conda and containers: small programs stand in their place,
which note how they were called.
"""

import csv
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import attempts
from pipeline.provenance import code_root
from slurm.submission.profile import load_profile

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(1500)]

OF_8 = {
    "cpu_nodes": 1,
    "cpus_per_node": 128,
    "memory_mb": 1_000_000,
    "partitions": "PartitionName=gpu Default=YES Nodes=n[0-1]\n"
    "PartitionName=cpu Nodes=c0\n"
    "PartitionName=preemptible Nodes=n[0-1] PreemptMode=REQUEUE GraceTime=15",
}
OF_4 = {**OF_8, "gpus_per_node": 4, "cpu_nodes": 0}
OF_4["partitions"] = "PartitionName=gpu Default=YES"
SHAPES = {
    "a100_8x80g": OF_8,
    "a100_8x_gres": OF_8,
    "a100_4x40g": OF_4,
    "preemptible": OF_8,
    "modules_conda": OF_8,
    "container_pyxis": OF_8,
    "container_apptainer": OF_8,
}
PUBLISHED = code_root() / "results/published/mini/tables"
# Of the runs of `mini`, those that get GPUs here.
WITH_GPUS = ("pretrain", "features", "knn")
# So short that the numbers mean nothing, but each stage does all that it does.
SETTINGS = (
    "pretrain.epochs=2",
    "pretrain.warmup_epochs=1",
    "pretrain.steps_per_epoch=2",
    "pretrain.keep_every_epochs=1",
    # It draws the same pixels and need not be compiled, which takes longer than all the rest.
    "pretrain.renderer=reference",
    "knn_curve.every_epochs=1",
    "detection.epochs=1",
    "detection.decay_epochs=[]",
    "segmentation.steps=20",
    "segmentation_linear.steps=20",
    *(
        f"{name}{start}.{setting}"
        for name in ("finetune", "finetune_10pct", "transfer")
        for start in ("", "_scratch")
        for setting in ("epochs=2", "rate.warmup_epochs=1", "validate_epochs=1")
    ),
)

# torch sees a GPU for each that Slurm gives, as far as it is asked for their number.
PRETENDED_GPUS = """
import os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.cuda":
            sys.meta_path.remove(self)
            import importlib.util
            spec = importlib.util.find_spec(name)
            load = spec.loader.exec_module
            def exec_module(module):
                load(module)
                module.device_count = lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))
            spec.loader.exec_module = exec_module
            return spec

if "CUDA_VISIBLE_DEVICES" in os.environ:
    sys.meta_path.insert(0, Finder())
"""
NOTE = """#!/bin/bash
echo "$(basename "$0") $*" >> {notes}
"""
# `exec OPTIONS IMAGE COMMAND`: the command runs with the Python of the image.
APPTAINER = f"""{NOTE}
while [[ "$1" != *.sif ]]; do shift; done
shift
PATH={{bin}}:$PATH exec "$@"
"""
# srun as pyxis extends it. It waits for the last steps of the job, as srun does.
SRUN = f"""{NOTE}
options=()
for word in "$@"; do
  case "$word" in --container-*) ;; *) options+=("$word") ;; esac
done
PATH={{bin}}:$PATH exec {{srun}} "${{{{options[@]}}}}"
"""
CONDA = """conda() {{
  echo "conda $*" >> {notes}
  PATH={bin}:$PATH
}}
"""


class Site:
    """A user's home on a cluster, with what its administrators have installed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = folder / "home"
        self.run_root = self.home / "mugs-runs"
        self._forget_runs()
        self.notes = folder / "notes"
        self.notes.write_text("")
        programs = folder / "programs"
        shutil.rmtree(programs, ignore_errors=True)
        for place in (self.home, programs):
            place.mkdir(exist_ok=True)
        (programs / "sitecustomize.py").write_text(PRETENDED_GPUS)
        self._install(programs / "module", NOTE)
        self._install(programs / "apptainer", APPTAINER)
        self._install(self.home / "miniforge3/etc/profile.d/conda.sh", CONDA)
        self.programs = programs
        monkeypatch.setenv("HOME", str(self.home))
        monkeypatch.setenv("PYTHONPATH", str(programs))
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def _forget_runs(self) -> None:
        """Remove what an earlier test left, but for the code and what was compiled of it."""
        for path in self.run_root.glob("*"):
            if path.is_dir() and not path.name.startswith(("code-", "compiled-")):
                shutil.rmtree(path)

    def install_pyxis(self) -> None:
        """Let srun take options of containers."""
        found = subprocess.run(["which", "-a", "srun"], capture_output=True, text=True, check=True)
        self._install(self.programs / "srun", SRUN, srun=found.stdout.split()[0])

    def _install(self, path: Path, text: str, **more: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {"notes": self.notes, "bin": Path(sys.executable).parent, **more}
        path.write_text(text.format(**{name: shlex.quote(str(v)) for name, v in values.items()}))
        path.chmod(0o755)

    def calls(self, program: str) -> list[str]:
        """How a program was called."""
        lines = self.notes.read_text().splitlines()
        return [line for line in lines if line.split()[0] == program]


@pytest.fixture(scope="module")
def folder_of_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests: another place of the code would be compiled again."""
    return tmp_path_factory.mktemp("site")


@pytest.fixture
def site(folder_of_site: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A home folder, modules, conda and apptainer."""
    return Site(folder_of_site, monkeypatch)


def list_filled_cells(tables: str) -> set[tuple[str, ...]]:
    """Return where tables as CSV, one after the other, have numbers of ours."""
    header, *lines = csv.reader(io.StringIO(tables))
    rows = [dict(zip(header, line, strict=True)) for line in lines if line and line != header]
    place = ("table", "group", "method", "arch", "line", "column")
    return {tuple(row[name] for name in place) for row in rows if row["ours"]}


class Reproduction:
    """A short `mini`, some of it with GPUs, and the commands of a user about it."""

    def __init__(self, cluster: str, *, gpus: int = 2) -> None:
        sets = [
            *SETTINGS,
            f"pretrain.resources.ranks_per_node={gpus}",
            *(f"{name}.resources.gpu=true" for name in WITH_GPUS),
        ]
        self.options = [part for item in sets for part in ("--set", item)]
        self.cluster = cluster
        self.run_root = load_profile(cluster).run_root

    def call(self, command: str, *more: str) -> str:
        """Run a command that must succeed; return what it prints."""
        line = [sys.executable, str(code_root() / "run_stage.py"), command, "mini"]
        line += ["--cluster", self.cluster, *self.options, *more]
        done = subprocess.run(line, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        return done.stdout

    def finish(self, describe: Any, timeout_s: float = 1200) -> None:
        """Submit, and wait until all is done."""
        self.call("submit")
        end = time.monotonic() + timeout_s
        states: set[str] = set()
        while states != {"done"}:
            time.sleep(5)
            found = json.loads(self.call("status", "--json"))
            states = {run["state"] for run in found}
            assert "failed" not in states and time.monotonic() < end, (found, describe())
            assert states == {"done"} or states & {"running", "queued"}, (found, describe())

    def check_tables(self) -> None:
        """Each cell that the published `mini` fills has a number of ours, and no other has."""
        cells = list_filled_cells(self.call("tables", "--format", "csv"))
        published = [path.read_text() for path in sorted(PUBLISHED.glob("*.csv"))]
        assert cells == list_filled_cells("".join(published)) and len(cells) == 20

    def count_jobs_and_ranks(self) -> tuple[int, int]:
        """How many jobs ran, each once, and how many processes they were in all."""
        folders = [path.parent for path in self.run_root.glob("*/*/attempts")]
        assert len(folders) == 25 and {attempts.latest_attempt(each) for each in folders} == {1}
        ranks = [attempts.read_attempt(each, 1)["ranks"] for each in folders]
        return len(ranks), sum(ranks)

    def facts(self, cluster: Any, name: str) -> dict[str, str]:
        """What Slurm says of the job of a run, and what a rank saw."""
        (folder,) = self.run_root.glob(f"*/{name}-*")
        job = json.loads((folder / "job.json").read_text())["job_id"]
        ranks = attempts.read_attempt(folder, 1)["ranks"]
        facts: dict[str, str] = cluster.job(job)
        return {**facts, "ranks": str(ranks)}


@pytest.mark.parametrize(
    ("shaped_cluster", "name"),
    [pytest.param(shape, name, id=name) for name, shape in SHAPES.items()],
    indirect=["shaped_cluster"],
)
def test_a_bundled_profile(shaped_cluster: Any, name: str, site: Site, tmp_path: Path) -> None:
    if name == "container_pyxis":
        site.install_pyxis()
    folded = name == "a100_4x40g"
    reproduction = Reproduction(name, gpus=8 if folded else 2)
    reproduction.finish(shaped_cluster.describe)
    reproduction.check_tables()
    assert reproduction.run_root == site.run_root
    training = reproduction.facts(shaped_cluster, "pretrain")
    conversion = reproduction.facts(shaped_cluster, "digits")
    expected = "preemptible" if name == "preemptible" else "gpu"
    assert training["Partition"] == expected, training
    assert conversion["Partition"] == ("cpu" if name == "a100_8x_gres" else expected)
    assert (training["NumNodes"], training["ranks"]) == (("2", "8") if folded else ("1", "2"))
    gpus = 4 if folded else 2
    assert f"gpu:a100:{gpus}" in str(training), training
    assert training["CPUs/Task"] == "12" and "gpu" not in conversion.get("TresPerNode", "")
    check_calls(name, site, *reproduction.count_jobs_and_ranks())


def check_calls(name: str, site: Site, jobs: int, ranks: int) -> None:
    """Each job asked for modules, conda and containers as the profile says.

    Keepers load the same software, but run outside of containers.
    """
    loaded = {
        "modules_conda": ["module purge", "module load cuda/12.8", "conda activate mugs"],
        "container_apptainer": ["module load apptainer"],
    }
    calls = [*site.calls("module"), *site.calls("conda")]
    assert set(calls) == set(loaded.get(name, [])), calls
    assert all(calls.count(words) >= jobs for words in set(calls)), calls
    image = "exec --nv --bind /data /images/mugs-repro.sif python3 -u -m slurm.node.job "
    started = site.calls("apptainer")
    assert all(image in call for call in started)
    assert len(started) == (ranks if name == "container_apptainer" else 0)
    steps = [call for call in site.calls("srun") if "slurm.node.job" in call]
    assert len(steps) == (jobs if name == "container_pyxis" else 0)
    mounts = "--container-mounts=/data:/data,/home:/home"
    assert all(f"--container-image=/images/mugs-repro.sqsh {mounts}" in call for call in steps)


@pytest.mark.parametrize("shaped_cluster", [OF_8, OF_4], ids=["8 GPUs", "4 GPUs"], indirect=True)
def test_a_profile_that_init_cluster_writes(
    shaped_cluster: Any, site: Site, tmp_path: Path
) -> None:
    out = tmp_path / "mine.yaml"
    line = [sys.executable, str(code_root() / "run_stage.py"), "init-cluster", str(out)]
    subprocess.run([*line, "--run-root", str(site.run_root)], check=True, timeout=120)
    reproduction = Reproduction(str(out))
    reproduction.finish(shaped_cluster.describe)
    reproduction.check_tables()
    training = reproduction.facts(shaped_cluster, "pretrain")
    assert training["Partition"] == "gpu" and "gpu:a100:2" in str(training), training
    if shaped_cluster.shape.cpu_nodes:
        assert reproduction.facts(shaped_cluster, "digits")["Partition"] == "cpu"


def test_the_profile_of_a_machine_without_slurm(site: Site, tmp_path: Path) -> None:
    reproduction = Reproduction("workstation")
    reproduction.call("run")
    reproduction.check_tables()
    assert reproduction.run_root == site.run_root
