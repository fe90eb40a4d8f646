"""The methods by name, and their settings.

Planning reads this file, so it does not import torch. What a method does is in the file that its
line in `METHODS` names.
"""

import importlib
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from mugs.data.views.config import ViewRecipe
from mugs.losses.config import PairAverage
from mugs.methods.options import MethodOptions
from mugs.models.config import HeadNorm, PointerRule, PredictorInit
from pipeline.settings import Added, Internal, Probability, Settings

if TYPE_CHECKING:
    from mugs.methods.base import Method

LocalGroupToken = Literal["released", "paper"]


def _describe_late_temperature(
    name: str, limits: tuple[float, float], reached: int, epochs: int
) -> list[str]:
    """Return a line if a temperature does not reach its last value within a run."""
    if limits[0] == limits[1] or reached <= epochs:
        return []
    return [
        f"{name} reaches {limits[1]:g} after {reached} epochs, the run has {epochs}: the teacher "
        "never has that temperature"
    ]


@dataclass(frozen=True, kw_only=True)
class MugsConfig(MethodOptions):
    """Everything of Mugs that shapes numbers. Defaults: the released ViT-S runs, except
    `memory_start`.
    """

    # Width of the hidden layers of all projectors.
    head_hidden: PositiveInt = 2048
    # Width of the hidden layer of the two predictors.
    predictor_hidden: PositiveInt = 4096
    # Width of the features that InfoNCE compares.
    head_out: PositiveInt = 256
    # The same for the local-group loss alone; null for `head_out`.
    local_group_out: Added[PositiveInt | None] = None
    # Width of the features that are compared with the prototypes (M23).
    group_bottleneck: PositiveInt = 256
    # Prototypes of the group loss.
    num_prototypes: PositiveInt = 65536
    # Whether the lengths of the prototypes are trained or stay 1.
    train_prototype_magnitude: bool = True
    # Negatives in the queue of each InfoNCE loss.
    queue_size: PositiveInt = 65536
    # The same for the local-group loss alone; null for `queue_size`.
    local_group_queue_size: Added[PositiveInt | None] = None
    # Past features among which neighbors are looked up.
    memory_size: PositiveInt = 65536
    # Neighbors that the relation blocks see beside a token.
    num_neighbours: PositiveInt = 8
    # Temperature of the instance InfoNCE loss.
    instance_temperature: PositiveFloat = 0.2
    # Temperature of the local-group InfoNCE loss.
    local_group_temperature: PositiveFloat = 0.2
    # Temperature of the student's softmax over prototypes.
    group_student_temperature: PositiveFloat = 0.1
    # First and last value of a linear warm-up over `group_teacher_warmup_epochs`.
    group_teacher_temperature: tuple[PositiveFloat, PositiveFloat] = (0.04, 0.04)
    # Epochs over which the teacher's temperature changes.
    group_teacher_warmup_epochs: NonNegativeInt = 0
    # Momentum of the center that is taken from the teacher's logits.
    center_momentum: Probability = 0.9
    # Weights of instance, local-group and group loss. 0 also removes the head, queue and memories
    # (M6).
    loss_weights: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (1.0, 1.0, 1.0)
    # "weighted" is the weighted mean of the losses. "released" divides their sum by that of the
    # weights, which multiply nothing (M5).
    loss_sum: Added[Literal["weighted", "released"]] = "weighted"
    # Transformer blocks over a token and its neighbors: the paper has 2 (M7).
    relation_depth: Literal[1, 2] = 1
    # `mugs.models.memory.NeighborMemory` explains both (M1, M33).
    memory_pointer: PointerRule = "released"
    # Whether both tables of a memory start alike (M33).
    memory_start: Literal["common", "released"] = "common"
    # "released": one per network, the student's for weak images only. "shared": one for both (the
    # paper, M9).
    memories: Literal["released", "shared"] = "released"
    # `mugs.methods.network.MugsNetwork` explains it (M3).
    local_group_token: LocalGroupToken = "released"
    # Weights of the pairs of crops: large and small pairs half each, or all alike (M8).
    pair_average: PairAverage = "released"
    # `mugs.models.heads.InfoNCEHead` explains both (M10).
    predictor_init: PredictorInit = "released"
    # Whether the student's features have unit length before the predictor, too (M34).
    norm_before_predictor: Added[bool] = True
    # Batch normalization in the hidden layers of the projectors, over all ranks.
    head_norm: HeadNorm = "none"

    @property
    def needs_whole_batch_per_rank(self) -> bool:
        """Whether a micro-batch would change the numbers."""
        return self.head_norm == "batch"

    def head_outs(self) -> tuple[int, int]:
        """Return the widths of the features of the instance and the local-group loss."""
        return self.head_out, self.local_group_out or self.head_out

    def queue_sizes(self) -> tuple[int, int]:
        """Return the sizes of the queues of the instance and the local-group loss."""
        return self.queue_size, self.local_group_queue_size or self.queue_size

    def list_late_settings(self, epochs: int) -> list[str]:
        """Return a line for a temperature that is still changing at the end."""
        return _describe_late_temperature(
            "group_teacher_temperature",
            self.group_teacher_temperature,
            self.group_teacher_warmup_epochs,
            epochs,
        )

    def count_parameters(self, width: int, depth: int) -> int:
        """Return about how many parameters the student has."""
        # The extra block is the relation block.
        backbone = super().count_parameters(width, depth + 1)
        # Three projection heads (instance, local group, group), then the group's prototypes.
        layers = width + self.head_hidden + self.head_out
        heads = 3 * self.head_hidden * layers + self.num_prototypes * self.group_bottleneck
        return backbone + heads

    def count_extra_values(self, width: int) -> int:
        """Return about how many values queues and memories hold."""
        # Queues of the instance and the local-group loss, memories of student and teacher.
        queues = sum(n * c for n, c in zip(self.queue_sizes(), self.head_outs(), strict=True))
        return queues + 2 * self.memory_size * width


