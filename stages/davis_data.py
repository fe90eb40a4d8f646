"""DAVIS-2017 where it lies: videos, frames and masks checked, before GPUs are spent on it."""

from collections.abc import Mapping
from functools import partial

from pydantic import Field

from pipeline.spec import Runtime, StageConfig, StageContext, StageOutput
from stages.located import folder, locate, write_root


class DavisDataConfig(StageConfig):
    """What the data set is. Its name and counts are its identity; where it lies does not enter the run id.

    `data_dir` holds `ImageSets/2017/val.txt`, `JPEGImages/480p/` and `Annotations/480p/`.
    """

    dataset: str = Field("davis2017", min_length=1)
    num_videos: int = Field(30, ge=1)
    num_frames: int = Field(1999, ge=3)
    data_dir: str | None = Runtime(None, required_at_run=True)
    threads: int = Runtime(8, ge=1)


def preflight(cfg: DavisDataConfig, inputs: Mapping[str, StageConfig]) -> tuple[str, float]:
    """Number of videos; nothing is written. Raises SourceError as `run` would."""
    from mugs.transfer.davis import VideoFolder, check_videos

    root = folder(cfg.data_dir, "videos")
    if root is None:
        return "videos of the digits that come with scikit-learn", 0.0
    check_videos(VideoFolder(root), cfg.num_videos, cfg.num_frames, threads=cfg.threads, report=lambda done: None)
    return f"{cfg.num_videos} videos, {cfg.num_frames:,} frames", 0.0


def run(ctx: StageContext, cfg: DavisDataConfig) -> StageOutput:
    """Check the validation videos; output `layout` says where they lie."""
    from mugs.engine.progress import Progress
    from mugs.transfer.davis import VideoFolder, check_videos
    from mugs.transfer.digit_scenes import materialize_videos

    materialize = partial(materialize_videos, videos=cfg.num_videos, frames=cfg.num_frames // cfg.num_videos)
    root, outputs = locate(ctx, cfg.data_dir, "videos", materialize)
    progress = Progress("check", cfg.num_videos, unit="videos", path=ctx.run_dir / "progress.json")
    check_videos(VideoFolder(root), cfg.num_videos, cfg.num_frames, threads=cfg.threads, report=progress.update)
    progress.close()
    outputs["layout"] = write_root(ctx.run_dir, root)
    return StageOutput(outputs=outputs, info={"dataset": cfg.dataset})
