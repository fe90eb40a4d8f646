"""Video object segmentation on DAVIS-2017 by label propagation with frozen features."""

from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field, NonNegativeInt

from mugs.transfer.video.config import PropagationRecipe
from pipeline.settings import Runtime
from pipeline.spec import Resources, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.external_data import read_data_root
from stages.shared.frozen import (
    WEIGHTS,
    Pretrained,
    build_result_rows,
    describe_standard_errors,
    load_vit,
)


@dataclass(frozen=True, kw_only=True)
class DavisSegmentationConfig(Pretrained, PropagationRecipe):
    """Label propagation. DINO and iBOT use 7 previous frames, the script of Mugs 20 (E6)."""

    # Numbers of previous frames that are compared; each gives rows of its own (E6).
    num_previous: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (7, 20)
    num_pictures: Runtime[NonNegativeInt] = 8


def run(ctx: StageContext, cfg: DavisSegmentationConfig) -> StageOutput:
    """Propagate for each number of frames; rows J&F, J and F, outputs masks and pictures."""
    from mugs import distributed
    from mugs.data.dense.davis import VideoFolder
    from mugs.transfer.video.evaluate import CAPTION, estimate_errors, evaluate_videos

    device = distributed.init_process_group()
    videos = VideoFolder(read_data_root(ctx))
    vit = load_vit(ctx, cfg.weights)
    outputs = {}
    rows = []
    captions = {}
    errors = {}
    for previous in cfg.num_previous:
        folder = ctx.run_dir / f"previous_{previous}"
        found = evaluate_videos(
            vit,
            videos,
            replace(cfg, previous_frames=previous),
            device,
            out_dir=folder,
            num_pictures=cfg.num_pictures,
            progress_path=ctx.run_dir / "progress.json",
        )
        # Ranks share the videos; a folder is an output once all of them have written it.
        distributed.barrier()
        outputs[f"masks_{previous}"] = folder / "masks"
        outputs[f"scores_{previous}"] = folder / "scores"
        spread = estimate_errors(folder, videos)
        errors[f"n={previous}"] = {"J&F": spread.jf, "J": spread.j, "F": spread.f}
        if cfg.num_pictures:
            # Reports show the label, so it says which setting the pictures belong to.
            label = f"pictures_n={previous}"
            outputs[label] = folder / "pictures"
            captions[label] = CAPTION.format(previous=previous)
        values = [("J&F", found.jf), ("J", found.j), ("F", found.f)]
        rows += build_result_rows(ctx, cfg.weights, f"n={previous}", values)
    return StageOutput(
        outputs=outputs,
        rows=rows,
        info={
            "dataset": ctx.inputs["data"].info["dataset"],
            "captions": captions,
            **describe_standard_errors(errors),
        },
    )


SPEC = StageSpec(
    name="davis_segmentation",
    config=DavisSegmentationConfig,
    entrypoint="stages.davis_segmentation:run",
    needs={"data": "davis_data", "weights": WEIGHTS},
    resources=Resources(ranks_per_node=1, hours=2.0),
)
