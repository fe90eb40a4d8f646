"""Pretraining: converted images -> teacher weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated

from pydantic import Field, PositiveFloat

from mugs.methods.config import METHODS, MethodSettings
from mugs.pretrain.config import TrainConfig
from pipeline.settings import Runtime
from pipeline.spec import Resources, StageConfig, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.batch_checks import check_batch_is_filled, check_even_batch, check_even_passes
from stages.shared.flops import count_pretraining, find_shape
from stages.shared.image_data import count_train_images

# Width and depth of each architecture, to estimate sizes without importing torch.
SHAPES = {
    "vit_s16": (384, 12),
    "vit_s16_h8": (384, 12),
    "vit_s16_h12": (384, 12),
    "vit_b16": (768, 12),
    "vit_b16_sincos": (768, 12),
    "vit_l16": (1024, 24),
    "vit_s8": (384, 12),
    "vit_b8": (768, 12),
}
OTHER = (192, 12)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(StageConfig, TrainConfig, MethodSettings):
    """A pretraining run. The defaults are those of the released ViT-S runs where these agree."""

    arch: str = "vit_s16"
    # Name of an experiment of your own; tables show its results in rows of that name.
    variant: Annotated[Runtime[str], Field(pattern=r"^[\w .+/=-]{0,40}$")] = ""
    base_lr: PositiveFloat = 8e-4
    activation_checkpointing: Runtime[bool] = False
    compile: Runtime[bool] = False

    def __post_init__(self) -> None:
        """Refuse views that the method cannot use."""
        super().__post_init__()
        self.options.check_views(self.views)

    def repeats_with_seed(self) -> bool:
        """Return True: a pretraining starts at random."""
        return True

    def complete_from(self, inputs: Mapping[str, StageConfig]) -> "PretrainConfig":
        """Fill in `steps_per_epoch`, one pass over the images, if their number is known."""
        images = count_train_images(inputs)
        if self.steps_per_epoch is not None or images is None:
            return self
        check_batch_is_filled(self.batch_size, images)
        return replace(self, steps_per_epoch=images // self.batch_size)

    def list_facts(self, inputs: Mapping[str, StageConfig]) -> list[str]:
        """Return epochs, steps, and passes over the images."""
        images = count_train_images(inputs)
        if self.steps_per_epoch is None or images is None:
            return []  # how many there are is known when they are there
        passes = self.steps_per_epoch * self.batch_size / images
        steps = f"{self.steps_per_epoch:,} steps of {self.batch_size} images"
        return [f"{self.epochs} epochs of {steps}: {passes:.2f} passes over {images:,} images each"]

    def list_remarks(self, inputs: Mapping[str, StageConfig]) -> list[str]:
        """Remark on epochs that are not one pass, and on a warm-up that does not end."""
        remarks = []
        images = count_train_images(inputs)
        # A step more or less than whole batches give is rounding: the released B-400 has 1,271.
        if self.steps_per_epoch is not None and images is not None:
            one_pass = images // self.batch_size
            if abs(self.steps_per_epoch - one_pass) > 1:
                passes = self.steps_per_epoch * self.batch_size / images
                advice = (
                    f"leave it out for one pass ({one_pass})"
                    if one_pass
                    else "a batch holds images twice"
                )
                remarks.append(
                    f"an epoch is {passes:.2f} passes over the images, "
                    f"because steps_per_epoch is {self.steps_per_epoch}; {advice}"
                )
        if self.warmup_epochs > self.epochs:
            remarks.append(
                f"the warm-up of {self.warmup_epochs} epochs is longer than the run of "
                f"{self.epochs}: the learning rate never reaches its peak"
            )
        if self.min_lr > self.peak_lr:
            remarks.append(
                f"min_lr {self.min_lr:g} exceeds the peak {self.peak_lr:g}: the learning rate rises"
            )
        if self.freeze_prototypes_epochs >= self.epochs:
            remarks.append(
                f"freeze_prototypes_epochs is {self.freeze_prototypes_epochs}, the run has "
                f"{self.epochs} epochs: the prototypes are never trained"
            )
        if late := [first for first, _ in self.clip if first >= self.epochs]:
            remarks.append(
                f"clip has a limit from epoch {late[0]} on, which a run of {self.epochs} epochs "
                "does not reach"
            )
        late_settings = self.options.list_late_settings(self.epochs)
        return [*remarks, *(f"{self.method}.{line}" for line in late_settings)]

    def check_image_counts(self, counts: Mapping[str, int]) -> None:
        """Require that the images fill a batch, unless the length of an epoch is set."""
        if self.steps_per_epoch is None and "train" in counts:
            check_batch_is_filled(self.batch_size, counts["train"])

    def estimate_checkpoint_gb(self) -> float:
        """Return the size of student, teacher and two optimizer moments in fp32, and the queues."""
        width, depth = SHAPES.get(self.arch, OTHER)
        parameters = self.options.count_parameters(width, depth)
        extra = self.options.count_extra_values(width)
        return 4 * (4 * parameters + extra) / 1e9

    def estimate_disk_gb(self, inputs: Mapping[str, StageConfig]) -> float:
        """Return the size of the checkpoints that are kept, and of one that is being written."""
        milestones = self.epochs // self.keep_every_epochs if self.keep_every_epochs else 0
        return (self.keep_checkpoints + milestones + 1) * self.estimate_checkpoint_gb()

    def estimate_flops(self, inputs: Mapping[str, StageConfig]) -> float | None:
        """Return the operations of all steps, if the architecture and their number are known."""
        shape = find_shape(self.arch)
        if shape is None or self.steps_per_epoch is None:
            return None
        views = self.views
        of_image = count_pretraining(
            shape, large=views.large_size, small=views.small_size, num_small=views.num_small
        )
        return of_image * self.batch_size * self.steps_per_epoch * self.epochs

    def check_resources(self, resources: Resources) -> None:
        """Require that the batch divides over the ranks, and each share into micro-batches."""
        check_even_batch(self.batch_size, resources)
        check_even_passes(
            self.batch_size,
            resources,
            self.micro_batch_size,
            single_pass=self.options.needs_whole_batch_per_rank,
        )


def run(ctx: StageContext, cfg: PretrainConfig) -> StageOutput:
    """Train and export: outputs `teacher`, `student`, `initial` (backbones) and `projection`.

    All are safetensors. `projection` is the first layer of the teacher's head, left out if the
    method has none that fine-tuning could start from.
    """
    from mugs import distributed
    from mugs.data.sources.open import open_source
    from mugs.pretrain.train import pretrain
    from mugs.weights.backbone_file import write_backbone_file

    device = distributed.init_process_group()
    method = METHODS[cfg.method].build(replace(cfg.options, arch=cfg.arch), seed=cfg.seed)
    method.accelerate(activation_checkpointing=cfg.activation_checkpointing, compile=cfg.compile)
    data = ctx.inputs["data"]
    arch = asdict(method.student.backbone.config)
    weights_dir = ctx.run_dir / "weights"
    outputs = {
        name: weights_dir / f"{name}.safetensors" for name in ("initial", "teacher", "student")
    }

    def export(name: str) -> None:
        net = method.student if name == "student" else method.teacher
        # Relation blocks serve the local-group loss only; evaluations use the plain ViT.
        state = {
            key: value
            for key, value in net.backbone.state_dict().items()
            if not key.startswith("relation_blocks.")
        }
        write_backbone_file(outputs[name], state, {"arch": arch, "weights": name})

    # Before training, and not again on a resume, when the networks are no longer the initial ones.
    if distributed.is_main() and not outputs["initial"].exists():
        export("initial")
    source = open_source(data.output("train"))
    pretrain(method, source, cfg, ctx.run_dir, device, ctx.control)
    projection = method.projection()
    if projection is not None:
        outputs["projection"] = weights_dir / "projection.safetensors"
    if distributed.is_main():
        export("teacher")
        export("student")
        if projection is not None:
            # Fine-tuning may start its head from this layer (`head.init: pretrained`).
            state = dict(projection.state_dict())
            write_backbone_file(outputs["projection"], state, {"weights": "projection"})
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


SPEC = StageSpec(
    name="pretrain",
    config=PretrainConfig,
    entrypoint="stages.pretrain:run",
    needs={"data": "convert"},
    resources=Resources(nodes=1, ranks_per_node=8, hours=36.0),
)
