"""`diagnose`: planted faults are found by what is recorded, or by a sample of images.

The campaign `9g_diagnosis` of `make chaos` plants ten in real runs.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mugs.checkpoint.save_load import save_checkpoint
from mugs.data.loading.device import DeviceTransform
from mugs.data.sources.open import open_source
from mugs.evaluation.feature_health import measure_health, measure_label_agreement
from mugs.evaluation.feature_store import StoreLayout, extract_split
from mugs.models import vit as vit_module
from mugs.models.vit import build_vit
from mugs.weights.backbone_file import load_backbone, write_backbone_file
from pipeline import manifest
from pipeline.identity import dump_settings
from pipeline.manifest import ManifestEntry, Output
from pipeline.spec import ConfigError
from results.diagnosis import Answer, Cause, Diagnosis
from results.store import COLUMNS
from stages.commands.diagnose import (
    DiagnoseRequest,
    describe_number,
    diagnose,
    find_counterparts,
    find_evaluation_inputs,
)
from stages.commands.measure_chain import (
    EvaluationInputs,
    compare_channels,
    format_cosine,
    measure_channels,
    measure_checkpoint,
    measure_evaluation,
)
from stages.commands.released_weights import QUESTION as RELEASED
from stages.commands.reproduction import Selection, all_runs
from stages.commands.run_chain import Chain

ROOT = Path(__file__).resolve().parents[3]
CHAIN = ("digits", "pretrain", "features", "knn")


def make_run_root(root: Path, settings: Sequence[str] = (), losses: float = 6.0) -> Selection:
    """Return the k-NN of mini with records of all that it needs, as if it had run."""
    runs = {run.name: run for run in all_runs("mini", settings)}
    for name in CHAIN:
        run = runs[name]
        entry = ManifestEntry(
            stage=run.stage,
            name=name,
            run_id=run.run_id,
            upstream=run.needs,
            config=dump_settings(run.config),
        )
        run.run_dir(root).mkdir(parents=True, exist_ok=True)
        manifest.record_entry(root, entry)
    epochs = runs["pretrain"].config.epochs  # type: ignore[attr-defined]
    lines = [{"step": e, "epoch": e, "loss": losses} for e in range(epochs)]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (runs["pretrain"].run_dir(root) / "metrics.jsonl").write_text(text)
    return Selection(list(runs.values()), list(runs.values()), root)


def find(selection: Selection, **changes: Any) -> Diagnosis:
    """Return the diagnosis by records alone."""
    asked = {"reproduction": "mini", "run": "knn", "records_only": True, **changes}
    return diagnose(selection, DiagnoseRequest(**asked))


@pytest.mark.parametrize(
    ("settings", "words", "evidence"),
    [
        (["pretrain.weight_decay=[0.4, 1.0]"], "pretrain: weight_decay", "[0.4, 1] in the run"),
        (["pretrain.teacher_momentum=0.9"], "pretrain: teacher_momentum", "0.9 in the run, 0.95"),
        (["pretrain.mugs.queue_size=64"], "pretrain: mugs.queue_size", "64 in the run, 512"),
        (["pretrain.mugs.drop_path=0.1"], "pretrain: mugs.drop_path", "0.1 in the run, 0 there"),
        (["pretrain.views.large_crops=shared"], "pretrain: views.large_crops", "shared in the run"),
        (["knn.temperatures=[0.5]"], "knn: temperatures", "[0.5] in the run, [0.07]"),
        (["features.crop=24"], "features: crop", "24 in the run, 32 there"),
        (["pretrain.precision=bf16"], "pretrain: precision", "bf16 in the run"),
        (
            ["pretrain.batch_size=128", "pretrain.base_lr=0.002"],
            "pretrain: batch_size",
            "not scaled with the batch",
        ),
    ],
)
def test_a_setting_that_differs_is_found(
    tmp_path: Path, settings: list[str], words: str, evidence: str
) -> None:
    causes = find(make_run_root(tmp_path, settings)).causes
    assert len(causes) == len(settings)
    (found,) = (cause for cause in causes if words in cause.what)
    assert evidence in found.evidence
    assert found.remedy.startswith("run it with --set ")


def test_a_sound_run_is_not_accused(tmp_path: Path) -> None:
    found = find(make_run_root(tmp_path))
    assert found.causes == []
    lines = list(found.describe())
    unknown = [answer for answer in found.answers if answer.state == "unknown"]
    assert f"no cause found; {len(unknown)} of {len(found.answers)} questions unknown" in lines
    answered = Diagnosis("run", "number", (Answer("q", seen="s"),))
    assert "no cause found" in answered.describe()
    assert any(line.startswith("fine    are the settings") for line in lines)
    assert any(line.startswith("unknown images, labels and features") for line in lines)


def test_another_recipe_can_be_named(tmp_path: Path) -> None:
    text = (ROOT / "pipeline/configs/mini.yaml").read_text(encoding="utf-8")
    recipe = tmp_path / "own.yaml"
    recipe.write_text(text.replace("queue_size: 512", "queue_size: 1024"), encoding="utf-8")
    (cause,) = find(make_run_root(tmp_path), recipe=str(recipe)).causes
    assert "mugs.queue_size differs" in cause.what


def test_an_evaluation_is_compared_with_that_of_the_same_method(tmp_path: Path) -> None:
    """Though in the recipe those names are of another method."""
    runs = {run.name: run for run in all_runs("mini_methods")}
    names = {"digits": "digits", "mgc": "pretrain", "features_mgc": "features", "knn_mgc": "knn"}
    entries = [
        ManifestEntry(
            stage=runs[theirs].stage,
            name=mine,
            run_id=runs[theirs].run_id,
            upstream=runs[theirs].needs,
            config=dump_settings(runs[theirs].config),
        )
        for theirs, mine in reversed(names.items())
    ]
    found = find_counterparts(Chain(tuple(entries)), list(runs.values()))
    assert [found[entry.run_id].name for entry in entries] == list(reversed(names))


def test_another_data_set_comes_before_all_settings(tmp_path: Path) -> None:
    found = find(make_run_root(tmp_path), recipe="mugs_vit_s16_ep100")
    first = found.causes[0]
    assert "its data set is not that of the recipe" in first.what
    assert first.evidence == "sklearn_digits in the run, imagenet1k there"
    assert "seen:  in" not in "\n".join(f"   seen: {cause.evidence}" for cause in found.causes)


def test_a_run_is_found_by_its_id_too(tmp_path: Path) -> None:
    selection = make_run_root(tmp_path)
    named = find(selection).run
    run_id = named.rpartition("-")[2]
    assert find(selection, run=run_id).run == find(selection, run=f"knn-{run_id}").run == named


def test_a_training_that_ended_early_is_found(tmp_path: Path) -> None:
    selection = make_run_root(tmp_path)
    (metrics,) = tmp_path.glob("pretrain/*/metrics.jsonl")
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join(lines[:5]) + "\n")
    (cause,) = find(selection).causes
    assert "metrics end early" in cause.what and cause.evidence == "the last epoch is 5 of 24"


@pytest.mark.parametrize(("loss", "accused"), [(6.05, False), (7.0, True)])
def test_first_losses_are_compared_with_sound_runs(
    tmp_path: Path, loss: float, accused: bool
) -> None:
    sound = tmp_path / "sound"
    for seed, value in enumerate((6.0, 6.02, 6.04)):
        make_run_root(sound, [f"pretrain.seed={seed}"], value)
    found = find(make_run_root(tmp_path / "mine", losses=loss), against=sound)
    assert [cause.what for cause in found.causes] == (
        ["pretrain pretrain: the losses of its first epochs are others"] if accused else []
    )


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("knn", r"knn .* is not done in .* give diagnose the same --set"),
        ("knm", r"knm: no such run; did you mean 'knn'"),
        ("logistic", r"logistic: 2 runs are meant \(logistic_1pct, logistic_10pct\)"),
        ("linear", r"linear .* is not done"),
    ],
)
def test_a_run_that_cannot_be_diagnosed_is_named(tmp_path: Path, run: str, words: str) -> None:
    runs = all_runs("mini")
    with pytest.raises(ConfigError, match=words):
        find(Selection(runs, runs, tmp_path), run=run)


def test_a_reference_without_runs_is_named(tmp_path: Path) -> None:
    selection = make_run_root(tmp_path / "mine")
    with pytest.raises(ConfigError, match="this run root has no finished runs"):
        find(selection, against=tmp_path)
    with pytest.raises(ConfigError, match="there is no such folder"):
        find(selection, against=tmp_path / "typo")


def test_a_run_is_no_reference_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whichever spelling of its run root."""
    selection = make_run_root(tmp_path / "mine")
    (tmp_path / "link").symlink_to("mine")
    monkeypatch.chdir(tmp_path / "mine")
    for spelled in ("mine", "link", "link/../mine", "mine/pretrain/.."):
        with pytest.raises(ConfigError, match="is the run root of the run itself"):
            find(selection, against=tmp_path / spelled)
    with pytest.raises(ConfigError, match="is the run root of the run itself"):
        find(selection, against=Path("."))


