"""k-NN over the epochs of a pretraining, from the checkpoints it keeps: after it or alongside."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from pipeline import attempts, manifest, runfile
from pipeline.files import read_json, read_server_time, write_json_atomic
from pipeline.settings import FormerName, Runtime
from pipeline.spec import Resources, StageConfig, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.pretrain import PretrainConfig
from stages.shared.frozen import (
    Crop,
    FeatureEvaluation,
    build_result_row,
    check_neighbors,
    compute_features,
    read_num_classes,
)
from stages.shared.image_data import check_labeled

if TYPE_CHECKING:
    from mugs.models.vit import ViT

logger = logging.getLogger(__name__)
INITIAL = "initial"


@dataclass(frozen=True, kw_only=True)
class KnnCurveConfig(Crop, FeatureEvaluation):
    """The teacher at the start, after every `every_epochs` epochs, and at the end.

    The pretraining has to keep the checkpoints of these epochs (its `keep_every_epochs`). Those are
    never removed, so none disappears while it is read. With `watch`, this run starts together with
    the pretraining, on resources of its own, and evaluates each checkpoint as it appears; without
    it, all are evaluated after the pretraining. A watch ends when the pretraining has made no
    progress for `patience_minutes`; submit it again to continue. Each checkpoint is evaluated once.
    """

    # Epochs between two evaluated checkpoints.
    every_epochs: PositiveInt
    feature: Literal["cls", "patch_mean"] | None = None
    ks: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (20,)
    temperatures: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.07,)
    # Start with the pretraining and evaluate each checkpoint as it appears.
    watch: Runtime[bool] = False
    # How often a watch looks for a new checkpoint.
    poll_seconds: Runtime[PositiveFloat] = 10.0
    # A watch ends if the pretraining shows no progress for so long.
    patience_minutes: Runtime[PositiveFloat] = 60.0
    eval_batch_size: Annotated[Runtime[PositiveInt], FormerName("images_per_pass")] = 256
    threads: Runtime[PositiveInt] = 2
    memory_mb: Runtime[PositiveInt] = 2048

    def concurrent_roles(self) -> frozenset[str]:
        """Return the pretraining if it is watched: it need only have begun."""
        return frozenset({"weights"}) if self.watch else frozenset()

    def check_inputs(self, inputs: Mapping[str, StageConfig]) -> None:
        """Refuse a pretraining that does not keep these checkpoints."""
        check_labeled(inputs)
        kept = getattr(inputs["weights"], "keep_every_epochs", 0)
        if not kept or self.every_epochs % kept:
            keeps = f"only those of every {kept} epochs" if kept else "none for good"
            raise ValueError(
                f"weights: of its checkpoints it keeps {keeps}; "
                f"set its keep_every_epochs to {self.every_epochs}"
            )

    def check_image_counts(self, counts: Mapping[str, int]) -> None:
        """Require as many training images as neighbors."""
        check_neighbors(self.ks, counts)


@dataclass(frozen=True)
class Pretraining:
    """A pretraining that runs or is done: its folder, and where the teacher of each epoch is or
    will be; epoch 0 is the start.
    """

    run_dir: Path
    files: Mapping[int, Path]

    def silent_minutes(self) -> float:
        """Return the time since its last sign of life: an attempt, progress, or a checkpoint."""
        places = [self.run_dir / name for name in ("progress.json", "attempts", "checkpoints")]
        newest = max((place.stat().st_mtime for place in places if place.exists()), default=0.0)
        return (read_server_time(self.run_dir) - newest) / 60


def run(ctx: StageContext, cfg: KnnCurveConfig) -> StageOutput:
    """Return one row per epoch, k and temperature, once all epochs of the pretraining are done."""
    from mugs import distributed
    from mugs.engine.progress import Progress

    distributed.init_process_group()
    pretraining = find_pretraining(ctx, cfg)
    began = time.monotonic()
    progress = Progress(
        "knn curve",
        len(pretraining.files),
        unit="checkpoints",
        rate_unit="checkpoints/s",
        path=ctx.run_dir / "progress.json",
        quiet=not distributed.is_main(),
    )
    # Rank 0 chooses for all: ranks that look at the file system at different times could see
    # different checkpoints and would then wait for each other forever.
    while (
        chosen := distributed.run_on_main(lambda: next_epoch(ctx, cfg, pretraining, began))
    ) != "none":
        if chosen == "wait":
            note_resumable(ctx, 0)
            time.sleep(cfg.poll_seconds)
        else:
            evaluate_epoch(ctx, cfg, pretraining, int(chosen))
            progress.update(len(list((ctx.run_dir / "epochs").glob("epoch_*.json"))))
    progress.close()
    entry = find_done_entry(ctx)
    assert entry is not None
    # A watch began without this entry, but result rows take their columns from it.
    ended = replace(ctx, inputs={**ctx.inputs, "weights": entry})
    feature = cfg.chosen_feature
    rows = [
        build_result_row(
            ended, "teacher", setting=f"epoch={epoch}, {feature}, k={k}, T={t:g}", value=value
        )
        for epoch in pretraining.files
        for k, t, value in (read_json(epoch_record_path(ctx, epoch)) or {})["top1"]
    ]
    return StageOutput(rows=rows)


def find_pretraining(ctx: StageContext, cfg: KnnCurveConfig) -> Pretraining:
    """Return the pretraining that fills the role `weights`."""
    from mugs.checkpoint.record import checkpoint_name
    from mugs.data.loading.order import SampleOrder
    from mugs.data.sources.open import open_source

    run_dir = ctx.inputs["weights"].run_dir if "weights" in ctx.inputs else ctx.running["weights"]
    config = runfile.read_run_file(run_dir).build().config
    assert isinstance(config, PretrainConfig)
    # Checkpoints are named by step. The order knows how many steps an epoch of this data set has.
    order = SampleOrder(
        len(open_source(ctx.inputs["data"].output("train"))),
        seed=config.seed,
        world=1,
        rank=0,
        batch_size=config.batch_size,
        steps_per_epoch=config.steps_per_epoch,
    )
    files = {0: run_dir / "weights" / f"{INITIAL}.safetensors"}
    for epoch in [*range(cfg.every_epochs, config.epochs, cfg.every_epochs), config.epochs]:
        name = checkpoint_name(epoch * order.steps_per_epoch)
        files[epoch] = run_dir / "checkpoints" / name / "teacher.safetensors"
    return Pretraining(run_dir, files)


def find_done_entry(ctx: StageContext) -> manifest.ManifestEntry | None:
    """Return the manifest entry of the pretraining, once there is one."""
    needed = runfile.read_run_file(ctx.run_dir).needs["weights"]
    return ctx.inputs.get("weights") or manifest.find_done(ctx.run_dir.parents[1], needed)


def epoch_record_path(ctx: StageContext, epoch: int) -> Path:
    """Return the file that keeps the result of an epoch."""
    return ctx.run_dir / "epochs" / f"epoch_{epoch:04d}.json"


def next_epoch(
    ctx: StageContext, cfg: KnnCurveConfig, pretraining: Pretraining, began: float
) -> str:
    """Return the first epoch to evaluate now, "none" if all are done, otherwise "wait".

    Raises:
        ValueError: waiting would not help.
    """
    # Asked first: a checkpoint that is missing afterwards will never come.
    done = find_done_entry(ctx) is not None
    remaining = [epoch for epoch in pretraining.files if not is_evaluated(ctx, pretraining, epoch)]
    for epoch in remaining:
        if is_good(pretraining.files[epoch]):
            return str(epoch)
    if done and remaining:
        raise ValueError(
            f"{pretraining.files[remaining[0]]}: no good weights of epoch {remaining[0]}, and the "
            "pretraining is done; every_epochs has to be a multiple of the keep_every_epochs it "
            "ran with"
        )
    if done:
        return "none"
    failure = attempts.read_failure(pretraining.run_dir)
    if failure is not None and failure.no_retry_reason:
        raise ValueError(f"the pretraining failed: {failure.error} ({failure.no_retry_reason})")
    # Its files may be old when this run starts, so the silence counts from this start at most.
    silent = min(pretraining.silent_minutes(), (time.monotonic() - began) / 60)
    if silent > cfg.patience_minutes:
        raise ValueError(
            f"{pretraining.run_dir}: no sign of life for {silent:.0f} minutes; "
            "submit again once the pretraining runs"
        )
    return "wait"


def is_evaluated(ctx: StageContext, pretraining: Pretraining, epoch: int) -> bool:
    """Return whether this epoch has a result, of the weights that are there now."""
    note = read_json(epoch_record_path(ctx, epoch))
    return note is not None and note["weights"] == identify_weights(pretraining, epoch)


def identify_weights(pretraining: Pretraining, epoch: int) -> str | None:
    """Return the SHA-256 of a checkpoint's weights, as its record says; None without a record."""
    from mugs.checkpoint.record import CheckpointError, read_record

    # The initial weights are written once and never change.
    if epoch == 0:
        return INITIAL
    file = pretraining.files[epoch]
    try:
        return read_record(file.parent).files[file.name].sha256
    except (CheckpointError, KeyError):
        return None


