"""Semantic segmentation: UPerNet on the pretrained ViT, or a linear layer on the frozen one (iBOT)."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from pipeline.spec import Resources, Runtime, StageConfig
from pipeline.stage import StageContext, StageOutput
from stages.shared.batch_checks import uneven
from stages.shared.external_data import read_root
from stages.shared.frozen import Pretrained, load_vit, result_row
from stages.shared.presets import same_named

if TYPE_CHECKING:
    from mugs.data.dense.ade20k import SceneFolder
    from mugs.models.vit import ViT
    from mugs.transfer.segmentation.config import SegmentationConfig

UPERNET = ("channels", "auxiliary_channels", "auxiliary_weight")


class SceneOptions(StageConfig):
    """Fields and defaults of `mugs.transfer.segmentation.recipe.SceneRecipe`, whose docstring explains them."""

    long_side: int = Field(2048, ge=1)
    short_side: int = Field(512, ge=1)
    ratio: tuple[float, float] = (0.5, 2.0)
    crop: int = Field(512, ge=1)
    max_class_share: float = Field(0.75, gt=0, le=1)
    flip_prob: float = Field(0.5, ge=0, le=1)
    photometric_prob: float = Field(0.5, ge=0, le=1)
    window: int = Field(512, ge=1)
    stride: int = Field(341, ge=1)


class Ade20kSegmentationConfig(Pretrained):
    """ViT-S/16 with UPerNet on ADE20K, as released, by default; ViT-B/16 has the same settings.

    `lr` and `layer_decay` are 3e-5 and 0.9 for UPerNet; the linear variant has 3e-5 for ViT-S, 7e-4 for
    ViT-B (iBOT's configuration) and no layer decay. `channels`: those of the UPerNet head, the ViT's width when null.
    """

    variant: Literal["upernet", "linear"] = "upernet"
    channels: int | None = Field(None, ge=1)
    auxiliary_channels: int = Field(256, ge=1)
    auxiliary_weight: float = Field(0.4, ge=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    drop_path: float = Field(0.1, ge=0, lt=1)
    scenes: SceneOptions = SceneOptions()
    steps: int = Field(160_000, ge=1)
    batch_size: int = Field(16, ge=2)
    lr: float = Field(3e-5, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    layer_decay: float = Field(0.9, gt=0, le=1)
    warmup_steps: int = Field(1500, ge=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: int = 0
    activation_checkpointing: bool = Runtime(False)
    workers: int = Runtime(8, ge=0)
    checkpoint_steps: int = Runtime(1000, ge=1)
    log_steps: int = Runtime(50, ge=1)
    num_pictures: int = Runtime(16, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _linear_defaults(cls, values: Any) -> Any:
        """The linear variant trains no ViT and has but one layer: what belongs to either means nothing there."""
        if not isinstance(values, dict) or values.get("variant") != "linear":
            return values
        frozen = {"layer_decay": 1.0, "drop_path": 0.0}
        upernet = {name: cls.model_fields[name].default for name in UPERNET}
        for name, off in {**frozen, **upernet}.items():
            if values.get(name, off) != off:
                why = "whose ViT is frozen" if name in frozen else "which is one layer"
                raise ValueError(f"{name} {values[name]} with variant linear, {why}: leave it out")
        return {**values, **frozen}

    def misfit(self, resources: Resources) -> str | None:
        """A batch that does not divide over the ranks."""
        return uneven(self.batch_size, resources)


def run(ctx: StageContext, cfg: Ade20kSegmentationConfig) -> StageOutput:
    """Train and test; rows mIoU, mAcc and aAcc, the segmenter's weights and pictures of the first images."""
    from mugs import distributed
    from mugs.data.dense.pictures import hex_colors
    from mugs.transfer.segmentation.evaluate import CAPTION, evaluate_scenes
    from mugs.transfer.segmentation.model import build_segmenter
    from mugs.transfer.segmentation.train import SegmentationTraining
    from mugs.weights.backbone_file import write_backbone_file

    device = distributed.init_process_group()
    data = ctx.inputs["data"].info
    config = segmentation_config(cfg, data["num_classes"])
    model = build_segmenter(trainable_vit(ctx, cfg), config.model, seed=cfg.seed)
    SegmentationTraining(model, open_scenes(ctx, "train"), config, ctx.run_dir, device).train(
        ctx.control
    )
    found = evaluate_scenes(
        model,
        open_scenes(ctx, "val"),
        config,
        device,
        run_dir=ctx.run_dir,
        num_pictures=cfg.num_pictures,
    )
    outputs = {"segmenter": ctx.run_dir / "weights" / "segmenter.safetensors"}
    if distributed.is_main():
        write_backbone_file(
            outputs["segmenter"],
            model.state_dict(),
            {"variant": cfg.variant, "classes": data["num_classes"]},
        )
    distributed.barrier()
    info: dict[str, Any] = {"dataset": data["dataset"]}
    if cfg.num_pictures:
        outputs["pictures"] = ctx.run_dir / "pictures"
        colours = hex_colors(data.get("class_names", ()), first=1)
        info |= {"captions": {"pictures": CAPTION}, "colours": {"pictures": colours}}
    setting = f"{cfg.variant}, lr={cfg.lr:g}, layer decay={cfg.layer_decay:g}"
    rows = [
        result_row(ctx, cfg.weights, setting=setting, metric=metric, value=value)
        for metric, value in (("mIoU", found.miou), ("mAcc", found.macc), ("aAcc", found.aacc))
    ]
    return StageOutput(outputs=outputs, rows=rows, info=info)


def trainable_vit(ctx: StageContext, cfg: Ade20kSegmentationConfig) -> "ViT":
    """The pretrained ViT with the position table of a crop. Raises ValueError for a crop that patches do not fill."""
    vit = load_vit(ctx, cfg.weights, drop_path=cfg.drop_path).requires_grad_(True)
    patch, crop = vit.config.patch_size, cfg.scenes.crop
    cells, rest = divmod(crop, patch)
    if rest or cells < 2:
        raise ValueError(
            f"scenes.crop {crop}: expected a multiple of the patch size {patch}, twice or more"
        )
    vit.set_position_grid(cells, cells)
    vit.activation_checkpointing = cfg.activation_checkpointing
    return vit


def open_scenes(ctx: StageContext, split: str) -> "SceneFolder":
    """A split where the check found it."""
    from mugs.data.dense.ade20k import SceneFolder

    info = ctx.inputs["data"].info
    return SceneFolder(
        read_root(ctx), split, num_classes=info["num_classes"], reduce_zero=info["reduce_zero"]
    )


def segmentation_config(cfg: Ade20kSegmentationConfig, num_classes: int) -> "SegmentationConfig":
    """The engine's configuration."""
    from mugs.transfer.segmentation.config import SegmentationConfig
    from mugs.transfer.segmentation.model import SegmenterConfig
    from mugs.transfer.segmentation.recipe import SceneRecipe

    model = same_named(SegmenterConfig, cfg, num_classes=num_classes)
    return same_named(
        SegmentationConfig, cfg, model=model, scenes=SceneRecipe(**cfg.scenes.model_dump())
    )
