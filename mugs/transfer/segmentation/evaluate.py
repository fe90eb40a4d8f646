"""Test of a segmenter: every validation image once, by sliding windows."""

from pathlib import Path

import numpy as np
import torch

from mugs import distributed
from mugs.data.dense.ade20k import SceneFolder
from mugs.data.dense.pictures import overlay_labels, save_png, side_by_side
from mugs.engine.precision import autocast
from mugs.engine.progress import Progress
from mugs.transfer.segmentation.batches import Scene, iter_scenes
from mugs.transfer.segmentation.config import SegmentationConfig
from mugs.transfer.segmentation.inference import argmax_at_size, slide_windows
from mugs.transfer.segmentation.metrics import SegmentationScores, compute_scores, count_confusion
from mugs.transfer.segmentation.model import Segmenter

CAPTION = (
    "The image, the prediction over it, the annotation over it. A pixel has the color of its "
    "class: class k has color k + 1 of PASCAL VOC. Void pixels have no color."
)


@torch.no_grad()
def evaluate_scenes(
    model: Segmenter,
    scenes: SceneFolder,
    config: SegmentationConfig,
    device: torch.device,
    *,
    run_dir: Path,
    num_pictures: int = 0,
) -> SegmentationScores:
    """Return the scores over all scenes, the same on all ranks.

    The first `num_pictures` scenes are drawn to `run_dir/pictures`.
    """
    model = model.to(device).eval()
    model.clear_draws()
    num_classes = config.num_classes
    # No image is repeated to make the ranks equal, so the summed counts are exact.
    own_indices = range(distributed.rank(), len(scenes), distributed.world_size())
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    progress = Progress(
        "segmentation test",
        len(own_indices),
        unit="images",
        path=run_dir / "progress.json",
        quiet=not distributed.is_main(),
    )
    for done, scene in enumerate(
        iter_scenes(scenes, config.scenes, own_indices, workers=config.workers), 1
    ):
        predicted = predict_scene(model, scene, config, device)
        counts += count_confusion(predicted, scene.labels.to(device), num_classes)
        if scene.sample < num_pictures:
            name = scenes.names[scene.sample]
            save_png(
                run_dir / "pictures" / f"{name}.png",
                compose_scene_picture(scene, predicted.cpu().numpy()),
            )
        progress.update(done)
    progress.close()
    return compute_scores(distributed.all_gather_rows(counts[None]).sum(dim=0))


def predict_scene(
    model: Segmenter, scene: Scene, config: SegmentationConfig, device: torch.device
) -> torch.Tensor:
    """Return the predicted label map (H, W) of a scene, at the size of its annotation."""
    recipe = config.scenes
    with autocast(config.precision, device):
        logits = slide_windows(
            model.logits,
            scene.view.to(device),
            num_classes=config.num_classes,
            window=recipe.window,
            stride=recipe.stride,
        )
    return argmax_at_size(logits, *scene.labels.shape)


def compose_scene_picture(scene: Scene, predicted: np.ndarray) -> np.ndarray:
    """Return the image, the prediction over it, and the annotation over it, side by side."""
    image = scene.picture.permute(1, 2, 0).numpy()
    maps = (predicted.astype(np.uint8), scene.labels.numpy())
    return side_by_side([image, *(overlay_labels(image, labels, first=1) for labels in maps)])