def is_good(file: Path) -> bool:
    """Return whether a weights file exists and is intact."""
    from mugs.checkpoint.record import CheckpointError, verify_checkpoint

    if not file.exists():
        return False
    if file.stem == INITIAL:
        return True
    try:
        verify_checkpoint(file.parent, only=file.name)
    except CheckpointError as error:
        # No reason to fail: a running pretraining may write a damaged checkpoint again.
        logger.warning("%s", error)
        return False
    return True


def evaluate_epoch(
    ctx: StageContext, cfg: KnnCurveConfig, pretraining: Pretraining, epoch: int
) -> None:
    """Evaluate the teacher of an epoch by k-NN and write the result to a file."""
    from mugs import distributed
    from mugs.evaluation.knn import evaluate_knn

    # Read before the weights: if they are replaced meanwhile, the result counts as outdated.
    weights = identify_weights(pretraining, epoch)
    vit = load_teacher(pretraining, epoch)
    found = compute_features(
        ctx, vit, cfg, cfg.chosen_feature, eval_batch_size=cfg.eval_batch_size, threads=cfg.threads
    )
    accuracy = evaluate_knn(
        *found["train"],
        *found["val"],
        num_classes=read_num_classes(ctx),
        ks=cfg.ks,
        temperatures=cfg.temperatures,
        memory_mb=cfg.memory_mb,
    )
    if distributed.is_main():
        top1 = [[k, t, value["top1"]] for (k, t), value in accuracy.items()]
        write_json_atomic(
            epoch_record_path(ctx, epoch), {"epoch": epoch, "weights": weights, "top1": top1}
        )
        note_resumable(ctx, epoch)
    distributed.barrier()


def note_resumable(ctx: StageContext, epoch: int) -> None:
    """Say that another attempt would not stop where this one does.

    It goes on with the epochs that have no result, or with waiting for them.
    """
    from mugs import distributed

    if ctx.control is not None and distributed.is_main():
        ctx.control.saved(epoch, 0.0)


def load_teacher(pretraining: Pretraining, epoch: int) -> "ViT":
    """Return the frozen teacher after an epoch.

    Raises:
        CheckpointError, WeightsError: names the file.
    """
    from mugs.checkpoint.save_load import load_state_dict_file
    from mugs.weights.backbone_file import extract_backbone_state, load_backbone, load_strictly

    # A checkpoint holds tensors only; the initial weights also say the shape of the network.
    vit = load_backbone(pretraining.files[0])
    if epoch:
        file = pretraining.files[epoch]
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
