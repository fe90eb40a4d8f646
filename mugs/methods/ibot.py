"""iBOT: DINO, and a prediction of masked patches (arXiv 2111.07832).

The student sees large crops with masked patches, the teacher sees them whole. The class tokens are
trained as in DINO. The student's masked patch tokens are compared with the teacher's tokens at the
same positions of the same crop. The two losses are added.

Prototypes are applied to the patches that the patch loss uses, not to all. Where to look:

    masks                          `annotate_masks`, mugs/methods/annotations.py
    masked patches of the student  `ViT.tokens`
    losses                         `Ibot.compute_losses`, mugs/losses/clustering.py
    centers                        `compute_mean_patch_logits`, `Ibot.update_extra_state`

Shapes: N images of a micro-batch, P crops of one network, V^2 patches of a large crop, M patches of
a crop that may be masked, D width, C bottleneck, K class and J patch prototypes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mugs.data.loading.batch import Views
from mugs.data.views.annotate import Annotate
from mugs.data.views.config import ViewRecipe
from mugs.losses.blocked import without_autocast
from mugs.losses.clustering import clustering_loss, teacher_temperature_at
from mugs.methods.annotations import annotate_masks
from mugs.methods.class_tokens import Centers, ClassTokenMethod, HeadNetwork
from mugs.methods.config import IbotConfig
from mugs.methods.teacher import update_center
from mugs.models.heads import Prototypes
from mugs.weights.pickle_file import WeightsError

# Prototypes of class and of patch tokens in released checkpoints.
FIRST_LAYER = "head.last_layer."
SECOND_LAYER = "head.last_layer2."


@dataclass(frozen=True)
class StudentCrops:
    """What the student sees: large crops with masks, large crops without, and small crops.

    masked is (2, N, 3, S, S) with masks (2, N, V^2). whole is None if the class tokens of the
    masked crops are trained.
    """

    masked: Tensor
    masks: Tensor
    whole: Tensor | None
    small: Tensor


class IbotNetwork(HeadNetwork):
    """A backbone, a head for class and patch tokens, and the student's mask vector."""

    def __init__(self, config: IbotConfig, *, student: bool) -> None:
        second_out = None if config.shared_head else config.count_patch_prototypes()
        super().__init__(config, student=student, second_out=second_out)
        # Two dimensions, so that it has weight decay (released, I15).
        self.masked_embed = (
            nn.Parameter(torch.zeros(1, self.backbone.embed_dim)) if student else None
        )

    @property
    def patch_prototypes(self) -> Prototypes:
        """Return the prototypes of patch tokens."""
        return self.head.last_layer2 or self.head.last_layer

    def forward(self, crops: StudentCrops, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits (P, N, K), and patch logits (2 * N * M, J) of the patches at `index`.

        `index` (2 * N, M) counts the patches of each masked crop.
        """
        assert self.masked_embed is not None, "the teacher sees whole crops"
        num_images = crops.masked.shape[1]
        masked = self.run(crops.masked, 0, (crops.masks.flatten(0, 1), self.masked_embed[0]))
        classes = []
        first = 2
        if crops.whole is None:
            classes.append(masked[:, 0])
        for group in (crops.whole, crops.small):
            if group is not None and len(group):
                classes.append(self.run(group, first)[:, 0])
                first += len(group)
        logits: Tensor = self.head(torch.cat(classes))
        patches = pick_tokens(masked[:, 1:], index)
        patch_logits: Tensor = self.patch_prototypes(self.head.project(patches))
        return logits.view(-1, num_images, logits.shape[-1]), patch_logits

    def run(self, crops: Tensor, first: int, masked: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the tokens (P * N, 1 + V^2, D) of crops first, first + 1, ... of one size."""
        self.set_crop_uniforms(first, len(crops))
        tokens: Tensor = self.backbone.norm(self.backbone.tokens(crops.flatten(0, 1), masked))
        return tokens


class IbotCenters(Centers):
    """The centers of class logits (K,) and patch logits (J,), equal on all ranks."""

    center2: Tensor

    def __init__(self, num_prototypes: int, num_patch_prototypes: int) -> None:
        super().__init__(num_prototypes)
        self.register_buffer("center2", torch.zeros(num_patch_prototypes))


@dataclass(frozen=True)
class TeacherOutputs:
    """Class logits (2, N, K), patch logits (2 * N * M, J) of the same patches as the student's,
    and the mean logits (J,) of all patches.
    """

    classes: Tensor
    patches: Tensor
    mean_patch_logits: Tensor


class Ibot(ClassTokenMethod):
    """The method as the engine sees it; `mugs.methods.base.Method` explains the calls."""

    config: IbotConfig
    student: IbotNetwork
    teacher: IbotNetwork
    extra_state: IbotCenters
    centers_entry = "ibot_loss"

    def __init__(self, config: IbotConfig, *, seed: int = 0) -> None:
        super().__init__(config, IbotNetwork, seed)
        self.loss_weights = dict(zip(("cls", "patch"), config.loss_weights, strict=True))
        self.extra_state = IbotCenters(config.num_prototypes, config.count_patch_prototypes())

    @property
    def annotate(self) -> Annotate:
        """Return the draw of `masks` (2, V, V), one for each large crop of an image."""
        return partial(annotate_masks, self.config, self.student.backbone.config.patch_size)

    def count_student_crops(self, recipe: ViewRecipe) -> int:
        """Return in how many crops the student sees each image in a step."""
        whole = 2 if self.config.clustering_input == "unmasked" else 0
        return 2 + whole + recipe.num_small

    def compute_losses(
        self, student: Callable[..., tuple[Tensor, Tensor]], views: Views, epoch: int
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """Return the losses `cls` and `patch`, and the mean teacher logits (K,) and (J,)."""
        # (N, 2, V, V) of the loader to (2, N, V^2), crop by crop.
        masks = views.extras["masks"].transpose(0, 1).flatten(2)
        crops = self._make_student_crops(views, masks)
        index, weights = self._choose_patches(masks.flatten(0, 1))
        with torch.no_grad():
            teacher = self._run_teacher(views.large[:2], index)
        classes, patches = student(crops, index)
        losses = {
            "cls": self.cluster_class_tokens(classes, teacher.classes, epoch),
            "patch": self._predict_patches(patches, teacher.patches, weights, epoch),
        }
        return losses, (teacher.classes.float().mean(dim=(0, 1)), teacher.mean_patch_logits)

    def _make_student_crops(self, views: Views, masks: Tensor) -> StudentCrops:
        if self.config.clustering_input == "unmasked":
            # Masks always lie on the teacher's own weak crops (paper of Mugs, table 8).
            return StudentCrops(views.large[:2], masks, views.large[-2:], views.small)
        assert len(views.large) == 2, "IbotConfig.check_views refuses crops of its own"
        return StudentCrops(views.large, masks, None, views.small)

    def _choose_patches(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the patches (2 * N, M) that are compared, and the weight (2 * N * M,) of each.

        M is the most that a mask may have, so the shapes do not depend on what was drawn and the
        host need not wait for a count. Patches that only fill up have the weight 0.
        """
        most = self.config.count_most_masked(masks.shape[1])
        # Masked patches come first, in their order.
        index = masks.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        chosen = masks.gather(1, index).to(torch.get_default_dtype())
        # The mean over the masked patches of a crop, then over all crops: also those without a mask
        # count (released, I4).
        share = chosen / masks.sum(dim=1, keepdim=True).clamp(min=1)
        return index, share.flatten() / len(masks)

    def _run_teacher(self, large: Tensor, index: Tensor) -> TeacherOutputs:
        network = self.teacher
        tokens = network.run(large, 0)
        classes: Tensor = network.head(tokens[:, 0])
        features = network.head.project(tokens[:, 1:])
        return TeacherOutputs(
            classes.view(2, -1, classes.shape[-1]),
            network.patch_prototypes(pick_tokens(features, index)),
            compute_mean_patch_logits(features, network.patch_prototypes),
        )

    def _predict_patches(
        self, student: Tensor, teacher: Tensor, weights: Tensor, epoch: int
    ) -> Tensor:
        config = self.config
        start, end = config.patch_teacher_temperature
        return clustering_loss(
            student[None],
            teacher[None],
            self.extra_state.center2,
            weights.new_ones(1, 1),
            student_temperature=config.student_temperature,
            # The warm-up waits for the masks.
            teacher_temperature=teacher_temperature_at(
                epoch - config.mask_start_epoch,
                start=start,
                end=end,
                warmup_epochs=config.teacher_warmup_epochs,
            ),
            image_weights_N=weights,
        )

    def update_extra_state(self, features: Sequence[tuple[Tensor, Tensor]], valid: Tensor) -> None:
        """Move both centers towards the mean teacher logits."""
        state = self.extra_state
        of_classes, of_patches = zip(*features, strict=True)
        update_center(state.center, of_classes, self.config.center_momentum, valid)
        update_center(state.center2, of_patches, self.config.center_momentum, valid)

    def read_network(self, released: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """Return the weights of a released network under our names.

        Raises:
            WeightsError: prototypes are not shared, and `shared_head` says so.
        """
        state = super().read_network(released, where)
        if self.config.shared_head:
            drop_second_layer(state, where)
        return state

    def release_network(self, network: HeadNetwork) -> dict[str, Tensor]:
        """Return the weights of a network under their released names: two of shared prototypes."""
        state = super().release_network(network)
        if self.config.shared_head:
            state |= {
                key.replace(FIRST_LAYER, SECOND_LAYER): value
                for key, value in state.items()
                if key.startswith(FIRST_LAYER)
            }
        return state


def pick_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Return the rows (N * M, D) of tokens (N, V^2, D) at `index` (N, M)."""
    # By rows, as the gradient of `gather` has no deterministic kernel.
    first = torch.arange(len(tokens), device=tokens.device)[:, None] * tokens.shape[1]
    return tokens.flatten(0, 1).index_select(0, (first + index).flatten())


def compute_mean_patch_logits(features: Tensor, prototypes: Prototypes) -> Tensor:
    """Return the mean (J,) of the logits of features (N, V^2, C).

    Prototypes have no bias, so the logits of the mean are the mean of the logits, and those of all
    patches are never made.
    """
    with without_autocast(features):
        logits: Tensor = prototypes(features.float().mean(dim=(0, 1)))
        return logits


def drop_second_layer(state: dict[str, Tensor], where: str) -> None:
    """Remove the second name that a released file has for the shared prototypes.

    Raises:
        WeightsError: its values are others, so the prototypes were not shared.
    """
    for key in [key for key in state if key.startswith(SECOND_LAYER)]:
        first = state.get(key.replace(SECOND_LAYER, FIRST_LAYER))
        if first is None or not torch.equal(state.pop(key), first):
            raise WeightsError(
                f"{where}: {key} differs from {FIRST_LAYER}*: class and patch tokens have "
                "prototypes of their own, so set ibot.shared_head to false"
            )