@pytest.mark.parametrize("fact", ["started", "finished"])
def test_copies_of_a_run_are_no_sound_runs(tmp_path: Path, fact: str) -> None:
    """Though the same settings that ran once more are: as data that another person converted."""
    mine = make_run_root(tmp_path / "mine")
    for seed in (0, 1, 2):
        make_run_root(tmp_path / "sound", [f"pretrain.seed={seed}"], 7.0)
    assert [cause.what for cause in find(mine, against=tmp_path / "sound").causes] == [
        "pretrain pretrain: the losses of its first epochs are others"
    ]
    when = "2026-01-01T00:00:00+0000"
    facts: dict[str, dict[str, Any]] = {
        "started": {"provenance": {"started": when}},
        "finished": {"finished": when, "seconds": 12.345},
    }
    for root in (tmp_path / "mine", tmp_path / "sound"):
        for run_id in manifest.list_run_ids(tmp_path / "mine"):
            entry = manifest.read_entry(root, run_id)
            assert entry is not None
            manifest.record_entry(root, entry.model_copy(update=facts[fact]))
    found = find(mine, against=tmp_path / "sound")
    text = "\n".join(found.describe())
    assert found.causes == []
    assert "2 sound pretrainings like it, 3 are needed; --against does not tell without" in text
    assert "compared with: 6; left out: " in text and "or a copy of it" in text


