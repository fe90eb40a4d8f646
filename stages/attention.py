"""Draw attention maps of the class token on some validation images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, PositiveInt

from pipeline.spec import Resources, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.frozen import WEIGHTS, Backbone, describe_backbone, load_vit


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(Backbone):
    """Maps of `num_images` validation images, spread evenly, or of those in `images`.

    The combined map shows the patches that hold a share `keep` of a head's attention. The map and
    the 480 pixels are DINO's.
    """

    resize: PositiveInt = 480
    crop: PositiveInt = 480
    # Share of the attention that the highlighted patches hold.
    keep: Annotated[float, Field(gt=0, le=1)] = 0.6
    # Number of images, spread over the validation images.
    num_images: PositiveInt = 8
    # Positions of the images to draw, instead of `num_images`.
    images: tuple[int, ...] = ()

    def check_image_counts(self, counts: Mapping[str, int]) -> None:
        """Require that the images to draw exist."""
        if "val" in counts:
            choose_images(self, counts["val"])


def run(ctx: StageContext, cfg: AttentionConfig) -> StageOutput:
    """Write output `pictures`: a PNG file per image.

    Raises:
        ValueError: an image does not exist, or the crop is not a multiple of the patch size.
    """
    from mugs import distributed
    from mugs.data.sources.open import open_source
    from mugs.evaluation.attention import CAPTION, draw_attention

    data = ctx.inputs["data"]
    # Labels are not needed here, so `read_num_classes` would refuse too much.
    if "val" not in data.outputs:
        raise ValueError(
            f"data set {data.info['dataset']!r} has no validation images, "
            "which stage attention needs"
        )
    device = distributed.init_process_group()
    vit = load_vit(ctx, cfg.weights).to(device)
    if cfg.crop % vit.config.patch_size:
        raise ValueError(
            f"crop {cfg.crop}: expected a multiple of the patch size {vit.config.patch_size}"
        )
    source = open_source(data.output("val"))
    folder = ctx.run_dir / "pictures"
    draw_attention(
        vit,
        source,
        choose_images(cfg, len(source)),
        folder,
        resize=cfg.resize,
        crop=cfg.crop,
        keep=cfg.keep,
        device=device,
        progress_path=ctx.run_dir / "progress.json",
    )
    # Ranks draw different images; rank 0 records the folder once all are there.
    distributed.barrier()
    caption = CAPTION.format(keep=cfg.keep, heads=vit.config.num_heads)
    return StageOutput(
        outputs={"pictures": folder},
        info={**describe_backbone(ctx, cfg.weights), "captions": {"pictures": caption}},
    )


def choose_images(cfg: AttentionConfig, count: int) -> list[int]:
    """Return the positions of the images to draw.

    Raises:
        ValueError: the data set does not have that many images.
    """
    if wrong := [index for index in cfg.images if not 0 <= index < count]:
        raise ValueError(f"images {wrong[0]}: the data set has validation images 0 to {count - 1}")
    if not cfg.images and cfg.num_images > count:
        raise ValueError(f"num_images {cfg.num_images}: the data set has {count} validation images")
    # Images of a folder are sorted by class, so even spacing shows different classes.
    spread = [number * count // cfg.num_images for number in range(cfg.num_images)]
    return list(cfg.images) or spread


SPEC = StageSpec(
    name="attention",
    config=AttentionConfig,
    entrypoint="stages.attention:run",
    needs={"data": "convert", "weights": WEIGHTS},
    resources=Resources(ranks_per_node=1, hours=0.5),
)