@dataclass(frozen=True, kw_only=True)
class DinoConfig(MethodOptions):
    """Everything of DINO that shapes numbers. Defaults: the released ViT-S run of 100 epochs."""

    # Width of the hidden layers of the projector.
    head_hidden: PositiveInt = 2048
    # Width of the features that are compared with the prototypes.
    bottleneck: PositiveInt = 256
    # Prototypes.
    num_prototypes: PositiveInt = 65536
    # Whether the lengths of the prototypes are trained or stay 1.
    train_prototype_magnitude: bool = False
    # Temperature of the student's softmax over prototypes.
    student_temperature: PositiveFloat = 0.1
    # First and last value of a linear warm-up over `teacher_warmup_epochs`.
    teacher_temperature: tuple[PositiveFloat, PositiveFloat] = (0.04, 0.04)
    # Epochs over which the teacher's temperature changes (D5).
    teacher_warmup_epochs: NonNegativeInt = 0
    # Momentum of the center that is taken from the teacher's logits.
    center_momentum: Probability = 0.9
    # Batch normalization in the hidden layers of the projector, over all crops and ranks.
    head_norm: HeadNorm = "none"

    @property
    def needs_whole_batch_per_rank(self) -> bool:
        """Whether a micro-batch would change the numbers."""
        return self.head_norm == "batch"

    def list_late_settings(self, epochs: int) -> list[str]:
        """Return a line for a temperature that is still changing at the end."""
        return _describe_late_temperature(
            "teacher_temperature", self.teacher_temperature, self.teacher_warmup_epochs, epochs
        )

    def count_parameters(self, width: int, depth: int) -> int:
        """Return about how many parameters the student has."""
        projector = self.head_hidden * (width + self.head_hidden + self.bottleneck)
        return (
            super().count_parameters(width, depth)
            + projector
            + self.num_prototypes * self.bottleneck
        )