def test_a_published_folder_is_no_run_root(tmp_path: Path) -> None:
    selection = make_run_root(tmp_path)
    with pytest.raises(ConfigError, match="is a published folder; diagnose needs a run root"):
        find(selection, against=ROOT / "results/published/mini")


def test_a_reference_that_does_not_help_is_not_asked_for_again(tmp_path: Path) -> None:
    selection = make_run_root(tmp_path / "mine")
    sound = make_run_root(tmp_path / "sound")
    for entry in (tmp_path / "sound/manifest").iterdir():
        if json.loads(entry.read_text())["stage"] == "knn":
            entry.unlink()
    asked = "\n".join(find(selection).describe())
    assert "no run of the stage knn to compare with; give --against RUN_ROOT" in asked
    given = "\n".join(find(selection, against=sound.root).describe())
    assert "to compare with; --against does not tell" in given and "give --against" not in given


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["best epoch,top5,98.6", "best epoch,top1,71.9"], "top1 71.90 (best epoch)"),
        (["6 epochs,mask AP50,54.1", "6 epochs,box AP,33.0"], "box AP 33.00"),
        (["upernet,aAcc,95.4", "upernet,mIoU,71.7"], "mIoU 71.70"),
        (["480p,F,80.0", "480p,J&F,75.1"], "J&F 75.10"),
    ],
)
def test_the_number_is_that_of_the_tables(tmp_path: Path, lines: list[str], words: str) -> None:
    rows = tmp_path / "rows.csv"
    written = [f"a,mugs,vit_mini,24,knn,sklearn_digits,{line},%,0" for line in lines]
    rows.write_text("\n".join([",".join(COLUMNS), *written]) + "\n")
    entry = ManifestEntry(
        stage="knn", name="x", run_id="a" * 12, upstream={}, config={}, rows="rows.csv"
    )
    manifest.record_entry(tmp_path, entry)
    found = manifest.read_entry(tmp_path, entry.run_id)
    nothing = Selection([], [], tmp_path)
    assert found is not None and describe_number(found, nothing).startswith(words)


def test_a_run_without_a_number_names_those_that_have_one_of_it(tmp_path: Path) -> None:
    ours = evaluate(tmp_path, "mugs_vit_s16_ep800", 70.0)
    found = find(ours, reproduction="mugs_vit_s16_ep800", run="pretrain")
    assert found.number == "no result rows of its own; diagnose a run that evaluates it: knn"


