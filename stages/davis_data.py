"""Check DAVIS-2017 in place: videos, frames and masks, before GPUs are spent on it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, PositiveInt

from pipeline.spec import Label, Resources, StageSpec
from pipeline.stage import StageContext, StageOutput
from stages.shared.external_data import ExternalDataConfig, Report, register_external_data


@dataclass(frozen=True, kw_only=True)
class DavisDataConfig(ExternalDataConfig):
    """A data set of videos; its name and counts are in the run id, its location is not.

    `data_dir` holds `ImageSets/2017/val.txt`, `JPEGImages/480p/` and `Annotations/480p/`.
    """

    kind: ClassVar[str] = "videos"

    dataset: Label = "davis2017"
    # Expected number of validation videos.
    num_videos: PositiveInt = 30
    # Expected number of their frames.
    num_frames: Annotated[int, Field(ge=3)] = 1999

    def check_files(self, root: Path, report: Report) -> dict[str, int]:
        """Read all videos and count them."""
        from mugs.data.dense.davis import VideoFolder, check_videos

        check_videos(
            VideoFolder(root), self.num_videos, self.num_frames, threads=self.threads, report=report
        )
        return {"videos": self.num_videos, "frames": self.num_frames}

    def write_builtin(self, root: Path) -> None:
        """Write videos of moving digits, all of the same length."""
        from mugs.data.mini.scenes_and_videos import materialize_videos

        materialize_videos(root, videos=self.num_videos, frames=self.num_frames // self.num_videos)


def run(ctx: StageContext, cfg: DavisDataConfig) -> StageOutput:
    """Check the validation videos; output `layout` says where they are."""
    # Label propagation trains nothing, so the training videos are not read (E6).
    outputs, _ = register_external_data(ctx, cfg)
    return StageOutput(outputs=outputs, info={"dataset": cfg.dataset})


SPEC = StageSpec(
    name="davis_data",
    config=DavisDataConfig,
    entrypoint="stages.davis_data:run",
    preflight="stages.shared.external_data:check_external_data",
    resources=Resources(gpu=False, cpus_per_rank=16, hours=1.0),
)
