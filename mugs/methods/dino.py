"""DINO: self-distillation of class tokens on prototypes (arXiv 2104.14294).

The student's assignment of every crop is compared with the teacher's assignment of the two large
crops. It is the group level of Mugs without the other two, and with all pairs of crops weighted
alike. The teacher is the EMA of the student; its logits are centered and sharpened.

Shapes: N images of a micro-batch, P crops of one network, D width, K prototypes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mugs.data.loading.batch import Views
from mugs.methods.class_tokens import Centers, ClassTokenMethod, HeadNetwork
from mugs.methods.config import DinoConfig
from mugs.methods.teacher import update_center


class DinoNetwork(HeadNetwork):
    """A backbone, and a head with prototypes on its class token."""

    def __init__(self, config: DinoConfig, *, student: bool) -> None:
        super().__init__(config, student=student, norm=config.head_norm)

    def forward(self, crops: list[Tensor]) -> Tensor:
        """Return logits (P, N, K) of crops, one tensor (P_i, N, 3, s_i, s_i) per size."""
        num_images = crops[0].shape[1]
        features = []
        first = 0
        for group in crops:
            # Crops of one size share a pass; there may be no small ones.
            if len(group):
                self.set_crop_uniforms(first, len(group))
                features.append(self.backbone.cls_feature(group.flatten(0, 1)))
                first += len(group)
        # One call: batch normalization, if the head has it, sees all crops of the network.
        logits: Tensor = self.head(torch.cat(features))
        return logits.view(first, num_images, -1)


class Dino(ClassTokenMethod):
    """The method as the engine sees it; `mugs.methods.base.Method` explains the calls."""

    config: DinoConfig
    student: DinoNetwork
    teacher: DinoNetwork
    centers_entry = "dino_loss"

    def __init__(self, config: DinoConfig, *, seed: int = 0) -> None:
        super().__init__(config, DinoNetwork, seed)
        self.loss_weights = {"cls": 1.0}
        self.extra_state = Centers(config.num_prototypes)

    def compute_losses(
        self, student: Callable[..., Tensor], views: Views, epoch: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the loss `cls` of a micro-batch, and the mean teacher logits (K,)."""
        with torch.no_grad():
            teacher_logits = self.teacher([views.large[:2]])
        student_logits = student([views.large[-2:], views.small])
        loss = self.cluster_class_tokens(student_logits, teacher_logits, epoch)
        return {"cls": loss}, teacher_logits.float().mean(dim=(0, 1))

    def update_extra_state(self, features: Sequence[Tensor], valid: Tensor) -> None:
        """Move the center towards the mean teacher logits."""
        update_center(self.extra_state.center, features, self.config.center_momentum, valid)