# Overlap (IoU) of two crops -> stride: a factor, the least and the most.
Stride = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class MgcConfig(MethodOptions):
    """Everything of MGC that shapes numbers. Defaults: the released ViT-S run on COCO.

    Values of three are those of the levels part, object and scene.
    """

    trains_class_token: ClassVar[bool] = False

    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.05
    # Width of the hidden layers of projectors and predictors.
    head_hidden: PositiveInt = 4096
    # Width of the features that are compared.
    head_out: PositiveInt = 128
    # Side of the square of patches whose mean is a token of a level (G8).
    windows: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 2, 7)
    # Pairs of tokens of an image; they are the weights of the levels as well.
    num_pairs: tuple[PositiveInt, PositiveInt, PositiveInt] = (10, 10, 2)
    row_strides: Internal[tuple[Stride, Stride, Stride]] = ((12, 2, 8), (8, 2, 4), (1, 1, 1))
    column_strides: Internal[tuple[Stride, Stride, Stride]] = ((8, 2, 6), (4, 1, 3), (1, 1, 1))
    # Divides the cosines.
    temperature: Annotated[float, Field(gt=0)] = 0.1
    # Whether pairs count by how much their cells share. The release computes this weight, and it
    # has no effect there (G1).
    overlap_weighting: bool = False
    # "independent": Linear layers of the teacher are drawn on their own, as released. "copy": the
    # teacher starts as the student (G2).
    teacher_init: Literal["independent", "copy"] = "independent"
    # Whether the bias of the final LayerNorm is trained, as released. It has no effect on the loss,
    # and AdamW moves it at random (G14).
    final_norm_bias: Literal["trained", "frozen"] = "trained"
    # "counted": where an image has too few pairs, token 0 of both crops fills up, as released.
    # "ignored": such rows are neither positives nor negatives (G16).
    padding: Literal["counted", "ignored"] = "counted"

    @property
    def needs_whole_batch_per_rank(self) -> bool:
        """Whether a micro-batch would change the numbers: batch normalization, negatives."""
        return True

    def check_views(self, views: ViewRecipe) -> None:
        """Raise ValueError unless both networks see the same two large crops, and no small ones."""
        if views.large_crops != "shared" or views.num_small > 0:
            raise ValueError(
                f"views: MGC compares two large crops that both networks see; large_crops is "
                f"{views.large_crops} and num_small {views.num_small}; "
                "set them to shared and 0"
            )

    def count_parameters(self, width: int, depth: int) -> int:
        """Return about how many parameters the student has."""
        projector = width + self.head_hidden + self.head_out
        heads = 3 * self.head_hidden * (projector + 2 * self.head_out)
        return super().count_parameters(width, depth) + heads


@dataclass(frozen=True, kw_only=True)
class IbotConfig(MethodOptions):
    """Everything of iBOT that shapes numbers. Defaults: the released ViT-S run of 800 epochs."""

    # Width of the hidden layers of the projector.
    head_hidden: PositiveInt = 2048
    # Width of the features that are compared with the prototypes.
    bottleneck: PositiveInt = 256
    # Whether class and patch tokens have the same prototypes, in both networks (I1).
    shared_head: bool = True
    # Prototypes of class tokens, and of patch tokens if they are shared.
    num_prototypes: PositiveInt = 8192
    # Prototypes of patch tokens if they are not shared; null for as many as of class tokens (I2).
    num_patch_prototypes: PositiveInt | None = None
    # Whether the lengths of the prototypes are trained or stay 1.
    train_prototype_magnitude: bool = True
    # Temperature of the student's softmax over prototypes.
    student_temperature: PositiveFloat = 0.1
    # First and last value of a linear warm-up over `teacher_warmup_epochs`, for class tokens.
    teacher_temperature: tuple[PositiveFloat, PositiveFloat] = (0.04, 0.07)
    # The same for patch tokens; their warm-up begins with the masks.
    patch_teacher_temperature: tuple[PositiveFloat, PositiveFloat] = (0.04, 0.07)
    # Epochs over which the teacher's temperatures change.
    teacher_warmup_epochs: NonNegativeInt = 30
    # Momentum of both centers that are taken from the teacher's logits.
    center_momentum: Probability = 0.9
    # Weights of the losses of class and patch tokens, which are added (I3).
    loss_weights: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    # Shares of the patches of a crop to mask, one of which is drawn for each crop (I12).
    mask_ratios: tuple[Probability, ...] = (0.0, 0.3)
    # How far each share is drawn around its value; as many as `mask_ratios`.
    mask_half_widths: tuple[Probability, ...] = (0.0, 0.2)
    # Rectangles that overlap, or patches anywhere (I6).
    mask_shape: Literal["block", "random"] = "block"
    # First epoch with masks (I16).
    mask_start_epoch: NonNegativeInt = 0
    # Whether the class tokens are trained on the masked crops, or on crops without masks in a pass
    # of their own (I5).
    clustering_input: Literal["masked", "unmasked"] = "masked"

    def __post_init__(self) -> None:
        """Refuse settings that do not fit together."""
        if self.shared_head and self.num_patch_prototypes is not None:
            raise ValueError(
                "num_patch_prototypes: shared_head is true, so patch tokens have the prototypes of "
                "class tokens; leave it out or set shared_head to false"
            )
        if len(self.mask_ratios) != len(self.mask_half_widths):
            raise ValueError(
                f"mask_half_widths has {len(self.mask_half_widths)} values and mask_ratios "
                f"{len(self.mask_ratios)}, which must be as many"
            )
        for ratio, half in zip(self.mask_ratios, self.mask_half_widths, strict=True):
            if ratio - half < 0 or ratio + half > 1:
                raise ValueError(f"mask_ratios: {ratio} +- {half} is not within 0 and 1")
        if max(self.mask_ratios, default=0.0) == 0:
            raise ValueError("mask_ratios: no share above 0, so nothing would ever be masked")

    def list_late_settings(self, epochs: int) -> list[str]:
        """Return a line for masks, and for temperatures, that the run ends before."""
        start = self.mask_start_epoch
        if start >= epochs:
            return [
                f"mask_start_epoch is {start}, the run has {epochs} epochs: nothing is ever masked"
            ]
        late = []
        for name, first in (("teacher_temperature", 0), ("patch_teacher_temperature", start)):
            late += _describe_late_temperature(
                name, getattr(self, name), first + self.teacher_warmup_epochs, epochs
            )
        return late

    def check_views(self, views: ViewRecipe) -> None:
        """Raise ValueError unless masks lie on crops that the teacher sees, too."""
        if self.clustering_input == "masked" and views.large_crops != "shared":
            raise ValueError(
                f"views: large_crops is {views.large_crops}, but iBOT compares a masked patch with "
                "the same patch of the teacher's crop; set it to shared, or "
                "ibot.clustering_input to unmasked"
            )

    def count_patch_prototypes(self) -> int:
        """Return the number of prototypes of patch tokens."""
        return self.num_patch_prototypes or self.num_prototypes

    def count_most_masked(self, num_patches: int) -> int:
        """Return how many of the patches of a crop may be masked at most."""
        sums = (r + h for r, h in zip(self.mask_ratios, self.mask_half_widths, strict=True))
        # A little is added, as the sum may be rounded down below a whole number.
        return min(num_patches, int(max(sums) * num_patches + 1e-6))

    def count_parameters(self, width: int, depth: int) -> int:
        """Return about how many parameters the student has."""
        projector = self.head_hidden * (width + self.head_hidden + self.bottleneck)
        prototypes = self.num_prototypes
        if not self.shared_head:
            prototypes += self.count_patch_prototypes()
        return super().count_parameters(width, depth) + projector + prototypes * self.bottleneck


