"""AdamW with the released parameter groups, and clipping of each tensor on its own."""

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

Decay = Literal["matrices", "all"]
"""Which parameters have weight decay: those with more than one dimension, or all."""


class RateSchedule(Protocol):
    """Learning rate and weight decay at every optimizer step."""

    @property
    def total_steps(self) -> int:
        """Return the number of optimizer steps of the run."""

    def lr(self, step: int) -> float:
        """Return the learning rate, before the scale of a group."""

    def wd(self, step: int) -> float:
        """Return the weight decay of the groups that have one."""

    def rates(self, step: int) -> dict[str, float]:
        """Return what the log records of a step."""


def build_pretrain_parameter_groups(
    model: nn.Module, patch_lr_scale: float, decay: Decay = "matrices"
) -> list[dict[str, object]]:
    """Build up to four groups: main, patch convolution with a scaled rate, and both without decay.

    With `decay="matrices"`, names that end in `bias` and tensors of one dimension have no weight
    decay; class token, position table and prototype magnitudes have it (released). With "all",
    every parameter has it.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = name.endswith("bias") or parameter.ndim == 1
            plain = vector and decay == "matrices"
            groups.setdefault(("patch_embed" in name, plain), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_scale": patch_lr_scale if patch else 1.0,
            "decay": not plain,
            "weight_decay": 0.0,
        }
        for (patch, plain), parameters in groups.items()
    ]


def build_pretrain_adamw(
    model: nn.Module, patch_lr_scale: float = 0.2, decay: Decay = "matrices"
) -> torch.optim.AdamW:
    """Build a fused AdamW, betas 0.9 / 0.999, eps 1e-8; rates are set at every step.

    The moments exist from the start, as zeros, so a checkpoint has the same size at every step.
    """
    optimizer = torch.optim.AdamW(
        build_pretrain_parameter_groups(model, patch_lr_scale, decay), lr=0.0, fused=True
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # The fused kernel counts its steps on the device, unlike the plain one.
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def flatten_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer as `<parameter>.<name>` -> tensor."""
    return {
        f"{index}.{name}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load the result of `flatten_optimizer_state`; parameter groups stay as they are."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    # Rates and groups belong to the schedule and the settings, not to a checkpoint.
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def apply_rate_schedule(
    optimizer: torch.optim.Optimizer, schedule: RateSchedule, step: int
) -> None:
    """Set learning rate and weight decay of every group for a step."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.lr(step) * group["lr_scale"]
        group["weight_decay"] = schedule.wd(step) if group["decay"] else 0.0


def update_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Make the step of a fused optimizer, skipped on the device where `finite` is false.

    There is no host sync, and a step that is not finite leaves the weights unchanged.
    """
    # The interface of GradScaler: fused kernels read `found_inf` on the device and then change
    # nothing.
    optimizer.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
    optimizer.step()


@torch.no_grad()
def clip_each_tensor(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale each gradient by limit / (norm + 1e-6) where that is below one; return the norms.

    The norms are those before clipping. The release clips each tensor on its own, not all by their
    common norm. There is no host sync. A limit of 0 clips nothing.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if limit > 0:
        # Python numbers would need the norms on the host.
        scale_each_tensor(gradients, (limit / (norms + 1e-6)).clamp(max=1.0))
    return norms


# Above this number of elements a launch costs less than another pass over a gradient.
MOST_STACKED_ELEMENTS = 1 << 16


def scale_each_tensor(tensors: list[Tensor], factors: Tensor) -> None:
    """Multiply each tensor with its factor (one of a vector on the device), in place.

    torch launches a kernel per tensor here, as the shapes of tensor and factor differ. So small
    tensors of the same shape, which are most, are stacked and scaled together.
    """
    alike: dict[tuple[torch.Size, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for tensor, factor in zip(tensors, factors.unbind(), strict=True):
        if tensor.numel() > MOST_STACKED_ELEMENTS:
            tensor.mul_(factor)
        else:
            alike.setdefault((tensor.shape, tensor.dtype), []).append((tensor, factor))
    for pairs in alike.values():
        members, of_members = map(list, zip(*pairs, strict=True))
        scaled = torch.stack(members)
        scaled.mul_(torch.stack(of_members).view(-1, *[1] * (scaled.ndim - 1)))
        torch._foreach_copy_(members, list(scaled.unbind()))
