"""Video object segmentation without training: nearest patches carry the first frame's labels on.

Shapes: P = h x w patches of a frame, D width, O objects with the background first, R reference
frames.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mugs.models.vit import ViT
from mugs.transfer.video.config import PropagationRecipe


def frame_size(height: int, width: int, recipe: PropagationRecipe) -> tuple[int, int]:
    """Return height and width of the network's input.

    The short side is exact; the long one is scaled alike and cut to a multiple.

    Raises:
        ValueError: The long side is shorter than one multiple.
    """
    short = recipe.short_side
    step = recipe.multiple
    longer = int(short * max(height, width) / min(height, width) // step * step)
    if longer == 0:
        raise ValueError(
            f"long side of {max(height, width)} x {min(height, width)} cut to a multiple of "
            f"{step} is 0"
        )
    return (longer, short) if height > width else (short, longer)


@torch.no_grad()
def frame_features(vit: ViT, image: Tensor) -> Tensor:
    """Return the patch tokens (P, D) of a frame (3, H, W), after the final norm, of length 1."""
    return F.normalize(vit.last_blocks(image[None], 1)[0][0, 1:].float(), dim=-1)


def neighborhood_mask(height: int, width: int, radius: int, device: torch.device) -> Tensor:
    """Tell which patches are at most `radius` rows and columns apart, (P, P)."""
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    return ((rows[:, None] - rows).abs() <= radius) & ((columns[:, None] - columns).abs() <= radius)


def propagate_to_frame(
    target: Tensor,
    sources: Tensor,
    labels: Tensor,
    near: Tensor,
    recipe: PropagationRecipe,
) -> Tensor:
    """Return the labels (P, O) of a frame: the weighted mean over its most similar patches.

    target (P, D), sources (R, P, D), labels (R, P, O), near (P, P). Weights are exp(cosine /
    temperature) of the best patches of all R frames together, within the neighborhood, divided by
    their sum.
    """
    # In place: it has R x P x P numbers, and to write them again takes longer than to compute them.
    affinity = torch.einsum("pd,rqd->prq", target, sources).div_(recipe.temperature).exp_()
    # Patches outside of the neighborhood get weight 0, not a low cosine, as in DINO's code.
    affinity = affinity.mul_(near[:, None]).flatten(1)
    best = affinity.topk(recipe.num_neighbours, dim=1)
    if recipe.ties == "kept":
        weights = affinity.masked_fill_(affinity < best.values[:, -1:], 0.0)
    else:
        weights = affinity.zero_().scatter_(1, best.indices, best.values)
    return weights.div_(weights.sum(dim=1, keepdim=True)) @ labels.flatten(0, 1)


def propagate_labels(
    features: Iterable[Tensor], first: Tensor, grid: tuple[int, int], recipe: PropagationRecipe
) -> Iterator[Tensor]:
    """Yield soft labels (P, O) of every frame after the first, whose labels (P, O) are given.

    features: those of all frames in order, (P, D) each. The references of a frame are the first
    frame and the `previous_frames` before it.
    """
    frames = iter(features)
    start = next(frames)
    near = neighborhood_mask(*grid, recipe.radius, start.device)
    # The first frame is not among them, so it never counts twice.
    past: deque[tuple[Tensor, Tensor]] = deque(maxlen=recipe.previous_frames)
    for target in frames:
        soft = propagate_to_frame(
            target,
            torch.stack([start, *(f for f, _ in past)]),
            torch.stack([first, *(soft for _, soft in past)]),
            near,
            recipe,
        )
        # Soft labels go on to the next frames, not hard ones, as in DINO's code.
        past.append((target, soft))
        yield soft


def harden_labels(soft: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Turn soft labels (P, O) into object numbers (h * patch, w * patch), uint8."""
    maps = F.interpolate(
        soft.T.reshape(1, -1, *grid), scale_factor=patch, mode="bilinear", align_corners=False
    )[0]
    # As in DINO's code, each object's map is stretched to 0 ... 1 before the largest one is taken,
    # so a small object with low values can win. A map that is zero everywhere stays zero. One that
    # is constant becomes NaN, which `argmax` takes first: an object that covers the frame wins.
    low, high = maps.aminmax(dim=2)
    low = low.amin(dim=1)[:, None, None]
    high = high.amax(dim=1)[:, None, None]
    stretched = (maps - low) / (high - low)
    return torch.where(high > 0, stretched, maps).argmax(dim=0).to(torch.uint8)
