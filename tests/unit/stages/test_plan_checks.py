"""What a plan checks: inputs and settings of evaluations of a frozen backbone, the global batch."""

import re
from contextlib import nullcontext

import pytest

from pipeline.config import load_recipe, load_reproduction
from pipeline.identity import dump_settings
from pipeline.plan import build_plan
from pipeline.reading import validate_model
from pipeline.spec import ConfigError
from stages import STAGES
from stages.commands.preflight import check_image_counts
from stages.linear import LinearConfig, build_probe
from stages.shared.image_data import ConvertConfig
from stages.shared.imported_weights import ImportConfig
from stages.shared.labelled import check_labelled_part

YAML = """
name: frozen
runs:
  digits: {stage: convert, dataset: mine, num_classes: 10, train_dir: /t, val_dir: /v}
  pretrain: {stage: pretrain, needs: {data: digits}, epochs: 1, batch_size: 8}
  features: {stage: features, needs: {data: digits, weights: pretrain}, resize: 32, crop: 32}
  others: {stage: import, arch: vit_s16, epochs: 800, file: /x.pth}
  patches: {stage: import, method: mgc, arch: vit_s16_h8, epochs: 800, file: /x.pth}
  of_patches: {stage: features, needs: {data: digits, weights: patches}, resize: 32, crop: 32}
  test: EVALUATION
"""
KEEPS = "batch_size: 8, keep_every_epochs: 1}"


def plan(tmp_path, evaluation: str):
    path = tmp_path / "frozen.yaml"
    path.write_text(YAML.replace("EVALUATION", evaluation))
    return {run.name: run for run in build_plan(load_reproduction(str(path), STAGES))}


@pytest.mark.parametrize(
    "evaluation",
    [
        "{stage: knn, needs: {features: features}}",
        "{stage: knn, needs: {data: digits, weights: pretrain}, weights: initial, crop: 32}",
        "{stage: linear, needs: {features: features}, augmentation: none}",
        "{stage: linear, needs: {data: digits, weights: pretrain}}",
        "{stage: linear, needs: {data: digits, weights: others}}",
        "{stage: knn, needs: {data: digits, weights: patches}, feature: patch_mean}",
        "{stage: linear, needs: {data: digits, weights: patches}, feature: cls_patchmean}",
        "{stage: logistic, needs: {features: features}, "
        "labelled: {percent: 1, by: class_balanced}}",
    ],
)
def test_either_features_or_data_and_weights(tmp_path, evaluation: str) -> None:
    assert plan(tmp_path, evaluation)["test"].needs


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        (
            "{stage: knn, needs: {data: digits, weights: patches}, feature: cls}",
            "feature cls: the method does not train the class token; use patch_mean",
        ),
        (
            "{stage: linear, needs: {data: digits, weights: patches}, feature: last4_cls}",
            "feature last4_cls: the method does not train the class token",
        ),
        (
            "{stage: knn, needs: {features: of_patches}, feature: cls}",
            "feature cls: the method does not train the class token",
        ),
        (
            "{stage: logistic, needs: {features: of_patches}, feature: cls, "
            "labelled: {percent: 1, by: class_balanced}}",
            "feature cls: the method does not train the class token",
        ),
        ("{stage: knn, needs: {data: digits}}", "needs either features, or data and weights"),
        ("{stage: knn, needs: {data: digits, features: features}}", "features and data are given"),
        (
            "{stage: knn, needs: {features: features}, weights: initial}",
            "weights: belongs to the run that fills",
        ),
        (
            "{stage: knn, needs: {features: features}, resize: 32, crop: 32}",
            "resize, crop: belongs to the run",
        ),
        (
            "{stage: knn, needs: {data: digits, weights: others}, weights: initial}",
            "imported weights are a single network",
        ),
        (
            "{stage: features, needs: {data: digits, weights: others}, weights: student}",
            "weights student: imported weights are a single network, named teacher",
        ),
        (
            "{stage: import, source: timm, arch: vit_small_patch16_224, epochs: 1, "
            "file: /y.pth, network: student}",
            "network student: only released checkpoints (source mugs) hold two networks",
        ),
        (
            "{stage: logistic, needs: {features: features}, labelled: {percent: 1}, "
            "resources: {ranks_per_node: 2}}",
            "logistic regression runs on one rank, not 2",
        ),
        (
            "{stage: linear, needs: {features: features}}",
            "augmentation strong needs data and weights",
        ),
        (
            "{stage: linear, needs: {data: digits, weights: pretrain}, base_lr: 1, sweep: {}}",
            "give either base_lr or sweep, not both",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, evaluation: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"frozen\.yaml: runs\.test.*{re.escape(words)}"):
        plan(tmp_path, evaluation)


