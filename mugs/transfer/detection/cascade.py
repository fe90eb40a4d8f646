"""Three stages of box and mask heads; each stage starts from the boxes of the previous one.

Thresholds, weights and counts are those of mmdet's Cascade Mask R-CNN config as iBOT changes it and
Mugs uses it; parity tests compare losses and detections with mmdet. Mask R-CNN is the same with one
stage, which has the thresholds and losses of mmdet's base config.

Shapes: R sampled boxes of all images, K classes; label K is the background.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from mugs.random_streams import DetectionStream, derive_detection_key
from mugs.transfer.detection.boxes import (
    Stds,
    Targets,
    decode_deltas,
    encode_deltas,
    generalized_iou,
)
from mugs.transfer.detection.config import DetectorConfig
from mugs.transfer.detection.heads import (
    BOX_SIZE,
    MASK_INPUT,
    BoxHead,
    MaskHead,
    cut_mask_targets,
    pool_regions,
    select_class,
)
from mugs.transfer.detection.matching import match_boxes, sample_matches

NMS_IOU = 0.5  # of the final boxes, within a class
GIOU_WEIGHT = 10.0  # iBOT's config; the base config has smooth L1 on deltas instead
POSITIVE_SHARE = 0.25  # at most, of the sampled boxes


@dataclass(frozen=True)
class CascadeStage:
    """One stage: IoU from which a box is positive, weight of its losses, spread of its deltas.

    Boxes below that IoU are background; none is ignored. promote: IoU from which the best boxes of
    an object stand for it, even if they overlap more with another one.
    """

    iou: float
    weight: float
    stds: Stds
    box_loss: Literal["giou", "l1"] = "giou"
    promote: float | None = None


# Each stage sees better boxes, so it demands more overlap and expects smaller deltas.
STAGES = (
    CascadeStage(0.5, 1.0, (0.1, 0.1, 0.2, 0.2)),
    CascadeStage(0.6, 0.5, (0.05, 0.05, 0.1, 0.1)),
    CascadeStage(0.7, 0.25, (0.033, 0.033, 0.067, 0.067)),
)
MASK_RCNN_STAGES = (CascadeStage(0.5, 1.0, (0.1, 0.1, 0.2, 0.2), box_loss="l1", promote=0.5),)


@dataclass(frozen=True)
class SampledBoxes:
    """Boxes (r, 4) of one image that losses are computed on, positives first.

    labels (r,): K for background. objects (p,): which object of the image each positive stands for.
    given (r,): whether the box is the true box of an object, put among the proposals.
    """

    boxes: Tensor
    labels: Tensor
    objects: Tensor
    given: Tensor


class Cascade(nn.Module):
    """The heads of all stages; they read the maps of the FPN without the coarsest one."""

    def __init__(self, config: DetectorConfig, strides: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.strides = tuple(strides)
        self.stages = STAGES if config.heads == "cascade" else MASK_RCNN_STAGES
        self.box_heads = nn.ModuleList(BoxHead(config) for _ in self.stages)
        self.mask_heads = nn.ModuleList(MaskHead(config) for _ in self.stages)

    def losses(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        """Return the weighted losses of every stage; proposals: boxes (p, 4) of each image."""
        result: dict[str, Tensor] = {}
        for number, stage in enumerate(self.stages):
            sampled = [
                sample_boxes(boxes, target, stage, number, self.config)
                for boxes, target in zip(proposals, targets, strict=True)
            ]
            logits, deltas = self.box_heads[number](
                pool_regions(maps, self.strides, [s.boxes for s in sampled], BOX_SIZE)
            )
            values = compute_box_losses(logits, deltas, sampled, targets, stage)
            values["mask"] = self._mask_loss(maps, sampled, targets, number)
            result |= {
                f"stage{number + 1}_{name}": stage.weight * value for name, value in values.items()
            }
            proposals = refine_proposals(logits, deltas, sampled, [t.size for t in targets], stage)
        return result

    def _mask_loss(
        self,
        maps: Sequence[Tensor],
        sampled: Sequence[SampledBoxes],
        targets: Sequence[Targets],
        number: int,
    ) -> Tensor:
        positives = [s.boxes[: len(s.objects)] for s in sampled]
        logits = self.mask_heads[number](pool_regions(maps, self.strides, positives, MASK_INPUT))
        found = zip(targets, sampled, positives, strict=True)
        expected = torch.cat([cut_mask_targets(t.masks, s.objects, boxes) for t, s, boxes in found])
        own = select_class(logits, torch.cat([s.labels[: len(s.objects)] for s in sampled]))
        # A mean by hand: torch's is NaN without positives, while this is 0 and has gradients, so
        # that all ranks average the same parameters.
        return F.binary_cross_entropy_with_logits(own, expected, reduction="sum") / max(
            own.numel(), 1
        )

    def detect(
        self, maps: Sequence[Tensor], proposals: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return boxes (n, 4), scores, labels and mask probabilities (n, 28, 28), best first.

        For one image, whose height and width without padding are `size`.
        """
        boxes = candidates = proposals
        sums = proposals.new_zeros(())
        for head, stage in zip(self.box_heads, self.stages, strict=True):
            logits, deltas = head(pool_regions(maps, self.strides, [boxes], BOX_SIZE))
            sums = sums + logits
            candidates = clip_boxes_to_image(
                decode_deltas(boxes[:, None], deltas, stage.stds), size
            )
            boxes = select_class(candidates, logits[:, :-1].argmax(dim=1))
        # mmdet averages logits over the stages, not probabilities; for masks it averages
        # probabilities.
        probabilities = (sums / len(self.stages)).softmax(dim=1)[:, :-1]
        found, scores, labels = select_best_boxes(candidates, probabilities, self.config)
        if len(found) == 0:
            return found, scores, labels, proposals.new_zeros(0, 2 * MASK_INPUT, 2 * MASK_INPUT)
        pooled = pool_regions(maps, self.strides, [found], MASK_INPUT)
        masks = torch.stack(
            [select_class(head(pooled), labels).sigmoid() for head in self.mask_heads]
        ).mean(dim=0)
        return found, scores, labels, masks


