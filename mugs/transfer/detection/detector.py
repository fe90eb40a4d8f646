"""Cascade Mask R-CNN and Mask R-CNN: pyramid of the ViT, FPN, proposals, stages of heads."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from mugs.hashed_draws import hashed_bits
from mugs.models.flops import copy_to_meta
from mugs.models.vit import ViT
from mugs.random_streams import DetectionStream, derive_detection_key
from mugs.transfer.detection.boxes import Detections, Targets
from mugs.transfer.detection.cascade import POSITIVE_SHARE, Cascade
from mugs.transfer.detection.config import DetectorConfig
from mugs.transfer.detection.heads import BOX_SIZE, MASK_INPUT, paste_masks
from mugs.transfer.detection.rpn import RPN
from mugs.transfer.pyramid import Pyramid, build_fpn, run_fpn


class Detector(nn.Module):
    """Finds boxes, classes and masks in images that are normalized and padded with zeros."""

    def __init__(self, vit: ViT, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        patch = vit.config.patch_size
        # The table is resized once, to the usual size of an image, and then trained at that size.
        vit.set_position_grid(config.image_size[0] // patch, config.image_size[1] // patch)
        self.pyramid = Pyramid(vit, normed=config.normed)
        self.fpn = build_fpn(self.pyramid.width, config.width, LastLevelMaxPool())
        strides = self.pyramid.strides
        self.rpn = RPN(config, (*strides, 2 * strides[-1]))
        self.cascade = Cascade(config, strides)

    def forward(self, images: Tensor, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Return weighted losses by name for images (N, 3, H, W); training minimizes their sum."""
        self.pyramid.vit.set_depth_uniforms(self._depth_uniforms(targets))
        maps = self._maps(images)
        logits, deltas, anchors = self.rpn(maps)
        proposals = self.rpn.proposals(logits, deltas, anchors, [t.size for t in targets])
        # The heads skip the coarsest map. RoIAlign and losses stay in fp32 under autocast.
        return self.rpn.losses(logits, deltas, anchors, targets) | self.cascade.losses(
            [m.float() for m in maps[:-1]], proposals, targets
        )

    @torch.no_grad()
    def detect(self, image: Tensor, size: tuple[int, int], original: tuple[int, int]) -> Detections:
        """Find the objects of one image (1, 3, H, W), in pixels of the original image.

        size: the part of the image without padding; original: the size of the original image; both
        as (height, width).
        """
        self.pyramid.vit.set_depth_uniforms(None)
        maps = self._maps(image)
        logits, deltas, anchors = self.rpn(maps)
        proposals = self.rpn.proposals(logits, deltas, anchors, [size])[0]
        boxes, scores, labels, masks = self.cascade.detect(
            [m.float() for m in maps[:-1]], proposals, size
        )
        # Two scales: rounding the size of the network's input changes the aspect a little.
        scale = boxes.new_tensor([original[1] / size[1], original[0] / size[0]] * 2)
        boxes = clip_boxes_to_image(boxes * scale, original)
        return Detections(boxes, scores, labels, paste_masks(masks, boxes, original))

    def _maps(self, images: Tensor) -> list[Tensor]:
        """Return the five maps of the FPN, finest first."""
        return run_fpn(self.fpn, self.pyramid(images))

    def _depth_uniforms(self, targets: Sequence[Targets]) -> Tensor:
        """Return U(0, 1) draws (2 * depth, N) on the CPU, a column for each image's key."""
        count = 2 * self.pyramid.vit.config.depth
        draws = [
            hashed_bits(
                derive_detection_key(t.key, DetectionStream.STOCHASTIC_DEPTH),
                count,
                torch.device("cpu"),
            )
            & 0xFFFFFF
            for t in targets
        ]
        return torch.stack(draws, dim=1).float() / (1 << 24)


def build_detector(vit: ViT, config: DetectorConfig, *, seed: int) -> Detector:
    """Return the detector on a backbone; new weights are drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Detector(vit, config)


def count_detector_flops(model: Detector, size: tuple[int, int]) -> float:
    """Count the floating-point operations of a training step on one image of (height, width).

    With as many boxes as are sampled at most, and without RoIAlign. Backward counts twice forward.
    """
    config = model.config
    twin = copy_to_meta(model, model).eval()
    twin.pyramid.vit.set_depth_uniforms(None)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin.rpn(twin._maps(torch.empty(1, 3, *size, device="meta")))
        for head in twin.cascade.box_heads:
            head(torch.empty(config.roi_samples, config.width, BOX_SIZE, BOX_SIZE, device="meta"))
        positives = int(config.roi_samples * POSITIVE_SHARE)
        for head in twin.cascade.mask_heads:
            head(torch.empty(positives, config.width, MASK_INPUT, MASK_INPUT, device="meta"))
    return 3.0 * float(counter.get_total_flops())
