"""Semi-supervised logistic regression on frozen features, for a path of L2 penalties."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from pipeline.manifest import find_done
from pipeline.settings import Runtime
from pipeline.spec import Resources, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.frozen import FeatureEvaluation, build_result_row
from stages.shared.labelled import LabelledPart

if TYPE_CHECKING:
    from torch import Tensor

    from mugs.data.sources.subset import Subset
    from mugs.evaluation.logistic import LogisticFit

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LogisticConfig(FeatureEvaluation):
    """Penalties of the released sweep; the objective ends within `tolerance` of its minimum.

    The release uses cyanure, which has no wheels beyond Linux on x86-64; L-BFGS reaches the same
    minimum. Its text calls the solver AdamW, which did not produce the printed numbers (E14).

    One process computes everything, on its GPU or all its cores: each step of L-BFGS follows from
    the previous one, and all labelled features fit on one device. Other ranks end at once. The
    result of each finished penalty is kept in the run's folder and is not computed again.
    """

    one_rank: ClassVar[bool] = True

    # The images that keep their labels.
    labelled: LabelledPart
    feature: Literal["cls", "patch_mean"] | None = None
    # Weights of the L2 penalty, as lambda / images; each gives a row (E14).
    penalties: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (
        0.01,
        0.03,
        0.06,
        0.10,
        0.15,
        0.20,
        0.30,
    )
    # The objective ends within this of its minimum, relatively.
    tolerance: PositiveFloat = 1e-4
    # Steps after which a penalty that has not converged is an error.
    max_iterations: Runtime[PositiveInt] = 5000

    def check_resources(self, resources: Resources) -> None:
        """Require a single process."""
        if resources.ranks > 1:
            raise ValueError(f"logistic regression runs on one rank, not {resources.ranks}")

    def fit_path(self, run_dir: Path, penalty: float) -> Path:
        """Return the file that keeps the result of a penalty."""
        return run_dir / "penalties" / f"lambda_{penalty!r}.safetensors"


def run(ctx: StageContext, cfg: LogisticConfig) -> StageOutput:
    """Return one row per penalty; tables take the best on the validation images, as released."""
    import torch.nn.functional as F

    from mugs import distributed
    from mugs.engine.progress import Progress
    from mugs.evaluation.feature_store import FeatureStore
    from mugs.evaluation.logistic import fit_logistic_regression, top1_accuracy

    device = distributed.init_process_group()
    world = distributed.world_size()
    if not distributed.is_main():
        logger.info(
            "nothing to do on rank %d: logistic regression runs on rank 0 of %d",
            distributed.rank(),
            world,
        )
        return StageOutput()
    store = FeatureStore(ctx.inputs["features"].output("features"))
    part = select_labelled_part(ctx, cfg)
    # N labelled images, Q validation images, D feature dimensions.
    x, y = (tensor[part.indices].to(device) for tensor in store.load("train", cfg.chosen_feature))
    x = F.normalize(x, dim=1)  # (N, D)
    queries, targets = (tensor.to(device) for tensor in store.load("val", cfg.chosen_feature))
    queries = F.normalize(queries, dim=1)  # (Q, D)
    # From strong to weak: the solution of a penalty is a good start for the next, weaker one.
    penalties = sorted(cfg.penalties, reverse=True)
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
    rows = []
    facts = []
    weight: Tensor | None = None
    for number, penalty in enumerate(penalties, 1):
        found = read_fit(ctx, cfg, penalty, (len(part.classes), x.shape[1]))
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
            write_fit(ctx, cfg, penalty, found)
            if ctx.control is not None:
                # After a time limit, the next attempt does not stop where this one does.
                ctx.control.saved(number, 0.0)
        else:
            logger.info("lambda %g: done before, not computed again", penalty)
        weight = found.weight
        value = top1_accuracy(weight, queries, targets)
        setting = f"{cfg.labelled.describe()}, {cfg.chosen_feature}, lambda={penalty:g}"
        # The record of the `features` run names the weights; the argument is not read.
        rows.append(build_result_row(ctx, "teacher", setting=setting, value=value))
        facts.append(
            {"penalty": penalty, "objective": found.objective, "gap": found.gap, "top1": value}
        )
        progress.update(number)
    progress.close()
    return StageOutput(rows=rows, info={"labelled_images": len(part), "path": facts})


def write_fit(ctx: StageContext, cfg: LogisticConfig, penalty: float, found: "LogisticFit") -> None:
    """Write the result of a penalty, with the checksum of the features it was fitted to."""
    from mugs.weights.backbone_file import write_backbone_file

    meta = {
        "features": ctx.inputs["features"].outputs["features"].sha256,
        "fit": {"objective": found.objective, "gap": found.gap, "iterations": found.iterations},
    }
    write_backbone_file(cfg.fit_path(ctx.run_dir, penalty), {"weight": found.weight}, meta)


def read_fit(
    ctx: StageContext, cfg: LogisticConfig, penalty: float, shape: tuple[int, int]
) -> "LogisticFit | None":
    """Return the kept result of a penalty; None if absent, damaged, or of other features."""
    from mugs.evaluation.logistic import LogisticFit
    from mugs.weights.backbone_file import read_backbone_file
    from mugs.weights.pickle_file import WeightsError

    path = cfg.fit_path(ctx.run_dir, penalty)
    if not path.exists():
        return None
    sha256 = ctx.inputs["features"].outputs["features"].sha256
    try:
        state, meta = read_backbone_file(path)
        if meta["features"] == sha256 and state["weight"].shape == shape:
            return LogisticFit(state["weight"], **meta["fit"])
        logger.warning("%s: of other features; lambda %g is computed again", path, penalty)
    except (WeightsError, KeyError, TypeError) as error:
        logger.warning("%s: not a readable result (%s)", path, error)
    return None


def select_labelled_part(ctx: StageContext, cfg: LogisticConfig) -> "Subset":
    """Return the labelled images of the data set that the features were computed from."""
    from mugs.data.sources.open import open_source

    features = ctx.inputs["features"]
    # The data set is no direct input of this run, so it may have been removed since.
    data = find_done(features.run_root, features.upstream["data"])
    if data is None:
        raise ValueError(
            f"run {features.upstream['data']}, the data set of the stored features, "
            "is not done any more"
        )
    return cfg.labelled.select_images(open_source(data.output("train")), data.info["dataset"])


SPEC = StageSpec(
    name="logistic",
    config=LogisticConfig,
    entrypoint="stages.logistic:run",
    preflight="stages.shared.labelled:check_labelled_part",
    needs={"features": "features"},
    resources=Resources(ranks_per_node=1, hours=4.0),
)
