"""What evaluations of a pretrained backbone share: its features, and their result rows."""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import PositiveInt

from mugs.evaluation.config import Feature
from mugs.methods.config import METHODS, MethodChoice
from pipeline.manifest import check_intact
from pipeline.settings import Internal
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
FACTS = ("method", "arch", "epochs", "seed")
"""What a run of `WEIGHTS` records for result rows."""


@dataclass(frozen=True, kw_only=True)
class Crop(StageConfig):
    """What a frozen backbone sees: the image with its shorter side at `resize`, center-cropped."""

    resize: PositiveInt = 256
    crop: PositiveInt = 224

    def __post_init__(self) -> None:
        """Refuse images that do not fill their crop."""
        if self.crop > self.resize:
            raise ValueError(
                f"images with a shorter side of {self.resize} pixels (resize) do not fill a crop "
                f"of {self.crop}: the border would be black; set resize too"
            )


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
class StoredFeatures(Backbone):
    """What an evaluation has to know of the features that it takes."""

    # Whether the method behind the weights trains the class token.
    class_token_trained: Internal[bool] = True

    def complete_from(self, inputs: Mapping[str, StageConfig]) -> Self:
        """Note what the method trains, for the evaluations of these features."""
        return replace(self, class_token_trained=is_class_token_trained(inputs["weights"]))


@dataclass(frozen=True, kw_only=True)
class FeatureEvaluation(StageConfig):
    """An evaluation of one feature, which is a trained output of the method unless it is set."""

    usual_feature: ClassVar[Feature] = "cls"
    """The feature of methods that train the class token."""

    # Which tokens of the backbone make up the feature of an image; null for the usual one, which is
    # `patch_mean` if the method does not train the class token (MGC).
    feature: Feature | None = None

    def complete_from(self, inputs: Mapping[str, StageConfig]) -> Self:
        """Fill in `feature`, or refuse one that the method does not train.

        Raises:
            ValueError: the feature is made of class tokens, which the method does not train.
        """
        # Either is there; `features` stand for the weights that they were computed from.
        trained = is_class_token_trained(inputs.get("features") or inputs["weights"])
        if not trained and self.feature in CLASS_FEATURES:
            raise ValueError(
                f"feature {self.feature}: the method does not train the class token; use "
                "patch_mean, the default, or cls_patchmean where a stage has it"
            )
        usual = self.usual_feature if trained else "patch_mean"
        return replace(self, feature=self.feature or usual)

    @property
    def chosen_feature(self) -> Feature:
        """Return the feature; of a run that is in no plan, the usual one."""
        return self.feature or self.usual_feature


def is_class_token_trained(source: StageConfig) -> bool:
    """Return whether the method behind a pretraining, import or stored features trains it."""
    if isinstance(source, StoredFeatures):
        return source.class_token_trained
    return not isinstance(source, ImportConfig | MethodChoice) or trains_class_token(source.method)


def trains_class_token(method: str) -> bool:
    """Return whether a method trains the class token; one that we do not have is taken to."""
    entry = METHODS.get(method)
    return entry is None or entry.options.trains_class_token


@dataclass(frozen=True, kw_only=True)
class FrozenEvaluation(Backbone, FeatureEvaluation):
    """An evaluation that takes stored features, or computes them from `data` and `weights`."""

    def check_inputs(self, inputs: Mapping[str, StageConfig]) -> None:
        """Refuse missing and surplus roles, and settings that belong to the stored features."""
        others = [role for role in ("data", "weights") if role in inputs]
        if "features" not in inputs:
            if len(others) < 2:
                raise ValueError("needs either features, or data and weights")
            super().check_inputs(inputs)
            check_labeled(inputs)
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


def list_settings_of_features(config: type[StageConfig], roles: Container[str]) -> frozenset[str]:
    """Return the settings of an evaluation that count in its features run, and not in itself."""
    if "features" not in roles or not issubclass(config, FrozenEvaluation):
        return frozenset()
    return frozenset(field.name for field in fields(Backbone))


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
            device=device,
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
    facts = {name: ctx.inputs["weights"].info[name] for name in FACTS}
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


def describe_standard_errors(errors: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return the sampling errors of result rows, by setting and metric, as verdicts look for them.

    Only for metrics that are no share of images: the error of those follows from their number.
    """
    return {
        "standard_errors": {
            setting: {metric: error for metric, error in found.items() if math.isfinite(error)}
            for setting, found in errors.items()
        }
    }


def build_result_rows(
    ctx: StageContext, weights: Weights, setting: str, values: Iterable[tuple[str, float]]
) -> list[ResultRow]:
    """Return a row for each pair of metric and value."""
    return [
        build_result_row(ctx, weights, setting=setting, metric=metric, value=value)
        for metric, value in values
    ]
