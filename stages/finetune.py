"""Supervised fine-tuning: on all labels, on a part of them, on other data sets (best and last epoch are recorded)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mugs.finetune.config import FinetuneConfig
from pipeline.manifest import check_intact
from pipeline.settings import Runtime
from pipeline.spec import Resources, StageConfig, StageSpec
from pipeline.stage import StageContext, StageOutput
from results.schema import ResultRow
from stages.shared.batch_checks import explain_uneven_batch, uneven_pairs, uneven_passes
from stages.shared.frozen import WEIGHTS, Pretrained, load_vit, num_classes, result_row
from stages.shared.image_data import ConvertConfig
from stages.shared.labelled import LabelledPart

if TYPE_CHECKING:
    from torch import nn

    from mugs.data.sources.base import Source
    from mugs.finetune.classifier import ImageClassifier
    from mugs.finetune.train import EpochAccuracy


@dataclass(frozen=True, kw_only=True)
class FinetuneStageConfig(StageConfig, FinetuneConfig):
    """A fine-tuning run.

    `weights`: "initial" is where the
    pretraining started; "scratch" draws a network of its shape from `seed`. `labelled` leaves only a part of the
    training images, for semi-supervised learning. The exponential moving average that the release keeps of these
    weights is left out: it never evaluates it.
    """

    weights: Literal["teacher", "student", "initial", "scratch"] = "teacher"
    # Train on a part of the labels only, for semi-supervised evaluation.
    labelled: LabelledPart | None = None
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    activation_checkpointing: Runtime[bool] = False
    compile: Runtime[bool] = False

    def misfit(self, resources: Resources) -> str | None:
        """A batch that does not divide over ranks, groups and pairs, or a rank's share over its passes."""
        pairs = uneven_pairs(self.batch_size, resources, self.mix.group) if self.mix.on else None
        passes = uneven_passes(self.batch_size, resources, self.micro_batch_size, whole=False)
        return explain_uneven_batch(self.batch_size, resources) or pairs or passes

    def wrong_inputs(self, inputs: Mapping[str, StageConfig]) -> str | None:
        """Weights that there are not; any say what shape to start from scratch with."""
        return (
            None
            if self.weights == "scratch"
            else Pretrained(weights=self.weights).wrong_inputs(inputs)
        )


def preflight(cfg: FinetuneStageConfig, inputs: Mapping[str, StageConfig]) -> tuple[str, float]:
    """What the list of labelled images names, if there is one. Raises SourceError."""
    data = inputs["data"]
    assert isinstance(data, ConvertConfig)
    return cfg.labelled.look(data) if cfg.labelled else "all labels", 0.0


def run(ctx: StageContext, cfg: FinetuneStageConfig) -> StageOutput:
    """Train and validate; rows `best epoch` (the released selection, on the validation split) and `last epoch`.

    Output `classifier`: backbone and head after the last epoch.
    """
    from mugs import distributed
    from mugs.data.sources.open import open_source
    from mugs.finetune.train import Finetuning
    from mugs.weights.backbone_file import write_backbone_file

    classes = num_classes(ctx)
    device = distributed.init_process_group()
    data, source_info = ctx.inputs["data"], ctx.inputs["weights"].info
    train: Source = open_source(data.output("train"))
    if cfg.labelled is not None:
        train = cfg.labelled.choose(train, data.info["dataset"])
    model = build_model(ctx, cfg, classes)
    sources = (train, open_source(data.output("val")))
    task = Finetuning(model, sources, cfg, ctx.run_dir, device, classes)
    task.train(ctx.control)
    path = ctx.run_dir / "weights" / "classifier.safetensors"
    arch = asdict(model.backbone.config)
    if distributed.is_main():
        write_backbone_file(
            path,
            dict(model.state_dict()),
            {"arch": arch, "weights": "finetuned", "num_classes": classes},
        )
    distributed.barrier()
    facts = {name: source_info[name] for name in ("method", "arch", "epochs", "seed")}
    info = {**facts, "shape": arch, "dataset": data.info["dataset"], "num_classes": classes}
    return StageOutput(
        outputs={"classifier": path}, rows=accuracy_rows(ctx, cfg, task.history), info=info
    )


def accuracy_rows(
    ctx: StageContext, cfg: FinetuneStageConfig, history: "list[EpochAccuracy]"
) -> list[ResultRow]:
    """Top-1 and top-5 of the best and of the last epoch."""
    part = f"{cfg.labelled.words()}, " if cfg.labelled is not None else ""
    best, last = max(history, key=lambda epoch: epoch.top1), history[-1]
    weights = "teacher" if cfg.weights == "scratch" else cfg.weights
    made = [
        result_row(
            ctx, weights, setting=f"{part}{name} epoch", metric=metric, value=getattr(epoch, metric)
        )
        for name, epoch in (("best", best), ("last", last))
        for metric in ("top1", "top5")
    ]
    if cfg.weights == "scratch":
        return [replace(row, method=f"{row.method} (scratch)", seed=cfg.seed) for row in made]
    return made


def build_model(ctx: StageContext, cfg: FinetuneStageConfig, classes: int) -> "ImageClassifier":
    """The backbone with the weights asked for, and a new head. Raises ValueError where image and patch do not fit."""
    import torch

    from mugs.finetune.classifier import ImageClassifier, build_head
    from mugs.models.vit import build_vit

    label = "teacher" if cfg.weights == "scratch" else cfg.weights
    vit = load_vit(ctx, label, drop_path=cfg.drop_path).requires_grad_(True)
    shape = vit.config
    if cfg.images.size % shape.patch_size:
        raise ValueError(
            f"images.size {cfg.images.size}: expected a multiple of the patch size {shape.patch_size}"
        )
    if cfg.weights == "scratch":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            vit = build_vit(shape, drop_path=cfg.drop_path)
    vit.activation_checkpointing = cfg.activation_checkpointing
    if cfg.compile:
        for block in vit.blocks:
            block.compile()
    head = build_head(cfg.head, shape.embed_dim, classes, cfg.seed)
    if cfg.head.init == "pretrained":
        load_projection(ctx, head)
    return ImageClassifier(vit, head)


def load_projection(ctx: StageContext, head: "nn.Module") -> None:
    """The first layer of the pretraining's group head into that of a two-layer head. Raises ValueError."""
    from mugs.finetune.classifier import load_first_layer
    from mugs.weights.backbone_file import read_backbone_file

    entry = ctx.inputs["weights"]
    if "projection" not in entry.outputs:
        raise ValueError(
            f"head.init pretrained: run {entry.name!r} has no output 'projection'; use random"
        )
    check_intact(entry, "projection")
    load_first_layer(head, read_backbone_file(entry.output("projection"))[0])


SPEC = StageSpec(
    name="finetune",
    config=FinetuneStageConfig,
    entrypoint="stages.finetune:run",
    preflight="stages.finetune:preflight",
    needs={"data": "convert", "weights": WEIGHTS},
    resources=Resources(ranks_per_node=4, hours=24.0),
)