@dataclass(frozen=True)
class MethodEntry:
    """A method: the class of its settings, and the class that does it, as "module:name"."""

    options: type[MethodOptions]
    entrypoint: str

    def build(self, options: MethodOptions, *, seed: int) -> "Method":
        """Build the method; its module, and with it torch, is imported here."""
        module, name = self.entrypoint.split(":")
        method: Method = getattr(importlib.import_module(module), name)(options, seed=seed)
        return method


METHODS: dict[str, MethodEntry] = {
    "mugs": MethodEntry(MugsConfig, "mugs.methods.mugs:Mugs"),
    "dino": MethodEntry(DinoConfig, "mugs.methods.dino:Dino"),
    "mgc": MethodEntry(MgcConfig, "mugs.methods.mgc:Mgc"),
    "ibot": MethodEntry(IbotConfig, "mugs.methods.ibot:Ibot"),
}


@dataclass(frozen=True, kw_only=True)
class MethodChoice(Settings):
    """Base of `MethodSettings`, which adds a field with the settings of each method."""

    # Which method; its settings are the field of its name.
    method: Literal[*METHODS] = "mugs"  # type: ignore[valid-type]

    def __post_init__(self) -> None:
        """Refuse settings of a method that is not chosen."""
        for name in self.unused_settings():
            if getattr(self, name) != METHODS[name].options():
                raise ValueError(
                    f"{name}: settings of a method that is not chosen; method is {self.method}"
                )

    @property
    def options(self) -> MethodOptions:
        """Return the settings of the chosen method."""
        options: MethodOptions = getattr(self, self.method)
        return options

    def unused_settings(self) -> frozenset[str]:
        """Return the methods that are not chosen."""
        return frozenset(METHODS) - {self.method}


if TYPE_CHECKING:
    MethodSettings = MethodChoice
else:
    # One field for each method, so that a new one needs no line here.
    MethodSettings = make_dataclass(
        "MethodSettings",
        [
            (name, entry.options, field(default_factory=entry.options))
            for name, entry in METHODS.items()
        ],
        bases=(MethodChoice,),
        frozen=True,
        kw_only=True,
        namespace={"__module__": __name__},
    )
