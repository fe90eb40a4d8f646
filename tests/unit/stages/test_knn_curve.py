"""k-NN over a pretraining: which checkpoints are evaluated, when, and what is refused."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stopping import NoteSaves

from mugs.checkpoint.record import checkpoint_name
from mugs.data.mini.digits import materialize_digits
from mugs.data.sources.convert import convert_to_beton
from mugs.data.sources.folder import FolderSource
from pipeline import attempts, config, manifest, runfile
from pipeline.manifest import ManifestEntry, describe_output
from pipeline.plan import build_plan
from pipeline.spec import ConfigError, StageRun
from pipeline.stage import StageContext
from stages import STAGES, knn_curve, pretrain
from stages.knn_curve import next_epoch

YAML = """
name: curve
runs:
  digits: {stage: convert, dataset: digits, num_classes: 10, train_dir: /t, val_dir: /v}
  pretrain:
    stage: pretrain
    needs: {data: digits}
    arch: vit_mini
    epochs: 3
    steps_per_epoch: 1
    batch_size: 4
    warmup_epochs: 1
    keep_every_epochs: 2
    keep_checkpoints: 1
    log_steps: 1
    threads: 1
    mugs: {drop_path: 0.0, head_hidden: 8, predictor_hidden: 8, head_out: 8, group_bottleneck: 8,
           num_prototypes: 8, queue_size: 8, memory_size: 16}
    views: {large_size: 16, small_size: 8, num_small: 1}
    resources: {gpu: false, ranks_per_node: 1}
  curve: {stage: knn_curve, needs: {data: digits, weights: pretrain}, every_epochs: 2, ks: [1, 3],
          watch: true, resize: 16, crop: 16, threads: 1, poll_seconds: 0.01}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run root with data and a pretraining of three epochs; its runs are those of the YAML."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    runs = planned(root / "curve.yaml")
    data, pre = runs["digits"], runs["pretrain"]
    materialize_digits(root / "images")
    for split in ("train", "val"):  # the validation images will do for both
        convert_to_beton(
            FolderSource(root / "images" / "val"), data.run_dir(root) / f"{split}.beton"
        )
    finish(root, data, ["train.beton", "val.beton"], {"dataset": "digits", "num_classes": 10})
    runfile.write_run_file(root, pre)
    met: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mugs.distributed.barrier", lambda: met.extend(root.rglob("*")))
        out = pretrain.run(context(root, pre), pre.config)  # type: ignore[arg-type]
    assert set(out.outputs.values()) <= set(met), "no rank goes on before they are there"
    outputs = [str(path.relative_to(pre.run_dir(root))) for path in out.outputs.values()]
    finish(root, pre, outputs, dict(out.info))
    runfile.write_run_file(root, runs["curve"])
    return root


def planned(path: Path) -> dict[str, StageRun]:
    path.write_text(YAML)
    return {run.name: run for run in build_plan(config.load_reproduction(str(path), STAGES))}


def finish(root: Path, run: StageRun, files: list[str], info: dict[str, object]) -> None:
    outputs = {Path(name).stem: describe_output(root, run.run_dir(root) / name) for name in files}
    upstream = dict(run.needs)
    entry = ManifestEntry(
        stage=run.stage,
        name=run.name,
        run_id=run.run_id,
        upstream=upstream,
        outputs=outputs,
        info=info,
    )
    manifest.record_entry(root, entry)


def context(root: Path, run: StageRun) -> StageContext:
    found = {role: manifest.find_done(root, need) for role, need in run.needs.items()}
    inputs = {role: entry for role, entry in found.items() if entry is not None}
    running = {
        role: runfile.find_run_dir(root, run.needs[role]) for role in set(run.needs) - set(inputs)
    }
    folders = {role: folder for role, folder in running.items() if folder is not None}
    return StageContext(
        run.stage, run.name, run.run_id, run.run_dir(root), inputs, 1, running=folders
    )


class Case:
    """A copy of the run root in which the pretraining is not done."""

    def __init__(self, root: Path) -> None:
        self.root, runs = root, planned(root / "curve.yaml")
        self.control = NoteSaves()
        self.pre, self.curve = runs["pretrain"].run_dir(root), runs["curve"]
        assert isinstance(self.curve.config, knn_curve.KnnCurveConfig)
        self.cfg = self.curve.config
        self.entry = manifest.entry_path(root, runs["pretrain"].run_id)
        self.entry.rename(root / "entry.json")
        for part in ("checkpoints", "weights"):
            (self.pre / part).rename(self.pre / f"{part}_later")

    def appear(self, *names: str) -> None:
        """The start and checkpoints, `initial` or a number of steps."""
        for name in names:
            part, file = (
                ("weights", "initial.safetensors")
                if name == "initial"
                else ("checkpoints", f"step_{name:0>8}")
            )
            (self.pre / part).mkdir(exist_ok=True)
            (self.pre / f"{part}_later" / file).rename(self.pre / part / file)

    def end(self) -> None:
        (self.root / "entry.json").rename(self.entry)
        shutil.copytree(self.pre / "weights_later", self.pre / "weights", dirs_exist_ok=True)

    def next(self, waited: float = 0.0) -> str:
        ctx = context(self.root, self.curve)
        return knn_curve.next_epoch(ctx, self.cfg, self.found(), time.monotonic() - waited)

    def evaluate(self, epoch: int) -> None:
        ctx = replace(context(self.root, self.curve), control=self.control)
        knn_curve.evaluate_epoch(ctx, self.cfg, self.found(), epoch)

    def found(self) -> knn_curve.Pretraining:
        return knn_curve.find_pretraining(context(self.root, self.curve), self.cfg)


