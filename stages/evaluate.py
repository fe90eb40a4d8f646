"""What the evaluations of a frozen backbone share: the backbone itself and the columns of its result rows."""

from typing import TYPE_CHECKING, Literal

from pipeline.spec import StageContext
from results.schema import ResultRow

if TYPE_CHECKING:
    from mugs.backbones.vit import ViT

Weights = Literal["teacher", "student", "initial"]


def load_vit(ctx: StageContext, weights: Weights) -> "ViT":
    """The pretrained backbone, frozen and in eval mode."""
    from mugs.backbones.vit import ViTConfig, build_vit
    from mugs.weights import load_backbone

    state, meta = load_backbone(ctx.inputs["weights"].output(weights))
    vit = build_vit(ViTConfig(**meta["arch"]))
    vit.load_state_dict(state)
    return vit.eval().requires_grad_(False)


def num_classes(ctx: StageContext) -> int:
    """Classes of the data set. Raises ValueError where it has no labels or no validation images."""
    data = ctx.inputs["data"]
    count: int = data.info["num_classes"]
    missing = "labels" if count == 0 else "validation images" if "val" not in data.outputs else None
    if missing:
        raise ValueError(f"data set {data.info['dataset']!r} has no {missing}, which stage {ctx.stage!r} needs")
    return count


def result_row(ctx: StageContext, weights: Weights, *, setting: str, value: float, metric: str = "top1") -> ResultRow:
    """One number of this run."""
    info = ctx.inputs["weights"].info
    method = info["method"] + (" (initialisation)" if weights == "initial" else "")
    return ResultRow(
        run_id=ctx.run_id,
        method=method,
        arch=info["arch"],
        epochs=info["epochs"],
        stage=ctx.stage,
        dataset=ctx.inputs["data"].info["dataset"],
        setting=setting,
        metric=metric,
        value=value,
        unit="%",
        seed=info["seed"],
    )
