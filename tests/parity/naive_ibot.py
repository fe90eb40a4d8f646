"""iBOT written loop by loop from its description: one crop, pair, image and patch at a time.

It shares the layers with the product, and nothing of its losses, choice of patches, clipping,
schedules or batching. Every patch goes through head and prototypes, and the center is their mean.
"""

import torch
from naive_dino import NaiveDino
from torch import Tensor

from mugs.data.loading.batch import Views
from mugs.methods.ibot import Ibot, IbotNetwork


class NaiveIbot(NaiveDino):
    """Starts from the weights and centers of an `Ibot` and repeats its training steps naively."""

    def __init__(self, method: Ibot, clip: float, patch_lr_scale: float = 1.0) -> None:
        super().__init__(method, clip, patch_lr_scale)
        self.state = {name: value.clone() for name, value in method.extra_state.named_buffers()}

    def tokens(self, network: IbotNetwork, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Tokens after the final LayerNorm, each masked patch replaced by hand."""
        vit = network.backbone
        patches = vit.patch_embed(images).clone()
        if masks is not None:
            # Without any mask the gradient of the vector is 0, not absent (released).
            patches = patches + 0 * network.masked_embed.sum()
            for image, row, column in masks.nonzero().tolist():
                patches[image, row, column] = network.masked_embed[0]
        x = vit._pos_embed(patches)
        for block in vit.blocks:
            x = block(x)
        return vit.norm(x)

    def class_logits(self, network: IbotNetwork, tokens: Tensor) -> Tensor:
        return network.head.last_layer(network.head.project(tokens[:, 0]))

    def patch_logits(self, network: IbotNetwork, tokens: Tensor) -> Tensor:
        head = network.head
        layer = head.last_layer if self.config.shared_head else head.last_layer2
        return layer(head.project(tokens[:, 1:]))

    def patch_loss(
        self, student: list[Tensor], teacher: list[Tensor], masks: Tensor, epoch: int
    ) -> Tensor:
        """Mean over crops of the mean over images of the mean over masked patches."""
        start, end = self.config.patch_teacher_temperature
        table = torch.linspace(start, end, self.config.teacher_warmup_epochs, dtype=torch.float64)
        table = torch.cat([torch.full((self.config.mask_start_epoch,), start), table])
        temperature = float(table[epoch]) if epoch < len(table) else end
        of_crops = []
        for crop in range(2):
            of_images = []
            for image, mask in enumerate(masks[:, crop].flatten(1)):
                terms = [0 * student[crop][image].sum()]
                for patch in mask.nonzero().flatten().tolist():
                    z = teacher[crop][image, patch] - self.state["center2"]
                    log_p = torch.log_softmax(
                        student[crop][image, patch] / self.config.student_temperature, -1
                    )
                    terms.append(-(torch.softmax(z / temperature, -1) * log_p).sum())
                of_images.append(torch.stack(terms).sum() / max(1, len(terms) - 1))
            of_crops.append(torch.stack(of_images).mean())
        return torch.stack(of_crops).mean()

    def step(
        self, views: Views, *, epoch: int, lr: float, wd: float, momentum: float, frozen: bool
    ) -> dict[str, float]:
        """One training step; returns the losses."""
        masks = views.extras["masks"]
        with torch.no_grad():
            seen = [self.tokens(self.teacher, views.large[crop]) for crop in range(2)]
            teacher = [self.class_logits(self.teacher, tokens) for tokens in seen]
            teacher_patches = [self.patch_logits(self.teacher, tokens) for tokens in seen]
        masked = [self.tokens(self.student, views.large[crop], masks[:, crop]) for crop in range(2)]
        student_patches = [self.patch_logits(self.student, tokens) for tokens in masked]
        if self.config.clustering_input == "unmasked":
            classes = [self.tokens(self.student, crop) for crop in views.large[-2:]]
        else:
            classes = list(masked)
        classes += [self.tokens(self.student, crop) for crop in views.small]
        cls = self.loss([self.class_logits(self.student, t) for t in classes], teacher, epoch)
        patch = self.patch_loss(student_patches, teacher_patches, masks, epoch)
        weight_cls, weight_patch = self.config.loss_weights
        total = weight_cls * cls + weight_patch * patch

        keep = self.config.center_momentum
        means = (torch.cat(teacher).mean(0), torch.cat(teacher_patches).mean(dim=(0, 1)))
        for name, mean in zip(("center", "center2"), means, strict=True):
            self.state[name] = keep * self.state[name] + (1 - keep) * mean
        self.optimizer.zero_grad()
        total.backward()
        self.update(lr, wd, frozen)
        with torch.no_grad():
            mine = dict(self.student.named_parameters())
            for name, parameter in self.teacher.named_parameters():
                parameter.copy_(momentum * parameter + (1 - momentum) * mine[name])
        return {"total": total.item(), "cls": cls.item(), "patch": patch.item()}
