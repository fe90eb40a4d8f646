"""Profiles: the sbatch text they give, that every key reaches it,
and what is said about mistakes.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.reading import list_bundled_yaml
from pipeline.spec import ConfigError, Resources, StageConfig, StageRun
from slurm.submission import profile as cluster
from slurm.submission import submit

NEED = Resources(nodes=2, ranks_per_node=8, cpus_per_rank=8, hours=30, memory_gb=None)
GOLDEN = Path(__file__).parent / "golden"
PROFILES = list_bundled_yaml("slurm", "profiles")
# key -> (value, text it must put into the sbatch file)
KEYS: dict[str, tuple[Any, str]] = {
    "run_root": ("/big/runs", "export MUGS_RUN_ROOT=/big/runs"),
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
    "setup": (["source x"], "\nsource x\n"),
    "stage_to": ("$TMPDIR", "export MUGS_STAGE_TO='$TMPDIR'"),
    "env": ({"A_B": "c d"}, 'export A_B="c d"'),
    "container_image": ("i.sqsh", "--container-image=i.sqsh"),
    "container_mounts": ("/a:/b", "--container-mounts=/a:/b"),
    "container_command": ("box exec i.sif", "--kill-on-bad-exit=1 box exec i.sif /"),
    "python": ("/opt/py", "--kill-on-bad-exit=1 /opt/py -u -m slurm.node.job "),
    "sbatch": ({"mail-type": "END"}, "--mail-type=END"),
    "gres": ("gpu:h100", "--gres=gpu:h100:8"),
    "memory_per_gpu_gb": (11, "--mem=88GB"),
    "stages": ({"pretrain": {"partition": "p2"}}, "--partition=p2"),
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
    """Nothing is written."""
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)


@pytest.mark.parametrize("name", PROFILES)
def test_golden_sbatch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setattr("sys.executable", "/venv/bin/python")
    text = sbatch_text(cluster.load_profile(name), parents=("41", "42"))
    # A hash of the folder as it is here: `/home` may be a link.
    text = re.sub(r"(-0123-)[0-9a-f]{6}\n", r"\1FOLDER\n", text)
    path = GOLDEN / f"{name}.sbatch"
    assert text == path.read_text(), f"changed on purpose? then write this to {path}:\n{text}"


def test_every_key_has_a_case() -> None:
    limits = {"gpus_per_node", "max_at_once"}
    assert set(KEYS) == set(cluster.ClusterProfile.model_fields) - limits


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
    fitting = (Resources(ranks_per_node=8), Resources(ranks_per_node=9, gpu=False))
    runs = [stage_run(need) for need in (*fitting, Resources(ranks_per_node=6))]
    assert cluster.find_gpu_shortages(profile, runs[:2]) == []
    (line,) = cluster.find_gpu_shortages(profile, runs)
    assert re.match(r"main.resources.ranks_per_node: 6 GPUs .* with 4 each", line)


@pytest.mark.parametrize(
    ("need", "limit", "options"),
    [
        (Resources(ranks_per_node=8), 4, ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4")),
        (Resources(nodes=5, ranks_per_node=8), 4, ("nodes=10", "ntasks-per-node=4")),
        (Resources(nodes=2, ranks_per_node=3), 2, ("nodes=3", "ntasks-per-node=2")),
        (Resources(ranks_per_node=8, memory_gb=500), 4, ("nodes=2", "mem=250GB")),
        (Resources(ranks_per_node=4), 8, ("nodes=1", "ntasks-per-node=4")),
        (Resources(ranks_per_node=8, gpu=False), 4, ("nodes=1", "ntasks-per-node=8")),
    ],
)
def test_ranks_are_folded_over_small_nodes(
    need: Resources, limit: int, options: tuple[str, ...]
) -> None:
    profile = cluster.ClusterProfile(run_root=Path("/runs"), gpus_per_node=limit)
    text = sbatch_text(profile, need)
    assert all(f"#SBATCH --{option}\n" in text for option in options), text


def test_a_stage_has_options_of_its_own() -> None:
    profile = cluster.ClusterProfile.model_validate(
        {
            "run_root": "/runs",
            "partition": "gpu",
            "cpus_per_rank": 12,
            "memory_per_gpu_gb": 100,
            "env": {"A": "1", "B": "1"},
            "sbatch": {"mail-type": "END"},
            "stages": {
                "convert": {"partition": "cpu", "memory_gb": 64, "env": {"B": "2"}},
                "knn": {"cpus_per_rank": 20},
            },
        }
    )

    def text_of(stage: str, need: Resources) -> str:
        run = StageRun(stage, "x", "0123456789ab", StageConfig(), {}, need, "x:run")
        return submit.sbatch_text(run, profile, submit.Dependencies(), Path("/code"))

    convert = text_of("convert", Resources(gpu=False, cpus_per_rank=32))
    words = ["--partition=cpu", "--mem=64GB", "task=32", 'A="1"', 'B="2"', "mail-type=END"]
    assert all(word in convert for word in words), convert
    knn = text_of("knn", Resources(ranks_per_node=2, cpus_per_rank=8))
    words = ["--partition=gpu", "--mem=200GB", "task=20", 'B="1"']
    assert all(word in knn for word in words), knn


@pytest.mark.parametrize("line", ["module load cuda", "ml cuda", "source x", "FOO=1"])
def test_software_that_is_not_there_ends_the_job(tmp_path: Path, line: str) -> None:
    text = sbatch_text(cluster.ClusterProfile(run_root=Path("/runs"), setup=(line,)))
    loads = line.split()[0] in ("module", "ml")
    assert (f"\n{line}\n" in text) != loads
    assert (f"'setup failed: {line}' >&2; exit 1" in text) == loads


def test_no_gpu_is_asked_for_when_none_is_needed() -> None:
    profile = cluster.ClusterProfile(run_root=Path("/runs"), gpu_type="a100")
    assert "gpu" not in sbatch_text(profile, Resources(gpu=False)).replace("MUGS", "")


@pytest.mark.parametrize("name", PROFILES)
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
        ("run_root: /r\nsbatch: {time: 3}", ["sbatch", "'time' is not an extra option"]),
        ("run_root: /r\ncontainer_mounts: /a:/a", ["container_mounts", "container_image"]),
        ("run_root: /r\nsbatch: {export: NONE}", ["sbatch: export", "under env"]),
        ("run_root: /r\nsbatch: {--export: NONE}", ["sbatch: export", "under env"]),
        ("run_root: /r\nsbatch: {--time: 3}", ["sbatch", "'--time' is not an extra option"]),
        ("run_root: /r\nstages: {knn: {sbatch: {time: 3}}}", ["stages.knn", "'time'"]),
        ("run_root: /r\nstages: {knn: {run_root: /s}}", ["stages.knn", "'run_root'"]),
        (
            "run_root: /r\nstages: {knn: {partitio: x}}",
            ["stages.knn: unknown key", "did you mean 'partition'?", "max_hours"],
        ),
        ("run_root: /r\ngres: gpu\ngpu_type: a100", ["gpu_type", "gpu:a100"]),
        ("run_root: /r%j/x", ["run_root", "'%'"]),
    ],
)
def test_mistakes_are_explained(
    content: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(content, monkeypatch)
    assert all(word in str(caught.value) for word in words), caught.value


# Values that look like data and would run in a shell, or undo what `submit` sets.
HOSTILE: dict[str, dict[str, Any]] = {
    **{
        f"{key}, {name}": {key: value}
        for key in ("partition", "account", "qos", "constraint", "nodelist", "exclude")
        for name, value in {"line": "a\ntouch x", "quote": "a'b", "command": "$(x)"}.items()
    },
    "reservation, line": {"reservation": "r\n#SBATCH --hold"},
    "gpu type, return": {"gpu_type": "a100\r"},
    "variable's name, command": {"env": {"A=1; touch x; B": "1"}},
    "variable's name, line": {"env": {"A\nB": "1"}},
    "variable, line": {"env": {"A": "1\ntouch x"}},
    "variable, separator": {"env": {"A": "1\u2028touch x"}},
    "image, line": {"container_image": "i\ntouch x"},
    "mounts, escape": {"container_image": "i", "container_mounts": "/a\x1b:/b"},
    "srun, line": {"srun": ["--x\ntouch x"]},
    "python, line": {"python": "python\ntouch x"},
    "sbatch, value": {"sbatch": {"begin": "now\ntouch x"}},
    "sbatch, line": {"sbatch": {"begin=now\n#SBATCH --hold": True}},
    "sbatch, underscore": {"sbatch": {"job_name": "x"}},
    "sbatch, beginning": {"sbatch": {"job-n": "x"}},
    "sbatch, one letter": {"sbatch": {"J": "x"}},
    "sbatch, beginning of export": {"sbatch": {"expo": "NONE"}},
    "sbatch, wrap": {"sbatch": {"wrap": "touch x"}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_run_in_the_shell_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"expected|not an extra option"):
        _load(yaml.safe_dump({"run_root": "/r", **HOSTILE[name]}), monkeypatch)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("$HOME/${USER}_x", "/home/me/me_x"),
        ("$(echo ran)", "$(echo ran)"),
        ("`echo ran`", "`echo ran`"),
        ("${A:-$(echo ran)}", "${A:-$(echo ran)}"),
        ("$((1+1)) $[1+1] $", "$((1+1)) $[1+1] $"),
        ('a"; echo ran; "', 'a"; echo ran; "'),
        ("\\$HOME \\\\", "\\/home/me \\\\"),
        ("a'b c!d*", "a'b c!d*"),
    ],
)
def test_only_variables_are_expanded_in_the_environment(value: str, expected: str) -> None:
    profile = cluster.ClusterProfile(run_root=Path("/runs"), env={"A_B": value})
    text = sbatch_text(profile)
    (line,) = (line for line in text.splitlines() if line.startswith("export A_B="))
    command = f'{line}\nprintf %s "$A_B"'
    env = {"HOME": "/home/me", "USER": "me"}
    done = subprocess.run(["/bin/bash", "-c", command], env=env, capture_output=True, text=True)
    assert done.stdout == expected


@pytest.mark.parametrize("sign", ["\n", ":", "%", "$", "'", '"', "`", "|", "\\", "\x1b", "(", ";"])
def test_a_run_root_that_jobs_would_misread_is_refused(
    sign: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUGS_RUN_ROOT", "")
    with pytest.raises(ConfigError, match=r"jobs cannot use a path with|mean something to Slurm"):
        cluster.load_profile_at("a100_8x80g", tmp_path / f"a{sign}b")


@pytest.mark.parametrize("name", ["mugs-runs", "läufe 2026", "a_b.c+d=e@f,g~"])
def test_a_run_root_with_usual_signs_is_fine(name: str, tmp_path: Path) -> None:
    assert cluster.load_profile_at("a100_8x80g", tmp_path / name).run_root == tmp_path / name


def test_secrets_in_a_profile_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _load("run_root: /r\nenv: {WANDB_API_KEY: x, HF_TOKEN: y, MONKEY: z}", monkeypatch)
    assert "env: HF_TOKEN, WANDB_API_KEY will stand in the batch script" in caplog.text
    assert "MONKEY" not in caplog.text
