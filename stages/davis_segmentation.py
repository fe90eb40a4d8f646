"""Video object segmentation on DAVIS-2017 by label propagation with frozen features."""

from typing import TYPE_CHECKING

from pydantic import Field, NonNegativeInt

from pipeline.spec import Runtime
from pipeline.stage import StageContext, StageOutput
from stages.shared.external_data import read_root
from stages.shared.frozen import Pretrained, load_vit, result_row

if TYPE_CHECKING:
    from mugs.transfer.video.propagation import PropagationRecipe


class DavisSegmentationConfig(Pretrained):
    """DINO's protocol. `num_previous` lists how many frames before the one at hand count: 7 in DINO and iBOT, 20 in the
    script of Mugs; each gives rows of its own. Other fields: `mugs.transfer.video.propagation.PropagationRecipe`.
    """

    num_previous: tuple[NonNegativeInt, ...] = Field((7, 20), min_length=1)
    num_neighbours: int = Field(5, ge=1)
    temperature: float = Field(0.1, gt=0)
    radius: int = Field(12, ge=0)
    short_side: int = Field(480, ge=1)
    multiple: int = Field(64, ge=1)
    num_pictures: int = Runtime(8, ge=0)


def run(ctx: StageContext, cfg: DavisSegmentationConfig) -> StageOutput:
    """Propagate for each number of frames; rows J&F, J and F, masks and pictures."""
    from mugs import distributed
    from mugs.data.dense.davis import VideoFolder
    from mugs.transfer.video.evaluate import CAPTION, evaluate_videos

    device = distributed.init_process_group()
    videos = VideoFolder(read_root(ctx))
    vit = load_vit(ctx, cfg.weights)
    outputs, rows, captions = {}, [], {}
    for previous in cfg.num_previous:
        folder = ctx.run_dir / f"previous_{previous}"
        recipe = propagation_recipe(cfg, previous)
        found = evaluate_videos(
            vit,
            videos,
            recipe,
            device,
            out_dir=folder,
            num_pictures=cfg.num_pictures,
            progress_path=ctx.run_dir / "progress.json",
        )
        distributed.barrier()
        outputs[f"masks_{previous}"] = folder / "masks"
        if cfg.num_pictures:
            outputs[f"pictures_n={previous}"] = folder / "pictures"
            captions[f"pictures_n={previous}"] = CAPTION.format(previous=previous)
        rows += [
            result_row(ctx, cfg.weights, setting=f"n={previous}", metric=metric, value=value)
            for metric, value in (("J&F", found.jf), ("J", found.j), ("F", found.f))
        ]
    info = {"dataset": ctx.inputs["data"].info["dataset"], "captions": captions}
    return StageOutput(outputs=outputs, rows=rows, info=info)


def propagation_recipe(cfg: DavisSegmentationConfig, num_previous: int) -> "PropagationRecipe":
    """The recipe with one number of previous frames."""
    from mugs.transfer.video.propagation import PropagationRecipe

    same = cfg.model_dump(exclude={"weights", "num_previous", "num_pictures"})
    return PropagationRecipe(num_previous=num_previous, **same)
