"""What the evaluations of a frozen backbone share: its features, and the columns of their result rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from pipeline.manifest import check_intact
from pipeline.spec import StageConfig
from pipeline.stage import StageContext
from results.schema import ResultRow
from stages.shared.imported_weights import ImportConfig

if TYPE_CHECKING:
    import torch

    from mugs.evaluation.config import Feature
    from mugs.models.vit import ViT

    Features = dict[str, tuple[torch.Tensor, torch.Tensor]]

WEIGHTS = "pretrain|import"
"""Stages whose runs may fill the role weights."""
FROZEN = {"data": "convert?", "weights": f"{WEIGHTS}?", "features": "features?"}
"""Roles of an evaluation of a frozen backbone: either features, or the other two."""
Weights = Literal["teacher", "student", "initial"]


@dataclass(frozen=True, kw_only=True)
class Crop(StageConfig):
    """What a frozen backbone sees of an image: shorter side to `resize`, centre crop of `crop` pixels."""

    resize: PositiveInt = 256
    crop: PositiveInt = 224


@dataclass(frozen=True, kw_only=True)
class Pretrained(StageConfig):
    """Which network of the run that fills the role weights is used."""

    weights: Weights = "teacher"

    def wrong_inputs(self, inputs: Mapping[str, StageConfig]) -> str | None:
        """Weights that were imported are a single network: they have no student and no start."""
        if self.weights == "teacher" or not isinstance(inputs["weights"], ImportConfig):
            return None
        return f"weights {self.weights}: imported weights are a single network, named teacher"


@dataclass(frozen=True, kw_only=True)
class Backbone(Pretrained, Crop):
    """Which backbone sees the images, and how."""


@dataclass(frozen=True, kw_only=True)
class FrozenEvaluation(Backbone):
    """An evaluation that takes stored features, or computes its own: then `data` and `weights` are what it needs."""

    def wrong_inputs(self, inputs: Mapping[str, StageConfig]) -> str | None:
        """Roles that are missing or too many, and settings that belong to the stored features."""
        others = [role for role in ("data", "weights") if role in inputs]
        if "features" not in inputs:
            return (
                super().wrong_inputs(inputs)
                if len(others) == 2
                else "needs either features, or data and weights"
            )
        if others:
            return f"needs either features, or data and weights; features and {' and '.join(others)} are given"
        defaults = {field.name: field.default for field in fields(Backbone)}
        given = [name for name, default in defaults.items() if getattr(self, name) != default]
        return (
            f"{', '.join(given)}: belongs to the run that fills the role features; set it there"
            if given
            else None
        )


def load_vit(ctx: StageContext, weights: Weights, *, drop_path: float = 0.0) -> "ViT":
    """The pretrained backbone, frozen and in eval mode. Raises WeightsError and DamagedError naming the file."""
    from mugs.weights.backbone_file import load_backbone

    vit = load_backbone(ctx.inputs["weights"].output(weights), drop_path=drop_path)
    check_intact(ctx.inputs["weights"], weights)
    return vit.eval().requires_grad_(False)


def frozen_features(
    ctx: StageContext,
    cfg: Backbone,
    name: "Feature",
    splits: Sequence[str] = ("train", "val"),
    *,
    eval_batch_size: int = 256,
    threads: int = 2,
) -> "Features":
    """Features (N, D) and labels (N,) by split, whole on every rank's device: stored, or computed by all ranks."""
    from mugs import distributed
    from mugs.evaluation.feature_store import FeatureStore

    device = distributed.init_process_group()
    if "features" in ctx.inputs:
        store = FeatureStore(ctx.inputs["features"].output("features"))
        stored = {split: store.load(split, name) for split in splits}
        return {
            split: (values.to(device), labels.to(device))
            for split, (values, labels) in stored.items()
        }
    vit = load_vit(ctx, cfg.weights)
    return computed_features(
        ctx, vit, cfg, name, splits, eval_batch_size=eval_batch_size, threads=threads
    )


def computed_features(
    ctx: StageContext,
    vit: "ViT",
    size: Crop,
    name: "Feature",
    splits: Sequence[str] = ("train", "val"),
    *,
    eval_batch_size: int,
    threads: int,
) -> "Features":
    """The same of a frozen network, computed by all ranks. Raises ValueError where there is no image for each."""
    from mugs import distributed
    from mugs.data.loading.evaluation import iter_eval_batches
    from mugs.data.sources.open import open_source
    from mugs.evaluation.features import build_feature_function, extract_features

    device = distributed.init_process_group()
    model = build_feature_function(vit.to(device), name)
    sources = {split: open_source(ctx.inputs["data"].output(split)) for split in splits}
    ranks = distributed.world_size()
    for split, source in sources.items():
        if len(source) < ranks:
            raise ValueError(
                f"{split}: {len(source)} images for {ranks} ranks, at least one each; use fewer ranks"
            )
    found = {}
    for split, source in sources.items():
        batches = iter_eval_batches(
            source,
            resize=size.resize,
            crop=size.crop,
            batch_size=eval_batch_size,
            indices=range(distributed.rank(), len(source), ranks),
            threads=threads,
        )
        found[split] = extract_features(model, batches, device=device)[:2]
    return found


def num_classes(ctx: StageContext) -> int:
    """Classes of the data set. Raises ValueError where it has no labels or no validation images."""
    if "features" in ctx.inputs:
        return int(ctx.inputs["features"].info["num_classes"])
    data = ctx.inputs["data"]
    count: int = data.info["num_classes"]
    missing = "labels" if count == 0 else "validation images" if "val" not in data.outputs else None
    if missing:
        raise ValueError(
            f"data set {data.info['dataset']!r} has no {missing}, which stage {ctx.stage!r} needs"
        )
    return count


def backbone_info(ctx: StageContext, weights: Weights) -> dict[str, Any]:
    """What result rows say of the backbone and the data set: of the stored features, or of the inputs."""
    if "features" in ctx.inputs:
        return dict(ctx.inputs["features"].info)
    source = ctx.inputs["weights"].info
    facts = {name: source[name] for name in ("method", "arch", "epochs", "seed")}
    return {**facts, "weights": weights, "dataset": ctx.inputs["data"].info["dataset"]}


def result_row(
    ctx: StageContext,
    weights: Weights,
    *,
    setting: str,
    value: float,
    metric: str = "top1",
) -> ResultRow:
    """One number of this run, on the data set that fills the role `data`, or that of the stored features."""
    info = backbone_info(ctx, weights)
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
