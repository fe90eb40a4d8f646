"""What the crops of an image are drawn from (paper, appendix; values of the released code)."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt
from pydantic_core import PydanticCustomError

from pipeline.settings import Added, FormerName, Internal, Probability, Settings

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _check_shares(limits: tuple[float, float]) -> tuple[float, float]:
    if not 0 < limits[0] <= limits[1] <= 1:
        raise PydanticCustomError("shares", "the smaller share first, both above 0 and at most 1")
    return limits


Shares = Annotated[tuple[float, float], AfterValidator(_check_shares)]
"""The smallest and the largest share that may be drawn."""


@dataclass(frozen=True, kw_only=True)
class ViewRecipe(Settings):
    """Crop sizes in pixels, scales as shares of the image area, probabilities."""

    # Side of the large crops.
    large_size: PositiveInt = 224
    # Side of the student's small crops.
    small_size: PositiveInt = 96
    # Number of small crops; 0 pretrains on large crops only (M4).
    num_small: Annotated[int, Field(ge=0)] = 10
    # Share of the image area that a large crop covers, drawn between these.
    large_scale: Shares = (0.25, 1.0)
    # The same for a small crop.
    small_scale: Shares = (0.05, 0.25)
    ratio: Internal[tuple[float, float]] = (3 / 4, 4 / 3)
    # Least overlap (IoU) of the two large crops of a network: the second one is drawn again until
    # it has more, and is the whole image after 1,000 tries. 0 draws it once.
    min_overlap: Added[Annotated[float, Field(ge=0, lt=1)]] = 0.0
    # Filter of the resize of a crop, with antialiasing; RandAugment draws its own.
    interpolation: Added[Literal["bicubic", "bilinear"]] = "bicubic"
    # Probability of a weak view; 1 turns strong views off. This is the released option `prob`,
    # whose help text says the opposite.
    weak_prob: Probability = 0.5
    # Who draws between weak and strong: "released" draws once for both large student crops and once
    # for each small crop, "per_image" once for all of them (the paper).
    student_strength_draw: Annotated[
        Literal["released", "per_image"], FormerName("student_coin")
    ] = "released"
    # "own": two large crops for each network. "shared": both see the same two, which are weak, as
    # with the release's weak-only option.
    large_crops: Annotated[
        Literal["own", "shared"], FormerName("weak_only", (("own", False), ("shared", True)))
    ] = "own"
    # With shared large crops, small crops are weak too, unless this is "released": then they are
    # drawn as ever (M13).
    weak_only_small: Literal["weak", "released"] = "weak"
    # Of a horizontal flip.
    flip_prob: Probability = 0.5
    # Of color jitter, in weak views.
    jitter_prob: Probability = 0.8
    # Brightness, contrast, saturation, hue.
    jitter: Internal[tuple[float, float, float, float]] = (0.4, 0.4, 0.2, 0.1)
    # Of a gray image, in weak views.
    gray_prob: Probability = 0.2
    # First large crop, second large crop, small crops (as in DINO).
    blur_prob: tuple[Probability, Probability, Probability] = (1.0, 0.1, 0.5)
    # Radius of the Gaussian blur in pixels, drawn between these.
    blur_radius: tuple[float, float] = (0.1, 2.0)
    # Of solarizing the second large crop, in weak views.
    solarize_prob: Probability = 0.2
    # Mean and standard deviation of the magnitude, which is at most 10: timm's "rand-m9-mstd0.5".
    randaugment_magnitude: Added[
        tuple[Annotated[float, Field(ge=0, le=10)], Annotated[float, Field(ge=0)]]
    ] = (9.0, 0.5)
    # Operations drawn for a strong view, each of which is applied with `randaugment_prob`.
    randaugment_num: Added[Annotated[int, Field(ge=1, le=15)]] = 2
    randaugment_prob: Added[Probability] = 0.5
    # timm may draw one operation twice, the release never does (M14).
    randaugment_replacement: bool = False
    # Of erasing one box, in strong views.
    erase_prob: Probability = 0.25
    # Erase with N(0, 1) noise before normalizing, as released, or after it (M11).
    erase_before_norm: bool = True
    mean: Internal[tuple[float, float, float]] = IMAGENET_MEAN
    std: Internal[tuple[float, float, float]] = IMAGENET_STD

    @property
    def num_large(self) -> int:
        """Return the number of large crops: two for each network, or two for both."""
        return 4 if self.large_crops == "own" else 2

    @property
    def num_crops(self) -> int:
        """Return the number of all crops."""
        return self.num_large + self.num_small
