"""A small run root in which each kind of record is there, made without any training.

photos    done     converted images
pretrain  done     weights, checkpoints, curves, and two attempts
knn       done     result rows
other     failed   another pretraining, which said how it failed
later     waiting  a third one, which was interrupted
last      waiting  k-NN of `other`
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from checkpoint_cases import save
from PIL import Image

from mugs.data.sources.convert import convert_to_beton
from mugs.data.sources.folder import FolderSource
from mugs.models.vit import build_vit
from mugs.weights.backbone_file import write_backbone_file
from pipeline import attempts, runfile
from pipeline.files import write_json_atomic
from pipeline.spec import StageRun
from pipeline.stage import StageOutput
from results.schema import ResultRow
from slurm.node.publish import publish_results
from stages.commands.reproduction import all_runs

# Longer ago than `clean` waits.
OLD = 1.7e9
CLASSES = ("cat", "dog")
TRAINING = """
    stage: pretrain
    needs: {data: photos}
    arch: vit_mini
    epochs: 1
    batch_size: 4
    warmup_epochs: 0
    checkpoint_steps: 1
    mugs: {head_hidden: 16, predictor_hidden: 16, head_out: 8, group_bottleneck: 8,
           num_prototypes: 16, queue_size: 16, memory_size: 16}
    views: {large_size: 32, small_size: 16, num_small: 1}
    resources: {gpu: false, ranks_per_node: 1}
"""
KNN = "stage: knn, ks: [1], resize: 32, crop: 32, resources: {gpu: false, ranks_per_node: 1}"
YAML = f"""
name: scene
runs:
  photos:
    stage: convert
    dataset: sklearn_digits
    num_classes: 2
    train_dir: IMAGES
    val_dir: IMAGES
    resources: {{gpu: false}}
  pretrain:{TRAINING}
  other:{TRAINING}    seed: 1
  later:{TRAINING}    seed: 2
  knn: {{needs: {{data: photos, weights: pretrain}}, {KNN}}}
  last: {{needs: {{data: photos, weights: other}}, {KNN}}}
"""
FACTS = {
    "git_sha": "c0ffee",
    "git_dirty": False,
    "versions": {"python": "3.11.7", "torch": "2.10.0"},
    "host": "node1",
    "inputs": {},
}


@dataclass(frozen=True)
class Scene:
    """The run root, the reproduction, and a folder for what commands write elsewhere."""

    folder: Path

    @property
    def root(self) -> Path:
        """The run root."""
        return self.folder / "runs"

    @property
    def reproduction(self) -> Path:
        """The YAML file."""
        return self.folder / "scene.yaml"

    def runs(self) -> dict[str, StageRun]:
        """Runs of the reproduction by name."""
        return {run.name: run for run in all_runs(str(self.reproduction))}

    def copy(self, folder: Path) -> "Scene":
        """The same in another folder; links and times stay as they are."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Scene(folder)

    def files(self) -> list[Path]:
        """All files of the run root, below it."""
        return sorted(p.relative_to(self.root) for p in self.root.rglob("*") if p.is_file())


def build_scene(folder: Path) -> Scene:
    """Make the run root."""
    scene = Scene(folder)
    _draw_images(folder / "images")
    text = YAML.replace("IMAGES", str(folder / "images"))
    scene.reproduction.write_text(text)
    runs = scene.runs()
    for run in runs.values():
        if run.name != "last":
            _begin(scene.root, run)
    _convert(scene.root, runs["photos"], folder / "images")
    _train(scene.root, runs["pretrain"])
    _evaluate(scene.root, runs["knn"])
    _fail(scene.root, runs["other"])
    attempts.record_interruption(runs["later"].run_dir(scene.root), 1, "SIGUSR2", saved=True)
    save(runs["later"].run_dir(scene.root) / "checkpoints", 1)
    _leave_over(scene.root)
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (OLD, OLD), follow_symlinks=False)
    return scene


