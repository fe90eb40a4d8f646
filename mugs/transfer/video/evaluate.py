"""Label propagation over all videos, shared out to the ranks, and its scores."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mugs import distributed
from mugs.data.dense.davis import VideoFolder, one_hot_patches, read_frame, resize_map
from mugs.data.dense.pictures import GAP, label_colors, overlay_labels, save_png, side_by_side
from mugs.data.sources.decode import decode_rgb
from mugs.engine.progress import Progress
from mugs.models.vit import ViT
from mugs.transfer.video.config import PropagationRecipe
from mugs.transfer.video.j_and_f import VideoScores, average_scores, score_objects
from mugs.transfer.video.propagation import (
    frame_features,
    frame_size,
    harden_labels,
    propagate_labels,
)
from pipeline.files import replace_atomically

logger = logging.getLogger(__name__)
SHOWN = (0.0, 0.25, 0.5, 0.75, 1.0)  # places in a video
CAPTION = (
    "Five frames of a video, first to last; above the masks that were propagated, each from the first frame and the "
    "{previous} before it, below the truth. Every object has a colour of its own."
)


@torch.no_grad()
def evaluate_videos(
    vit: ViT,
    videos: VideoFolder,
    recipe: PropagationRecipe,
    device: torch.device,
    *,
    out_dir: Path,
    num_pictures: int = 0,
    progress_path: Path | None = None,
) -> VideoScores:
    """Propagate, score and write `out_dir/masks/<video>/<frame>.png`; the first videos go to `out_dir/pictures` too.

    Every rank takes every world-th video; the scores of all objects, the same on all ranks, are averaged once.
    """
    vit = vit.to(device).eval()
    mine = range(distributed.rank(), len(videos), distributed.world_size())
    progress = Progress(
        "video segmentation",
        len(mine),
        unit="videos",
        rate_unit="frames/s",
        path=progress_path,
        quiet=not distributed.is_main(),
    )
    tables: dict[int, np.ndarray] = {}
    for done, index in enumerate(mine, 1):
        video = videos.names[index]
        truth = videos.masks(video)
        predicted = segment_video(vit, videos, video, truth[0], recipe, device)
        tables[index] = score_objects(predicted, truth, int(truth[0].max()))
        write_masks(out_dir / "masks" / video, videos.frames(video), predicted)
        if index < num_pictures:
            save_png(
                out_dir / "pictures" / f"{video}.png",
                compose_video_picture(videos.frames(video), predicted, truth),
            )
        progress.update(
            done, items=len(truth), detail=f"{video} J&F {100 * tables[index].mean():.1f}"
        )
    progress.close()
    return average_scores(gather_scores(tables, len(videos), device))


def segment_video(
    vit: ViT,
    videos: VideoFolder,
    video: str,
    first: np.ndarray,
    recipe: PropagationRecipe,
    device: torch.device,
) -> np.ndarray:
    """Object numbers (T, H, W), uint8, of a video whose first map is given."""
    frames, patch = videos.frames(video), vit.config.patch_size
    height, width = first.shape
    size = frame_size(height, width, recipe)
    grid = size[0] // patch, size[1] // patch
    start = one_hot_patches(first, grid, int(first.max())).to(device)

    def features() -> Iterator[Tensor]:
        for frame in frames:
            yield frame_features(vit, read_frame(frame, size, recipe.mean, recipe.std).to(device))

    soft = propagate_labels(features(), start, grid, recipe)
    later = [resize_map(harden_labels(labels, grid, patch), height, width) for labels in soft]
    return np.stack([first, *later])


def gather_scores(
    tables: dict[int, np.ndarray], num_videos: int, device: torch.device
) -> np.ndarray:
    """Scores (n, 2) of the objects of all videos in order, from those of each rank's videos."""
    most = max((len(table) for table in tables.values()), default=0)
    width = int(distributed.all_gather_rows(torch.tensor([most], device=device)).max())
    mine = torch.full((num_videos, width, 2), float("nan"), dtype=torch.float64, device=device)
    for index, table in tables.items():
        mine[index, : len(table)] = torch.from_numpy(table).to(device)
    ranks = distributed.all_gather_rows(mine[None])
    rows = ranks.nan_to_num(-1.0).amax(dim=0).flatten(0, 1)
    return rows[rows[:, 0] >= 0].cpu().numpy()


def write_masks(folder: Path, frames: list[Path], masks: np.ndarray) -> None:
    """Masks as palette PNG files, the form in which DAVIS' evaluators read them."""
    for frame, mask in zip(frames, masks, strict=True):
        image = Image.fromarray(mask)
        image.putpalette(label_colors().flatten().tolist())
        with replace_atomically(folder / f"{frame.stem}.png") as temporary:
            image.save(temporary, format="PNG")


def compose_video_picture(
    frames: list[Path], predicted: np.ndarray, truth: np.ndarray
) -> np.ndarray:
    """Some frames in a row with what was propagated over them, the truth below."""
    places = [round(share * (len(frames) - 1)) for share in SHOWN]
    images = [np.asarray(decode_rgb(frames[i].read_bytes(), str(frames[i]))) for i in places]
    lines = [
        side_by_side(
            [
                overlay_labels(image, maps[i], first=0)
                for image, i in zip(images, places, strict=True)
            ]
        )
        for maps in (predicted, truth)
    ]
    gap = np.full((GAP, lines[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([lines[0], gap, lines[1]])
