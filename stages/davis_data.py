"""DAVIS-2017 where it lies: videos, frames and masks checked, before GPUs are spent on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt

from pipeline.settings import RequiredAtRun, Runtime
from pipeline.spec import Resources, StageConfig, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.external_data import Report, check_external_data, register_external_data


@dataclass(frozen=True, kw_only=True)
class DavisDataConfig(StageConfig):
    """What the data set is. Its name and counts are its identity; where it lies does not enter the run id.

    `data_dir` holds `ImageSets/2017/val.txt`, `JPEGImages/480p/` and `Annotations/480p/`.
    """

    dataset: Annotated[str, Field(min_length=1)] = "davis2017"
    # Expected number of validation videos.
    num_videos: PositiveInt = 30
    # Expected number of their frames.
    num_frames: Annotated[int, Field(ge=3)] = 1999
    data_dir: RequiredAtRun[str | None] = None
    threads: Runtime[PositiveInt] = 8


def preflight(cfg: DavisDataConfig, inputs: Mapping[str, StageConfig]) -> tuple[str, float]:
    """Number of videos and frames; nothing is written. Raises SourceError as `run` would."""
    return check_external_data(cfg.data_dir, "videos", partial(check_video_files, cfg))


def check_video_files(cfg: DavisDataConfig, root: Path, report: Report) -> dict[str, int]:
    """Read all videos and count them. Raises SourceError naming what is wrong."""
    from mugs.data.dense.davis import VideoFolder, check_videos

    check_videos(
        VideoFolder(root), cfg.num_videos, cfg.num_frames, threads=cfg.threads, report=report
    )
    return {"videos": cfg.num_videos, "frames": cfg.num_frames}


def run(ctx: StageContext, cfg: DavisDataConfig) -> StageOutput:
    """Check the validation videos; output `layout` says where they lie."""
    from mugs.data.mini.scenes_and_videos import materialize_videos

    materialize = partial(
        materialize_videos, videos=cfg.num_videos, frames=cfg.num_frames // cfg.num_videos
    )
    outputs, _ = register_external_data(
        ctx, cfg.data_dir, "videos", materialize, partial(check_video_files, cfg)
    )
    return StageOutput(outputs=outputs, info={"dataset": cfg.dataset})


SPEC = StageSpec(
    name="davis_data",
    config=DavisDataConfig,
    entrypoint="stages.davis_data:run",
    preflight="stages.davis_data:preflight",
    resources=Resources(gpu=False, cpus_per_rank=16, hours=1.0),
)
