"""DINO: self-distillation of class tokens on prototypes (arXiv 2104.14294).

The student's assignment of every crop is compared with the teacher's assignment of the two large
crops. It is the group level of Mugs without the other two, and with all pairs of crops weighted
alike. The teacher is the EMA of the student; its logits are centered and sharpened.

Shapes: N images of a micro-batch, P crops of one network, D width, K prototypes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mugs.data.loading.batch import Views
from mugs.losses.clustering import clustering_loss, teacher_temperature_at
from mugs.losses.pairs import pair_weights
from mugs.methods.base import Method, Network
from mugs.methods.config import DinoConfig
from mugs.methods.teacher import update_center
from mugs.models.heads import GroupHead
from mugs.models.vit import ViT, build_vit
from mugs.weights.backbone_file import load_strictly, remove_wrappers

# The projector of the head, in our state dicts and in released checkpoints.
OUR_PROJECTOR = "head.projector."
RELEASED_PROJECTOR = "head.mlp."


class DinoNetwork(Network):
    """A backbone, and a head with prototypes on its class token."""

    def __init__(self, backbone: ViT, head: GroupHead) -> None:
        super().__init__(backbone)
        self.head = head

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


class DinoState(nn.Module):
    """The center (K,), equal on all ranks."""

    center: Tensor

    def __init__(self, num_prototypes: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(num_prototypes))


class Dino(Method):
    """The method as the engine sees it; `mugs.methods.base.Method` explains the calls."""

    student: DinoNetwork
    teacher: DinoNetwork
    extra_state: DinoState

    def __init__(self, config: DinoConfig, *, seed: int = 0) -> None:
        self.config = config
        self.loss_weights = {"cls": 1.0}
        self.needs_whole_batch_per_rank = config.needs_whole_batch_per_rank
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.student = build_network(config, drop_path=config.drop_path)
            self.teacher = build_network(config, drop_path=0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.extra_state = DinoState(config.num_prototypes)

    def compute_losses(
        self, student: Callable[..., Tensor], views: Views, epoch: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the loss `cls` of a micro-batch, and the mean teacher logits (K,)."""
        config = self.config
        with torch.no_grad():
            teacher_logits = self.teacher([views.large[:2]])
        student_logits = student([views.large[-2:], views.small])

        # Pairs of equal index are left out, also where the student's large crops are its own.
        weights = pair_weights(2, len(student_logits), 2, "uniform", views.large.device)
        loss = clustering_loss(
            student_logits,
            teacher_logits,
            self.extra_state.center,
            weights,
            student_temperature=config.student_temperature,
            teacher_temperature=teacher_temperature_at(
                epoch,
                start=config.teacher_temperature[0],
                end=config.teacher_temperature[1],
                warmup_epochs=config.teacher_warmup_epochs,
            ),
        )
        return {"cls": loss}, teacher_logits.float().mean(dim=(0, 1))

    def update_extra_state(self, features: Sequence[Tensor], valid: Tensor) -> None:
        """Move the center towards the mean teacher logits."""
        update_center(self.extra_state.center, features, self.config.center_momentum, valid)

    def last_layer_parameters(self) -> list[nn.Parameter]:
        """Return directions and magnitudes of the prototypes."""
        return list(self.student.head.last_layer.parameters())

    def projection(self) -> nn.Linear | None:
        """Return the first layer of the teacher's head."""
        return self.teacher.head.input_layer

    def load_released(self, checkpoint: Mapping[str, Any]) -> None:
        """Continue from networks and center of a released full checkpoint.

        Raises:
            WeightsError: names the keys that are missing or that the network does not have.
        """
        for name, network in (("student", self.student), ("teacher", self.teacher)):
            state = {
                remove_wrappers(key).replace(RELEASED_PROJECTOR, OUR_PROJECTOR): value
                for key, value in checkpoint[name].items()
            }
            load_strictly(network, state, name)
        self.extra_state.center.copy_(checkpoint["dino_loss"]["center"][0])

    def released_state(self) -> dict[str, dict[str, Tensor]]:
        """Return networks and center under the names of a released full checkpoint."""

        def rename(network: nn.Module, prefix: str) -> dict[str, Tensor]:
            return {
                prefix + key.replace(OUR_PROJECTOR, RELEASED_PROJECTOR): value
                for key, value in network.state_dict().items()
            }

        return {
            "student": rename(self.student, "module."),
            "teacher": rename(self.teacher, ""),
            "dino_loss": {"center": self.extra_state.center[None]},
        }


def build_network(config: DinoConfig, *, drop_path: float) -> DinoNetwork:
    """Build a student or teacher."""
    backbone = build_vit(config.arch, drop_path=drop_path)
    head = GroupHead(
        backbone.embed_dim,
        hidden=config.head_hidden,
        bottleneck=config.bottleneck,
        out=config.num_prototypes,
        train_magnitude=config.train_prototype_magnitude,
        norm=config.head_norm,
    )
    return DinoNetwork(backbone, head)
