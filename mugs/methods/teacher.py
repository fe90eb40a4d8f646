"""Rules by which the teacher's side follows the student: its start, the EMA and the center."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mugs.distributed import all_reduce_mean

PRODUCT_ELEMENTS = 1 << 25  # of student parameters times a factor: 128 MiB at a time


def start_as_copy(teacher: nn.Module, student: nn.Module) -> None:
    """Give the teacher the student's weights of all that both have, and no gradient."""
    of_student = student.state_dict()
    teacher.load_state_dict({key: of_student[key] for key in teacher.state_dict()})
    teacher.requires_grad_(False)


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float, valid: Tensor) -> None:
    """Update the teacher as the EMA of the student: t <- m t + (1 - m) s, unless not valid.

    All parameters of the teacher are averaged. Those of the student that have no counterpart
    (predictors) have no effect.
    """
    of_student = dict(student.named_parameters())
    names, averaged = zip(*teacher.named_parameters(), strict=True)
    # A step that is not valid has the factors 1 and 0, chosen on the device without a host sync.
    keep = torch.where(valid, momentum, 1.0)
    share = torch.where(valid, 1 - momentum, 0.0)
    torch._foreach_mul_(averaged, keep)
    pairs = [(mean, of_student[name].detach()) for name, mean in zip(names, averaged, strict=True)]
    # Part by part: the products of all parameters would be another copy of the network.
    for part in split_by_size(pairs, PRODUCT_ELEMENTS):
        means, students = map(list, zip(*part, strict=True))
        torch._foreach_add_(means, torch._foreach_mul(students, share))


def split_by_size(
    pairs: Sequence[tuple[Tensor, Tensor]], most: int
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield the pairs in order, in lists of about `most` elements; a larger tensor is alone."""
    part: list[tuple[Tensor, Tensor]] = []
    count = 0
    for pair in pairs:
        if part and count + pair[0].numel() > most:
            yield part
            part = []
            count = 0
        part.append(pair)
        count += pair[0].numel()
    if part:
        yield part


@torch.no_grad()
def update_center(center: Tensor, means: Sequence[Tensor], momentum: float, valid: Tensor) -> None:
    """Move the center towards the mean teacher logits of all ranks: c <- m c + (1 - m) mean.

    `means` are those of the micro-batches, which are equally large. The center stays if not valid.
    """
    mean = all_reduce_mean(torch.stack(list(means)).mean(dim=0))
    moved = momentum * center + (1 - momentum) * mean
    center.copy_(torch.where(valid, moved, center))
