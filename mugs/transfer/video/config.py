"""Settings of video object segmentation."""

from dataclasses import dataclass

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.settings import Internal, Settings


@dataclass(frozen=True, kw_only=True)
class PropagationRecipe(Settings):
    """Label propagation with DINO's settings."""

    # Pixels of the shorter side, and of what the other one is cut to a multiple of.
    short_side: PositiveInt = 480
    multiple: PositiveInt = 64
    # Frames before the one at hand that count besides the first: 7 in DINO and iBOT, 20 in the
    # script of Mugs.
    previous_frames: Internal[int] = 7
    # Patches of the earlier frames that decide about one patch.
    num_neighbours: PositiveInt = 5
    # Of the softmax over their similarities.
    temperature: PositiveFloat = 0.1
    # In patches, up and down as well as left and right.
    radius: NonNegativeInt = 12
    mean: Internal[tuple[float, float, float]] = (0.485, 0.456, 0.406)
    # DINO's slip in the first number (0.229 elsewhere) is kept.
    std: Internal[tuple[float, float, float]] = (0.228, 0.224, 0.225)
