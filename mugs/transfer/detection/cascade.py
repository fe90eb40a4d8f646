"""Three stages of box and mask heads, each of which starts from the boxes of the one before.

R sampled boxes of all images, K classes; label K is the background.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from mugs.random_streams import DetectionStream, derive_detection_key
from mugs.transfer.detection.boxes import Stds, decode_deltas, generalized_iou
from mugs.transfer.detection.config import DetectorConfig
from mugs.transfer.detection.heads import BOX_SIZE, MASK_INPUT, BoxHead, MaskHead, select_class
from mugs.transfer.detection.matching import match_boxes, sample_matches
from mugs.transfer.detection.roi_pooling import cut_mask_targets, pool_regions
from mugs.transfer.detection.targets import Targets

NMS_IOU = 0.5
GIOU_WEIGHT = 10.0
POSITIVE_SHARE = 0.25


@dataclass(frozen=True)
class CascadeStage:
    """IoU from which a box is positive (below it is background), weight of the losses, spread of the deltas."""

    iou: float
    weight: float
    stds: Stds


STAGES = (
    CascadeStage(0.5, 1.0, (0.1, 0.1, 0.2, 0.2)),
    CascadeStage(0.6, 0.5, (0.05, 0.05, 0.1, 0.1)),
    CascadeStage(0.7, 0.25, (0.033, 0.033, 0.067, 0.067)),
)


@dataclass(frozen=True)
class SampledBoxes:
    """Boxes (r, 4) of one image that losses are taken on, positives first, and what they stand for.

    labels (r,): K for background; objects (p,): which object of the image each positive stands for; given (r,): whether
    the box is an object's own, put among the proposals.
    """

    boxes: Tensor
    labels: Tensor
    objects: Tensor
    given: Tensor


class Cascade(nn.Module):
    """The heads of all stages, on the maps of the FPN without the coarsest."""

    def __init__(self, config: DetectorConfig, strides: Sequence[int]) -> None:
        super().__init__()
        self.config, self.strides = config, tuple(strides)
        self.box_heads = nn.ModuleList(BoxHead(config) for _ in STAGES)
        self.mask_heads = nn.ModuleList(MaskHead(config) for _ in STAGES)

    def losses(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        """Weighted losses of every stage. proposals: boxes (p, 4) of each image."""
        result: dict[str, Tensor] = {}
        for number, stage in enumerate(STAGES):
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
        labels = torch.cat([s.labels[: len(s.objects)] for s in sampled])
        found = zip(targets, sampled, positives, strict=True)
        wanted = torch.cat([cut_mask_targets(t.masks, s.objects, boxes) for t, s, boxes in found])
        own = select_class(logits, labels)
        return F.binary_cross_entropy_with_logits(own, wanted, reduction="sum") / max(
            own.numel(), 1
        )

    def detect(
        self, maps: Sequence[Tensor], proposals: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes (n, 4), scores, labels and mask probabilities (n, 28, 28) of one image, best first.

        The classes' logits are averaged over the stages, the masks' probabilities too.
        """
        boxes, sums, candidates = proposals, proposals.new_zeros(()), proposals
        for head, stage in zip(self.box_heads, STAGES, strict=True):
            logits, deltas = head(pool_regions(maps, self.strides, [boxes], BOX_SIZE))
            sums = sums + logits
            candidates = clip_boxes_to_image(
                decode_deltas(boxes[:, None], deltas, stage.stds), size
            )
            boxes = select_class(candidates, logits[:, :-1].argmax(dim=1))
        probabilities = (sums / len(STAGES)).softmax(dim=1)[:, :-1]
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
    """Boxes of one image for a stage; the image's own objects are among the proposals."""
    boxes = torch.cat([target.boxes, proposals])
    matched = match_boxes(boxes, target.boxes, positive=stage.iou, negative=stage.iou)
    positive, negative = sample_matches(
        matched,
        config.roi_samples,
        POSITIVE_SHARE,
        derive_detection_key(target.key, DetectionStream.STAGE_SAMPLES + number),
    )
    chosen = torch.cat([positive, negative])
    objects = matched[positive]
    background = torch.full_like(negative, config.num_classes)
    return SampledBoxes(
        boxes[chosen],
        torch.cat([target.labels[objects], background]),
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
    """Cross-entropy, and 10 x (1 - GIoU) of the positives' decoded, unclipped boxes; both over all R boxes."""
    labels = torch.cat([s.labels for s in sampled])
    num_classes = deltas.shape[1]
    positive = (labels < num_classes).nonzero()[:, 0]
    boxes = torch.cat([s.boxes for s in sampled])[positive]
    objects = torch.cat([t.boxes[s.objects] for t, s in zip(targets, sampled, strict=True)])
    predicted = decode_deltas(boxes, select_class(deltas[positive], labels[positive]), stage.stds)
    total = max(len(labels), 1)
    return {
        "class": F.cross_entropy(logits, labels, reduction="sum") / total,
        "box": GIOU_WEIGHT * (1 - generalized_iou(predicted, objects)).sum() / total,
    }


@torch.no_grad()
def refine_proposals(
    logits: Tensor,
    deltas: Tensor,
    sampled: Sequence[SampledBoxes],
    sizes: Sequence[tuple[int, int]],
    stage: CascadeStage,
) -> list[Tensor]:
    """The decoded boxes of each image, clipped: of the object's class for positives, of the likeliest for others.

    Objects that had been put among the proposals are dropped; the next stage puts them back.
    """
    result = []
    counts = [len(s.boxes) for s in sampled]
    parts = zip(
        torch.split(logits, counts), torch.split(deltas, counts), sampled, sizes, strict=True
    )
    for logit, delta, one, size in parts:
        likeliest = logit[:, :-1].argmax(dim=1)
        labels = torch.where(one.labels < logit.shape[1] - 1, one.labels, likeliest)
        refined = clip_boxes_to_image(
            decode_deltas(one.boxes, select_class(delta, labels), stage.stds), size
        )
        result.append(refined[~one.given])
    return result


def select_best_boxes(
    boxes: Tensor, probabilities: Tensor, config: DetectorConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (R, K, 4) and probabilities (R, K) -> boxes, scores and labels after NMS within each class, best first."""
    rows, labels = (probabilities > config.score_threshold).nonzero(as_tuple=True)
    candidates, scores = boxes[rows, labels], probabilities[rows, labels]
    kept = batched_nms(candidates, scores, labels, NMS_IOU)[: config.max_detections]
    return candidates[kept], scores[kept], labels[kept]
