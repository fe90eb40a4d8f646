"""UPerNet on ViT-S/16 at full size: a training step of two crops of 512, the test of an image,
a frame of a video.

The baseline of the frame finds the best five as the release does, with `topk` over all sources, and
multiplies the labels by a matrix that is 0 elsewhere.
"""

from typing import Any

import torch
import torch.nn.functional as F
from bench_step import compare
from dense_step import Measured, backbone, measured, report, rows

from mugs.engine.layer_decay import build_adamw, build_layer_decay_groups
from mugs.transfer.segmentation.config import SegmenterConfig
from mugs.transfer.segmentation.evaluate import slide_windows
from mugs.transfer.segmentation.model import build_segmenter
from mugs.transfer.video.config import PropagationRecipe
from mugs.transfer.video.propagation import neighborhood_mask, propagate_to_frame

CPU = torch.device("cpu")


def measure(attention: str, memory: str) -> Measured:
    generator = torch.Generator().manual_seed(0)
    vit = backbone(attention, memory)
    vit.set_position_grid(32, 32)
    model = build_segmenter(
        vit, SegmenterConfig(variant="upernet", num_classes=150), seed=0
    ).train()
    optimizer = build_adamw(build_layer_decay_groups(model, model.backbone.vit, 0.9))
    images = torch.randn(2, 3, 512, 512, generator=generator)
    labels = torch.randint(0, 150, (2, 512, 512), generator=generator)

    def train() -> None:
        model.set_draws(0, 0, 2, slice(0, 2), CPU)
        torch.stack(list(model.loss(model(images), labels).values())).sum().backward()
        optimizer.step()

    @torch.no_grad()
    def test() -> None:
        slide_windows(
            model.eval().logits, torch.randn(3, 512, 683), num_classes=150, window=512, stride=341
        )

    return measured(train, test)


def video_frame() -> dict[str, Any]:
    """One frame of 480 x 832 from eight others."""
    generator = torch.Generator().manual_seed(0)
    target, *sources = F.normalize(torch.randn(9, 1560, 384, generator=generator), dim=-1)
    labels = torch.rand(8, 1560, 3, generator=generator)
    near, references = neighborhood_mask(30, 52, 12, CPU), torch.stack(sources)

    def as_released() -> torch.Tensor:
        affinity = torch.exp(torch.einsum("pd,rqd->prq", target, references) / 0.1) * near[:, None]
        affinity = affinity.flatten(1)
        least = affinity.topk(5, dim=1).values[:, -1:]
        affinity[affinity < least] = 0
        return torch.mm(affinity / affinity.sum(1, keepdim=True), labels.flatten(0, 1))

    def ours() -> torch.Tensor:
        return propagate_to_frame(target, references, labels, near, PropagationRecipe())

    difference = (ours() - as_released()).abs().max().item()
    note = f"480 x 832, 8 references, labels differ by {difference:.1e}"
    return compare("video_propagation", ours, as_released, note)


def run() -> list[dict[str, Any]]:
    step = "UPerNet ViT-S/16, 2 crops of 512"
    return [
        *rows(__file__, "segmentation", train=step, test="512 x 683, two windows"),
        video_frame(),
    ]


if __name__ == "__main__":
    report(measure)
