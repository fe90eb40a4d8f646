"""Semi-supervised logistic regression: the labelled part's frozen features, and a path of L2 penalties."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline.manifest import ManifestEntry, find_done
from pipeline.spec import Resources, Runtime, StageConfig, StageContext, StageOutput
from stages.convert import ConvertConfig
from stages.evaluate import result_row
from stages.labelled import LabelledPart

if TYPE_CHECKING:
    from torch import Tensor

    from mugs.data.subset import Subset


class LogisticConfig(StageConfig):
    """Penalties of the released sweep; the objective ends within `tolerance` of its minimum, relatively.

    The release uses cyanure, which has no wheels beyond Linux on x86-64; L-BFGS reaches the same minimum. Its text
    calls this AdamW, which is not what made the printed numbers (row E14).
    """

    labelled: LabelledPart
    feature: Literal["cls", "patch_mean"] = "cls"
    penalties: tuple[float, ...] = (0.01, 0.03, 0.06, 0.10, 0.15, 0.20, 0.30)
    tolerance: float = Field(1e-4, gt=0)
    max_iterations: int = Runtime(5000, ge=1)

    def misfit(self, resources: Resources) -> str | None:
        """More than one process."""
        return f"logistic regression runs on one rank, not {resources.ranks}" if resources.ranks > 1 else None


def preflight(cfg: LogisticConfig, inputs: Mapping[str, StageConfig]) -> tuple[str, float]:
    """What the list of labelled images names. Raises SourceError."""
    data = inputs["data"]
    assert isinstance(data, ConvertConfig)
    return cfg.labelled.look(data), 0.0


def run(ctx: StageContext, cfg: LogisticConfig) -> StageOutput:
    """One row per penalty; tables take the best on the validation images, as released."""
    import torch.nn.functional as F

    from mugs.engine import distributed
    from mugs.evaluation.feature_store import FeatureStore
    from mugs.evaluation.logistic import fit, top1

    device = distributed.init()
    store = FeatureStore(ctx.inputs["features"].output("features"))
    train, val = (store.load(split, cfg.feature) for split in ("train", "val"))
    part = labelled_part(ctx, cfg)
    x, y = (t[part.indices].to(device) for t in train)
    x, queries, targets = F.normalize(x, dim=1), F.normalize(val[0].to(device), dim=1), val[1].to(device)
    rows, facts = [], []
    weight: Tensor | None = None
    for penalty in sorted(cfg.penalties, reverse=True):
        found = fit(
            x,
            y,
            num_classes=len(part.classes),
            penalty=penalty,
            start=weight,
            tolerance=cfg.tolerance,
            max_iterations=cfg.max_iterations,
        )
        weight, value = found.weight, top1(found.weight, queries, targets)
        setting = f"{cfg.labelled.words()}, {cfg.feature}, lambda={penalty:g}"
        rows.append(result_row(ctx, "teacher", setting=setting, value=value))
        facts.append({"penalty": penalty, "objective": found.objective, "gap": found.gap, "top1": value})
    return StageOutput(rows=rows, info={"labelled_images": len(part), "path": facts})


def labelled_part(ctx: StageContext, cfg: LogisticConfig) -> "Subset":
    """The labelled images of the data set the features were taken from."""
    from mugs.data.source import open_source

    features = ctx.inputs["features"]
    data: ManifestEntry | None = find_done(features.run_root, features.upstream["data"])
    if data is None:
        raise ValueError(f"run {features.upstream['data']}, the data set of the stored features, is not done any more")
    return cfg.labelled.choose(open_source(data.output("train")), data.info["dataset"])
