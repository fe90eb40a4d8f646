"""Semi-supervised logistic regression: the labelled part's frozen features, and a path of L2 penalties."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat, PositiveInt

from pipeline.manifest import ManifestEntry, find_done
from pipeline.settings import Runtime
from pipeline.spec import Resources, StageConfig, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.frozen import result_row
from stages.shared.image_data import ConvertConfig
from stages.shared.labelled import LabelledPart

if TYPE_CHECKING:
    from torch import Tensor

    from mugs.data.sources.subset import Subset
    from mugs.evaluation.logistic import LogisticFit

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LogisticConfig(StageConfig):
    """Penalties of the released sweep; the objective ends within `tolerance` of its minimum, relatively.

    The release uses cyanure, which has no wheels beyond Linux on x86-64; L-BFGS reaches the same minimum. Its text
    calls this AdamW, which is not what made the printed numbers (row E14).

    One process does it, on its GPU or all its cores: each step of L-BFGS follows from the one before, and all labelled
    features fit one device. Ranks beyond the first end at once. Every penalty that is finished is kept in the run's
    folder and not computed again.
    """

    # The images that keep their labels.
    labelled: LabelledPart
    feature: Literal["cls", "patch_mean"] = "cls"
    # Weights of the L2 penalty, as lambda / images; each gives a row (E14).
    penalties: tuple[float, ...] = (0.01, 0.03, 0.06, 0.10, 0.15, 0.20, 0.30)
    # The objective ends within this of its minimum, relatively.
    tolerance: PositiveFloat = 1e-4
    # Steps after which a penalty that has not converged is an error.
    max_iterations: Runtime[PositiveInt] = 5000

    def misfit(self, resources: Resources) -> str | None:
        """More than one process."""
        return (
            f"logistic regression runs on one rank, not {resources.ranks}"
            if resources.ranks > 1
            else None
        )

    def kept(self, run_dir: Path, penalty: float) -> Path:
        """Where the result of a penalty is kept."""
        return run_dir / "penalties" / f"lambda_{penalty!r}.safetensors"


def preflight(cfg: LogisticConfig, inputs: Mapping[str, StageConfig]) -> tuple[str, float]:
    """What the list of labelled images names. Raises SourceError."""
    data = inputs["data"]
    assert isinstance(data, ConvertConfig)
    return cfg.labelled.look(data), 0.0


def run(ctx: StageContext, cfg: LogisticConfig) -> StageOutput:
    """One row per penalty; tables take the best on the validation images, as released."""
    import torch.nn.functional as F

    from mugs import distributed
    from mugs.engine.progress import Progress
    from mugs.evaluation.feature_store import FeatureStore
    from mugs.evaluation.logistic import fit_logistic_regression, top1_accuracy

    device, world = distributed.init_process_group(), distributed.world_size()
    if not distributed.is_main():
        logger.info(
            "nothing to do on rank %d: logistic regression runs on rank 0 of %d",
            distributed.rank(),
            world,
        )
        return StageOutput()
    store = FeatureStore(ctx.inputs["features"].output("features"))
    train, val = (store.load(split, cfg.feature) for split in ("train", "val"))
    part = labelled_part(ctx, cfg)
    x, y = (t[part.indices].to(device) for t in train)
    x, queries, targets = (
        F.normalize(x, dim=1),
        F.normalize(val[0].to(device), dim=1),
        val[1].to(device),
    )
    penalties, shape = sorted(cfg.penalties, reverse=True), (len(part.classes), x.shape[1])
    logger.info(
        "rank 0 of %d on %s: %d labelled images, %d penalties",
        world,
        device,
        len(part),
        len(penalties),
    )
    progress = Progress(
        "logistic", len(penalties), unit="penalties", path=ctx.run_dir / "progress.json"
    )
    rows, facts = [], []
    weight: Tensor | None = None
    for number, penalty in enumerate(penalties, 1):
        found = read_fit(ctx, cfg, penalty, shape)
        if found is None:
            found = fit_logistic_regression(
                x,
                y,
                num_classes=len(part.classes),
                penalty=penalty,
                start=weight,
                tolerance=cfg.tolerance,
                max_iterations=cfg.max_iterations,
            )
            keep_fit(ctx, cfg, penalty, found)
        else:
            logger.info("lambda %g: done before, not computed again", penalty)
        weight, value = found.weight, top1_accuracy(found.weight, queries, targets)
        setting = f"{cfg.labelled.words()}, {cfg.feature}, lambda={penalty:g}"
        rows.append(result_row(ctx, "teacher", setting=setting, value=value))
        facts.append(
            {"penalty": penalty, "objective": found.objective, "gap": found.gap, "top1": value}
        )
        progress.update(number)
    progress.close()
    return StageOutput(rows=rows, info={"labelled_images": len(part), "path": facts})


def keep_fit(ctx: StageContext, cfg: LogisticConfig, penalty: float, found: "LogisticFit") -> None:
    """Write the result of a penalty, and of which features it is."""
    from mugs.weights.backbone_file import write_backbone_file

    facts = {"objective": found.objective, "gap": found.gap, "iterations": found.iterations}
    meta = {"features": ctx.inputs["features"].outputs["features"].sha256, "fit": facts}
    write_backbone_file(cfg.kept(ctx.run_dir, penalty), {"weight": found.weight}, meta)


def read_fit(
    ctx: StageContext, cfg: LogisticConfig, penalty: float, shape: tuple[int, int]
) -> "LogisticFit | None":
    """The kept result of a penalty; None where there is none, it is damaged, or of other features."""
    from mugs.evaluation.logistic import LogisticFit
    from mugs.weights.backbone_file import WeightsError, read_backbone_file

    path = cfg.kept(ctx.run_dir, penalty)
    if not path.exists():
        return None
    try:
        state, meta = read_backbone_file(path)
        if (
            meta["features"] == ctx.inputs["features"].outputs["features"].sha256
            and state["weight"].shape == shape
        ):
            return LogisticFit(state["weight"], **meta["fit"])
    except (WeightsError, KeyError, TypeError) as error:
        logger.warning("%s: not a readable result (%s)", path, error)
        return None
    logger.warning("%s: of other features; lambda %g is computed again", path, penalty)
    return None


def labelled_part(ctx: StageContext, cfg: LogisticConfig) -> "Subset":
    """The labelled images of the data set the features were taken from."""
    from mugs.data.sources.open import open_source

    features = ctx.inputs["features"]
    data: ManifestEntry | None = find_done(features.run_root, features.upstream["data"])
    if data is None:
        raise ValueError(
            f"run {features.upstream['data']}, the data set of the stored features, is not done any more"
        )
    return cfg.labelled.choose(open_source(data.output("train")), data.info["dataset"])


SPEC = StageSpec(
    name="logistic",
    config=LogisticConfig,
    entrypoint="stages.logistic:run",
    preflight="stages.logistic:preflight",
    needs={"features": "features"},
    resources=Resources(ranks_per_node=1, hours=4.0),
)
