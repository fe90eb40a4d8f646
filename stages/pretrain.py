"""Pretraining: converted images -> teacher weights."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from pipeline.spec import Resources, Runtime, StageConfig
from pipeline.stage import StageContext, StageOutput
from stages.shared.batch_checks import uneven, uneven_passes
from stages.shared.presets import filled, paper, same_named

if TYPE_CHECKING:
    from mugs.pretrain.config import TrainConfig


SHAPES = {"vit_s16": (384, 12), "vit_b16": (768, 12), "vit_l16": (1024, 24)}  # width, depth
OTHER = (192, 12)


class MugsOptions(StageConfig):
    """Fields and defaults of `mugs.methods.config.MugsConfig`, whose docstring explains them."""

    drop_path: float = Field(0.1, ge=0, lt=1)
    head_hidden: int = 2048
    predictor_hidden: int = 4096
    head_out: int = 256
    group_bottleneck: int = 256
    num_prototypes: int = 65536
    train_prototype_magnitude: bool = True
    queue_size: int = 65536
    memory_size: int = 65536
    num_neighbours: int = 8
    instance_temperature: float = 0.2
    local_group_temperature: float = 0.2
    group_student_temperature: float = 0.1
    group_teacher_temperature: tuple[float, float] = (0.04, 0.04)
    group_teacher_warmup_epochs: int = 0
    center_momentum: float = 0.9
    loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    relation_depth: Literal[1, 2] = 1
    memory_pointer: Literal["released", "fifo"] = "released"
    memory_start: Literal["common", "released"] = "common"
    memories: Literal["released", "shared"] = "released"
    local_group_token: Literal["released", "paper"] = "released"
    pair_average: Literal["released", "uniform"] = "released"
    predictor_init: Literal["released", "0.02"] = "released"
    head_norm: Literal["none", "batch"] = "none"


class ViewOptions(StageConfig):
    """Fields of `mugs.data.views.config.ViewRecipe` that a reproduction may change."""

    large_size: int = 224
    small_size: int = 96
    num_small: int = Field(10, ge=0)
    large_scale: tuple[float, float] = (0.25, 1.0)
    small_scale: tuple[float, float] = (0.05, 0.25)
    weak_prob: float = Field(0.5, ge=0, le=1)
    student_coin: Literal["released", "per_image"] = "released"
    weak_only: bool = False
    weak_only_small: Literal["weak", "released"] = "weak"
    jitter_prob: float = Field(0.8, ge=0, le=1)
    gray_prob: float = Field(0.2, ge=0, le=1)
    blur_prob: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_radius: tuple[float, float] = (0.1, 2.0)
    solarize_prob: float = Field(0.2, ge=0, le=1)
    randaugment_replacement: bool = False
    flip_prob: float = Field(0.5, ge=0, le=1)
    erase_prob: float = Field(0.25, ge=0, le=1)
    erase_before_norm: bool = True


class PretrainConfig(StageConfig):
    """A pretraining run. Defaults are those of the released ViT-S runs where these agree.

    `preset: paper` gives every field that is not given what the paper says where it differs from the released code
    (`stages/shared/presets.py`). Given fields stand, those of a bundled reproduction too: to have the paper's there as well,
    set them to null (`--set pretrain.batch_size=null --set pretrain.steps_per_epoch=null`). "released" changes
    nothing. The run id follows the fields that come out, not the preset. `calibration` names the
    released run whose mean losses of the first epochs are logged beside ours (`mugs/methods/calibration.csv`).
    """

    preset: Literal["released", "paper"] = Runtime("released")
    method: Literal["mugs"] = "mugs"
    arch: str = "vit_s16"
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    base_lr: float = Field(8e-4, gt=0)
    min_lr: float = Field(1e-6, ge=0)
    warmup_epochs: int = Field(10, ge=0)
    weight_decay: tuple[float, float] = (0.04, 0.2)
    teacher_momentum: float = Field(0.996, ge=0, le=1)
    patch_lr_scale: float = 0.2
    clip: tuple[tuple[int, float], ...] = ((0, 3.0),)
    freeze_prototypes_epochs: int = Field(1, ge=0)
    steps_per_epoch: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    mugs: MugsOptions = MugsOptions()
    views: ViewOptions = ViewOptions()
    max_images_per_step: int | None = Runtime(None, ge=1)
    loader: Literal["auto", "thread", "ffcv"] = Runtime("auto")
    renderer: Literal["fast", "reference"] = Runtime("fast")
    threads: int = Runtime(2, ge=1)
    checkpoint_steps: int = Runtime(500, ge=1)
    keep_checkpoints: int = Runtime(2, ge=1)
    keep_every_epochs: int = Runtime(0, ge=0)
    checkpoint_retry_minutes: float = Runtime(
        10.0, ge=0, le=20
    )  # below the patience of the other ranks
    log_steps: int = Runtime(10, ge=1)
    activation_checkpointing: bool = Runtime(False)
    compile: bool = Runtime(False)
    profile_steps: int = Runtime(0, ge=0)
    calibration: Literal["s100", "s300", "l250"] | None = Runtime(None)

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset") != "paper":
            return values
        return filled(values, paper(str(values.get("arch", cls.model_fields["arch"].default))))

    def state_gb(self) -> float:
        """Student, teacher and two moments in 32 bits: backbone of the usual shapes, heads and prototypes; queues."""
        width, depth = SHAPES.get(self.arch, OTHER)
        options = self.mugs
        heads = 3 * (
            width * options.head_hidden
            + options.head_hidden * (options.head_hidden + options.head_out)
        )
        parameters = (
            12 * width**2 * (depth + 1) + heads + options.num_prototypes * options.group_bottleneck
        )
        queues = 2 * (options.queue_size * options.head_out + options.memory_size * width)
        return 4 * (4 * parameters + queues) / 1e9

    def disk_gb(self, inputs: Mapping[str, StageConfig]) -> float:
        """The checkpoints that are kept, and one in the making."""
        milestones = self.epochs // self.keep_every_epochs if self.keep_every_epochs else 0
        return (self.keep_checkpoints + milestones + 1) * self.state_gb()

    def misfit(self, resources: Resources) -> str | None:
        """A batch that does not divide over the ranks, or a rank's share over its passes."""
        whole = self.mugs.head_norm == "batch"
        passes = uneven_passes(self.batch_size, resources, self.max_images_per_step, whole=whole)
        return uneven(self.batch_size, resources) or passes


