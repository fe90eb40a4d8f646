"""What a worker makes of a decoded image: its views, annotations and noise.

An object of these classes is sent to the workers, so it must be small and possible to pickle. Its
crops are functions of (seed, epoch, sample), whichever worker draws them. The compiled renderer is
imported where it is called: the trainer, which only makes the objects, saves the second that numba
takes.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from mugs.data.loading.config import RendererName
from mugs.data.views.annotate import Annotate
from mugs.data.views.boxes import BoxDraws, ErasedBox
from mugs.data.views.config import ViewRecipe
from mugs.data.views.plan import (
    FIRST_SMALL_CROP,
    CropPlan,
    ViewPlan,
    draw_crop_box,
    draw_strong_crop,
    plan_views,
)
from mugs.data.views.render import reference
from mugs.random_streams import SampleStream, make_generator

Augmentation = Literal["strong", "crop_flip"]
Interpolation = Literal["bicubic", "bilinear"]


NO_BOXES = BoxDraws(np.empty((2, 0), np.float32), np.empty(0, np.int64))


class Crops(NamedTuple):
    """The crops of n images, crop by crop: large (L, n, 3, S, S) and small (P, n, 3, s, s)."""

    large: np.ndarray
    small: np.ndarray


class CropSizes(NamedTuple):
    """How many large and small crops an image has, and their sides in pixels."""

    num_large: int
    large_size: int
    num_small: int = 0
    small_size: int = 0

    @property
    def bytes_per_image(self) -> int:
        """Return the bytes of all crops of an image."""
        return 3 * (self.num_large * self.large_size**2 + self.num_small * self.small_size**2)

    def split(self, memory: np.ndarray, num: int) -> Crops:
        """Return the crops of `num` images that are stored at the start of a piece of memory."""
        large_shape = (self.num_large, num, 3, self.large_size, self.large_size)
        small_shape = (self.num_small, num, 3, self.small_size, self.small_size)
        middle = int(np.prod(large_shape))
        end = num * self.bytes_per_image
        return Crops(memory[:middle].reshape(large_shape), memory[middle:end].reshape(small_shape))


class Place(NamedTuple):
    """An image in a batch: its slot there, its sample number and the epoch."""

    slot: int
    sample: int
    epoch: int


class DrawnImage(NamedTuple):
    """What is made of an image besides its pixels: annotations by name, and the erased boxes."""

    annotations: dict[str, np.ndarray]
    boxes: BoxDraws


class Drawing(Protocol):
    """Fills the slot of an image in a batch."""

    @property
    def sizes(self) -> CropSizes:
        """Number and sizes of the crops."""

    def __call__(self, image: Image.Image, place: Place, crops: Crops) -> DrawnImage:
        """Write the crops of an RGB image into its slot; return what else is made of it."""


@dataclass(frozen=True)
class TrainingViews:
    """The views of pretraining: all crops of a recipe."""

    recipe: ViewRecipe
    seed: int
    renderer: RendererName
    annotate: Annotate

    @property
    def sizes(self) -> CropSizes:
        """Number and sizes of the crops."""
        recipe = self.recipe
        return CropSizes(recipe.num_large, recipe.large_size, recipe.num_small, recipe.small_size)

    def __call__(self, image: Image.Image, place: Place, crops: Crops) -> DrawnImage:
        """Write the crops of an RGB image into its slot; return annotations and erased boxes."""
        from mugs.data.views.render import fast
        from mugs.data.views.render.erase import draw_boxes

        key = (self.seed, place.epoch, place.sample)
        # Drawn only now, as boxes depend on the size of the image.
        plan = plan_views(*key, image.width, image.height, self.recipe)
        render = (
            fast.render_views_compiled if self.renderer == "fast" else reference.render_views_pil
        )
        render(image, plan, crops.large[:, place.slot], crops.small[:, place.slot])
        boxes = draw_boxes(*key, list_erased_boxes(crops, plan, place.slot))
        rng = make_generator(*key, SampleStream.ANNOTATIONS)
        return DrawnImage(self.annotate(rng, plan, place.epoch), boxes)


def list_erased_boxes(crops: Crops, plan: ViewPlan, slot: int) -> list[ErasedBox]:
    """Return the erased boxes of the image in a slot, and where in the batch its crops are."""
    erased = []
    for index, crop in enumerate(plan.crops):
        if crop.erase[2] > 0:
            is_small = index >= len(crops.large)
            group = crops.small if is_small else crops.large
            number = index - len(crops.large) if is_small else index
            first = crops.large.size if is_small else 0
            # A value is a byte, so strides count values.
            start = first + number * group.strides[0] + slot * group.strides[1]
            stream = FIRST_SMALL_CROP + number if is_small else number
            erased.append(ErasedBox(stream, crop.erase, start, crop.size))
    return erased


@dataclass(frozen=True)
class ProbeView:
    """The view that a linear probe is trained on: one crop, strong or cut and mirrored only."""

    recipe: ViewRecipe
    seed: int
    augmentation: Augmentation

    @property
    def sizes(self) -> CropSizes:
        """Number and size of the crop."""
        return CropSizes(1, self.recipe.large_size)

    def __call__(self, image: Image.Image, place: Place, crops: Crops) -> DrawnImage:
        """Write the crop of an RGB image into its slot; return its erased box."""
        from mugs.data.views.render import fast
        from mugs.data.views.render.erase import draw_boxes

        key = (self.seed, place.epoch, place.sample)
        recipe = self.recipe
        rng = make_generator(*key, SampleStream.PROBE_VIEW)
        box = draw_crop_box(rng, image.width, image.height, recipe.large_scale, recipe.ratio)
        if self.augmentation == "strong":
            crop = draw_strong_crop(rng, recipe.large_size, box, 0, recipe)
        else:
            flip = bool(rng.random() < recipe.flip_prob)
            crop = CropPlan(recipe.large_size, box, flip, strong=False)
        plan = ViewPlan((crop,), weak=not crop.strong)
        slot = place.slot
        fast.render_views_compiled(image, plan, crops.large[:, slot], crops.small[:, slot])
        # Erased on the device, as in pretraining, after normalizing.
        boxes = list_erased_boxes(crops, plan, slot)
        return DrawnImage({}, draw_boxes(*key, boxes))


@dataclass(frozen=True)
class CenterCrop:
    """The image of an evaluation, preprocessed by PIL exactly as torchvision does."""

    resize: int
    crop: int
    interpolation: Interpolation

    @property
    def sizes(self) -> CropSizes:
        """Number and size of the crop."""
        return CropSizes(1, self.crop)

    def __call__(self, image: Image.Image, place: Place, crops: Crops) -> DrawnImage:
        """Write the center of an RGB image into its slot; nothing is random."""
        crops.large[0, place.slot] = preprocess_eval_image(
            image, self.resize, self.crop, self.interpolation
        )
        return DrawnImage({}, NO_BOXES)


def preprocess_eval_image(
    image: Image.Image, short_side: int, crop: int, interpolation: Interpolation = "bicubic"
) -> np.ndarray:
    """Resize the shorter side to `short_side` and cut out the center; return uint8 (3, crop, crop).

    Roundings are those of torchvision's Resize (down) and CenterCrop (to the nearest, halves to
    even).
    """
    width, height = image.size
    short = min(width, height)
    size = (int(short_side * width / short), int(short_side * height / short))
    image = reference.resize_pil(image, *size, resample=Image.Resampling[interpolation.upper()])
    left = round((size[0] - crop) / 2)
    top = round((size[1] - crop) / 2)
    return np.asarray(image.crop((left, top, left + crop, top + crop))).transpose(2, 0, 1)