def evaluate(root: Path, reproduction: str, accuracy: float, *settings: str) -> Selection:
    """Record the k-NN of a reproduction on ImageNet, and all that it needs, as if it had run."""
    runs = all_runs(reproduction, settings)
    needed = {"imagenet", "pretrain", "weights", "features", "knn"}
    for run in (run for run in runs if run.name in needed):
        folder = run.run_dir(root)
        folder.mkdir(parents=True, exist_ok=True)
        info = {"method": "mugs", "arch": "vit_s16", "epochs": 800, "seed": 0}
        rows = None
        if run.name == "knn":
            line = f'{run.run_id},mugs,vit_s16,800,knn,imagenet1k,"cls, k=20, T=0.05",top1'
            (folder / "rows.csv").write_text(f"{','.join(COLUMNS)}\n{line},{accuracy},%,0\n")
            rows = str((folder / "rows.csv").relative_to(root))
        facts = {"stage": run.stage, "name": run.name, "run_id": run.run_id, "info": info}
        config = dump_settings(run.config)
        entry = ManifestEntry(**facts, upstream=run.needs, config=config, rows=rows)  # type: ignore[arg-type]
        manifest.record_entry(root, entry)
    return Selection(runs, runs, root)


def answer_about_released(selection: Selection, reproduction: str, **changes: Any) -> Answer:
    found = find(selection, reproduction=reproduction, **changes)
    (answer,) = (each for each in found.answers if each.question == RELEASED)
    return answer


@pytest.mark.parametrize(
    ("accuracy", "state", "words"),
    [
        (75.6, "fine", "knn, k-NN: 75.6, printed 75.6 (reproduced)"),
        (73.0, "cause", "knn, k-NN: 73.0, printed 75.6 (lower by 2.6 ± 0.5)"),
        (78.0, "fine", "knn, k-NN: 78.0, printed 75.6 (higher by 2.4 ± 0.5)"),
    ],
)
def test_released_weights_tell_the_evaluation_from_the_training(
    tmp_path: Path, accuracy: float, state: str, words: str
) -> None:
    ours = evaluate(tmp_path, "mugs_vit_s16_ep800", 70.0)
    released = evaluate(tmp_path, "evaluate_released", accuracy)
    found = answer_about_released(ours, "mugs_vit_s16_ep800")
    assert found.state == state
    assert words in (found.causes[0].evidence if found.causes else found.detail)
    # Asked about the released weights themselves, the answer is the same.
    assert answer_about_released(released, "evaluate_released").state == state


def test_released_weights_are_also_found_in_the_sound_run_root(tmp_path: Path) -> None:
    ours = evaluate(tmp_path / "mine", "mugs_vit_s16_ep800", 70.0)
    evaluate(tmp_path / "sound", "evaluate_released", 75.6)
    asked = answer_about_released(ours, "mugs_vit_s16_ep800", against=tmp_path / "sound")
    assert asked.state == "fine" and "75.6, printed 75.6" in asked.detail


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("features.crop=192",),
        ("knn.temperatures=[0.04]",),
        ("weights.source=ours",),
    ],
)
def test_only_released_weights_in_the_same_evaluation_count(
    tmp_path: Path, settings: tuple[str, ...]
) -> None:
    """Without any, it says how to make one."""
    ours = evaluate(tmp_path, "mugs_vit_s16_ep800", 70.0)
    if settings:
        evaluate(tmp_path, "evaluate_released", 75.6, *settings)
    found = answer_about_released(ours, "mugs_vit_s16_ep800")
    assert found.unknown.startswith("no evaluation of released weights with these settings in ")
    only = "--only weights --only features --only knn"
    assert f"run evaluate_released {only} --set weights.file=FILE" in found.unknown


def test_no_weights_of_the_mini_network_are_released(tmp_path: Path) -> None:
    found = answer_about_released(make_run_root(tmp_path), "mini")
    assert found.unknown == "no weights of vit_mini are released"


def test_causes_come_likeliest_first() -> None:
    weak, strong = (Cause(value, f"cause {value}", "seen", "do") for value in (0.5, 0.9))
    answers = (Answer("a", (weak,)), Answer("b", (strong,)), Answer("c", unknown="no data"))
    found = Diagnosis("knn", "top1 1.0", answers)
    assert list(found.describe())[:2] == ["knn: top1 1.0", "1. cause 0.9"]
    assert [each["state"] for each in found.to_json()["answers"]] == ["cause", "cause", "unknown"]


def test_health_tells_a_collapsed_network() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = measure_health(torch.randn(200, 16, generator=generator))
    assert spread.effective_rank > 14 and abs(spread.mean_cosine) < 0.05
    one = torch.randn(1, 16, generator=generator)
    same = measure_health(one.expand(200, -1))
    assert same.mean_cosine == pytest.approx(1.0)
    line = measure_health(torch.randn(200, 1, generator=generator) * one)
    assert line.effective_rank == pytest.approx(1.0, abs=1e-3)