@pytest.mark.parametrize(
    ("evaluation", "feature"),
    [
        ("{stage: knn, needs: {data: digits, weights: pretrain}}", "cls"),
        ("{stage: knn, needs: {data: digits, weights: others}}", "cls"),
        ("{stage: knn, needs: {features: features}, feature: patch_mean}", "patch_mean"),
        ("{stage: linear, needs: {features: features}, augmentation: none}", "last4_cls"),
        ("{stage: knn, needs: {data: digits, weights: patches}}", "patch_mean"),
        ("{stage: knn, needs: {features: of_patches}}", "patch_mean"),
        ("{stage: linear, needs: {features: of_patches}, augmentation: none}", "patch_mean"),
        (
            "{stage: linear, needs: {features: of_patches}, augmentation: none, "
            "feature: cls_patchmean}",
            "cls_patchmean",
        ),
        (
            "{stage: logistic, needs: {features: of_patches}, "
            "labelled: {percent: 1, by: class_balanced}}",
            "patch_mean",
        ),
    ],
)
def test_the_default_feature_is_one_that_the_method_trains(
    tmp_path, evaluation: str, feature: str
) -> None:
    assert plan(tmp_path, evaluation)["test"].config.feature == feature


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("num_classes: 10", "has no labels, which it needs"),
        ("num_val_images: 0", "has no validation images, which it needs"),
    ],
)
@pytest.mark.parametrize(
    "evaluation",
    [
        "{stage: knn, needs: {data: digits, weights: pretrain}}",
        "{stage: knn_curve, needs: {data: digits, weights: pretrain}, every_epochs: 1}",
        "{stage: features, needs: {data: digits, weights: pretrain}}",
        "{stage: finetune, needs: {data: digits, weights: pretrain}, epochs: 1, batch_size: 8, "
        "rate: {base_lr: 1}}",
    ],
)
def test_evaluations_need_labels_and_validation_images(
    tmp_path, evaluation: str, missing: str, words: str
) -> None:
    path = tmp_path / "frozen.yaml"
    data = "num_classes: 0" if "classes" in missing else f"num_classes: 10, {missing}"
    text = YAML.replace("num_classes: 10", data).replace("batch_size: 8}", KEEPS, 1)
    # The features of the file itself would be refused first.
    lines = [line for line in text.splitlines() if "{stage: features" not in line]
    path.write_text("\n".join(lines).replace("EVALUATION", evaluation))
    with pytest.raises(ConfigError, match=rf"runs\.test\.needs: data: data set 'mine' {words}"):
        build_plan(load_reproduction(str(path), STAGES))


@pytest.fixture
def six_images(tmp_path) -> ConvertConfig:
    """Three training and three validation images of each of two classes."""
    for name in (f"{label}/{i}.jpg" for label in ("cat", "dog") for i in range(3)):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    folder = str(tmp_path / "images")
    return ConvertConfig(dataset="mine", train_dir=folder, val_dir=folder)


TRAIN = {"epochs": 1, "rate": {"base_lr": 1}}
LABELLED = {"percent": 40, "by": "class_balanced"}


@pytest.mark.parametrize(
    ("stage", "settings", "words"),
    [
        ("knn", {"ks": [6]}, None),
        ("knn", {"ks": [2, 7]}, "ks [2, 7]: the data set has 6 training images"),
        ("knn_curve", {"ks": [7], "every_epochs": 1}, "ks [7]: the data set has 6"),
        ("attention", {"num_images": 6}, None),
        ("attention", {"num_images": 7}, "num_images 7: the data set has 6 validation images"),
        ("attention", {"images": [6]}, "images 6: the data set has validation images 0 to 5"),
        ("pretrain", {"epochs": 1, "batch_size": 6}, None),
        ("pretrain", {"epochs": 1, "batch_size": 7}, "batch_size 7 is more than all 6"),
        ("finetune", {**TRAIN, "batch_size": 6}, None),
        ("finetune", {**TRAIN, "batch_size": 7}, "batch_size 7 is more than all 6"),
    ],
)
def test_data_sets_have_the_images_that_a_run_needs(
    six_images: ConvertConfig, stage: str, settings: dict[str, object], words: str | None
) -> None:
    """As listed; without a look at the files, as declared."""
    config = validate_model(STAGES[stage].config, settings, "x.yaml")
    found = {"data": six_images}
    declared = {"data": ConvertConfig(dataset="mine", num_train_images=6, num_val_images=6)}
    expected = nullcontext() if words is None else pytest.raises(ValueError, match=re.escape(words))
    with expected:
        check_image_counts(config, found, skip_data_checks=False)
    with expected:
        check_image_counts(config, declared, skip_data_checks=True)
    check_image_counts(config, found, skip_data_checks=True)


