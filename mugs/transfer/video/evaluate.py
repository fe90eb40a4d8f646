"""Label propagation over all videos, divided over the ranks, and its scores."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mugs import distributed
from mugs.data.dense.davis import VideoFolder, one_hot_patches, read_frame, resize_map
from mugs.data.dense.pictures import (
    label_colors,
    one_below_the_other,
    overlay_labels,
    save_png,
    side_by_side,
)
from mugs.data.sources.decode import decode_rgb
from mugs.engine.progress import Progress
from mugs.models.vit import ViT
from mugs.transfer.bootstrap import bootstrap_errors
from mugs.transfer.video.config import PropagationRecipe
from mugs.transfer.video.j_and_f import VideoScores, average_scores, score_objects
from mugs.transfer.video.propagation import (
    frame_features,
    frame_size,
    harden_labels,
    propagate_labels,
)
from pipeline.files import replace_atomically, write_json_atomic

logger = logging.getLogger(__name__)
SHOWN_FRAMES = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the length of a video
CAPTION = (
    "Five frames of a video, first to last. Above: the propagated masks, each computed from the "
    "first frame and the {previous} frames before it. Below: the annotation. Each object has its "
    "own color."
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
    """Propagate the labels of all videos, write the masks and return the scores.

    Writes `out_dir/masks/<video>/<frame>.png`, the scores of its objects to
    `out_dir/scores/<video>.json`, and `out_dir/pictures/<video>.png` for the first
    `num_pictures` videos. The scores are the same on all ranks.
    """
    vit = vit.to(device).eval()
    own_indices = range(distributed.rank(), len(videos), distributed.world_size())
    progress = Progress(
        "video segmentation",
        len(own_indices),
        unit="videos",
        rate_unit="frames/s",
        path=progress_path,
        quiet=not distributed.is_main(),
    )
    tables: dict[int, np.ndarray] = {}
    for done, index in enumerate(own_indices, 1):
        video = videos.names[index]
        truth = videos.masks(video)
        predicted = segment_video(vit, videos, video, truth[0], recipe, device)
        tables[index] = score_objects(predicted, truth, int(truth[0].max()))
        write_masks(out_dir / "masks" / video, videos.frames(video), predicted)
        path = out_dir / "scores" / f"{video}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, [{"J": j, "F": f} for j, f in tables[index].tolist()])
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


def estimate_errors(folder: Path, videos: VideoFolder) -> VideoScores:
    """Return the standard errors of the scores, from those that all ranks wrote of each video."""
    tables = [
        np.array([[each["J"], each["F"]] for each in json.loads(path.read_bytes())])
        for path in (folder / "scores" / f"{video}.json" for video in videos.names)
    ]
    sums = np.stack([table.sum(axis=0) for table in tables])
    objects = np.array([len(table) for table in tables])

    def score(draws: np.ndarray) -> np.ndarray:
        means = 100 * (draws @ sums) / (draws @ objects)[:, None]
        return np.concatenate([means.mean(axis=1, keepdims=True), means], axis=1)

    jf, j, f = bootstrap_errors(len(tables), score).tolist()
    return VideoScores(jf=jf, j=j, f=f)


def segment_video(
    vit: ViT,
    videos: VideoFolder,
    video: str,
    first: np.ndarray,
    recipe: PropagationRecipe,
    device: torch.device,
) -> np.ndarray:
    """Return object numbers (T, H, W), uint8, of a video whose first label map is given."""
    patch = vit.config.patch_size
    height, width = first.shape
    size = frame_size(height, width, recipe)
    grid = size[0] // patch, size[1] // patch
    start = one_hot_patches(first, grid, int(first.max())).to(device)

    # A generator, so that only the features of the reference frames are in memory.
    def features() -> Iterator[Tensor]:
        for frame in videos.frames(video):
            yield frame_features(vit, read_frame(frame, size, recipe.mean, recipe.std).to(device))

    later = [
        resize_map(harden_labels(soft, grid, patch), height, width)
        for soft in propagate_labels(features(), start, grid, recipe)
    ]
    return np.stack([first, *later])


def gather_scores(
    tables: dict[int, np.ndarray], num_videos: int, device: torch.device
) -> np.ndarray:
    """Gather the scores (n, 2) of the objects of all videos, in order, on every rank."""
    # Videos have different numbers of objects. Each rank fills its rows of one table of equal size,
    # NaN elsewhere; scores are not negative, so the maximum over ranks finds the filled ones.
    most = max((len(table) for table in tables.values()), default=0)
    width = int(distributed.all_gather_rows(torch.tensor([most], device=device)).max())
    own = torch.full((num_videos, width, 2), float("nan"), dtype=torch.float64, device=device)
    for index, table in tables.items():
        own[index, : len(table)] = torch.from_numpy(table).to(device)
    ranks = distributed.all_gather_rows(own[None])
    rows = ranks.nan_to_num(-1.0).amax(dim=0).flatten(0, 1)
    return rows[rows[:, 0] >= 0].cpu().numpy()


def write_masks(folder: Path, frames: list[Path], masks: np.ndarray) -> None:
    """Write masks as palette PNG files, the form that DAVIS' evaluators read."""
    for frame, mask in zip(frames, masks, strict=True):
        image = Image.fromarray(mask)
        image.putpalette(label_colors().flatten().tolist())
        with replace_atomically(folder / f"{frame.stem}.png") as temporary:
            image.save(temporary, format="PNG")


def compose_video_picture(
    frames: list[Path], predicted: np.ndarray, truth: np.ndarray
) -> np.ndarray:
    """Return some frames in a row with the propagated masks, and below with the annotation."""
    places = [round(share * (len(frames) - 1)) for share in SHOWN_FRAMES]
    images = [np.asarray(decode_rgb(frames[i].read_bytes(), str(frames[i]))) for i in places]
    rows = []
    for maps in (predicted, truth):
        pairs = zip(images, places, strict=True)
        rows.append(side_by_side([overlay_labels(image, maps[i], first=0) for image, i in pairs]))
    return one_below_the_other(rows)
