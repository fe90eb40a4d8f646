"""Settings of a pretraining run around the method."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic_core import PydanticCustomError

from mugs.data.loading.config import LoaderName, RendererName
from mugs.data.views.config import ViewRecipe
from pipeline.settings import Added, FormerName, Probability, Runtime, Settings


def _check_clip(schedule: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    epochs = [first for first, _ in schedule]
    if epochs[:1] != [0] or sorted(set(epochs)) != epochs:
        raise PydanticCustomError("clip", "pairs (first epoch, limit) in rising order, from 0 on")
    return schedule


@dataclass(frozen=True, kw_only=True)
class StepConfig(Settings):
    """What a single optimizer step depends on."""

    # (first epoch, limit) pairs in rising order, from epoch 0 on; the last one that applies counts.
    # A limit of 0 leaves gradients alone.
    clip: Annotated[
        tuple[tuple[NonNegativeInt, NonNegativeFloat], ...], AfterValidator(_check_clip)
    ] = ((0, 3.0),)
    # Epochs in which the prototypes get no update.
    freeze_prototypes_epochs: NonNegativeInt = 1
    precision: Literal["fp32", "bf16"] = "fp32"

    def clip_at(self, epoch: int) -> float:
        """Return the clipping limit of an epoch."""
        return [limit for first, limit in self.clip if epoch >= first][-1]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StepConfig):
    """The run around the method. `batch_size` is global."""

    epochs: PositiveInt
    batch_size: PositiveInt
    # The peak rate is base_lr * batch_size / 256.
    base_lr: Annotated[float, Field(gt=0)]
    # Last value of the cosine.
    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    # Epochs of the linear warm-up from 0 to the peak.
    warmup_epochs: NonNegativeInt = 10
    # First and last value of a cosine.
    weight_decay: tuple[NonNegativeFloat, NonNegativeFloat] = (0.04, 0.2)
    # Parameters with weight decay: "matrices" leaves out biases and all others of one dimension.
    decay: Added[Literal["matrices", "all"]] = "matrices"
    # Momentum of the teacher's EMA at the start; it rises to 1 on a cosine.
    teacher_momentum: Probability = 0.996
    # Factor of the learning rate of the patch embedding.
    patch_lr_scale: NonNegativeFloat = 0.2
    # Steps of an epoch; without it, as many whole batches as the images give: one pass.
    steps_per_epoch: PositiveInt | None = None
    seed: int = 0
    views: ViewRecipe = field(default_factory=ViewRecipe)
    micro_batch_size: Annotated[Runtime[PositiveInt | None], FormerName("max_images_per_step")] = (
        None
    )
    # What reads images ahead; `auto` takes FFCV if it is installed. Both give the same batches.
    loader: Runtime[LoaderName] = "auto"
    # `reference` renders views with Pillow; `fast` gives the same and is compiled.
    renderer: Runtime[RendererName] = "fast"
    # Repeat a run bit by bit on GPUs too, more slowly. On CPUs it is so anyway.
    deterministic: Runtime[bool] = False
    threads: Runtime[PositiveInt] = 2
    checkpoint_steps: Runtime[PositiveInt] = 500
    # The newest checkpoints stay, and those after every `keep_every_epochs` epochs (0: none of
    # these).
    keep_checkpoints: Runtime[PositiveInt] = 2
    keep_every_epochs: Runtime[NonNegativeInt] = 0
    # How long a full or failing disk is tried again before the run fails. At most 20: the other
    # ranks wait that long for the one that saves.
    checkpoint_retry_minutes: Runtime[Annotated[float, Field(ge=0, le=20)]] = 10.0
    log_steps: Runtime[PositiveInt] = 10
    # Steps of a profiler trace, 0 for none.
    trace_steps: Annotated[Runtime[NonNegativeInt], FormerName("profile_steps")] = 0
    # Released run whose mean losses of the first epochs are logged beside ours
    # (mugs/methods/calibration.csv).
    calibration: Runtime[Literal["s100", "s300", "l250"] | None] = None

    @property
    def peak_lr(self) -> float:
        """Return base_lr * batch_size / 256."""
        return self.base_lr * self.batch_size / 256
