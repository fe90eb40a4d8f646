"""Pretraining: converted images -> teacher weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from pydantic import PositiveFloat

from mugs.methods.config import MugsConfig
from mugs.pretrain.config import TrainConfig
from pipeline.settings import Runtime
from pipeline.spec import Resources, StageConfig, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.batch_checks import explain_uneven_batch, uneven_passes

SHAPES = {"vit_s16": (384, 12), "vit_b16": (768, 12), "vit_l16": (1024, 24)}  # width, depth
OTHER = (192, 12)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(StageConfig, TrainConfig):
    """A pretraining run. Defaults are those of the released ViT-S runs where these agree."""

    method: Literal["mugs"] = "mugs"
    arch: str = "vit_s16"
    base_lr: PositiveFloat = 8e-4
    mugs: MugsConfig = field(default_factory=MugsConfig)
    activation_checkpointing: Runtime[bool] = False
    compile: Runtime[bool] = False

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
        passes = uneven_passes(self.batch_size, resources, self.micro_batch_size, whole=whole)
        return explain_uneven_batch(self.batch_size, resources) or passes


def run(ctx: StageContext, cfg: PretrainConfig) -> StageOutput:
    """Train and export: outputs `teacher`, `student`, `initial` (backbones, safetensors), and `projection`.

    That is the first layer of the teacher's group head, left out where there is none.
    """
    from mugs import distributed
    from mugs.data.sources.open import open_source
    from mugs.methods.registry import METHODS
    from mugs.pretrain.train import pretrain
    from mugs.weights.backbone_file import write_backbone_file

    device = distributed.init_process_group()
    method = METHODS[cfg.method](replace(cfg.mugs, arch=cfg.arch), seed=cfg.seed)
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
        cfg,
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


SPEC = StageSpec(
    name="pretrain",
    config=PretrainConfig,
    entrypoint="stages.pretrain:run",
    needs={"data": "convert"},
    resources=Resources(nodes=1, ranks_per_node=8, hours=36.0),
)
