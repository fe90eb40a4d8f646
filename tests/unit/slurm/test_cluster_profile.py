"""Profiles: the sbatch text they give, that every key reaches it,
and what is said about mistakes.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.reading import list_bundled_yaml
from pipeline.spec import ConfigError, Resources, StageConfig, StageRun
from slurm.submission import profile as cluster
from slurm.submission import submit

NEED = Resources(nodes=2, ranks_per_node=8, cpus_per_rank=8, hours=30, memory_gb=None)
GOLDEN = Path(__file__).parent / "golden_a100_8x80g.sbatch"
# key -> (value, text it must put into the sbatch file)
KEYS: dict[str, tuple[Any, str]] = {
    "run_root": ("/big/runs", 'export MUGS_RUN_ROOT="/big/runs"'),
    "partition": ("p1", "--partition=p1"),
    "account": ("a1", "--account=a1"),
    "qos": ("q1", "--qos=q1"),
    "constraint": ("c1", "--constraint=c1"),
    "nodelist": ("n[1-2]", "--nodelist='n[1-2]'"),
    "exclude": ("n9", "--exclude=n9"),
    "reservation": ("r1", "--reservation=r1"),
    "exclusive": (True, "#SBATCH --exclusive\n"),
    "gpu_type": ("h100", "--gpus-per-node=h100:8"),
    "cpus_per_rank": (13, "srun --unbuffered.*--cpus-per-task=13"),
    "memory_gb": (77, "--mem=77GB"),
    "max_hours": (5, "--time=300"),
    "signal_delay_s": (321, "--signal=USR2@321"),
    "setup": (["module load x"], "\nmodule load x\n"),
    "env": ({"A_B": "c d"}, 'export A_B="c d"'),
    "container_image": ("i.sqsh", "--container-image=i.sqsh"),
    "container_mounts": ("/a:/b", "--container-mounts=/a:/b"),
    "python": ("/opt/py", "--kill-on-bad-exit=1 /opt/py -u -m slurm.node.job "),
    "sbatch": ({"mail-type": "END"}, "--mail-type=END"),
    "srun": (["--cpu-bind=none"], "srun --unbuffered.*--cpu-bind=none"),
}


def stage_run(need: Resources) -> StageRun:
    return StageRun("pretrain", "main", "0123456789ab", StageConfig(), {}, need, "x:run")


def sbatch_text(
    profile: cluster.ClusterProfile, need: Resources = NEED, parents: tuple[str, ...] = ()
) -> str:
    return submit.sbatch_text(
        stage_run(need),
        profile,
        submit.Dependencies(after_end=list(parents)),
        Path("/runs/code/c0de"),
    )


@pytest.fixture(autouse=True)
def somewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Submitit wants an srun and a folder it can make."""
    monkeypatch.setattr("shutil.which", lambda name, *_, **__: f"/usr/bin/{name}")
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)


def test_golden_sbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    profile = cluster.load_profile("a100_8x80g").model_copy(update={"python": "/venv/bin/python"})
    text = sbatch_text(profile, parents=("41", "42"))
    assert text == GOLDEN.read_text(), f"changed on purpose? then write this to {GOLDEN}:\n{text}"


def test_every_key_has_a_case() -> None:
    assert set(KEYS) == set(cluster.ClusterProfile.model_fields) - {"gpus_per_node"}


@pytest.mark.parametrize("key", KEYS)
def test_every_key_reaches_the_sbatch_text(key: str) -> None:
    value, expected = KEYS[key]
    pattern = expected if ".*" in expected else re.escape(expected)
    plain = {"run_root": "/runs", "container_image": None}
    assert not re.search(pattern, sbatch_text(cluster.ClusterProfile.model_validate(plain)))
    assert re.search(
        pattern, sbatch_text(cluster.ClusterProfile.model_validate({**plain, key: value}))
    )


def test_gpus_per_node_is_a_limit() -> None:
    profile = cluster.ClusterProfile(run_root=Path("/runs"), gpus_per_node=4)
    fitting = (Resources(ranks_per_node=4), Resources(ranks_per_node=9, gpu=False))
    runs = [stage_run(need) for need in (*fitting, Resources(ranks_per_node=8))]
    assert cluster.find_gpu_shortages(profile, runs[:2]) == []
    (line,) = cluster.find_gpu_shortages(profile, runs)
    assert re.match(r"main.resources.ranks_per_node: 8 .* has 4", line)


def test_no_gpu_is_asked_for_when_none_is_needed() -> None:
    profile = cluster.ClusterProfile(run_root=Path("/runs"), gpu_type="a100")
    assert "gpu" not in sbatch_text(profile, Resources(gpu=False)).replace("MUGS", "")


@pytest.mark.parametrize("name", list_bundled_yaml("slurm", "profiles"))
def test_bundled_profiles_load(name: str) -> None:
    assert cluster.load_profile(name).run_root.is_absolute()


def _load(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    monkeypatch.setattr("pipeline.reading.read_config_text", lambda _: content)
    cluster.load_profile("/x/mine.yaml")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("partion: x", ["/x/mine.yaml", "'partion'", "did you mean 'partition'"]),
        ("run_root: /r\ngpus_per_node: many", ["mine.yaml.gpus_per_node", "integer", "'many'"]),
        ("partition: x", ["mine.yaml", "'run_root' is missing"]),
        ("run_root: $NO_SUCH_THING/r", ["run_root", "absolute path with known variables"]),
        ("run_root: runs", ["run_root", "absolute path"]),
        ("run_root: /r\nsbatch: {time: 3}", ["sbatch: 'time' is not an extra option"]),
        ("run_root: /r\ncontainer_mounts: /a:/a", ["container_mounts", "container_image"]),
    ],
)
def test_mistakes_are_explained(
    content: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(content, monkeypatch)
    assert all(word in str(caught.value) for word in words), caught.value
