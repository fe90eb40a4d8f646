"""k-NN over the epochs of a pretraining, from the checkpoints it keeps: afterwards, or while it runs."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import PositiveFloat, PositiveInt

from pipeline import attempts, manifest, runfile
from pipeline.files import read_json, write_json_atomic
from pipeline.settings import FormerName, Runtime
from pipeline.spec import Resources, StageConfig, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.pretrain import PretrainConfig
from stages.shared.frozen import Crop, computed_features, num_classes, result_row

if TYPE_CHECKING:
    from mugs.models.vit import ViT

logger = logging.getLogger(__name__)
INITIAL = "initial"


@dataclass(frozen=True, kw_only=True)
class KnnCurveConfig(Crop):
    """The teacher at the start, after every `every_epochs` epochs, and at the end.

    The pretraining has to keep the checkpoints of these epochs (its `keep_every_epochs`); those stay, so that none is
    read that is being removed. `watch`: start with the pretraining and evaluate each as it appears, which takes
    resources of its own for as long; without it, all come after the pretraining. A watch ends when the pretraining has
    shown no life for `patience_minutes`; submitted again it goes on. One checkpoint is evaluated once.
    """

    # Epochs between two evaluated checkpoints.
    every_epochs: PositiveInt
    feature: Literal["cls", "patch_mean"] = "cls"
    ks: tuple[int, ...] = (20,)
    temperatures: tuple[float, ...] = (0.07,)
    # Start with the pretraining and evaluate each checkpoint as it appears.
    watch: Runtime[bool] = False
    # How often a watch looks for a new checkpoint.
    poll_seconds: Runtime[PositiveFloat] = 10.0
    # A watch ends if the pretraining shows no progress for so long.
    patience_minutes: Runtime[PositiveFloat] = 60.0
    eval_batch_size: Annotated[Runtime[PositiveInt], FormerName("images_per_pass")] = 256
    threads: Runtime[PositiveInt] = 2
    memory_mb: Runtime[PositiveInt] = 2048

    def alongside(self) -> frozenset[str]:
        """With `watch`, the pretraining need only have begun."""
        return frozenset({"weights"}) if self.watch else frozenset()

    def wrong_inputs(self, inputs: Mapping[str, StageConfig]) -> str | None:
        """A pretraining that does not keep these checkpoints."""
        kept = getattr(inputs["weights"], "keep_every_epochs", 0)
        if kept and self.every_epochs % kept == 0:
            return None
        keeps = f"only those of every {kept} epochs" if kept else "none for good"
        return f"weights: of its checkpoints it keeps {keeps}; set its keep_every_epochs to {self.every_epochs}"


@dataclass(frozen=True)
class Pretraining:
    """A pretraining that runs or is done: its folder, and the steps after which it is looked at, by epoch."""

    run_dir: Path
    steps: Mapping[int, int]

    def file(self, epoch: int) -> Path:
        """Where the teacher of an epoch is, once it is there: 0 is the start."""
        if epoch == 0:
            return self.run_dir / "weights" / f"{INITIAL}.safetensors"
        from mugs.checkpoint.record import checkpoint_name

        return (
            self.run_dir
            / "checkpoints"
            / checkpoint_name(self.steps[epoch])
            / "teacher.safetensors"
        )

    def silent_minutes(self) -> float:
        """Time since it last showed life: an attempt, progress, a checkpoint."""
        places = [
            self.run_dir / "progress.json",
            self.run_dir / "attempts",
            self.run_dir / "checkpoints",
        ]
        newest = max((place.stat().st_mtime for place in places if place.exists()), default=0.0)
        return (time.time() - newest) / 60


def run(ctx: StageContext, cfg: KnnCurveConfig) -> StageOutput:
    """One row per epoch, k and temperature; returns when the pretraining is done and all of its epochs are."""
    from mugs import distributed
    from mugs.engine.progress import Progress

    distributed.init_process_group()
    pretraining = find_pretraining(ctx, cfg)
    began, path, quiet = time.monotonic(), ctx.run_dir / "progress.json", not distributed.is_main()
    progress = Progress(
        "knn curve",
        len(pretraining.steps),
        unit="checkpoints",
        rate_unit="checkpoints/s",
        path=path,
        quiet=quiet,
    )
    while (
        chosen := distributed.run_on_main(lambda: next_epoch(ctx, cfg, pretraining, began))
    ) != "none":
        if chosen == "wait":
            time.sleep(cfg.poll_seconds)
            continue
        evaluate_epoch(ctx, cfg, pretraining, int(chosen))
        progress.update(len(list((ctx.run_dir / "epochs").glob("epoch_*.json"))))
    progress.close()
    entry = done_entry(ctx)
    assert entry is not None
    ended = replace(ctx, inputs={**ctx.inputs, "weights": entry})
    rows = [
        result_row(
            ended, "teacher", setting=f"epoch={epoch}, {cfg.feature}, k={k}, T={t:g}", value=value
        )
        for epoch in pretraining.steps
        for k, t, value in (read_json(epoch_record_path(ctx, epoch)) or {})["top1"]
    ]
    return StageOutput(rows=rows)


def find_pretraining(ctx: StageContext, cfg: KnnCurveConfig) -> Pretraining:
    """The pretraining that fills the role `weights`."""
    from mugs.data.loading.order import SampleOrder
    from mugs.data.sources.open import open_source

    run_dir = ctx.inputs["weights"].run_dir if "weights" in ctx.inputs else ctx.running["weights"]
    config = runfile.read_run_file(run_dir).build().config
    assert isinstance(config, PretrainConfig)
    images = len(open_source(ctx.inputs["data"].output("train")))
    batch: dict[str, Any] = {
        "batch_size": config.batch_size,
        "steps_per_epoch": config.steps_per_epoch,
    }
    steps = SampleOrder(images, seed=config.seed, world=1, rank=0, **batch).steps_per_epoch
    epochs = [*range(0, config.epochs, cfg.every_epochs), config.epochs]
    return Pretraining(run_dir, {epoch: epoch * steps for epoch in epochs})


def done_entry(ctx: StageContext) -> manifest.ManifestEntry | None:
    """The manifest entry of the pretraining, once there is one."""
    needed = runfile.read_run_file(ctx.run_dir).needs["weights"]
    return ctx.inputs.get("weights") or manifest.find_done(ctx.run_dir.parents[1], needed)


def epoch_record_path(ctx: StageContext, epoch: int) -> Path:
    """Where the result of an epoch is kept."""
    return ctx.run_dir / "epochs" / f"epoch_{epoch:04d}.json"


def next_epoch(
    ctx: StageContext, cfg: KnnCurveConfig, pretraining: Pretraining, began: float
) -> str:
    """The first epoch that is there and not evaluated, `none` when there is no more to come, else `wait`.

    Raises ValueError where waiting would not help.
    """
    done = done_entry(ctx) is not None  # asked first: what is not there afterwards never comes
    open_epochs = [
        epoch for epoch in pretraining.steps if not is_evaluated(ctx, pretraining, epoch)
    ]
    there = next((epoch for epoch in open_epochs if is_good(pretraining.file(epoch))), None)
    if there is not None:
        return str(there)
    if done and open_epochs:
        file = pretraining.file(open_epochs[0])
        raise ValueError(
            f"{file}: no good weights of epoch {open_epochs[0]}, and the pretraining is done; every_epochs has to be a "
            "multiple of the keep_every_epochs it ran with"
        )
    if done:
        return "none"
    if (
        failure := attempts.read_failure(pretraining.run_dir)
    ) is not None and failure.no_retry_reason:
        raise ValueError(f"the pretraining failed: {failure.error} ({failure.no_retry_reason})")
    silent = min(pretraining.silent_minutes(), (time.monotonic() - began) / 60)
    if silent > cfg.patience_minutes:
        raise ValueError(
            f"{pretraining.run_dir}: no sign of life for {silent:.0f} minutes; submit again once the pretraining runs"
        )
    return "wait"


def is_evaluated(ctx: StageContext, pretraining: Pretraining, epoch: int) -> bool:
    """Whether there is a result of this epoch, and the weights are still those it is of."""
    note = read_json(epoch_record_path(ctx, epoch))
    return note is not None and note["weights"] == weights_identity(pretraining, epoch)


def weights_identity(pretraining: Pretraining, epoch: int) -> str | None:
    """SHA-256 of the weights of a checkpoint, as its record says; the start, once written, stays what it is."""
    from mugs.checkpoint.record import CheckpointError, read_record

    if epoch == 0:
        return INITIAL
    file = pretraining.file(epoch)
    try:
        return read_record(file.parent).files[file.name].sha256
    except (CheckpointError, KeyError):
        return None


def is_good(file: Path) -> bool:
    """Whether a weights file is there and whole; a bad checkpoint may be written again by a pretraining that runs."""
    from mugs.checkpoint.record import CheckpointError, verify_checkpoint

    if not file.exists():
        return False
    if file.stem == INITIAL:
        return True
    try:
        verify_checkpoint(file.parent, only=file.name)
    except CheckpointError as error:
        logger.warning("%s", error)
        return False
    return True


def evaluate_epoch(
    ctx: StageContext, cfg: KnnCurveConfig, pretraining: Pretraining, epoch: int
) -> None:
    """k-NN of the teacher of an epoch, kept in a file."""
    from mugs import distributed
    from mugs.evaluation.knn import evaluate_knn

    weights, vit = weights_identity(pretraining, epoch), load_teacher(pretraining, epoch)
    found = computed_features(
        ctx, vit, cfg, cfg.feature, eval_batch_size=cfg.eval_batch_size, threads=cfg.threads
    )
    options: dict[str, Any] = {
        "ks": cfg.ks,
        "temperatures": cfg.temperatures,
        "memory_mb": cfg.memory_mb,
    }
    accuracy = evaluate_knn(*found["train"], *found["val"], num_classes=num_classes(ctx), **options)
    if distributed.is_main():
        top1 = [[k, t, value["top1"]] for (k, t), value in accuracy.items()]
        write_json_atomic(
            epoch_record_path(ctx, epoch), {"epoch": epoch, "weights": weights, "top1": top1}
        )
    distributed.barrier()


def load_teacher(pretraining: Pretraining, epoch: int) -> "ViT":
    """The frozen teacher after an epoch. Raises CheckpointError and WeightsError naming the file."""
    from mugs.checkpoint.save_load import load_state_dict_file
    from mugs.weights.backbone_file import extract_backbone_state, load_backbone, load_strictly

    vit, file = load_backbone(pretraining.file(0)), pretraining.file(epoch)
    if epoch:
        state, _ = extract_backbone_state({"teacher": load_state_dict_file(file.parent, "teacher")})
        load_strictly(vit, state, file)
    return vit.eval().requires_grad_(False)


SPEC = StageSpec(
    name="knn_curve",
    config=KnnCurveConfig,
    entrypoint="stages.knn_curve:run",
    needs={"data": "convert", "weights": "pretrain"},
    resources=Resources(ranks_per_node=1, hours=12.0),
)
