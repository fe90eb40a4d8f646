"""Mixup and cutmix of a global batch, drawn in groups, and the soft targets that go with them.

N images of this rank, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import RandomState
from torch import Tensor

from mugs.finetune.config import MixOptions


@dataclass(frozen=True)
class MixDraw:
    """What happens to a group: `share` of the image itself, the rest from its partner.

    box: (top, bottom, left, right) that is cut in from the partner; None for a blend of all pixels.
    """

    share: float
    box: tuple[int, int, int, int] | None = None


def assign_columns(batch_size: int, options: MixOptions, world: int, rank: int) -> np.ndarray:
    """Columns (N,) of the global batch that a rank trains on: the first halves of pairs, then their partners.

    Group g consists of the columns g, g + G, g + 2 G, ... of G groups, as a distributed sampler deals images to GPUs;
    its first and last image are partners, and so on inwards. Pairs stay together whatever the number of ranks.
    Raises ValueError for odd groups or shares.
    """
    share = batch_size // world
    if not options.on:
        return np.arange(rank * share, (rank + 1) * share)
    size = resolve_group_size(batch_size, options)
    if share % 2:
        raise ValueError(
            f"{share} images per rank cannot be mixed in pairs; expected an even number"
        )
    pair = np.arange(rank * share // 2, (rank + 1) * share // 2)
    group, inside = np.divmod(pair, size // 2)
    groups = batch_size // size
    return np.concatenate([inside * groups + group, (size - 1 - inside) * groups + group])


def resolve_group_size(batch_size: int, options: MixOptions) -> int:
    """Images that share one draw. Raises ValueError unless it is even and divides the batch."""
    size = options.group or batch_size
    if size % 2 or batch_size % size:
        raise ValueError(f"mix.group {size}: expected an even divisor of batch_size {batch_size}")
    return size


def draw_mix(
    options: MixOptions, seed: int, step: int, group: int, height: int, width: int
) -> MixDraw:
    """The draw of a group, in the order in which timm's `Mixup` draws for a batch; a function of its arguments."""
    rng = RandomState(np.random.SeedSequence([seed, step, group]).generate_state(4))
    if rng.rand() >= options.prob:
        return MixDraw(1.0)
    cut = options.cutmix > 0 and (options.mixup == 0 or rng.rand() < options.switch_prob)
    alpha = options.cutmix if cut else options.mixup
    share = float(rng.beta(alpha, alpha))
    if not cut or share == 1.0:
        return MixDraw(share)
    half = np.sqrt(1 - share)
    tall, wide = int(height * half), int(width * half)
    y, x = rng.randint(0, height), rng.randint(0, width)
    top, bottom = np.clip([y - tall // 2, y + (tall + 1) // 2], 0, height).tolist()
    left, right = np.clip([x - wide // 2, x + (wide + 1) // 2], 0, width).tolist()
    return MixDraw(
        1.0 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right)
    )


def mix_batch(
    images: Tensor,
    targets: Tensor,
    groups: np.ndarray,
    options: MixOptions,
    *,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) and targets (N, C), mixed with their partners: first half and second half, in order.

    groups: (N,), the group of each image.
    """
    group_of = torch.from_numpy(groups)
    partners, other = images.roll(len(images) // 2, 0), targets.roll(len(images) // 2, 0)
    mixed, shares = images.clone(), torch.ones(len(images), 1, device=images.device)
    for group in np.unique(groups).tolist():
        mix = draw_mix(options, seed, step, group, *images.shape[-2:])
        rows = (group_of == group).nonzero().flatten().to(images.device)
        shares[rows] = mix.share
        if mix.box is None:
            mixed[rows] = images[rows] * mix.share + partners[rows] * (1 - mix.share)
        else:
            top, bottom, left, right = mix.box
            mixed[rows, :, top:bottom, left:right] = partners[rows, :, top:bottom, left:right]
    return mixed, targets * shares + other * (1 - shares)


def smooth_labels(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Labels (N,) -> (N, C): 1 - smoothing on the label, the rest spread over all classes."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over images of -sum(target * log softmax(logits)), in fp32."""
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1).mean()
