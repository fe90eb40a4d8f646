"""What the 14 crops of an image are drawn from (paper, appendix; values of the released code)."""

from dataclasses import dataclass
from typing import Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """Crop sizes in pixels, scales as shares of the image area, probabilities.

    weak_prob: probability of a weak view (the released `prob`, whose help text says the opposite). 1 turns strong off.
    student_coin: "released" tosses one coin for both large student crops and one for each small crop; "per_image" one
    for all of them (paper).
    weak_only: the student's large crops are copies of the teacher's, as the release's weak-only option; small crops
    are weak too unless weak_only_small = "released", which leaves them to the coin (row M13).
    erase_before_norm: erase with N(0, 1) before normalising, as released; else after it (M11).
    randaugment_replacement: timm may draw one operation twice, the release never does (M14).
    """

    large_size: int = 224
    small_size: int = 96
    num_small: int = 10
    large_scale: tuple[float, float] = (0.25, 1.0)
    small_scale: tuple[float, float] = (0.05, 0.25)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    weak_prob: float = 0.5
    student_coin: Literal["released", "per_image"] = "released"
    weak_only: bool = False
    weak_only_small: Literal["weak", "released"] = "weak"
    flip_prob: float = 0.5
    jitter_prob: float = 0.8
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    gray_prob: float = 0.2
    blur_prob: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_radius: tuple[float, float] = (0.1, 2.0)
    solarize_prob: float = 0.2
    randaugment_magnitude: tuple[float, float] = (9.0, 0.5)
    randaugment_replacement: bool = False
    erase_prob: float = 0.25
    erase_before_norm: bool = True
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @property
    def num_crops(self) -> int:
        """Two teacher crops, two large and `num_small` small student crops."""
        return 4 + self.num_small
