"""Store frozen features of a data set once, for every evaluation that needs no augmentation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import PositiveInt

from pipeline.settings import FormerName, Runtime
from pipeline.spec import Resources, StageConfig, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.pretrain import OTHER, SHAPES
from stages.shared.frozen import (
    WEIGHTS,
    StoredFeatures,
    describe_backbone,
    load_vit,
    read_num_classes,
    trains_class_token,
)
from stages.shared.image_data import ConvertConfig, check_labeled


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(StoredFeatures):
    """Class tokens of the last blocks and the patch mean of the last, after the final LayerNorm.

    `dtype: fp16` halves the files; reported numbers are meant for fp32.
    """

    # Number of last blocks whose class tokens are stored.
    blocks: PositiveInt = 4
    # Precision of the stored features; reported numbers are meant for fp32.
    dtype: Literal["fp32", "fp16"] = "fp32"
    eval_batch_size: Annotated[Runtime[PositiveInt], FormerName("images_per_pass")] = 256
    # Images in one file.
    shard_images: Runtime[PositiveInt] = 16384
    threads: Runtime[PositiveInt] = 2

    def check_inputs(self, inputs: Mapping[str, StageConfig]) -> None:
        """Refuse a data set without labels or validation images, which evaluations need."""
        super().check_inputs(inputs)
        check_labeled(inputs)

    def estimate_disk_gb(self, inputs: Mapping[str, StageConfig]) -> float:
        """Return the size of all features, if the number of images is known."""
        data = inputs["data"]
        images = data.count_images() if isinstance(data, ConvertConfig) else 0
        width, _ = SHAPES.get(getattr(inputs["weights"], "arch", ""), OTHER)
        # An image has `blocks` class tokens and one patch mean, each of the backbone's width.
        return images * (self.blocks + 1) * width * (4 if self.dtype == "fp32" else 2) / 1e9


def run(ctx: StageContext, cfg: FeaturesConfig) -> StageOutput:
    """Write output `features`: a folder that `mugs.evaluation.feature_store.FeatureStore` reads."""
    from mugs import distributed
    from mugs.data.sources.open import open_source
    from mugs.evaluation.feature_store import StoreLayout, extract_split

    # Called first: a data set without labels is refused before anything is computed.
    classes = read_num_classes(ctx)
    device = distributed.init_process_group()
    vit = load_vit(ctx, cfg.weights).to(device)
    folder = ctx.run_dir / "features"
    for split in ("train", "val"):
        source = open_source(ctx.inputs["data"].output(split))
        layout = StoreLayout(
            images=len(source),
            fingerprint=source.fingerprint,
            blocks=cfg.blocks,
            dtype=cfg.dtype,
            resize=cfg.resize,
            crop=cfg.crop,
            shard_images=cfg.shard_images,
        )
        extract_split(
            vit,
            source,
            folder / split,
            layout,
            device=device,
            batch_size=cfg.eval_batch_size,
            threads=cfg.threads,
            progress_path=ctx.run_dir / "progress.json",
            control=ctx.control,
        )
    described = describe_backbone(ctx, cfg.weights)
    info = {
        **described,
        "num_classes": classes,
        # What figures show of them.
        "trained_feature": "cls" if trains_class_token(described["method"]) else "patch_mean",
    }
    return StageOutput(outputs={"features": folder}, info=info)


SPEC = StageSpec(
    name="features",
    config=FeaturesConfig,
    entrypoint="stages.features:run",
    needs={"data": "convert", "weights": WEIGHTS},
    resources=Resources(ranks_per_node=8, hours=2.0),
)
