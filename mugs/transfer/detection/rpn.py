"""Region proposal network (RPN): losses on anchors, and the best boxes of each image.

Thresholds and weights are those of mmdet's Cascade Mask R-CNN config. Mask R-CNN has other losses
of boxes, and trains anchors that cross the border of the image.

Shapes: N images, a anchors of a level, A anchors of all levels in the order of the levels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import clip_boxes_to_image, nms

from mugs.devices import make_constant
from mugs.random_streams import DetectionStream, derive_detection_key
from mugs.transfer.detection.boxes import (
    Stds,
    Targets,
    center_and_size,
    decode_deltas,
    encode_deltas,
)
from mugs.transfer.detection.config import DetectorConfig
from mugs.transfer.detection.heads import PADDED_TO
from mugs.transfer.detection.matching import match_boxes, sample_matches

NMS_IOU = 0.7  # between proposals of one level
POSITIVE_IOU = 0.7  # from here on an anchor stands for an object
NEGATIVE_IOU = 0.3  # below, it is background; between the two it takes no part
POSITIVE_SHARE = 0.5  # at most, of the sampled anchors
SMOOTH_L1_BETA = 1 / 9  # of the cascade; with Mask R-CNN it is 0, which is the L1 distance
# Sizes of mmdet's Cascade R-CNN config: an anchor's side is 8 strides of its level.
ANCHOR_SCALE = 8
ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height over width


DELTA_STDS: Stds = (1.0, 1.0, 1.0, 1.0)


class RPN(nn.Module):
    """A 3x3 convolution, then objectness and four deltas for each anchor of each cell."""

    def __init__(self, config: DetectorConfig, strides: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.strides = tuple(strides)
        self.cascade = config.heads == "cascade"
        self.head = RPNHead(config.width, len(ANCHOR_RATIOS))

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Map (N, C, H, W) of each level to logits (N, a), deltas (N, a, 4) and anchors (a, 4)."""
        logits, deltas = self.head(list(maps))
        # Under autocast, decoding and losses need fp32. Channels become the last axis: this is the
        # order of the anchors.
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
        """Return binary cross-entropy and smooth L1, divided by the number of sampled anchors.

        With Mask R-CNN, L1.
        """
        scores = torch.cat(list(logits), 1)
        boxes = torch.cat(list(anchors))
        objectness = regression = scores.new_zeros(())
        count = 0
        for score, shift, target in zip(scores, torch.cat(list(deltas), 1), targets, strict=True):
            usable = self._usable(boxes, target.size).nonzero()[:, 0]
            # Every object's best anchor counts as well, if its IoU is not below NEGATIVE_IOU.
            matched = match_boxes(
                boxes[usable],
                target.boxes,
                positive=POSITIVE_IOU,
                negative=NEGATIVE_IOU,
                promote=NEGATIVE_IOU,
            )
            positive, negative = sample_matches(
                matched,
                self.config.rpn_samples,
                POSITIVE_SHARE,
                derive_detection_key(target.key, DetectionStream.RPN_SAMPLES),
            )
            objects = target.boxes[matched[positive]]
            positive = usable[positive]  # from places among the usable anchors to those among all
            chosen = score[torch.cat([positive, usable[negative]])]
            truth = torch.zeros_like(chosen)
            truth[: len(positive)] = 1
            objectness = objectness + F.binary_cross_entropy_with_logits(
                chosen, truth, reduction="sum"
            )
            regression = regression + F.smooth_l1_loss(
                shift[positive],
                encode_deltas(boxes[positive], objects, DELTA_STDS),
                beta=SMOOTH_L1_BETA if self.cascade else 0.0,
                reduction="sum",
            )
            # mmdet counts one positive and one background anchor at least.
            count += max(len(positive), 1) + max(len(negative), 1)
        return {"rpn_objectness": objectness / count, "rpn_box": regression / count}

    def _usable(self, anchors: Tensor, size: tuple[int, int]) -> Tensor:
        """Tell which anchors (n, 4) take part in the losses of an image of height and width `size`.

        In the cascade those that do not cross its border; torchvision would sample these as
        background. In Mask R-CNN all of the image, but not those of the padding that only the
        larger images of the batch need.
        """
        if self.cascade:
            return inside_image(anchors, size)
        height, width = (-(-side // PADDED_TO) * PADDED_TO for side in size)
        # Centers are multiples of the stride, up to rounding.
        center = center_and_size(anchors)[0].round()
        return (center[:, 0] < width) & (center[:, 1] < height)

    @torch.no_grad()
    def proposals(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Return the proposals (p, 4) of each image, best first."""
        config = self.config
        most = config.proposals_train if self.training else config.proposals_test
        most_of_image = (config.proposals_train_image if self.training else None) or most
        result = []
        for image, size in enumerate(sizes):
            boxes = []
            scores = []
            for logit, delta, anchor in zip(logits, deltas, anchors, strict=True):
                # NMS within a level only, as in mmdet: levels hold objects of different sizes.
                best, index = logit[image].topk(min(most, logit.shape[1]))
                level = clip_boxes_to_image(
                    decode_deltas(anchor[index], delta[image][index], DELTA_STDS), size
                )
                kept = nms(level, best, NMS_IOU)
                boxes.append(level[kept])
                scores.append(best[kept])
            order = torch.cat(scores).argsort(descending=True, stable=True)[:most_of_image]
            result.append(torch.cat(boxes)[order])
        return result


def build_level_anchors(rows: int, columns: int, stride: int, device: torch.device) -> Tensor:
    """Return the anchors (rows * columns * 3, 4) of a map, in the order of its cells, ratios last.

    Differs from torchvision's `AnchorGenerator`, which rounds the anchors and takes image size over
    map size as the stride. The two strides differ where a side is no multiple of the largest one:
    for an 800 x 1008 image, anchors of the last level would be off by up to 36 pixels.
    """
    # All ratios have the same area: width * height = (scale * stride)^2.
    root = make_constant(ANCHOR_RATIOS, torch.get_default_dtype(), device).sqrt()
    half = ANCHOR_SCALE * stride / 2 * torch.stack([1 / root, root], dim=-1)
    base = torch.cat([-half, half], dim=-1)

    # Centers are the top left corners of the cells, as in mmdet, not the centers of the cells.
    y, x = (torch.arange(n, device=device) * stride for n in (rows, columns))
    corner = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(-1, 1, 2)
    return (torch.cat([corner, corner], dim=-1) + base).view(-1, 4)


def inside_image(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Tell which anchors (n, 4) lie within an image of height and width `size`, without padding."""
    height, width = size
    return (anchors[:, :2] >= 0).all(dim=1) & (anchors[:, 2] < width) & (anchors[:, 3] < height)
