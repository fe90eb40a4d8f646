"""Region proposals: losses on anchors, and the best boxes of each image.

N images, A anchors of all levels, in the order of the levels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import clip_boxes_to_image, nms

from mugs.random_streams import DetectionStream, derive_detection_key
from mugs.transfer.detection.anchors import ANCHOR_RATIOS, build_level_anchors, inside_image
from mugs.transfer.detection.boxes import Stds, decode_deltas, encode_deltas
from mugs.transfer.detection.config import DetectorConfig
from mugs.transfer.detection.matching import match_boxes, sample_matches
from mugs.transfer.detection.targets import Targets

DELTA_STDS: Stds = (1.0, 1.0, 1.0, 1.0)
NMS_IOU = 0.7


class RPN(nn.Module):
    """3x3 convolution, then objectness and four deltas for each anchor of each cell."""

    def __init__(self, config: DetectorConfig, strides: Sequence[int]) -> None:
        super().__init__()
        self.config, self.strides = config, tuple(strides)
        self.head = RPNHead(config.width, len(ANCHOR_RATIOS))

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Maps (N, C, H, W) -> objectness logits (N, a), deltas (N, a, 4) and anchors (a, 4) of each level."""
        logits, deltas = self.head(list(maps))
        scores = [x.float().permute(0, 2, 3, 1).flatten(1) for x in logits]
        shifts = [x.float().permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in deltas]
        sizes = zip(maps, self.strides, strict=True)
        return (
            scores,
            shifts,
            [build_level_anchors(m.shape[2], m.shape[3], stride, m.device) for m, stride in sizes],
        )

    def losses(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Sequence[Tensor],
        targets: Sequence[Targets],
    ) -> dict[str, Tensor]:
        """Binary cross-entropy and smooth L1 (beta 1/9) on sampled anchors, both over the number sampled.

        Anchors that cross the border of the image take no part.
        """
        scores, shifts, boxes = (
            torch.cat(list(logits), 1),
            torch.cat(list(deltas), 1),
            torch.cat(list(anchors)),
        )
        objectness, regression, count = scores.new_zeros(()), scores.new_zeros(()), 0
        for score, shift, target in zip(scores, shifts, targets, strict=True):
            usable = inside_image(boxes, target.size).nonzero()[:, 0]
            matched = match_boxes(
                boxes[usable], target.boxes, positive=0.7, negative=0.3, promote=0.3
            )
            positive, negative = sample_matches(
                matched,
                self.config.rpn_samples,
                0.5,
                derive_detection_key(target.key, DetectionStream.RPN_SAMPLES),
            )
            objects, positive, negative = (
                target.boxes[matched[positive]],
                usable[positive],
                usable[negative],
            )
            chosen = score[torch.cat([positive, negative])]
            truth = (torch.arange(len(chosen), device=chosen.device) < len(positive)).to(
                chosen.dtype
            )
            objectness = objectness + F.binary_cross_entropy_with_logits(
                chosen, truth, reduction="sum"
            )
            wanted = encode_deltas(boxes[positive], objects, DELTA_STDS)
            regression = regression + F.smooth_l1_loss(
                shift[positive], wanted, beta=1 / 9, reduction="sum"
            )
            count += len(chosen)
        return {"rpn_objectness": objectness / max(count, 1), "rpn_box": regression / max(count, 1)}

    @torch.no_grad()
    def proposals(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Boxes (p, 4) of each image, best first: the best of each level after NMS within it, the best of those."""
        most = self.config.proposals_train if self.training else self.config.proposals_test
        result = []
        for image, size in enumerate(sizes):
            boxes, scores = [], []
            for logit, delta, anchor in zip(logits, deltas, anchors, strict=True):
                best, index = logit[image].topk(min(most, logit.shape[1]))
                level = clip_boxes_to_image(
                    decode_deltas(anchor[index], delta[image][index], DELTA_STDS), size
                )
                kept = nms(level, best, NMS_IOU)
                boxes.append(level[kept])
                scores.append(best[kept])
            order = torch.cat(scores).argsort(descending=True, stable=True)[:most]
            result.append(torch.cat(boxes)[order])
        return result