@pytest.fixture
def case(trained: Path, tmp_path: Path) -> Case:
    shutil.copytree(trained, tmp_path / "runs")
    return Case(tmp_path / "runs")


def test_checkpoints_are_evaluated_as_they_appear(
    case: Case, meetings: list[set[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [(epoch, file.parent.name) for epoch, file in case.found().files.items()]
    assert folders == [(0, "weights"), (2, checkpoint_name(2)), (3, checkpoint_name(3))]
    assert case.next() == "wait"
    case.appear("initial")
    assert case.next() == "0"
    case.evaluate(0)
    assert knn_curve.epoch_record_path(context(case.root, case.curve), 0) in meetings[-1]
    assert case.next() == "wait"
    case.appear("2")
    assert case.next() == "2"
    case.evaluate(2)
    assert case.control.saves == [0, 2], "else a stop at the time limit would end the run"
    assert case.next() == "wait"
    case.appear("3")
    case.end()
    pretend_wait = ["wait"]
    monkeypatch.setattr(
        knn_curve, "next_epoch", lambda *a: pretend_wait.pop() if pretend_wait else next_epoch(*a)
    )
    ctx = replace(context(case.root, case.curve), control=case.control)
    out = knn_curve.run(ctx, case.cfg)
    assert case.control.saves == [0, 2, 0, 3], "also while it waits for a slow pretraining"
    settings = [row.setting for row in out.rows]
    assert settings == [f"epoch={e}, cls, k={k}, T=0.07" for e in (0, 2, 3) for k in (1, 3)]
    assert {(row.method, row.stage, row.epochs, row.unit) for row in out.rows} == {
        ("mugs", "knn_curve", 3, "%")
    }
    assert out.rows[0].value == 100  # the bank holds the very images
    assert case.next() == "none"


def test_the_last_epoch_is_the_teacher(case: Case) -> None:
    case.appear("initial", "2", "3")
    case.end()
    last = knn_curve.load_teacher(case.found(), 3).state_dict()
    from mugs.weights.backbone_file import read_backbone_file

    exported, _ = read_backbone_file(case.pre / "weights" / "teacher.safetensors")
    assert last.keys() == exported.keys() and all(
        torch.equal(last[name], exported[name]) for name in last
    )


def test_a_bad_checkpoint_is_waited_for_and_a_new_one_is_evaluated_again(case: Case) -> None:
    case.appear("initial", "2")
    case.evaluate(0)
    file = case.pre / "checkpoints" / "step_00000002" / "teacher.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert case.next() == "wait"
    file.write_bytes(good)
    case.evaluate(2)
    note = case.curve.run_dir(case.root) / "epochs" / "epoch_0002.json"
    note.write_text(note.read_text().replace('"weights": "', '"weights": "0'))
    assert case.next() == "2"


def test_waiting_ends(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.appear("initial")
    case.evaluate(0)
    monkeypatch.setattr(knn_curve.Pretraining, "silent_minutes", lambda _: 61.0)
    assert case.next(waited=60) == "wait"  # seconds
    with pytest.raises(ValueError, match="no sign of life for 61 minutes; submit again"):
        case.next(waited=7200)
    attempts.start_attempt(case.pre)
    attempts.record_failure(case.pre, 1, error="no luck", log=Path("x"))
    assert case.next() == "wait"  # Slurm may start it again
    attempts.record_no_retry(case.pre, 1, "3 attempts failed")
    with pytest.raises(ValueError, match=r"the pretraining failed: no luck \(3 attempts failed\)"):
        case.next()
    case.end()
    with pytest.raises(
        ValueError, match=r"step_00000002.*no good weights of epoch 2, and the pretraining is done"
    ):
        case.next()


def test_signs_of_life(case: Case) -> None:
    found = replace(case.found(), run_dir=case.root / "nowhere")
    assert found.silent_minutes() > 1e6
    attempts.start_attempt(case.pre)
    assert case.found().silent_minutes() < 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "every_epochs: 2, ks",
            "every_epochs: 3, ks",
            "only those of every 2 epochs; set its keep_every_epochs to 3",
        ),
        ("    keep_every_epochs: 2\n", "", "none for good; set its keep_every_epochs to 2"),
    ],
)
def test_checkpoints_that_are_not_kept_are_refused(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    path = tmp_path / "curve.yaml"
    path.write_text(YAML.replace(old, new))
    with pytest.raises(
        ConfigError, match=f"runs.curve.needs: weights: of its checkpoints it keeps {words}"
    ):
        build_plan(config.load_reproduction(str(path), STAGES))


def test_only_a_watch_starts_early(tmp_path: Path) -> None:
    curve = planned(tmp_path / "curve.yaml")["curve"]
    assert curve.config.concurrent_roles() == {"weights"}
    assert replace(curve.config, watch=False).concurrent_roles() == set()
