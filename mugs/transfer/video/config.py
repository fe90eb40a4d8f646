"""Settings of video object segmentation."""

from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.settings import Internal, Settings


@dataclass(frozen=True, kw_only=True)
class PropagationRecipe(Settings):
    """Label propagation with DINO's settings."""

    # Length of the shorter side in pixels; the longer one is cut to a multiple of `multiple`.
    short_side: PositiveInt = 480
    multiple: PositiveInt = 64
    # Number of preceding frames that labels come from, besides the first frame: 7 in DINO and iBOT,
    # 20 in the script of Mugs.
    previous_frames: Internal[int] = 7
    # Number of patches in these frames that decide about one patch.
    num_neighbours: PositiveInt = 5
    # "kept", as released: patches as similar as the last of these count too. "cut": they do not.
    ties: Literal["kept", "cut"] = "kept"
    # Temperature of the softmax over their similarities.
    temperature: PositiveFloat = 0.1
    # Radius of the neighborhood in patches, up and down as well as left and right.
    radius: NonNegativeInt = 12
    mean: Internal[tuple[float, float, float]] = (0.485, 0.456, 0.406)
    # DINO has 0.228 as the first number, elsewhere it is 0.229; kept, because results depend on it.
    std: Internal[tuple[float, float, float]] = (0.228, 0.224, 0.225)
