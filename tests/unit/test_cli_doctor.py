"""Commands on data and weights: doctor, plan's look at them, import, features and export."""

import errno
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from click.testing import Result
from commands import write_commands
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import run_stage
from mugs.data.loading.evaluation import iter_eval_batches
from mugs.data.sources.open import open_source
from mugs.evaluation.feature_store import FeatureStore
from mugs.models.vit import build_vit
from mugs.weights.backbone_file import read_backbone_file
from pipeline import environment, manifest
from pipeline.files import OverwriteError
from pipeline.findings import Finding, wrong
from pipeline.reading import validate_model
from pipeline.spec import ConfigError
from pipeline.stage import StageContext
from stages import STAGES, convert, features, import_weights
from stages.commands.whole_run_root import load_all_runs
from stages.shared import image_data
from stages.shared.image_data import ConvertConfig
from stages.shared.labelled import LabelledPart

Doctor = Callable[..., Result]
YAML = """
name: small
runs:
  photos: {{stage: convert, dataset: photos, num_classes: 2, num_train_images: 4, num_val_images: 4,
            train_dir: {images}, val_dir: {images}}}
  weights: {{stage: import, arch: vit_mini, epochs: 1, file: {file}}}
  features: {{stage: features, needs: {{data: photos, weights: weights}}}}
  logistic:
    stage: logistic
    needs: {{features: features}}
    labelled: {{percent: 50, list_file: {list}}}
"""


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """The command on a reproduction whose files are all there;
    nothing costly is imported in a process of its own.
    """
    monkeypatch.setattr(environment, "_run_python", lambda *_: (0, "imported"))
    monkeypatch.setenv("MUGS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (40, 36)).save(tmp_path / "images" / label / f"{label}{index}.jpg")
    torch.save(
        {"teacher": build_vit("vit_mini", relation_depth=1).state_dict()}, tmp_path / "w.pth"
    )
    (tmp_path / "list.txt").write_text("cat0.jpg\ndog1.jpg\n")
    (tmp_path / "small.yaml").write_text(
        YAML.format(images=tmp_path / "images", file=tmp_path / "w.pth", list=tmp_path / "list.txt")
    )

    def call(*arguments: str, command: str = "doctor") -> Result:
        root = ["--run-root", str(tmp_path / "runs")]
        # Each command is a process of its own.
        image_data.list_data_set.cache_clear()
        return CliRunner().invoke(run_stage.app, [command, "small.yaml", *root, *arguments])

    return call


def told(result: Result, line: str, remedy: str) -> None:
    """A wrong finding with its remedy below, and the exit code."""
    lines = result.stdout.splitlines()
    (index,) = (i for i, text in enumerate(lines) if text.startswith("wrong") and line in text)
    assert lines[index + 1].startswith("        to do: ") and remedy in lines[index + 1], lines[
        index + 1
    ]
    assert result.exit_code == 1 and re.fullmatch(
        r"\d+ checked(, \d+ skipped)?, \d+ problems?", lines[-1]
    )


def test_where_all_is_well(doctor: Doctor, tmp_path: Path) -> None:
    result = doctor()
    assert result.exit_code == 0 and "wrong" not in result.output, (result.output, result.exception)
    for words in (
        "photos: 4 train images, 4 val images of 2 classes",
        "all keys fit (",
        "list.txt names 2 images, of all classes",
        "slurm: not checked",
    ):
        assert words in result.output, result.output
    assert re.search(r"^\d+ checked, 1 skipped, no problems$", result.output, re.M)
    assert not (tmp_path / "runs").exists()


BROKEN = [
    ("photos.train_dir=null", "photos.train_dir is not set", "--set photos.train_dir="),
    ("photos.train_dir=/nowhere", "train_dir: /nowhere is not a folder", "photos.train_dir"),
    ("photos.num_train_images=5", "4 images found, 5 expected", "photos.train_dir"),
    ("photos.num_classes=3", "2 classes found, 3 expected", "photos.train_dir"),
    ("weights.file=/nowhere.pth", "/nowhere.pth: No such file", "weights.file"),
    ("weights.arch=vit_s16", "missing (blocks", "weights.file"),
    (
        "logistic.labelled.list_file=/nowhere",
        "/nowhere: cannot be read",
        "logistic.labelled.list_file",
    ),
    (
        f"logistic.labelled.list_sha256={'a' * 64}",
        "list_sha256 says aa",
        "logistic.labelled.list_file",
    ),
]


@pytest.mark.parametrize(("override", "words", "remedy"), BROKEN)
def test_what_a_setting_breaks(doctor: Doctor, override: str, words: str, remedy: str) -> None:
    told(doctor("--set", override), words, remedy)


@pytest.mark.parametrize(("override", "words", "remedy"), BROKEN)
def test_plan_shows_it_and_nothing_is_queued(
    doctor: Doctor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    words: str,
    remedy: str,
) -> None:
    stopped(doctor, tmp_path, monkeypatch, ("--set", override), words, remedy)


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_an_image_cut_short_is_told_before_anything_is_queued(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    cut = tmp_path / f"images/dog/cut.{kind}"
    Image.effect_noise((64, 64), 50).save(cut)
    count = ("--set", "photos.num_train_images=5", "--set", "photos.num_val_images=5")
    assert doctor(*count).exit_code == 0
    cut.write_bytes(cut.read_bytes()[:-200])
    words = f"1 of 5 files are not usable images: dog/cut.{kind}"
    told(doctor(*count), words, "photos.train_dir")
    stopped(doctor, tmp_path, monkeypatch, count, words, "photos.train_dir")
    assert doctor(*count, "--set", f"photos.allow_bad=[dog/cut.{kind}]").exit_code == 0


def stopped(
    doctor: Doctor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: Sequence[str],
    words: str,
    remedy: str,
) -> None:
    """`plan` shows it in one line with its remedy; `submit` refuses and queues nothing."""
    monkeypatch.setenv("PATH", fake(tmp_path / "bin", sbatch=f"touch {tmp_path}/asked; echo 7"))
    (tmp_path / "c.yaml").write_text(f"run_root: {tmp_path}/runs\ncpus_per_rank: 1\n")
    shown = doctor(*options, command="plan")
    (line,) = (line for line in shown.output.splitlines() if words in line)
    assert shown.exit_code == 0 and remedy in line.partition("; to do: ")[2]
    refused = doctor(*options, "--cluster", str(tmp_path / "c.yaml"), command="submit")
    assert isinstance(refused.exception, ConfigError) and words in str(refused.exception)
    assert not (tmp_path / "asked").exists() and not (tmp_path / "runs").exists()


def test_files_that_only_compute_nodes_have(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "PATH", fake(tmp_path / "bin", sbatch=f"touch {tmp_path}/asked; echo Submitted batch job 7")
    )
    (tmp_path / "c.yaml").write_text(f"run_root: {tmp_path}/runs\ncpus_per_rank: 1\n")
    there = (
        "--cluster",
        str(tmp_path / "c.yaml"),
        "--set",
        "photos.train_dir=/node/images",
        "--only",
        "photos",
    )
    refused = doctor(*there, command="submit")
    assert isinstance(refused.exception, ConfigError) and not (tmp_path / "asked").exists()
    assert "--skip-data-checks" in str(refused.exception)
    assert "/node/images" in doctor(*there, command="plan").output
    shown = doctor(*there, "--skip-data-checks", command="plan")
    assert (
        shown.exit_code == 0 and "GPU-hours" in shown.stdout and "/node/images" not in shown.output
    )
    seen = doctor(*there[2:], "--skip-data-checks")
    assert seen.exit_code == 0 and "skipped photos: its files are not checked" in seen.stdout
    unset = ("--set", "photos.val_dir=null", "--skip-data-checks")
    assert (
        "photos.val_dir is not set; to do: --set photos.val_dir="
        in doctor(*there, *unset, command="plan").output
    )
    assert "val_dir is not set" in str(doctor(*there, *unset, command="submit").exception)
    assert not (tmp_path / "asked").exists()
    assert (
        doctor(*there, "--skip-data-checks", command="submit").exit_code == 0
        and (tmp_path / "asked").exists()
    )
    # `status` of all runs knows what was submitted without reading its file.
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.runfile.read_run_file", None)
        (run,), _, unreadable = load_all_runs(tmp_path / "runs", ())
    assert run.name == "photos" and unreadable == []


def test_plan_tells_what_does_not_fit_the_cluster(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"run_root: {tmp_path}/runs\ngpus_per_node: 3\n")
    asked = ("--cluster", str(tmp_path / "c.yaml"), "--set", "features.resources.ranks_per_node=4")
    shown = doctor(*asked, command="plan")
    line = "features.resources.ranks_per_node: 4 GPUs cannot be spread evenly over nodes with 3"
    assert shown.exit_code == 0 and line in shown.stdout and "GPU-hours" in shown.stdout
    refused = doctor(*asked, command="submit")
    assert line in str(refused.exception) and "checking data sets" not in refused.output


def test_the_look_at_a_list_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("0/1.jpg\n")
    digits = "builtin:sklearn_digits"
    data = ConvertConfig(dataset="digits", train_dir=digits, val_dir=digits)
    words, images = LabelledPart(percent=1, list_file="list.txt").check_list(data)
    assert words == "list.txt names 1 images; whether they are there shows with digits"
    assert images is None
    assert [path.name for path in tmp_path.iterdir()] == ["list.txt"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_half_a_built_in_data_set(doctor: Doctor, split: str) -> None:
    refused = doctor("--set", f"photos.{split}_dir=builtin:sklearn_digits")
    assert isinstance(refused.exception, ConfigError)
    assert "must name the same built-in data set" in str(refused.exception)


def test_only_what_is_not_there_may_be_elsewhere(doctor: Doctor) -> None:
    assert "--skip-data-checks if" in doctor("--set", "photos.val_dir=/nowhere").stdout
    assert "--skip-data-checks if" not in doctor("--set", "photos.num_classes=3").stdout


def test_all_folders_that_are_wrong_are_told_at_once(doctor: Doctor) -> None:
    told(
        doctor("--set", "photos.train_dir=/nowhere", "--set", "photos.val_dir=/elsewhere"),
        "/nowhere is not a folder; val: val_dir: /elsewhere is not a folder",
        "photos.val_dir",
    )


def test_damaged_files(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:5000])
    (tmp_path / "images/cat/cat0.jpg").unlink()
    (tmp_path / "images/emu").mkdir()
    (tmp_path / "list.txt").write_text("cat1.jpg\n")
    result = doctor()
    told(result, "w.pth: damaged", "weights.file")
    told(result, "class folders without images: emu", "photos.train_dir")
    assert "ok      logistic" in result.output  # its images show with the data set's own finding


def test_a_list_that_names_what_is_not_there(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("cat1.jpg\nowl.jpg\ndog0.jpg\n")
    told(doctor(), "name no image of the data set: owl.jpg", "logistic.labelled.list_file")
    (tmp_path / "list.txt").write_text("cat1.jpg\ncat0.jpg\n")
    told(doctor(), "1 of 2 classes have no image in it: dog", "logistic.labelled.list_file")


def test_inputs_outside_the_chosen_runs(doctor: Doctor) -> None:
    told(
        doctor("--only", "features"),
        "features: needs photos, which is not done",
        "--only photos too",
    )


def test_room_and_rights(doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        environment.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1})()
    )
    told(doctor(), "0.0 GB free", "free space")

    def read_only(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(environment.tempfile, "NamedTemporaryFile", read_only)
    told(doctor(), "cannot be written to (Permission denied)", "--run-root")


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_quota_shows_in_what_is_written(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A full quota still lets an empty file be made."""

    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    told(doctor(), f"cannot be written to ({os.strerror(number)})", "--run-root")


@pytest.mark.parametrize(
    ("total", "left", "wrong"), [(9e6, 500, True), (9e6, 9e5, False), (0, 0, False)]
)
def test_room_for_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: float, left: float, wrong: bool
) -> None:
    usage = SimpleNamespace(
        f_files=int(total), f_favail=int(left), f_blocks=9, f_bavail=9, f_bfree=9, f_frsize=10**9
    )
    monkeypatch.setattr(environment.os, "statvfs", lambda _: usage)
    found = environment.check_free_space(tmp_path, 0.0)
    told = [each for each in found if each.state == "wrong" and "500 more files" in each.detail]
    assert bool(told) == wrong


@pytest.mark.parametrize("name", ["HOME", "XDG_CACHE_HOME", "MUGS_CACHE_DIR", "TMPDIR"])
def test_folders_of_the_user_that_cannot_be_written(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What is remembered there is found out again; nothing else is."""
    monkeypatch.delenv("MUGS_CACHE_DIR")
    monkeypatch.setenv(name, "/proc/none")
    if name == "HOME":
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    result = doctor()
    assert result.exit_code == 0, (result.output, result.exception)


def test_packages_that_are_missing_old_or_broken(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        environment.metadata, "requires", lambda name: ["torch>=99", "no-such-package", "numpy"]
    )
    monkeypatch.setattr(environment, "_run_python", lambda code: (1, "ImportError: libx.so"))
    result = doctor()
    told(result, "expected >=99", "make setup")
    told(result, "no-such-package: not installed", "make setup")
    told(result, "torch: cannot be imported: ImportError: libx.so", "make setup")


def fake(folder: Path, **scripts: str) -> str:
    """A PATH whose Slurm commands are these shell lines."""
    names = ("sbatch", "squeue", "scancel", "scontrol", "sacctmgr")
    return write_commands(folder, **dict.fromkeys(names, "exit 0") | scripts)


PARTITIONS = "echo 'PartitionName=gpu State=UP'; echo 'PartitionName=cpu State=DOWN'"
LIMITED = """case "$*" in
*partition*) echo 'PartitionName=gpu State=UP Default=YES MaxTime=04:00:00 QoS=N/A';;
*node*) echo 'NodeName=n1 State=IDLE Partitions=gpu CPUTot=64 RealMemory=500000 Gres=gpu:a100:4'
        echo 'NodeName=n2 State=IDLE+DRAIN Partitions=gpu CPUTot=64 RealMemory=500000';;
esac"""


@pytest.mark.parametrize(
    ("lines", "words", "remedy"),
    [
        ("partition: gpu", "its time limit is 36 h, partition gpu allows 4 h", "max_hours"),
        ("account: mine", "its time limit is 36 h, partition gpu allows 4 h", "max_hours"),
        ("max_hours: 4\nqos: short", "its time limit is 4 h, QOS short allows 2 h", "max_hours"),
        ("max_hours: 2\nqos: short", "1 x 64 CPUs, 500 GB, gpu:a100:4; 1 x 64 CPUs", "resources"),
        ("max_hours: 4", "asked for 1 nodes with 64 CPUs, 8 GPUs (any type) each", "resources"),
        ("max_hours: 4", "500 GB (1 down or drained)", "resources"),
    ],
)
def test_limits_of_the_cluster(
    doctor: Doctor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: str,
    words: str,
    remedy: str,
) -> None:
    """Slurm's default lets a dry run pass that asks for more time than the partition allows."""
    (tmp_path / "c.yaml").write_text(f"run_root: {tmp_path}/runs\n{lines}\n")
    sacctmgr = "case $* in *qos*) echo 02:00:00;; *) echo mine;; esac"
    refuses = "echo 'sbatch: error: Requested node configuration is not available' >&2; exit 1"
    path = fake(tmp_path / "bin", scontrol=LIMITED, sacctmgr=sacctmgr, sbatch=refuses)
    monkeypatch.setenv("PATH", path)
    hours = "features.resources={ranks_per_node: 8, cpus_per_rank: 8, hours: 36}"
    asked = ("--cluster", str(tmp_path / "c.yaml"), "--only", "features", "--set", hours)
    told(doctor(*asked), words, remedy)


@pytest.mark.parametrize("python", ["/no/such/python", "sh -c false", "env false"])
def test_the_python_of_the_profile_is_tried(python: str) -> None:
    finding = environment.check_job_python(python)
    assert finding.state == "wrong" and finding.detail.startswith(f"{python}: ")


@pytest.mark.parametrize(
    "name", ["manifest", "code-{user}", "features", "features/features-{id}/logs"]
)
def test_a_folder_of_another_user_is_told(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    plan = json.loads(doctor("--json", command="plan").stdout)
    ids = {run["run"]: run["run_id"] for run in plan["runs"]}
    folder = tmp_path / "runs" / name.format(id=ids["features"], user=os.geteuid())
    folder.mkdir(parents=True)
    create = tempfile.NamedTemporaryFile

    def refuse(*_: Any, dir: Path, **options: Any) -> Any:
        if Path(dir) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return create(dir=dir, **options)

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    told(doctor(), f"{folder}: Permission denied", "chmod g+w")


def test_slurm(doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile, call = tmp_path / "c.yaml", ("--cluster", str(tmp_path / "c.yaml"))
    profile.write_text(f"run_root: {tmp_path}/runs\npartition: gpu\naccount: mine\n")
    monkeypatch.setenv("PATH", "/nowhere")
    told(doctor(*call), "not found: sbatch, squeue", "login node")
    dry = "grep -q 'partition=gpu' && echo 'sbatch: Job 1 to start at noon' >&2"
    monkeypatch.setenv(
        "PATH", fake(tmp_path / "bin", scontrol=PARTITIONS, sacctmgr="echo mine", sbatch=dry)
    )
    result = doctor(*call)
    assert result.exit_code == 0 and "jobs photos: Job 1 to start at noon" in result.output, (
        result.output
    )
    assert (
        "ok      partition: gpu is UP" in result.output and "ok      account: mine" in result.output
    )
    profile.write_text(
        f"run_root: {tmp_path}/runs\npartition: gpus\naccount: yours\ngpus_per_node: 1\n"
    )
    result = doctor(*call)
    told(result, "there is no gpus", "set partition to one of cpu, gpu")
    told(result, "has no account yours", "set account to one of mine")
    profile.write_text(f"run_root: {tmp_path}/runs\ngpus_per_node: 3\n")
    fake(
        tmp_path / "bin",
        scontrol=PARTITIONS,
        sbatch="echo 'sbatch: error: QOS is full' >&2; exit 1",
    )
    result = doctor(*call)
    told(result, "jobs features: features.resources.ranks_per_node: 8 GPUs cannot", "gpus_per_node")
    told(result, "jobs photos: QOS is full", "resources")
    fake(tmp_path / "bin", scontrol="echo 'Unable to contact slurm controller' >&2; exit 1")
    told(doctor(*call), "Unable to contact slurm controller", "administrators")


def test_a_probe_adds_what_its_job_found(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe_cluster(profile: Any, runs: Any, *, on_wait: Any) -> list[Finding]:
        on_wait("7")
        return [wrong("probe GPU", f"{len(runs)} runs: it is broken", "exclude: n1")]

    monkeypatch.setattr("slurm.submission.probe.probe_cluster", probe_cluster)
    (tmp_path / "c.yaml").write_text(f"run_root: {tmp_path}/runs\n")
    monkeypatch.setenv("PATH", fake(tmp_path / "bin", scontrol=PARTITIONS))
    result = doctor("--cluster", str(tmp_path / "c.yaml"), "--probe")
    told(result, "probe GPU: 4 runs: it is broken", "exclude: n1")
    assert "probe: job 7" in result.stderr
    assert doctor("--probe").exit_code == 2


def cli(*arguments: object) -> Result:
    """The command line in this process."""
    return CliRunner().invoke(run_stage.app, [str(each) for each in arguments])


def refused(*arguments: object) -> str:
    """What `main` would print of a command that fails."""
    result = cli(*arguments)
    assert isinstance(result.exception, ConfigError), (result.output, result.exception)
    return str(result.exception)


def released(path: Path, arch: str) -> Path:
    """A full checkpoint in the released layout, with random weights."""
    torch.manual_seed(0)
    vit = build_vit(arch, relation_depth=1)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    teacher = {f"backbone.{key}": value for key, value in vit.state_dict().items()}
    student = {f"module.{key}": -value for key, value in teacher.items()}
    torch.save(
        {"teacher": {**teacher, "group_head.0.weight": torch.zeros(2, 2)}, "student": student}, path
    )
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of two images."""
    for label, color in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(2):
            shade = tuple(c + 20 * index for c in color)
            Image.new("RGB", (240, 230), shade).save(tmp_path / "images" / label / f"{index}.jpg")
    return tmp_path / "images"


def finish(
    root: Path, module: ModuleType, inputs: Mapping[str, manifest.ManifestEntry], **values: Any
) -> manifest.ManifestEntry:
    """Run a stage in this process, and record it."""
    stage = {convert: "convert", import_weights: "import", features: "features"}[module]
    folder = root / stage / f"{stage}-{stage}0"
    folder.mkdir(parents=True)
    config = validate_model(STAGES[stage].config, values, "x.yaml")
    made = module.run(StageContext(stage, stage, f"{stage}0", folder, inputs, 1), config)
    outputs = {label: manifest.describe_output(root, path) for label, path in made.outputs.items()}
    entry = manifest.ManifestEntry(
        stage=stage, name=stage, run_id=f"{stage}0", outputs=outputs, info=dict(made.info)
    )
    manifest.record_entry(root, entry)
    return entry.at(root)


@pytest.mark.parametrize(
    ("arch", "format", "crop"),
    [pytest.param("vit_s16", "timm", 224, marks=pytest.mark.slow), ("vit_mini", "safetensors", 32)],
)
def test_import_features_export_timm(
    tmp_path: Path, images: Path, arch: str, format: str, crop: int
) -> None:
    root, ours, plain = tmp_path / "runs", tmp_path / "ours.safetensors", tmp_path / "plain"
    done = cli("import", released(tmp_path / "released.pth", arch), "--arch", arch, "--out", ours)
    assert done.exit_code == 0, done.exception
    assert (
        "left out: group_head.0.weight" in done.output
        and "left out: backbone.relation_blocks" in done.output
    )
    data = finish(root, convert, {}, dataset="colors", train_dir=str(images), val_dir=str(images))
    weights = finish(root, import_weights, {}, source="ours", arch=arch, epochs=800, file=str(ours))
    stored = finish(
        root, features, {"data": data, "weights": weights}, blocks=1, resize=crop + 16, crop=crop
    )
    done = cli("export", "import0", "--run-root", root, "--out", plain, "--format", format)
    assert done.exit_code == 0, done.exception
    (call,) = (line for line in done.output.splitlines() if line.startswith("model = "))
    model = eval(call.removeprefix("model = "), {"timm": timm}).eval()
    state = torch.load(plain, weights_only=True) if format == "timm" else load_file(plain)
    model.load_state_dict(state, strict=True)
    batches = iter_eval_batches(open_source(data.output("val")), resize=crop + 16, crop=crop)
    with torch.no_grad():
        theirs = torch.cat([model(batch[0]) for batch in batches])
    wanted, _ = FeatureStore(stored.output("features")).load("val", "cls")
    assert (theirs - wanted).abs().max() < 1e-5 and theirs.std() > 0.01


def test_wrong_weights_stop_with_the_keys_and_nothing_is_written(tmp_path: Path) -> None:
    path, out = released(tmp_path / "r.pth", "vit_mini"), tmp_path / "o.safetensors"
    small, none = released(tmp_path / "s.pth", "vit_s16"), tmp_path / "none.pth"
    wider = refused("import", small, "--arch", "vit_b16", "--out", out)
    keys = tmp_path / "o.keys.txt"
    assert "cls_token is [1, 1, 384] and not [1, 1, 768]" in wider and "\n" not in wider
    assert "more)" in wider and str(keys) in wider and "blocks.9.norm2.weight" in keys.read_text()
    for words, *arguments in (
        ("missing (blocks", "import", path, "--arch", "vit_s16"),
        ("No such file", "import", none, "--arch", "vit_s16"),
        ("expected 00", "import", path, "--arch", "vit_mini", "--sha256", "0" * 64),
        ("ends in .safetensors", "import", path, "--arch", "vit_mini", "--out", tmp_path / "o.pth"),
        ("not a backbone file of ours", "export", path),
        ("has only one network", "export", path, "--weights", "student"),
    ):
        assert words in refused(arguments[0], "--out", out, *arguments[1:]), words
    assert not out.exists()


def test_a_timm_file_and_the_student(tmp_path: Path) -> None:
    plain, out = tmp_path / "tiny.pth", tmp_path / "o.safetensors"
    name = "vit_tiny_patch16_224.augreg_in21k"
    torch.save(timm.create_model(name, pretrained=False).state_dict(), plain)
    assert cli("import", plain, "--arch", name, "--source", "timm", "--out", out).exit_code == 0
    path = released(tmp_path / "r.pth", "vit_mini")
    for network in ("teacher", "student"):
        to = ("--out", tmp_path / f"{network}.safetensors")
        assert cli("import", path, "--arch", "vit_mini", "--network", network, *to).exit_code == 0
    teacher, student = (
        read_backbone_file(tmp_path / f"{n}.safetensors")[0] for n in ("teacher", "student")
    )
    assert torch.equal(student["norm.weight"], -teacher["norm.weight"])


def test_a_run_to_export_is_found_or_named(tmp_path: Path, images: Path) -> None:
    root, out = tmp_path / "runs", tmp_path / "plain.pth"
    path = released(tmp_path / "r.pth", "vit_mini")
    entry = finish(root, import_weights, {}, arch="vit_mini", epochs=1, file=str(path))
    for run in ("import", "import-import0", entry.run_dir):
        assert cli("export", run, "--run-root", root, "--out", out).exit_code == 0
    known = refused("export", "knn", "--run-root", root, "--out", out)
    assert "neither a file nor a finished run" in known and "import-import0" in known
    given = ("export", "import", "--run-root", root, "--out", out)
    assert "no weights 'student' (it has: teacher; those" in refused(*given, "--weights", "student")
    damaged = bytearray(entry.output("teacher").read_bytes())
    damaged[-1] ^= 1
    entry.output("teacher").write_bytes(damaged)
    assert "differs from the SHA-256" in refused(*given)


def test_import_and_export_replace_only_what_they_wrote(tmp_path: Path) -> None:
    path, ours = released(tmp_path / "r.pth", "vit_mini"), tmp_path / "ours.safetensors"
    imports = ("import", path, "--arch", "vit_mini", "--out", ours)
    exports = ("export", ours, "--run-root", tmp_path, "--out")
    bare = tmp_path / "bare.safetensors"
    for command, out in (
        (imports, ours),
        ((*exports, tmp_path / "plain.pth"), tmp_path / "plain.pth"),
        ((*exports, bare, "--format", "safetensors"), bare),
    ):
        assert cli(*command).exit_code == 0
        first = out.read_bytes()
        assert cli(*command).exit_code == 0
        assert out.read_bytes() == first
        out.write_text("my notes")
        result = cli(*command)
        assert isinstance(result.exception, OverwriteError)
        assert out.read_text() == "my notes"
        assert cli(*command, "--force").exit_code == 0
        assert out.read_bytes() == first


def test_a_list_of_keys_replaces_no_other_text(tmp_path: Path) -> None:
    given = ("import", released(tmp_path / "r.pth", "vit_mini"), "--arch", "vit_s16", "--out")
    keys = tmp_path / "o.keys.txt"
    keys.write_text("keys of my house")
    assert isinstance(cli(*given, tmp_path / "o.safetensors").exception, OverwriteError)
    assert keys.read_text() == "keys of my house"
    for _ in range(2):
        assert "keys do not fit" in refused(*given, tmp_path / "p.safetensors")


def test_another_architecture_than_the_file_of_ours_says(tmp_path: Path) -> None:
    ours, path = tmp_path / "ours.safetensors", released(tmp_path / "r.pth", "vit_mini")
    assert cli("import", path, "--arch", "vit_mini", "--out", ours).exit_code == 0
    given = ("--source", "ours", "--out", tmp_path / "again.safetensors")
    assert cli("import", ours, "--arch", "vit_mini", *given).exit_code == 0
    assert "vit_s16 is ViTConfig(" in refused("import", ours, "--arch", "vit_s16", *given)
