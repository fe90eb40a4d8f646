"""Imported weights take the place of a pretraining: import,
features and evaluations as a job would run them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mugs.models.vit import build_vit
from mugs.weights.pickle_file import WeightsError
from pipeline import manifest
from pipeline.manifest import ManifestEntry, describe_output
from pipeline.reading import validate_model
from pipeline.spec import ConfigError, StageConfig
from pipeline.stage import StageContext
from results.schema import ResultRow
from stages import STAGES, convert, features, import_weights, knn, linear, logistic
from stages.commands.weights import import_settings

MODULES: dict[str, Any] = {
    "convert": convert,
    "import": import_weights,
    "features": features,
    "knn": knn,
}
MODULES |= {"linear": linear, "logistic": logistic}


class Runs:
    """Stage runs in a run root, one after the other, in this process."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(
        self, stage: str, inputs: Mapping[str, ManifestEntry], **values: Any
    ) -> tuple[ManifestEntry, list[ResultRow]]:
        config: StageConfig = validate_model(STAGES[stage].config, values, "x.yaml")
        folder = self.root / stage / f"{stage}-0"
        folder.mkdir(parents=True)
        context = StageContext(stage, stage, f"{stage}0000", folder, inputs, 1)
        output = MODULES[stage].run(context, config)
        outputs = {
            label: describe_output(self.root, path) for label, path in output.outputs.items()
        }
        upstream = {role: entry.run_id for role, entry in inputs.items()}
        info = dict(output.info)
        entry = ManifestEntry(
            stage=stage,
            name=stage,
            run_id=context.run_id,
            upstream=upstream,
            outputs=outputs,
            info=info,
        )
        manifest.record_entry(self.root, entry)
        return entry.at(self.root), list(output.rows)


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A file in the released layout, with random weights."""
    torch.manual_seed(0)
    state = build_vit("vit_mini", relation_depth=1).state_dict()
    path = tmp_path / "released.pth"
    torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items()}, "epoch": 800}, path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes, told apart by their color."""
    for label, color in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(8):
            shade = tuple(c + 6 * index for c in color)
            Image.new("RGB", (40, 36), shade).save(tmp_path / "images" / label / f"{index}.jpg")
    return tmp_path / "images"


def test_from_a_released_file_to_rows(tmp_path: Path, released: Path, images: Path) -> None:
    runs, folder = Runs(tmp_path / "runs"), str(images)
    data, _ = runs.run("convert", {}, dataset="colours", train_dir=folder, val_dir=folder)
    weights, _ = runs.run("import", {}, arch="vit_mini", epochs=800, file=str(released))
    assert weights.info["sha256"] == manifest.hash_path(released)
    assert any("relation_blocks" in key for key in weights.info["discarded"])
    both = {"data": data, "weights": weights}
    stored, _ = runs.run("features", both, blocks=3, resize=32, crop=32, shard_images=5)
    given, labelled = {"features": stored}, {"percent": 50, "by": "class_balanced"}
    rows = {
        "knn": runs.run("knn", given, ks=(1, 3), temperatures=(0.07,))[1],
        "linear": runs.run(
            "linear", given, feature="cls", augmentation="none", epochs=2, batch_size=8
        )[1],
        "logistic": runs.run("logistic", given, labelled=labelled, penalties=(0.01, 0.001))[1],
    }
    assert [row.setting for row in rows["knn"]] == ["cls, k=1, T=0.07", "cls, k=3, T=0.07"]
    assert [row.setting for row in rows["linear"]] == [
        "cls, none, best epoch",
        "cls, none, last epoch",
    ]
    assert [row.setting for row in rows["logistic"]] == [
        "50% of labels, cls, lambda=0.01",
        "50% of labels, cls, lambda=0.001",
    ]
    for row in (row for some in rows.values() for row in some):
        assert (row.method, row.arch, row.epochs, row.dataset) == (
            "mugs",
            "vit_mini",
            800,
            "colours",
        )
    assert rows["knn"][0].value == rows["logistic"][1].value == 100


def test_stored_and_computed_features_give_the_same_rows(
    tmp_path: Path, released: Path, images: Path
) -> None:
    runs, folder = Runs(tmp_path / "runs"), str(images)
    data, _ = runs.run("convert", {}, dataset="colours", train_dir=folder, val_dir=folder)
    weights, _ = runs.run("import", {}, arch="vit_mini", epochs=800, file=str(released))
    both = {"data": data, "weights": weights}
    stored, _ = runs.run("features", both, blocks=1, resize=32, crop=32)
    _, one = runs.run("knn", {"features": stored}, ks=(1, 5), temperatures=(0.05,))
    other = Runs(tmp_path / "runs" / "other")
    _, two = other.run("knn", both, ks=(1, 5), temperatures=(0.05,), resize=32, crop=32)
    assert [(r.setting, r.value) for r in one] == [(r.setting, r.value) for r in two]


def test_more_ranks_than_images_are_refused(
    tmp_path: Path, released: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, folder = Runs(tmp_path / "runs"), str(images)
    data, _ = runs.run("convert", {}, dataset="colours", train_dir=folder, val_dir=folder)
    weights, _ = runs.run("import", {}, arch="vit_mini", epochs=800, file=str(released))
    monkeypatch.setattr("mugs.distributed.world_size", lambda: 17)
    with pytest.raises(ValueError, match="train: 16 images for 17 ranks"):
        runs.run(
            "knn",
            {"data": data, "weights": weights},
            ks=(1,),
            temperatures=(0.05,),
            resize=32,
            crop=32,
        )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"arch": "vit_s16"}, r"(?s)released\.pth: .*missing \(blocks"),
        ({"sha256": "0" * 64}, "SHA-256"),
        ({"sha256": "0" * 64, "source": "ours"}, "SHA-256"),
        ({"sha256": "0" * 64, "source": "timm", "arch": "vit_tiny_patch16_224"}, "SHA-256"),
    ],
)
def test_another_file_stops_the_import(
    tmp_path: Path, released: Path, values: dict[str, Any], words: str
) -> None:
    values = {"arch": "vit_mini", "epochs": 800, "file": str(released), **values}
    with pytest.raises(WeightsError, match=words):
        Runs(tmp_path / "runs").run("import", {}, **values)


@pytest.mark.parametrize("source", ["mugs", "ours"])
def test_an_unknown_architecture_is_named_before_the_file_is_read(source: str) -> None:
    cfg = import_settings("/no/file", "vit_s61", source=source)
    with pytest.raises(ConfigError, match=r"'vit_s61'; did you mean 'vit_s16'"):
        import_weights.load_foreign_weights(cfg)
