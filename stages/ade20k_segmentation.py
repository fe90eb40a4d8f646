"""Semantic segmentation: UPerNet or Semantic FPN on the pretrained ViT, or a linear layer on the
frozen ViT.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, NonNegativeInt, model_validator

from mugs.transfer.segmentation.config import SegmentationConfig
from pipeline.settings import Runtime
from pipeline.spec import Resources, StageConfig, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.batch_checks import check_even_batch
from stages.shared.external_data import read_data_root
from stages.shared.frozen import (
    WEIGHTS,
    Pretrained,
    build_result_rows,
    describe_standard_errors,
    load_vit,
)

if TYPE_CHECKING:
    from mugs.data.dense.ade20k import SceneFolder
    from mugs.models.vit import ViT

VIT = ("layer_decay", "drop_path")
AUXILIARY = ("auxiliary_channels", "auxiliary_weight")


@dataclass(frozen=True, kw_only=True)
class Ade20kSegmentationConfig(Pretrained, SegmentationConfig):
    """ViT-S/16 with UPerNet on ADE20K, as released, by default.

    The linear variant on the frozen ViT is iBOT's, and so are the settings of ViT-B/16 in the
    bundled reproduction: Mugs was not released with others. Semantic FPN is MGC's.
    """

    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    activation_checkpointing: Runtime[bool] = False
    num_pictures: Runtime[NonNegativeInt] = 16

    def rate_follows_batch(self) -> bool:
        """Return that it does not: `lr` is for the released batch size."""
        return False

    def list_remarks(self, inputs: Mapping[str, StageConfig]) -> list[str]:
        """Remark on a warm-up that does not end."""
        if self.warmup_steps <= self.steps:
            return []
        return [
            f"the warm-up of {self.warmup_steps} steps is longer than the run of {self.steps}: "
            "the learning rate never reaches its peak"
        ]

    @model_validator(mode="before")
    @classmethod
    def _refuse_unused_settings(cls, values: Any) -> Any:
        """Refuse settings of parts that a variant does not have.

        The linear variant freezes the ViT and is one layer; Semantic FPN has no auxiliary head.
        """
        variant = values.get("variant") if isinstance(values, dict) else None
        if variant not in ("linear", "semantic_fpn"):
            return values
        off = {name: getattr(cls, name) for name in AUXILIARY}
        # They are turned off, so that records show what happened.
        frozen = {"layer_decay": 1.0, "drop_path": 0.0, "dropout": 0.0}
        if variant == "linear":
            off |= {**frozen, "channels": None, "decay": "matrices"}
        for name, value in off.items():
            if values.get(name, value) != value:
                why = "whose ViT is frozen" if name in VIT else "which is one layer"
                if variant == "semantic_fpn":
                    why = "which has no auxiliary head"
                raise ValueError(
                    f"{name} {values[name]} with variant {variant}, {why}: leave it out"
                )
        return {**values, **frozen} if variant == "linear" else values

    def check_resources(self, resources: Resources) -> None:
        """Require that the batch divides over the ranks."""
        check_even_batch(self.batch_size, resources)


def run(ctx: StageContext, cfg: Ade20kSegmentationConfig) -> StageOutput:
    """Train and test; rows mIoU, mAcc and aAcc.

    Outputs `segmenter`, its weights, and `pictures` of the first images.
    """
    from mugs import distributed
    from mugs.data.dense.pictures import hex_colors
    from mugs.transfer.segmentation.evaluate import (
        CAPTION,
        estimate_errors,
        evaluate_scenes,
        merge_parts,
    )
    from mugs.transfer.segmentation.model import build_segmenter
    from mugs.transfer.segmentation.train import SegmentationTraining
    from mugs.weights.backbone_file import write_backbone_file

    device = distributed.init_process_group()
    data = ctx.inputs["data"].info
    config = replace(cfg, num_classes=data["num_classes"])
    model = build_segmenter(load_trainable_vit(ctx, cfg), config, seed=cfg.seed)
    training = SegmentationTraining(model, open_scenes(ctx, "train"), config, ctx.run_dir, device)
    training.train(ctx.control)
    found = evaluate_scenes(
        model,
        open_scenes(ctx, "val"),
        config,
        device,
        run_dir=ctx.run_dir,
        num_pictures=cfg.num_pictures,
    )
    setting = f"{cfg.variant}, lr={cfg.lr:g}, layer decay={cfg.layer_decay:g}"
    info: dict[str, Any] = {"dataset": data["dataset"]}
    outputs = {"segmenter": ctx.run_dir / "weights" / "segmenter.safetensors"}
    # All ranks have written their part of the results per image.
    distributed.barrier()
    if distributed.is_main():
        outputs["per_image"] = ctx.run_dir / "per_image.npz"
        errors = estimate_errors(merge_parts(ctx.run_dir, outputs["per_image"]))
        named = {"mIoU": errors.miou, "mAcc": errors.macc, "aAcc": errors.aacc}
        info |= describe_standard_errors({setting: named})
        meta = {"variant": cfg.variant, "classes": data["num_classes"]}
        write_backbone_file(outputs["segmenter"], model.state_dict(), meta)
    # The file has to be complete before any rank returns and the run is recorded.
    distributed.barrier()
    if cfg.num_pictures:
        outputs["pictures"] = ctx.run_dir / "pictures"
        # Color 0 is not drawn, so label 0 has color 1.
        colors = hex_colors(data.get("class_names", ()), first=1)
        # The key is spelled as reports of earlier runs have it.
        info |= {"captions": {"pictures": CAPTION}, "colours": {"pictures": colors}}
    values = [("mIoU", found.miou), ("mAcc", found.macc), ("aAcc", found.aacc)]
    return StageOutput(
        outputs=outputs, rows=build_result_rows(ctx, cfg.weights, setting, values), info=info
    )


def load_trainable_vit(ctx: StageContext, cfg: Ade20kSegmentationConfig) -> "ViT":
    """Return the pretrained ViT with the position table of a crop.

    Raises:
        ValueError: the crop is not a multiple of the patch size, or too small.
    """
    vit = load_vit(ctx, cfg.weights, drop_path=cfg.drop_path).requires_grad_(True)
    patch = vit.config.patch_size
    crop = cfg.scenes.crop
    cells, rest = divmod(crop, patch)
    if rest or cells < 2:
        raise ValueError(
            f"scenes.crop {crop}: expected a multiple of the patch size {patch}, twice or more"
        )
    # The table is resized once, so that training learns the positions of a crop.
    vit.set_position_grid(cells, cells)
    vit.activation_checkpointing = cfg.activation_checkpointing
    return vit


def open_scenes(ctx: StageContext, split: str) -> "SceneFolder":
    """Return a split from where the data stage found it."""
    from mugs.data.dense.ade20k import SceneFolder

    info = ctx.inputs["data"].info
    return SceneFolder(
        read_data_root(ctx),
        split,
        num_classes=info["num_classes"],
        reduce_zero=info["reduce_zero"],
        # Runs of before there was another one do not state it.
        layout=info.get("layout", "ade20k"),
    )


SPEC = StageSpec(
    name="ade20k_segmentation",
    config=Ade20kSegmentationConfig,
    entrypoint="stages.ade20k_segmentation:run",
    needs={"data": "ade20k_data", "weights": WEIGHTS},
    resources=Resources(ranks_per_node=4, hours=24.0),
)
