"""What stages say in their result rows: of which network, of which part, which epoch, what seed."""

from types import SimpleNamespace
from typing import Any

import pytest

from mugs.finetune.config import RateOptions
from stages.finetune import FinetuneStageConfig, build_accuracy_rows
from stages.shared.frozen import build_result_rows, check_neighbors, read_num_classes
from stages.shared.labelled import LabelledPart

FACTS = {"method": "mugs", "arch": "vit_s16", "epochs": 300, "seed": 5}


def context(**inputs: dict[str, Any]) -> Any:
    given = {"weights": FACTS, "data": {"dataset": "photos"}} | inputs
    runs = {role: SimpleNamespace(info=info) for role, info in given.items() if info}
    return SimpleNamespace(run_id="abc", stage="some_stage", inputs=runs)


def test_rows_of_a_backbone() -> None:
    ctx = context()
    rows = build_result_rows(ctx, "student", "k=3", [("top1", 70.0), ("top5", 90.0)])
    assert [(row.metric, row.value) for row in rows] == [("top1", 70.0), ("top5", 90.0)]
    for row in rows:
        assert (row.run_id, row.stage, row.dataset, row.unit) == (
            "abc",
            "some_stage",
            "photos",
            "%",
        )
        assert (row.method, row.arch, row.epochs, row.seed) == tuple(FACTS.values())
        assert row.setting == "k=3"


@pytest.mark.parametrize(
    ("own", "of_features", "method"),
    [
        ("initial", None, "mugs (initialisation)"),
        ("teacher", None, "mugs"),
        ("teacher", "initial", "mugs (initialisation)"),
        ("initial", "teacher", "mugs"),
    ],
)
def test_stored_features_say_of_which_network_they_are(
    own: Any, of_features: str | None, method: str
) -> None:
    features = FACTS | {"weights": of_features, "dataset": "stored"}
    ctx = context(features=features) if of_features else context()
    (row,) = build_result_rows(ctx, own, "", [("top1", 1.0)])
    assert row.method == method and row.dataset == ("stored" if of_features else "photos")


def history(*accuracies: float) -> list[Any]:
    return [
        SimpleNamespace(epoch=epoch, top1=top1, top5=90.0 + epoch)
        for epoch, top1 in enumerate(accuracies)
    ]


def finetuning(**options: Any) -> FinetuneStageConfig:
    return FinetuneStageConfig(epochs=4, batch_size=8, rate=RateOptions(base_lr=1.0), **options)


def values(rows: list[Any]) -> dict[tuple[str, str], float]:
    return {(row.setting, row.metric): row.value for row in rows}


def test_the_first_of_the_best_epochs_and_the_last_one() -> None:
    cfg = finetuning()
    assert values(build_accuracy_rows(context(), cfg, history(50.0, 80.0, 80.0, 70.0))) == {
        ("best epoch", "top1"): 80.0,
        ("best epoch", "top5"): 91.0,
        ("last epoch", "top1"): 70.0,
        ("last epoch", "top5"): 93.0,
    }


@pytest.mark.parametrize(
    ("weights", "method", "seed"),
    [
        ("teacher", "mugs", 5),
        ("initial", "mugs (initialisation)", 5),
        ("scratch", "mugs (scratch)", 9),
    ],
)
def test_a_network_from_scratch_has_the_seed_of_its_own(
    weights: Any, method: str, seed: int
) -> None:
    cfg = finetuning(weights=weights, seed=9)
    rows = build_accuracy_rows(context(), cfg, history(50.0))
    assert {(row.method, row.seed) for row in rows} == {(method, seed)}


def test_rows_of_a_labelled_part() -> None:
    part = LabelledPart(percent=10, by="class_balanced")
    cfg = finetuning(labelled=part)
    rows = build_accuracy_rows(context(), cfg, history(50.0))
    assert rows[0].setting == f"{part.describe()}, best epoch"


@pytest.mark.parametrize(
    ("classes", "outputs", "words"),
    [
        (10, ("train", "val"), None),
        (10, ("train",), "has no validation images"),
        (0, ("train", "val"), "has no labels"),
    ],
)
def test_classes_of_a_data_set(classes: int, outputs: tuple[str, ...], words: str | None) -> None:
    ctx = context()
    ctx.inputs["data"].info["num_classes"] = classes
    ctx.inputs["data"].outputs = outputs
    if words is None:
        assert read_num_classes(ctx) == classes
        return
    with pytest.raises(ValueError, match=f"'photos' {words}, which stage 'some_stage' needs"):
        read_num_classes(ctx)


@pytest.mark.parametrize("counts", [{}, {"train": 20}, {"val": 3}])
def test_as_many_neighbors_as_images(counts: dict[str, int]) -> None:
    check_neighbors((5, 20), counts)
    with pytest.raises(ValueError, match=r"ks \[20, 5\]: the data set has 19 training images"):
        check_neighbors((20, 5), counts | {"train": 19})
