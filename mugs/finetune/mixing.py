"""Mixup and cutmix of a global batch, drawn in groups, and the soft targets for them.

Shapes: N images of this rank, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import RandomState
from torch import Tensor

from mugs.devices import copy_to_device
from mugs.finetune.config import MixOptions


@dataclass(frozen=True)
class MixDraw:
    """What happens to a group of images: each keeps `share` of itself, the partner gives the rest.

    box: the part (top, bottom, left, right) that is taken from the partner (cutmix), or None for a
    blend of all pixels (mixup).
    """

    share: float
    box: tuple[int, int, int, int] | None = None


def assign_columns(batch_size: int, options: MixOptions, world: int, rank: int) -> np.ndarray:
    """Return the columns (N,) of the global batch that a rank trains on.

    The first halves of the pairs come first, then their partners. Of G groups, group g has the
    columns g, g + G, g + 2 G, ..., as a distributed sampler deals images to GPUs. The first and
    the last image of a group are partners (timm), then the second and the last but one, and so on.

    Raises:
        ValueError: A group or a rank has an odd number of images.
    """
    share = batch_size // world
    if not options.on:
        return np.arange(rank * share, (rank + 1) * share)
    size = resolve_group_size(batch_size, options)
    if share % 2:
        raise ValueError(
            f"{share} images per rank cannot be mixed in pairs; expected an even number"
        )
    # Ranks divide pairs, not images, so that both images of a pair are on one rank. A group may
    # spread over ranks: its draw is a function of (seed, step, group).
    pair = np.arange(rank * share // 2, (rank + 1) * share // 2)
    group, inside = np.divmod(pair, size // 2)
    groups = batch_size // size
    return np.concatenate([inside * groups + group, (size - 1 - inside) * groups + group])


def resolve_group_size(batch_size: int, options: MixOptions) -> int:
    """Return how many images share one draw.

    Raises:
        ValueError: The number is odd or does not divide the batch.
    """
    size = options.group or batch_size
    if size % 2 or batch_size % size:
        raise ValueError(f"mix.group {size}: expected an even divisor of batch_size {batch_size}")
    return size


def draw_mix(
    options: MixOptions, seed: int, step: int, group: int, height: int, width: int
) -> MixDraw:
    """Draw what happens to a group; a function of the arguments."""
    # The draws follow the order and the formulas of timm's `Mixup`, so that a test can compare.
    rng = RandomState(np.random.SeedSequence([seed, step, group]).generate_state(4))
    if rng.rand() >= options.prob:
        return MixDraw(1.0)
    cut = options.cutmix > 0 and (options.mixup == 0 or rng.rand() < options.switch_prob)
    alpha = options.cutmix if cut else options.mixup
    share = float(rng.beta(alpha, alpha))
    if not cut or share == 1.0:
        return MixDraw(share)
    # A box of the area 1 - share around a random center, cut at the border of the image.
    side = np.sqrt(1 - share)
    box_height = int(height * side)
    box_width = int(width * side)
    y = rng.randint(0, height)
    x = rng.randint(0, width)
    # timm 0.4.5 halves both sides down, so that a box of odd sides is a pixel short (E27).
    odd = 1 if options.cutmix_box == "timm" else 0
    top, bottom = np.clip([y - box_height // 2, y + (box_height + odd) // 2], 0, height).tolist()
    left, right = np.clip([x - box_width // 2, x + (box_width + odd) // 2], 0, width).tolist()
    # The share of the targets is that of the pixels which are really replaced.
    replaced = (bottom - top) * (right - left) / (height * width)
    return MixDraw(1.0 - replaced, (top, bottom, left, right))


def mix_batch(
    images: Tensor,
    targets: Tensor,
    groups: np.ndarray,
    options: MixOptions,
    *,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    """Mix images (N, 3, H, W) and targets (N, C) with their partners.

    Image i of the first half and image i of the second half are partners. groups: (N,), the group
    of each image.
    """
    group_of = torch.from_numpy(groups)
    partners = images.roll(len(images) // 2, 0)
    mixed = images.clone()
    shares = torch.ones(len(images), 1)
    # Every rank draws for the groups it has images of. All ranks of a group draw the same.
    for group in np.unique(groups).tolist():
        mix = draw_mix(options, seed, step, group, *images.shape[-2:])
        chosen = (group_of == group).nonzero().flatten()
        shares[chosen] = mix.share
        rows = copy_to_device(chosen, images.device)
        # `images` stays untouched: each image is also the partner of another one.
        if mix.box is None:
            mixed[rows] = images[rows] * mix.share + partners[rows] * (1 - mix.share)
        else:
            top, bottom, left, right = mix.box
            mixed[rows, :, top:bottom, left:right] = partners[rows, :, top:bottom, left:right]
    shares = copy_to_device(shares, images.device)
    return mixed, targets * shares + targets.roll(len(images) // 2, 0) * (1 - shares)


def smooth_labels(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Turn labels (N,) into targets (N, C).

    1 - smoothing goes to the label, the rest is spread evenly over all classes, the label included.
    """
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over images of -sum(target * log softmax(logits)), in fp32."""
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1).mean()