def run(ctx: StageContext, cfg: PretrainConfig) -> StageOutput:
    """Train and export: outputs `teacher`, `student`, `initial` (backbones, safetensors), and `projection`.

    That is the first layer of the teacher's group head, left out where there is none.
    """
    from dataclasses import asdict

    from mugs import distributed
    from mugs.data.sources.open import open_source
    from mugs.methods import METHODS, MugsConfig
    from mugs.pretrain.train import pretrain
    from mugs.weights.backbone_file import write_backbone_file

    device = distributed.init_process_group()
    method = METHODS[cfg.method](MugsConfig(arch=cfg.arch, **cfg.mugs.model_dump()), seed=cfg.seed)
    method.accelerate(activation_checkpointing=cfg.activation_checkpointing, compile=cfg.compile)
    data = ctx.inputs["data"]
    arch = asdict(method.student.backbone.config)
    outputs = {
        name: ctx.run_dir / "weights" / f"{name}.safetensors"
        for name in ("initial", "teacher", "student")
    }

    def export(name: str) -> None:
        net = method.student if name == "student" else method.teacher
        state = {
            k: v
            for k, v in net.backbone.state_dict().items()
            if not k.startswith("relation_blocks.")
        }
        write_backbone_file(outputs[name], state, {"arch": arch, "weights": name})

    if distributed.is_main() and not outputs["initial"].exists():
        export("initial")
    pretrain(
        method,
        open_source(data.output("train")),
        train_config(cfg),
        ctx.run_dir,
        device,
        ctx.control,
    )
    if distributed.is_main():
        export("teacher")
        export("student")
    if (head := method.teacher.group_head) is not None:
        outputs["projection"] = ctx.run_dir / "weights" / "projection.safetensors"
        if distributed.is_main():
            write_backbone_file(
                outputs["projection"], head.projector[0].state_dict(), {"weights": "projection"}
            )
    distributed.barrier()
    info = {
        "method": cfg.method,
        "arch": cfg.arch,
        "shape": arch,
        "epochs": cfg.epochs,
        "seed": cfg.seed,
        "dataset": data.info["dataset"],
    }
    return StageOutput(outputs=outputs, info=info)


def train_config(cfg: PretrainConfig) -> "TrainConfig":
    """The engine's configuration."""
    from mugs.data.views.config import ViewRecipe
    from mugs.methods.calibration import load_calibration_targets
    from mugs.pretrain.config import TrainConfig
    from mugs.pretrain.step import StepConfig

    step = StepConfig(
        clip=cfg.clip,
        freeze_last_layer_epochs=cfg.freeze_prototypes_epochs,
        precision=cfg.precision,
    )
    views = ViewRecipe(**cfg.views.model_dump())
    return same_named(
        TrainConfig,
        cfg,
        step=step,
        views=views,
        calibration=load_calibration_targets(cfg.calibration),
    )
