"""Supervised fine-tuning: on all labels, on a part of them, or on other data sets."""

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
from stages.shared.batch_checks import (
    check_batch_is_filled,
    check_even_batch,
    check_even_pairs,
    check_even_passes,
)
from stages.shared.flops import count_finetuning, find_shape
from stages.shared.frozen import (
    FACTS,
    WEIGHTS,
    Pretrained,
    build_result_rows,
    load_vit,
    read_num_classes,
)
from stages.shared.image_data import check_labeled, count_train_images
from stages.shared.labelled import LabelledPart

if TYPE_CHECKING:
    from torch import nn

    from mugs.data.sources.base import Source
    from mugs.finetune.classifier import ImageClassifier
    from mugs.finetune.train import EpochAccuracy


@dataclass(frozen=True, kw_only=True)
class FinetuneStageConfig(StageConfig, FinetuneConfig):
    """A fine-tuning run.

    `weights: initial` is where the pretraining started; `scratch` draws a network of the same
    shape from `seed`. `labelled` leaves only a part of the training images, for semi-supervised
    learning. The release also keeps an exponential moving average of these weights but never
    evaluates it, so there is none here.
    """

    weights: Literal["teacher", "student", "initial", "scratch"] = "teacher"
    # Train on a part of the labels only, for semi-supervised evaluation.
    labelled: LabelledPart | None = None
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    activation_checkpointing: Runtime[bool] = False
    compile: Runtime[bool] = False

    def repeats_with_seed(self) -> bool:
        """Return whether the network starts at random, and not from a pretraining."""
        return self.weights == "scratch"

    def rate_follows_batch(self) -> bool:
        """Return whether the rate is meant for a batch of `lr_batch` images."""
        return self.rate.lr_batch is not None

    def list_remarks(self, inputs: Mapping[str, StageConfig]) -> list[str]:
        """Remark on a warm-up that does not end."""
        if self.rate.warmup_epochs <= self.epochs:
            return []
        return [
            f"the warm-up of {self.rate.warmup_epochs} epochs is longer than the run of "
            f"{self.epochs}: the learning rate never reaches its peak"
        ]

    def estimate_flops(self, inputs: Mapping[str, StageConfig]) -> float | None:
        """Return the operations of all epochs, if the architecture and the images are known."""
        shape = find_shape(getattr(inputs.get("weights"), "arch", ""))
        images = count_train_images(inputs)
        if shape is None or images is None:
            return None
        share = self.labelled.percent / 100 if self.labelled is not None else 1.0
        return count_finetuning(shape, self.images.size) * share * images * self.epochs

    def check_resources(self, resources: Resources) -> None:
        """Require that the batch divides over ranks, groups and pairs, and into micro-batches."""
        check_even_batch(self.batch_size, resources)
        if self.mix.on:
            check_even_pairs(self.batch_size, resources, self.mix.group)
        check_even_passes(self.batch_size, resources, self.micro_batch_size, single_pass=False)

    def check_inputs(self, inputs: Mapping[str, StageConfig]) -> None:
        """Refuse weights that do not exist; from scratch, any weights give the shape."""
        if self.weights != "scratch":
            Pretrained(weights=self.weights).check_inputs(inputs)
        check_labeled(inputs)

    def check_image_counts(self, counts: Mapping[str, int]) -> None:
        """Require that the images fill a batch; of a part of them, `check_labelled_part` does."""
        if self.labelled is None and "train" in counts:
            check_batch_is_filled(self.batch_size, counts["train"])


def run(ctx: StageContext, cfg: FinetuneStageConfig) -> StageOutput:
    """Train and validate; rows `best epoch` and `last epoch`, both on the validation split.

    The best epoch is what the release reports. Output `classifier` is the backbone and head after
    the last epoch.
    """
    from mugs import distributed
    from mugs.data.sources.open import open_source
    from mugs.finetune.train import Finetuning
    from mugs.weights.backbone_file import write_backbone_file

    classes = read_num_classes(ctx)
    device = distributed.init_process_group()
    data = ctx.inputs["data"]
    train: Source = open_source(data.output("train"))
    if cfg.labelled is not None:
        train = cfg.labelled.select_images(train, data.info["dataset"])
    model = build_model(ctx, cfg, classes)
    sources = (train, open_source(data.output("val")))
    task = Finetuning(model, sources, cfg, ctx.run_dir, device, classes)
    task.train(ctx.control)
    path = ctx.run_dir / "weights" / "classifier.safetensors"
    arch = asdict(model.backbone.config)
    if distributed.is_main():
        meta = {"arch": arch, "weights": "finetuned", "num_classes": classes}
        write_backbone_file(path, dict(model.state_dict()), meta)
    # The file has to be complete before any rank returns and the run is recorded.
    distributed.barrier()
    facts = {name: ctx.inputs["weights"].info[name] for name in FACTS}
    return StageOutput(
        outputs={"classifier": path},
        rows=build_accuracy_rows(ctx, cfg, task.history),
        info={**facts, "shape": arch, "dataset": data.info["dataset"], "num_classes": classes},
    )


def build_accuracy_rows(
    ctx: StageContext, cfg: FinetuneStageConfig, history: "list[EpochAccuracy]"
) -> list[ResultRow]:
    """Return top-1 and top-5 of the best and of the last epoch."""
    part = f"{cfg.labelled.describe()}, " if cfg.labelled is not None else ""
    # `max` returns the first of equal epochs.
    best = max(history, key=lambda epoch: epoch.top1)
    label = "teacher" if cfg.weights == "scratch" else cfg.weights
    rows = []
    for name, epoch in (("best", best), ("last", history[-1])):
        values = [("top1", epoch.top1), ("top5", epoch.top5)]
        rows += build_result_rows(ctx, label, f"{part}{name} epoch", values)
    if cfg.weights != "scratch":
        return rows
    # Seed and method of the pretraining say nothing about a network that did not use it.
    return [replace(row, method=f"{row.method} (scratch)", seed=cfg.seed) for row in rows]


def build_model(ctx: StageContext, cfg: FinetuneStageConfig, classes: int) -> "ImageClassifier":
    """Return the backbone with the requested weights, and a new head.

    Raises:
        ValueError: the image size is not a multiple of the patch size.
    """
    import torch

    from mugs.finetune.classifier import ImageClassifier, build_head
    from mugs.models.vit import build_vit

    label = "teacher" if cfg.weights == "scratch" else cfg.weights
    vit = load_vit(ctx, label, drop_path=cfg.drop_path).requires_grad_(True)
    shape = vit.config
    if cfg.images.size % shape.patch_size:
        raise ValueError(
            f"images.size {cfg.images.size}: "
            f"expected a multiple of the patch size {shape.patch_size}"
        )
    if cfg.weights == "scratch":
        # The global generator is restored, so that later draws do not depend on this choice.
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
    """Load the first layer of the pretraining's group head into that of a two-layer head.

    Raises:
        ValueError: the pretraining has no group head, or the shapes differ.
    """
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
    preflight="stages.shared.labelled:check_labelled_part",
    needs={"data": "convert", "weights": WEIGHTS},
    resources=Resources(ranks_per_node=4, hours=24.0),
)
