"""What evaluations of a pretrained backbone share: its features, and their result rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from mugs.evaluation.config import Feature
from mugs.methods.config import METHODS, MethodChoice
from pipeline.manifest import check_intact
from pipeline.spec import StageConfig
from pipeline.stage import StageContext
from results.schema import ResultRow
from stages.shared.image_data import check_labeled
from stages.shared.imported_weights import ImportConfig

if TYPE_CHECKING:
    import torch

    from mugs.models.vit import ViT

    Features = dict[str, tuple[torch.Tensor, torch.Tensor]]

WEIGHTS = "pretrain|import"
"""Stages whose runs may fill the role `weights`."""
FROZEN = {"data": "convert?", "weights": f"{WEIGHTS}?", "features": "features?"}
"""Roles of an evaluation of a frozen backbone: either features, or the other two."""
CLASS_FEATURES: tuple[Feature, ...] = ("cls", "last4_cls")
"""Features of class tokens alone."""
Weights = Literal["teacher", "student", "initial"]


@dataclass(frozen=True, kw_only=True)
class Crop(StageConfig):
    """What a frozen backbone sees: the image with its shorter side at `resize`, center-cropped."""

    resize: PositiveInt = 256
    crop: PositiveInt = 224


@dataclass(frozen=True, kw_only=True)
class Pretrained(StageConfig):
    """Which network of the run that fills the role `weights` is used."""

    weights: Weights = "teacher"

    def check_inputs(self, inputs: Mapping[str, StageConfig]) -> None:
        """Refuse a student or an initial network of imported weights, which have neither."""
        if self.weights != "teacher" and isinstance(inputs["weights"], ImportConfig):
            raise ValueError(
                f"weights {self.weights}: imported weights are a single network, named teacher"
            )


@dataclass(frozen=True, kw_only=True)
class Backbone(Pretrained, Crop):
    """Which backbone sees the images, and how."""


@dataclass(frozen=True, kw_only=True)
class FrozenEvaluation(Backbone):
    """An evaluation that takes stored features, or computes them from `data` and `weights`."""

    feature: Feature = "cls"

    def check_inputs(self, inputs: Mapping[str, StageConfig]) -> None:
        """Refuse missing and surplus roles, and settings that belong to the stored features."""
        others = [role for role in ("data", "weights") if role in inputs]
        if "features" not in inputs:
            if len(others) < 2:
                raise ValueError("needs either features, or data and weights")
            super().check_inputs(inputs)
            check_labeled(inputs)
            check_trained_feature(self.feature, inputs["weights"])
            return
        if others:
            raise ValueError(
                "needs either features, or data and weights; "
                f"features and {' and '.join(others)} are given"
            )
        # Stored features were computed with the crop and weights of their own run. A different
        # value here would change the run id, but no number.
        given = [f.name for f in fields(Backbone) if getattr(self, f.name) != f.default]
        if given:
            raise ValueError(
                f"{', '.join(given)}: belongs to the run that fills the role features; set it there"
            )


def check_trained_feature(feature: Feature, weights: StageConfig) -> None:
    """Raise ValueError if the method behind a pretraining or import does not train the feature."""
    if isinstance(weights, ImportConfig | MethodChoice):
        check_feature_of_method(feature, weights.method)


def check_feature_of_method(feature: Feature, method: str) -> None:
    """Raise ValueError if a feature is made of class tokens and the method does not train them."""
    entry = METHODS.get(method)
    if entry is not None and not entry.options.trains_class_token and feature in CLASS_FEATURES:
        raise ValueError(
            f"feature {feature}: {method} does not train the class token; "
            "use a feature with the mean patch token (patch_mean or cls_patchmean)"
        )


def check_neighbors(ks: Sequence[int], counts: Mapping[str, int]) -> None:
    """Raise ValueError if there are fewer training images than neighbors are asked for."""
    images = counts.get("train")
    if images is not None and max(ks) > images:
        raise ValueError(
            f"ks {list(ks)}: the data set has {images:,} training images; set ks to at most that"
        )


def load_vit(ctx: StageContext, weights: Weights, *, drop_path: float = 0.0) -> "ViT":
    """Return the pretrained backbone, frozen and in eval mode.

    Raises:
        WeightsError, DamagedError: names the file.
    """
    from mugs.weights.backbone_file import load_backbone

    vit = load_backbone(ctx.inputs["weights"].output(weights), drop_path=drop_path)
    check_intact(ctx.inputs["weights"], weights)
    return vit.eval().requires_grad_(False)


def load_features(
    ctx: StageContext,
    cfg: Backbone,
    name: Feature,
    splits: Sequence[str] = ("train", "val"),
    *,
    eval_batch_size: int = 256,
    threads: int = 2,
) -> "Features":
    """Return features (N, D) and labels (N,) by split, whole on every rank's device.

    They are read from the run that fills the role `features`, or else computed by all ranks.
    """
    from mugs import distributed
    from mugs.evaluation.feature_store import FeatureStore

    check_feature_of_method(name, describe_backbone(ctx, cfg.weights)["method"])
    if "features" not in ctx.inputs:
        vit = load_vit(ctx, cfg.weights)
        return compute_features(
            ctx, vit, cfg, name, splits, eval_batch_size=eval_batch_size, threads=threads
        )
    device = distributed.init_process_group()
    store = FeatureStore(ctx.inputs["features"].output("features"))
    found = {}
    for split in splits:
        values, labels = store.load(split, name)
        found[split] = (values.to(device), labels.to(device))
    return found


def compute_features(
    ctx: StageContext,
    vit: "ViT",
    size: Crop,
    name: Feature,
    splits: Sequence[str] = ("train", "val"),
    *,
    eval_batch_size: int,
    threads: int,
) -> "Features":
    """Return features (N, D) and labels (N,) by split, computed by all ranks together.

    Raises:
        ValueError: a split has fewer images than there are ranks.
    """
    from mugs import distributed
    from mugs.data.loading.evaluation import iter_eval_batches
    from mugs.data.sources.open import open_source
    from mugs.evaluation.features import build_feature_function, extract_features

    device = distributed.init_process_group()
    model = build_feature_function(vit.to(device), name)
    sources = {split: open_source(ctx.inputs["data"].output(split)) for split in splits}
    ranks = distributed.world_size()
    # All splits are checked before the first is computed, which takes long.
    for split, source in sources.items():
        if len(source) < ranks:
            raise ValueError(
                f"{split}: {len(source)} images for {ranks} ranks, at least one each; "
                "use fewer ranks"
            )
    found = {}
    for split, source in sources.items():
        batches = iter_eval_batches(
            source,
            resize=size.resize,
            crop=size.crop,
            batch_size=eval_batch_size,
            # Rank r takes images r, r + ranks, ...: every image exactly once, without padding.
            indices=range(distributed.rank(), len(source), ranks),
            threads=threads,
        )
        found[split] = extract_features(model, batches, device=device)[:2]
    return found


def read_num_classes(ctx: StageContext) -> int:
    """Return the number of classes of the data set.

    Raises:
        ValueError: the data set has no labels or no validation images.
    """
    if "features" in ctx.inputs:
        return int(ctx.inputs["features"].info["num_classes"])
    data = ctx.inputs["data"]
    count: int = data.info["num_classes"]
    if count and "val" in data.outputs:
        return count
    missing = "validation images" if count else "labels"
    raise ValueError(
        f"data set {data.info['dataset']!r} has no {missing}, which stage {ctx.stage!r} needs"
    )


def describe_backbone(ctx: StageContext, weights: Weights) -> dict[str, Any]:
    """Return what result rows say of the backbone and the data set."""
    # Stored features carry these facts of the data and the weights they were computed from.
    if "features" in ctx.inputs:
        return dict(ctx.inputs["features"].info)
    source = ctx.inputs["weights"].info
    facts = {name: source[name] for name in ("method", "arch", "epochs", "seed")}
    return {**facts, "weights": weights, "dataset": ctx.inputs["data"].info["dataset"]}


def build_result_row(
    ctx: StageContext,
    weights: Weights,
    *,
    setting: str,
    value: float,
    metric: str = "top1",
) -> ResultRow:
    """Return one number of this run as a row; the data set is that of `data` or of the features."""
    info = describe_backbone(ctx, weights)
    return ResultRow(
        run_id=ctx.run_id,
        method=info["method"] + (" (initialisation)" if info["weights"] == "initial" else ""),
        arch=info["arch"],
        epochs=info["epochs"],
        stage=ctx.stage,
        dataset=info["dataset"],
        setting=setting,
        metric=metric,
        value=value,
        unit="%",
        seed=info["seed"],
    )


def build_result_rows(
    ctx: StageContext, weights: Weights, setting: str, values: Iterable[tuple[str, float]]
) -> list[ResultRow]:
    """Return a row for each pair of metric and value."""
    return [
        build_result_row(ctx, weights, setting=setting, metric=metric, value=value)
        for metric, value in values
    ]