def test_label_agreement_by_hand() -> None:
    """Four classes, each in a direction of its own."""
    labels = torch.arange(4).repeat(10)
    values = torch.eye(4)[labels]
    right = measure_label_agreement(values, labels, values, labels)
    assert (right.within_train, right.within_val, right.from_train_to_val) == (100, 100, 100)
    assert right.chance == 25 and right.images == 40
    moved = measure_label_agreement(values, labels, values, (labels + 1) % 4)
    assert (moved.within_val, moved.from_train_to_val) == (100, 0)


def test_collapsed_queues_and_prototypes_are_found(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 8, generator=generator)
    same = rows[:1].expand(64, -1).contiguous()
    entry = make_entry(tmp_path, "pretrain")
    folder = entry.run_dir / "checkpoints"
    assert measure_checkpoint(entry).unknown == "there is no checkpoint any more"

    def save(step: int, queue: torch.Tensor, prototypes: torch.Tensor) -> list[str]:
        parts = {
            "teacher": {"head.last_layer.weight_v": prototypes, "blocks.0.weight": same},
            "extra_state": {"instance_queue.rows": queue, "center": torch.zeros(8)},
        }
        save_checkpoint(folder, step, parts, {})
        return [cause.what for cause in measure_checkpoint(entry).causes]

    assert save(9, rows, rows) == []
    assert save(10, same, rows) == ["pretrain pretrain: all rows of instance_queue.rows are alike"]
    assert save(11, rows, same)[0].endswith("all rows of head.last_layer.weight_v are alike")


@pytest.mark.parametrize("damaged", ["checkpoints/step_00000005", "features"])
def test_what_cannot_be_read_stays_unknown(tmp_path: Path, damaged: str) -> None:
    selection = make_run_root(tmp_path)
    (folder,) = tmp_path.glob("pretrain/pretrain-*")
    (folder / damaged).mkdir(parents=True)
    found = diagnose(selection, DiagnoseRequest(reproduction="mini", run="knn"))
    unknown = [each.question for each in found.answers if each.unknown]
    assert found.causes == []
    assert "labels and features of a sample" in unknown
    assert "did prototypes or queues of pretrain collapse" in unknown


COLORS = ((200, 40, 20), (30, 30, 30), (220, 180, 90), (120, 90, 40))


def write_images(folder: Path, *, bgr: bool = False, seed: int = 0) -> None:
    """Write 4 classes of 12 reddish images each, with a bright square in a corner of its own."""
    random = np.random.default_rng(seed)
    for split in ("train", "val"):
        for label, color in enumerate(COLORS):
            (folder / split / str(label)).mkdir(parents=True)
            for number in range(12):
                pixels = random.integers(0, 40, (48, 48, 3)) + np.array([60, 40, 20])
                row, column = 24 * (label // 2), 24 * (label % 2)
                pixels[row : row + 24, column : column + 24] = np.array(color) + 20
                image = pixels.astype(np.uint8)[..., :: -1 if bgr else 1]
                path = folder / split / str(label) / f"{number}.jpg"
                Image.fromarray(np.ascontiguousarray(image)).save(path, quality=95)


def make_entry(root: Path, name: str, **outputs: str) -> ManifestEntry:
    """Return a record whose outputs are paths below a run root."""
    found = {label: Output(path=path, size=0, sha256="") for label, path in outputs.items()}
    return ManifestEntry(stage=name, name=name, run_id=name, outputs=found).at(root)


@pytest.fixture
def evaluated(tmp_path: Path) -> EvaluationInputs:
    """Images and two random backbones in a run root; features are not stored yet."""
    write_images(tmp_path / "data")
    for seed, label in enumerate(("teacher", "initial")):
        torch.manual_seed(seed)
        network = build_vit("vit_mini")
        # As large as those of a trained network.
        network.pos_embed.data *= 20
        meta = {"arch": vars(network.config)}
        write_backbone_file(tmp_path / f"{label}.safetensors", network.state_dict(), meta)
    weights = {label: f"{label}.safetensors" for label in ("teacher", "initial")}
    return EvaluationInputs(
        data=make_entry(tmp_path, "convert", train="data/train", val="data/val"),
        weights=make_entry(tmp_path, "pretrain", **weights),
        label="teacher",
        resize=48,
        crop=48,
        features=make_entry(tmp_path, "features", features="features"),
    )


def store_features(inputs: EvaluationInputs, label: str = "teacher") -> None:
    """Store the features of the validation images, as the stage does."""
    source = open_source(inputs.data.output("val"))
    assert inputs.features is not None
    network = load_backbone(inputs.weights.output(label)).eval()
    size = {"resize": inputs.resize, "crop": inputs.crop}
    layout = StoreLayout(images=len(source), fingerprint=source.fingerprint, blocks=1, **size)
    folder = inputs.features.output("features") / "val"
    device = torch.device("cpu")
    extract_split(network, source, folder, layout, device=device, batch_size=16, threads=1)


def skip_normalization(patch: pytest.MonkeyPatch) -> None:
    """Let an evaluation see pixels of 0 to 1."""
    made = DeviceTransform.__init__

    def without(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        self.mean = torch.zeros(3, 1, 1)
        self.std = torch.ones(3, 1, 1)

    patch.setattr(DeviceTransform, "__init__", without)


def cut_positions(patch: pytest.MonkeyPatch) -> None:
    """Let a backbone use the first positions of its table for larger images."""

    def cut(table: torch.Tensor, height: int, width: int, grid: object) -> torch.Tensor:
        rows = torch.arange(height * width) % (table.shape[1] - 1)
        return torch.cat([table[:, :1], table[:, 1:][:, rows]], dim=1)

    patch.setattr(vit_module, "resize_position_table", cut)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (None, None),
        (skip_normalization, "without normalizing the images"),
        (cut_positions, "with positions that were cut"),
        ("initial", "with the initial instead of the teacher"),
    ],
)
def test_stored_features_that_do_not_come_out_again(
    evaluated: EvaluationInputs, monkeypatch: pytest.MonkeyPatch, fault: Any, words: str | None
) -> None:
    with monkeypatch.context() as patch:
        if callable(fault):
            fault(patch)
        store_features(evaluated, fault if isinstance(fault, str) else "teacher")
    causes = [cause.what for found in measure_evaluation(evaluated) for cause in found.causes]
    if words is None:
        assert causes == []
    else:
        assert len(causes) == 1 and words in causes[0], causes


