"""Student and teacher network of Mugs: a backbone and up to three heads.

Shapes: N images, P crops of one network, D width, C channels of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mugs.methods.base import Network
from mugs.methods.config import LocalGroupToken, MugsConfig
from mugs.models.heads import GroupHead, InfoNCEHead
from mugs.models.memory import NeighborMemory
from mugs.models.vit import ViT, build_vit


@dataclass(frozen=True)
class NetworkOutputs:
    """Outputs of a network: heads (P, N, C), and the rows (N, D) that the memory stores.

    A field is None if its head is absent.
    """

    instance: Tensor | None
    local_group: Tensor | None
    group: Tensor | None
    memory: Tensor | None


class MugsNetwork(Network):
    """Backbone and heads. A head that is None is left out together with its output.

    `local_group_token` chooses query and stored row of the memory (M3). "released": the query is
    the mean over all tokens before the final LayerNorm, the stored row is the mean patch token
    after it. "paper": both are the mean patch token after the LayerNorm.
    """

    def __init__(
        self,
        backbone: ViT,
        instance_head: InfoNCEHead | None,
        local_group_head: InfoNCEHead | None,
        group_head: GroupHead | None,
        *,
        num_neighbors: int,
        local_group_token: LocalGroupToken,
    ) -> None:
        super().__init__(backbone)
        self.instance_head = instance_head
        self.local_group_head = local_group_head
        self.group_head = group_head
        self.num_neighbors = num_neighbors
        self.local_group_token = local_group_token

    def forward(self, crops: list[Tensor], memory: NeighborMemory | None) -> NetworkOutputs:
        """Run all crops: one tensor (P_i, N, 3, s_i, s_i) per size, the large ones first."""
        num_images = crops[0].shape[1]
        passes = []
        num_crops = 0
        # Crops of one size share a pass. Results are crop-major: all images of crop 0, then of 1,
        # ...
        for group in crops:
            if len(group):
                passes.append(self._one_size(group, num_crops, memory))
                num_crops += len(group)
        classes, related, stored = zip(*passes, strict=True)
        cls = torch.cat(classes)
        local = None if related[0] is None else torch.cat(related)

        def shaped(x: Tensor) -> Tensor:
            return x.view(num_crops, num_images, -1)

        return NetworkOutputs(
            instance=shaped(self.instance_head(cls)) if self.instance_head else None,
            local_group=shaped(self.local_group_head(local))
            if self.local_group_head and local is not None
            else None,
            group=shaped(self.group_head(cls)) if self.group_head else None,
            memory=stored[0],
        )

    def _one_size(
        self, crops: Tensor, first: int, memory: NeighborMemory | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return class tokens and local-group features (P_i * N, D), and memory rows (N, D).

        The rows are None unless this is the pass of crop 0. Without a memory there are no features.
        """
        self.set_crop_uniforms(first, len(crops))
        tokens = self.backbone.tokens(crops.flatten(0, 1))
        # The final LayerNorm runs only on tokens whose output is used.
        cls = self.backbone.norm(tokens[:, 0])
        if self.local_group_head is None or memory is None:
            return cls, None, None
        if self.local_group_token == "released":
            query = tokens.float().mean(dim=1)
        else:
            query = self.backbone.norm(tokens[:, 1:]).mean(dim=1)
        # Gradient flows through the query into the backbone, not through the neighbors.
        neighbors = memory.find_neighbors(query.detach(), self.num_neighbors)
        related = self.backbone.apply_relation_blocks(query, neighbors)
        if first > 0:
            return cls, related, None
        # The first large crop of each image is stored (released).
        with torch.no_grad():
            stored = self.backbone.norm(tokens.detach()[: crops.shape[1], 1:]).mean(dim=1)
        return cls, related, stored


def build_network(config: MugsConfig, *, student: bool) -> MugsNetwork:
    """Build the student (with predictors and stochastic depth) or the teacher."""
    instance, local_group, group = config.loss_weights
    backbone = build_vit(
        config.arch,
        relation_depth=config.relation_depth if local_group else 0,
        drop_path=config.drop_path if student else 0.0,
    )

    def info_nce_head(out: int) -> InfoNCEHead:
        return InfoNCEHead(
            backbone.embed_dim,
            hidden=config.head_hidden,
            out=out,
            predictor_hidden=config.predictor_hidden if student else None,
            predictor_init=config.predictor_init,
            norm=config.head_norm,
            norm_before_predictor=config.norm_before_predictor,
        )

    instance_out, local_group_out = config.head_outs()
    group_head = GroupHead(
        backbone.embed_dim,
        hidden=config.head_hidden,
        bottleneck=config.group_bottleneck,
        out=config.num_prototypes,
        train_magnitude=config.train_prototype_magnitude,
        norm=config.head_norm,
    )
    return MugsNetwork(
        backbone,
        info_nce_head(instance_out) if instance else None,
        info_nce_head(local_group_out) if local_group else None,
        group_head if group else None,
        num_neighbors=config.num_neighbours,
        local_group_token=config.local_group_token,
    )
