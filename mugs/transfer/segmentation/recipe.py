"""How images become crops for training and inputs for testing (the mmsegmentation settings of iBOT and Mugs)."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SceneRecipe:
    """Sizes in pixels.

    long_side, short_side: an image is scaled to fit into both, whichever way it lies; in training both are first
    multiplied by one draw from `ratio`. max_class_share: of ten crops the first with at least two classes, each with
    less than this share, is taken, else the eleventh. photometric_prob: of each of brightness, contrast, saturation
    and hue. window, stride: of the test.
    """

    long_side: int = 2048
    short_side: int = 512
    ratio: tuple[float, float] = (0.5, 2.0)
    crop: int = 512
    max_class_share: float = 0.75
    flip_prob: float = 0.5
    photometric_prob: float = 0.5
    window: int = 512
    stride: int = 341