@pytest.mark.parametrize("batch_size", [2, 4])
def test_a_labelled_part_fills_a_batch(six_images: ConvertConfig, batch_size: int) -> None:
    """Of 3 images in each of 2 classes, 40% are 1 each."""
    settings = {**TRAIN, "batch_size": batch_size, "labelled": LABELLED}
    config = validate_model(STAGES["finetune"].config, settings, "x.yaml")
    if batch_size == 2:
        check_labelled_part(config, {"data": six_images})
        return
    with pytest.raises(ValueError, match="batch_size 4 is more than all 2 training images"):
        check_labelled_part(config, {"data": six_images})


@pytest.mark.parametrize("ks", [[], [0], [5, -1]])
def test_numbers_of_neighbors_are_positive(ks: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"x\.yaml\.ks"):
        validate_model(STAGES["knn"].config, {"ks": ks}, "x.yaml")


@pytest.mark.parametrize(
    "stage", ["coco_detection", "ade20k_segmentation", "davis_segmentation", "finetune"]
)
def test_imported_weights_have_no_student(stage: str) -> None:
    inputs = {"weights": ImportConfig(arch="vit_s16", epochs=800)}
    options = {"epochs": 1, "batch_size": 8, "rate": {"base_lr": 1}} if stage == "finetune" else {}
    cls = STAGES[stage].config
    validate_model(cls, options, "x.yaml").check_inputs(inputs)
    student = validate_model(cls, {**options, "weights": "student"}, "x.yaml")
    with pytest.raises(ValueError, match="weights student: imported weights are a single"):
        student.check_inputs(inputs)


def linear(**values: object) -> LinearConfig:
    return validate_model(LinearConfig, values, "x.yaml")


def from_recipe(name: str, **changes: object) -> LinearConfig:
    settings = load_recipe(f"linear/{name}")
    assert settings.pop("stage") == "linear"
    return linear(**settings | changes)


def test_the_released_sweep_has_360_classifiers() -> None:
    settings = build_probe(from_recipe("l250")).settings
    assert len(settings) == len(set(settings)) == 360
    rates = sorted({s.base_lr for s in settings})
    assert rates == pytest.approx(
        [n * 10**e for e in (-4, -3, -2, -1) for n in range(1, 10)], rel=1e-12
    )
    assert {s.weight_decay for s in settings} == {0, 1e-6, 1e-5, 1e-4, 1e-3}
    assert {s.optimizer for s in settings} == {"sgd", "lars"}


def test_recipes_of_the_released_probes() -> None:
    expected = {"s100": 0.015, "s300": 0.02, "s800": 0.01, "b400": 0.002}
    assert {name: from_recipe(name).base_lr for name in expected} == expected
    assert from_recipe("b400").batch_size == 512 and from_recipe("b400").feature == "cls_patchmean"
    assert from_recipe("s300").final_lr == 0 and linear().base_lr == 0.015
    given = from_recipe("l250", base_lr=0.3, sweep=None, batch_size=256)
    assert (given.base_lr, given.sweep, given.batch_size) == (0.3, None, 256)
    for name in (*expected, "l250"):
        cfg = from_recipe(name)
        assert validate_model(LinearConfig, dump_settings(cfg), "x.yaml") == cfg


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["pretrain.resources.nodes=3"],
            "runs.pretrain: batch_size 512 over 3 x 8 = 24 ranks leaves 21.33 images each; "
            "expected a multiple of 24 (nearest: 504 or 528)",
        ),
        (
            ["pretrain.batch_size=7"],
            "batch_size 7 over 8 ranks leaves 0.88 images each; "
            "expected a multiple of 8 (nearest: 8)",
        ),
        (
            ["pretrain.micro_batch_size=48"],
            "batch_size 512 over 8 ranks leaves 64 images each, which micro_batch_size 48 cuts "
            "into 1.33 passes; expected a divisor of 64 (nearest below: 32)",
        ),
        (
            ["pretrain.micro_batch_size=32", "pretrain.mugs.head_norm=batch"],
            "leaves 64 images each, more than micro_batch_size 32, "
            "and batch normalization needs them in one pass",
        ),
        (
            ["linear.resources.ranks_per_node=3"],
            "runs.linear: batch_size 1024 over 3 ranks leaves 341.33 images each",
        ),
        (["pretrain.micro_batch_size=0"], "greater than 0"),
    ],
)
def test_a_global_batch_that_does_not_work_out_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_plan(load_reproduction("mugs_vit_s16_ep100", STAGES, overrides))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["pretrain.resources.nodes=2"],
        ["pretrain.micro_batch_size=32"],
        ["pretrain.micro_batch_size=100"],
        ["pretrain.micro_batch_size=64", "pretrain.mugs.head_norm=batch"],
    ],
)
def test_a_global_batch_that_works_out(overrides: list[str]) -> None:
    build_plan(load_reproduction("mugs_vit_s16_ep100", STAGES, overrides))