def _draw_images(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    for number, values in enumerate(pixels):
        path = folder / CLASSES[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)


def _begin(root: Path, run: StageRun) -> None:
    """What the start of a run leaves: its file, an attempt, a log, the note of its job."""
    folder = runfile.write_run_file(root, run)
    attempts.start_attempt(folder, launch="a", job_id="7", gpus=0)
    attempts.record_provenance(folder, 1, FACTS)
    attempt = folder / "attempts/0001.json"
    content = json.loads(attempt.read_text())
    attempt.write_text(json.dumps({**content, "host": "node1", "time": OLD}))
    (folder / "logs").mkdir()
    (folder / "logs/attempt_0001_rank0.log").write_text("INFO: began\nINFO: a step\n")
    (folder / "submission.sh").write_text("#!/bin/sh\n#SBATCH --exclude=node9\n")
    write_json_atomic(folder / "job.json", {"job_id": "7", "time": OLD - 60})
    write_json_atomic(folder / "claims/0001.json", {"host": "login", "pid": 1, "time": OLD - 61})
    write_json_atomic(folder / "claims/0001.released.json", {"job_id": "7"})
    progress = {"time": OLD + 9, "done": 1, "total": 2, "unit": "steps", "rate": 3.0, "eta_s": 4.0}
    write_json_atomic(folder / "progress.json", progress)


def _convert(root: Path, run: StageRun, images: Path) -> None:
    folder = run.run_dir(root)
    outputs = {}
    for split in ("train", "val"):
        path = folder / f"{split}.beton"
        convert_to_beton(FolderSource(images), path, threads=1)
        outputs |= {split: path, f"{split}_sidecar": path.with_name(path.name + ".json")}
    info = {"dataset": "sklearn_digits", "num_classes": 2}
    _publish(run, folder, StageOutput(outputs, info=info))


def _train(root: Path, run: StageRun) -> None:
    folder = run.run_dir(root)
    vit = build_vit("vit_mini")
    outputs = {}
    for name in ("initial", "teacher", "student"):
        outputs[name] = folder / f"weights/{name}.safetensors"
        outputs[name].parent.mkdir(exist_ok=True)
        meta = {"arch": asdict(vit.config), "weights": name}
        write_backbone_file(outputs[name], dict(vit.state_dict()), meta)
    for step in (1, 2):
        save(folder / "checkpoints", step)
    attempts.record_save(folder, 1, step=2, seconds=0.1)
    lines = [
        {"step": step, "epoch": 0, "loss": 9 - step, "lr": 0.1, "images_per_second": 3.0}
        for step in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    info = {"arch": "vit_mini", "epochs": 1, "method": "mugs", "seed": 0}
    _publish(run, folder, StageOutput(outputs, info=info))


def _evaluate(root: Path, run: StageRun) -> None:
    row = ResultRow(
        run.run_id, "mugs", "vit_mini", 1, "knn", "sklearn_digits", "cls, k=1, T=0.07", "top1",
        62.5, "%", 0,
    )  # fmt: skip
    _publish(run, run.run_dir(root), StageOutput(rows=[row]))


def _fail(root: Path, run: StageRun) -> None:
    folder = run.run_dir(root)
    attempts.record_failure(
        folder,
        1,
        error="ValueError: no luck",
        log=folder / "logs/attempt_0001_rank0.log",
        step=1,
        host="node1",
    )
    attempts.record_no_retry(folder, 1, "3 attempts failed")
    for step in (1, 2):
        save(folder / "checkpoints", step)


def _publish(run: StageRun, folder: Path, output: StageOutput) -> None:
    publish_results(run, folder, output, attempt=1, ranks=1, facts=FACTS)


def _leave_over(root: Path) -> None:
    """Leave what `clean` lists: half a file, and a run that no reproduction asks for."""
    (root / "manifest/.0123456789ab.json.01234567.tmp").write_text("{")
    folder = root / "pretrain/mine-0123456789ab"
    folder.mkdir()
    head = "stage: pretrain\nname: mine\nrun_id: 0123456789ab\n"
    (folder / runfile.FILE_NAME).write_text(head)
    (folder / "notes.txt").write_text("mine")
