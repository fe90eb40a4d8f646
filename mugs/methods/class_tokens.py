"""What DINO and iBOT share: networks with one head, clustering of class tokens, released files.

Shapes: N images of a micro-batch, P crops of one network, K prototypes.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mugs.losses.clustering import clustering_loss, teacher_temperature_at
from mugs.losses.pairs import pair_weights
from mugs.methods.base import Method, Network
from mugs.methods.config import DinoConfig, IbotConfig
from mugs.methods.teacher import start_as_copy
from mugs.models.config import HeadNorm
from mugs.models.heads import GroupHead
from mugs.models.vit import build_vit
from mugs.weights.backbone_file import load_strictly, remove_wrappers

# The beginnings of our names in state dicts, and of those in released checkpoints.
RELEASED_NAMES = {"head.projector.": "head.mlp.", "masked_embed": "backbone.masked_embed"}
# Released checkpoints have centers of these shapes.
RELEASED_CENTERS = {"center": (1, -1), "center2": (1, 1, -1)}


class HeadNetwork(Network):
    """A backbone, and a head with prototypes."""

    def __init__(
        self,
        config: DinoConfig | IbotConfig,
        *,
        student: bool,
        norm: HeadNorm = "none",
        second_out: int | None = None,
    ) -> None:
        # The teacher has no stochastic depth.
        super().__init__(build_vit(config.arch, drop_path=config.drop_path if student else 0.0))
        self.head = GroupHead(
            self.backbone.embed_dim,
            hidden=config.head_hidden,
            bottleneck=config.bottleneck,
            out=config.num_prototypes,
            train_magnitude=config.train_prototype_magnitude,
            norm=norm,
            second_out=second_out,
        )


class Centers(nn.Module):
    """The center (K,) of the class logits, equal on all ranks."""

    center: Tensor

    def __init__(self, num_prototypes: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(num_prototypes))


class ClassTokenMethod(Method):
    """A method that compares assignments of class tokens to prototypes."""

    config: DinoConfig | IbotConfig
    student: HeadNetwork
    teacher: HeadNetwork
    extra_state: Centers
    centers_entry: ClassVar[str]
    """Where released checkpoints have the centers."""

    def __init__(
        self, config: DinoConfig | IbotConfig, build: Callable[..., HeadNetwork], seed: int
    ) -> None:
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.student = build(config, student=True)
            self.teacher = build(config, student=False)
        start_as_copy(self.teacher, self.student)

    def cluster_class_tokens(self, student: Tensor, teacher: Tensor, epoch: int) -> Tensor:
        """Return the loss of the student's class logits (P, N, K) and the teacher's (2, N, K)."""
        config = self.config
        # Pairs of equal index are left out, also where the student's large crops are its own.
        weights = pair_weights(2, len(student), 2, "uniform", student.device)
        start, end = config.teacher_temperature
        return clustering_loss(
            student,
            teacher,
            self.extra_state.center,
            weights,
            student_temperature=config.student_temperature,
            teacher_temperature=teacher_temperature_at(
                epoch, start=start, end=end, warmup_epochs=config.teacher_warmup_epochs
            ),
        )

    def last_layer_parameters(self) -> list[nn.Parameter]:
        """Return directions and magnitudes of all prototypes."""
        head = self.student.head
        layers = (head.last_layer, head.last_layer2)
        return [p for layer in layers if layer is not None for p in layer.parameters()]

    def projection(self) -> nn.Linear | None:
        """Return the first layer of the teacher's head."""
        return self.teacher.head.input_layer

    def load_released(self, checkpoint: Mapping[str, Any]) -> None:
        """Continue from networks and centers of a released full checkpoint.

        Raises:
            WeightsError: names the keys that are missing or that the network does not have.
        """
        for name, network in (("student", self.student), ("teacher", self.teacher)):
            load_strictly(network, self.read_network(checkpoint[name], name), name)
        entry = self.centers_entry
        centers = {key: value.flatten() for key, value in checkpoint[entry].items()}
        load_strictly(self.extra_state, centers, entry)

    def read_network(self, released: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """Return the weights of a released network under our names; `where` is for messages."""
        return {
            rename(remove_wrappers(key), released=False): value for key, value in released.items()
        }

    def released_state(self) -> dict[str, dict[str, Tensor]]:
        """Return networks and centers under the names of a released full checkpoint."""
        student = self.release_network(self.student)
        return {
            "student": {f"module.{key}": value for key, value in student.items()},
            "teacher": self.release_network(self.teacher),
            self.centers_entry: {
                key: value.view(RELEASED_CENTERS[key])
                for key, value in self.extra_state.state_dict().items()
            },
        }

    def release_network(self, network: HeadNetwork) -> dict[str, Tensor]:
        """Return the weights of a network under their released names."""
        return {rename(key, released=True): value for key, value in network.state_dict().items()}


def rename(key: str, *, released: bool) -> str:
    """Return a key under its released name, or else a released key under ours."""
    for ours, theirs in RELEASED_NAMES.items():
        old, new = (ours, theirs) if released else (theirs, ours)
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key