@pytest.mark.parametrize(("method", "feature"), [("mugs", "cls"), ("mgc", "patch_mean")])
def test_a_token_is_examined_that_the_method_trains(
    tmp_path: Path, method: str, feature: str
) -> None:
    data = ManifestEntry(stage="convert", name="d", run_id="d" * 12)
    weights = ManifestEntry(stage="pretrain", name="p", run_id="p" * 12, config={"method": method})
    needs = {"data": data.run_id, "weights": weights.run_id}
    size = {"resize": 48, "crop": 48}
    run = ManifestEntry(stage="knn", name="k", run_id="k" * 12, upstream=needs, config=size)
    inputs = find_evaluation_inputs(Chain((run, data, weights)))
    assert inputs is not None and inputs.feature == feature


def test_shuffled_labels_are_found(evaluated: EvaluationInputs) -> None:
    store_features(evaluated)
    folder = evaluated.data.output("val")
    paths = sorted(folder.rglob("*.jpg"))
    order = np.random.default_rng(1).permutation(len(paths))
    for path, other in zip(paths, order, strict=True):
        path.rename(paths[other].parent / f"moved_{path.name}_{other}.jpg")
    (folder.parent.parent / "features" / "val" / "index.json").unlink()
    store_features(evaluated)
    causes = [cause.what for found in measure_evaluation(evaluated) for cause in found.causes]
    assert causes == ["convert convert: labels of val are shuffled"]


def test_exchanged_channels_are_found(tmp_path: Path) -> None:
    write_images(tmp_path / "rgb")
    write_images(tmp_path / "bgr", bgr=True, seed=1)
    write_images(tmp_path / "other", seed=2)
    reference, _ = measure_channels(tmp_path / "rgb" / "train")
    wrong = make_entry(tmp_path, "convert", train="bgr/train")
    (cause,) = compare_channels(wrong, reference, "the sound run")
    assert "red and blue are exchanged (BGR)" in cause.what
    right = make_entry(tmp_path, "convert", train="other/train")
    assert not list(compare_channels(right, reference, "the sound run"))
    (cause,) = compare_channels(right, (0.1, 0.1, 0.1), "the sound run")
    assert "not those of the reference" in cause.what


@pytest.mark.parametrize(
    ("distance", "shown"), [(0.0, "1"), (-2.2e-16, "1"), (3.4e-4, "1 - 3.4e-04")]
)
def test_a_cosine_is_told_by_what_it_lacks(distance: float, shown: str) -> None:
    assert format_cosine(distance) == shown
