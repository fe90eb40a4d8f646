"""DINO written loop by loop from its description: one crop, one pair, one image at a time.

It shares the layers with the product, and nothing of its losses, clipping, schedules or batching.
"""

import torch
from torch import Tensor

from mugs.data.loading.batch import Views
from mugs.methods.dino import Dino, DinoNetwork


class NaiveDino:
    """Starts from the weights and center of a `Dino` and repeats its training steps naively."""

    def __init__(self, method: Dino, clip: float, patch_lr_scale: float = 1.0) -> None:
        self.config = method.config
        self.student = method.student
        self.teacher = method.teacher
        self.state = {"center": method.extra_state.center.clone()}
        self.clip = clip
        self.patch_lr_scale = patch_lr_scale
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [parameter], "name": name}
                for name, parameter in self.student.named_parameters()
                if parameter.requires_grad
            ],
            lr=0.0,
            foreach=False,
        )

    def logits(self, network: DinoNetwork, crops: list[Tensor]) -> list[Tensor]:
        """Logits of each crop; batch normalization in the head mixes them, so it sees them all."""
        features = [
            network.backbone.norm(network.backbone.tokens(images))[:, 0] for images in crops
        ]
        if self.config.head_norm == "batch":
            return list(network.head(torch.cat(features)).split(len(features[0])))
        return [network.head(feature) for feature in features]

    def teacher_temperature(self, epoch: int) -> float:
        start, end = self.config.teacher_temperature
        table = torch.linspace(start, end, self.config.teacher_warmup_epochs, dtype=torch.float64)
        return float(table[epoch]) if epoch < len(table) else end

    def loss(self, student: list[Tensor], teacher: list[Tensor], epoch: int) -> Tensor:
        """Mean over pairs of crops of the mean over images."""
        temperature = self.teacher_temperature(epoch)
        pairs = []
        for t, teacher_crop in enumerate(teacher):
            for p, student_crop in enumerate(student):
                if t == p:
                    continue
                of_images = []
                for s, z in zip(student_crop, teacher_crop, strict=True):
                    assigned = torch.softmax((z - self.state["center"]) / temperature, -1)
                    log_p = torch.log_softmax(s / self.config.student_temperature, -1)
                    of_images.append(-(assigned * log_p).sum())
                pairs.append(torch.stack(of_images).mean())
        return torch.stack(pairs).mean()

    def step(
        self,
        views: Views,
        *,
        epoch: int,
        lr: float,
        wd: float,
        momentum: float,
        frozen: bool,
    ) -> dict[str, float]:
        """One training step; returns the losses."""
        with torch.no_grad():
            teacher = self.logits(self.teacher, [views.large[0], views.large[1]])
        own = [views.large[-2], views.large[-1], *views.small]
        loss = self.loss(self.logits(self.student, own), teacher, epoch)
        keep = self.config.center_momentum
        mean = torch.cat(teacher).mean(0)
        self.state["center"] = keep * self.state["center"] + (1 - keep) * mean
        self.optimizer.zero_grad()
        loss.backward()
        self.update(lr, wd, frozen)
        with torch.no_grad():
            mine = dict(self.student.named_parameters())
            for name, parameter in self.teacher.named_parameters():
                parameter.copy_(momentum * parameter + (1 - momentum) * mine[name])
        return {"total": loss.item(), "cls": loss.item()}

    def update(self, lr: float, wd: float, frozen: bool) -> None:
        for group in self.optimizer.param_groups:
            (parameter,) = group["params"]
            name = group["name"]
            factor = self.clip / (parameter.grad.norm().item() + 1e-6)
            if self.clip and factor < 1:
                parameter.grad.mul_(factor)
            if frozen and "last_layer" in name:
                parameter.grad = None
            group["lr"] = lr * (self.patch_lr_scale if "patch_embed" in name else 1.0)
            group["weight_decay"] = 0.0 if name.endswith("bias") or parameter.ndim == 1 else wd
        self.optimizer.step()
