"""What the engine needs of a self-supervised method. It knows nothing else about one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from mugs.data.loading.batch import Views
from mugs.data.views.annotate import Annotate, annotate_nothing
from mugs.data.views.config import ViewRecipe
from mugs.data.views.plan import plan_views
from mugs.methods.options import MethodOptions
from mugs.methods.teacher import update_ema
from mugs.models.flops import copy_to_meta, count_flops
from mugs.models.vit import ViT
from mugs.random_streams import SampleStream, make_generator


class Network(nn.Module):
    """Student or teacher: a backbone, which evaluations use, and heads, which they do not."""

    backbone: ViT

    def __init__(self, backbone: ViT) -> None:
        super().__init__()
        self.backbone = backbone
        # Draws (branches, crops, N) of stochastic depth for the next pass, on the CPU; None keeps
        # every branch.
        self.depth_uniforms: Tensor | None = None
        # Of how many crops the draws were handed to the backbone.
        self.crops_drawn = 0

    def set_crop_uniforms(self, first: int, count: int) -> None:
        """Hand the draws of crops first, ..., first + count - 1 to the backbone, if there are any.

        The pass that follows has these crops, crop by crop. A network calls it before each pass.
        """
        if self.depth_uniforms is not None:
            self.crops_drawn += count
            self.backbone.set_depth_uniforms(
                self.depth_uniforms[:, first : first + count].flatten(1)
            )


class Method(ABC):
    """Networks, losses, teacher rule and extra state (queues, memories, centers) of a method.

    A subclass sets the attributes below in its constructor, which is called as
    `(config, seed=seed)`, and writes `compute_losses`, and `update_extra_state` if it keeps
    anything between steps. Everything else has a default, which fits a method whose teacher is the
    EMA of the student.

    Each rank computes the losses of its own images, and gradients are averaged over the ranks. What
    depends on other images (negatives, batch normalization, centers) has to be made of those of all
    ranks: `mugs/distributed.py`, and `norm="batch"` of `mugs.models.heads.build_mlp`.
    """

    config: MethodOptions
    """Its settings."""

    student: Network
    """The network that is trained."""
    teacher: Network
    """The network that follows the student (its EMA); it starts as a copy and has no gradient."""
    extra_state: nn.Module
    """Buffers besides the networks, which are equal on all ranks; an empty module without any."""
    loss_weights: dict[str, float]
    """The loss of a step is the sum of weight * loss over these names."""

    @property
    def annotate(self) -> Annotate:
        """Return what is drawn of each image besides its views; it becomes `Views.extras`."""
        return annotate_nothing

    @property
    def num_depth_branches(self) -> int:
        """Return the number of the student's stochastic-depth branches; 0 if its rate is 0."""
        layers = self.student.backbone.stochastic_depth_layers()
        return len(layers) if any(layer.rate > 0 for layer in layers) else 0

    def count_student_crops(self, recipe: ViewRecipe) -> int:
        """Return in how many crops the student sees each image in a step."""
        return 2 + recipe.num_small

    def to(self, device: torch.device) -> Self:
        """Move networks and state to a device."""
        for module in (self.student, self.teacher, self.extra_state):
            module.to(device)
        return self

    def accelerate(self, *, activation_checkpointing: bool = False, compile: bool = False) -> None:
        """Set how the networks run; no number changes beyond rounding.

        Activation checkpointing saves memory in the student's backbone. `compile` compiles the
        blocks of both backbones.
        """
        self.student.backbone.activation_checkpointing = activation_checkpointing
        if compile:
            # In place and block by block: parameter names stay, and all blocks share one compiled
            # graph.
            for network in (self.student, self.teacher):
                network.backbone.skip_dropped = False
                for block in network.backbone.blocks:
                    # Static shapes: there are two, one for each size of crops.
                    block.compile(dynamic=False)

    def count_step_flops(self, recipe: ViewRecipe, num_images: int) -> int:
        """Return the floating-point operations of one step over `num_images` images."""
        twin = copy_to_meta(self, self.student, self.teacher, self.extra_state)
        twin.accelerate(activation_checkpointing=False)
        views = make_meta_views(self.annotate, recipe)

        def total_loss() -> Tensor:
            losses, _ = twin.compute_losses(twin.student, views, epoch=0)
            return torch.stack(list(losses.values())).sum()

        # Every product has the images of the batch as one of its dimensions, so the count is
        # proportional.
        return num_images * count_flops(total_loss)

    @abstractmethod
    def compute_losses(
        self, student: Callable[..., Any], views: Views, epoch: int
    ) -> tuple[dict[str, Tensor], Any]:
        """Return the losses of a micro-batch by name, and its features for `update_extra_state`.

        `student` is `self.student`, possibly wrapped for distributed training. It is called once.
        The teacher sees `views.large[:2]` and the student `views.large[-2:]` and `views.small`: of
        each image, the same two crops with `large_crops: shared`, four different ones with `own`.
        """

    def update_extra_state(  # noqa: B027 (some methods keep nothing)
        self, features: Sequence[Any], valid: Tensor
    ) -> None:
        """Update queues, memories and center once per step, from all its micro-batches in order.

        Where `valid`, a boolean on the device, is false, the state stays as it is.
        """

    def before_forward(self, momentum: float) -> None:  # noqa: B027 (most methods do nothing)
        """Do what comes before the passes of a step; `momentum` is the EMA's of this step."""

    def after_step(self, momentum: float, valid: Tensor) -> None:
        """Do what comes after the optimizer: move the teacher, unless `valid` is false."""
        update_ema(self.teacher, self.student, momentum, valid)

    def set_depth_uniforms(self, uniforms: Tensor | None) -> None:
        """Hand draws (branches, student crops, N) to the student; the teacher drops nothing."""
        self.student.depth_uniforms = uniforms
        self.student.crops_drawn = 0

    def check_depth_uniforms(self) -> None:
        """Check that the student's passes took the draws of every crop.

        Raises:
            RuntimeError: some were not taken; the branches would have been kept without a word.
        """
        uniforms = self.student.depth_uniforms
        if uniforms is not None and self.student.crops_drawn != uniforms.shape[1]:
            raise RuntimeError(
                f"{type(self).__name__}: stochastic depth was drawn for {uniforms.shape[1]} crops "
                f"of the student, and its passes took the draws of {self.student.crops_drawn}; "
                "call set_crop_uniforms before each pass of the backbone, and see "
                "count_student_crops"
            )

    def last_layer_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that get no update in the first epochs."""
        return []

    def projection(self) -> nn.Linear | None:
        """Return the first layer of the teacher's head, from which fine-tuning may start."""
        return None


def make_meta_views(annotate: Annotate, recipe: ViewRecipe) -> Views:
    """Return views of one image without content, to count the operations of a step."""
    plan = plan_views(0, 0, 0, recipe.large_size, recipe.large_size, recipe)
    drawn = annotate(make_generator(0, 0, 0, SampleStream.ANNOTATIONS), plan, 0)

    def empty(crops: int, size: int) -> Tensor:
        return torch.empty(crops, 1, 3, size, size, device="meta")

    return Views(
        empty(recipe.num_large, recipe.large_size),
        empty(recipe.num_small, recipe.small_size),
        {name: torch.from_numpy(value)[None].to("meta") for name, value in drawn.items()},
    )
