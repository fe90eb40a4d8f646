"""AdamW with the released parameter groups, and clipping of each tensor on its own."""

from typing import Protocol

import torch
from torch import Tensor, nn


class RateSchedule(Protocol):
    """Learning rate and weight decay at every optimizer step."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""

    def lr(self, step: int) -> float:
        """Learning rate, before the scale of a group."""

    def wd(self, step: int) -> float:
        """Weight decay of the groups that have one."""

    def rates(self, step: int) -> dict[str, float]:
        """What the log notes of a step."""


def build_pretrain_parameter_groups(
    model: nn.Module, patch_lr_scale: float
) -> list[dict[str, object]]:
    """Four groups: main, patch convolution at a scaled rate, and the same two without weight decay.

    Without decay: names that end in `bias` and tensors of one dimension. Class token, position table and prototype
    magnitudes do decay (released).
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = name.endswith("bias") or parameter.ndim == 1
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


def build_pretrain_adamw(model: nn.Module, patch_lr_scale: float = 0.2) -> torch.optim.AdamW:
    """Fused AdamW, betas 0.9 / 0.999, eps 1e-8; rates are set at every step.

    Moments are there from the start, zero, so that a checkpoint has the same tensors and size at every step.
    """
    optimizer = torch.optim.AdamW(
        build_pretrain_parameter_groups(model, patch_lr_scale), lr=0.0, fused=True
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def flatten_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an optimizer as `<parameter>.<name>` -> tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; parameter groups stay as they are."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def apply_rate_schedule(
    optimizer: torch.optim.Optimizer, schedule: RateSchedule, step: int
) -> None:
    """Learning rate and weight decay of every group for this step."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.lr(step) * group["lr_scale"]
        group["weight_decay"] = schedule.wd(step) if group["decay"] else 0.0


def update_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Step of a fused optimizer, skipped on the device where `finite` is false: nothing waits, no weight goes bad."""
    optimizer.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
    optimizer.step()


@torch.no_grad()
def clip_each_tensor(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale each gradient by limit / (norm + 1e-6) where that is below one; returns the norms, before clipping.

    The whole list is handled by foreach kernels and nothing waits for the device.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if limit > 0:
        torch._foreach_mul_(gradients, list((limit / (norms + 1e-6)).clamp(max=1.0).unbind()))
    return norms
