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
from stages.shared.batch_checks import check_even_batch, check_even_passes

# Width and depth of each architecture, to estimate sizes without importing torch.
SHAPES = {"vit_s16": (384, 12), "vit_b16": (768, 12), "vit_l16": (1024, 24)}
OTHER = (192, 12)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(StageConfig, TrainConfig):
    """A pretraining run. The defaults are those of the released ViT-S runs where these agree."""

    method: Literal["mugs"] = "mugs"
    arch: str = "vit_s16"
    base_lr: PositiveFloat = 8e-4
    mugs: MugsConfig = field(default_factory=MugsConfig)
    activation_checkpointing: Runtime[bool] = False
    compile: Runtime[bool] = False

    def estimate_checkpoint_gb(self) -> float:
        """Return the size of student, teacher and two optimizer moments in fp32, and the queues."""
        width, depth = SHAPES.get(self.arch, OTHER)
        mugs = self.mugs
        # A block has 12 width^2 weights: 4 in attention, 8 in the MLP. The extra one is the
        # relation block.
        backbone = 12 * width**2 * (depth + 1)
        # Three projection heads (instance, local group, group), then the group's prototypes.
        layers = width + mugs.head_hidden + mugs.head_out
        heads = 3 * mugs.head_hidden * layers + mugs.num_prototypes * mugs.group_bottleneck
        # Queues of the instance and the local-group loss, memories of student and teacher.
        queues = 2 * (mugs.queue_size * mugs.head_out + mugs.memory_size * width)
        return 4 * (4 * (backbone + heads) + queues) / 1e9

    def estimate_disk_gb(self, inputs: Mapping[str, StageConfig]) -> float:
        """Return the size of the checkpoints that are kept, and of one that is being written."""
        milestones = self.epochs // self.keep_every_epochs if self.keep_every_epochs else 0
        return (self.keep_checkpoints + milestones + 1) * self.estimate_checkpoint_gb()

    def check_resources(self, resources: Resources) -> None:
        """Require that the batch divides over the ranks, and each share into micro-batches."""
        check_even_batch(self.batch_size, resources)
        check_even_passes(
            self.batch_size,
            resources,
            self.micro_batch_size,
            single_pass=self.mugs.head_norm == "batch",
        )


def run(ctx: StageContext, cfg: PretrainConfig) -> StageOutput:
    """Train and export: outputs `teacher`, `student`, `initial` (backbones) and `projection`.

    All are safetensors. `projection` is the first layer of the teacher's group head, left out if
    the method has no group head.
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
    head = method.teacher.group_head
    if head is not None:
        outputs["projection"] = weights_dir / "projection.safetensors"
    if distributed.is_main():
        export("teacher")
        export("student")
        if head is not None:
            # Fine-tuning may start its head from this layer (`head.init: pretrained`).
            projection = head.projector[0].state_dict()
            write_backbone_file(outputs["projection"], projection, {"weights": "projection"})
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