def sample_boxes(
    proposals: Tensor, target: Targets, stage: CascadeStage, number: int, config: DetectorConfig
) -> SampledBoxes:
    """Sample the boxes of one image for a stage."""
    # The true boxes are put among the proposals, at every stage: early in training the proposals
    # alone may contain no positive one.
    boxes = torch.cat([target.boxes, proposals])
    matched = match_boxes(
        proposals, target.boxes, positive=stage.iou, negative=stage.iou, promote=stage.promote
    )
    # Each object's own box stands for that object, also where another one has an equal box.
    own = torch.arange(len(target.boxes), device=matched.device)
    matched = torch.cat([own, matched])
    positive, negative = sample_matches(
        matched,
        config.roi_samples,
        POSITIVE_SHARE,
        derive_detection_key(target.key, DetectionStream.STAGE_SAMPLES + number),
    )
    chosen = torch.cat([positive, negative])
    objects = matched[positive]
    return SampledBoxes(
        boxes[chosen],
        torch.cat([target.labels[objects], torch.full_like(negative, config.num_classes)]),
        objects,
        chosen < len(target.boxes),
    )


def compute_box_losses(
    logits: Tensor,
    deltas: Tensor,
    sampled: Sequence[SampledBoxes],
    targets: Sequence[Targets],
    stage: CascadeStage,
) -> dict[str, Tensor]:
    """Return cross-entropy, and the loss of the positives' boxes.

    The latter is 10 (1 - GIoU) of the decoded, unclipped boxes, or the L1 distance of deltas. Both
    losses are sums divided by the number of all R boxes, the background included.
    """
    labels = torch.cat([s.labels for s in sampled])
    positive = (labels < deltas.shape[1]).nonzero()[:, 0]
    boxes = torch.cat([s.boxes for s in sampled])[positive]
    objects = torch.cat([t.boxes[s.objects] for t, s in zip(targets, sampled, strict=True)])
    own = select_class(deltas[positive], labels[positive])
    if stage.box_loss == "giou":
        predicted = decode_deltas(boxes, own, stage.stds)
        distance = GIOU_WEIGHT * (1 - generalized_iou(predicted, objects)).sum()
    else:
        distance = (own - encode_deltas(boxes, objects, stage.stds)).abs().sum()
    total = max(len(labels), 1)
    return {
        "class": F.cross_entropy(logits, labels, reduction="sum") / total,
        "box": distance / total,
    }


@torch.no_grad()
def refine_proposals(
    logits: Tensor,
    deltas: Tensor,
    sampled: Sequence[SampledBoxes],
    sizes: Sequence[tuple[int, int]],
    stage: CascadeStage,
) -> list[Tensor]:
    """Decode and clip the boxes of each image for the next stage.

    Positives use the deltas of their object's class, the others those of their likeliest class.
    """
    result = []
    counts = [len(s.boxes) for s in sampled]
    parts = zip(
        torch.split(logits, counts), torch.split(deltas, counts), sampled, sizes, strict=True
    )
    for logit, delta, one, size in parts:
        likeliest = logit[:, :-1].argmax(dim=1)
        labels = torch.where(one.labels < logit.shape[1] - 1, one.labels, likeliest)
        boxes = decode_deltas(one.boxes, select_class(delta, labels), stage.stds)
        # True boxes that were put among the proposals leave here; the next stage adds them again.
        result.append(clip_boxes_to_image(boxes, size)[~one.given])
    return result


def select_best_boxes(
    boxes: Tensor, probabilities: Tensor, config: DetectorConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the best boxes after NMS within each class: boxes, scores and labels, best first.

    boxes (R, K, 4) and probabilities (R, K).
    """
    # One row may give several detections: one per class above the threshold.
    rows, labels = (probabilities > config.score_threshold).nonzero(as_tuple=True)
    candidates, scores = boxes[rows, labels], probabilities[rows, labels]
    kept = batched_nms(candidates, scores, labels, NMS_IOU)[: config.max_detections]
    return candidates[kept], scores[kept], labels[kept]
