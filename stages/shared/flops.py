"""Floating-point operations of runs in closed form, for plans: torch is not imported.

As torch counts them: a multiply-add is two, a backward pass twice its forward pass. Counted are the
backbones. With ViT-S/16, heads and losses add 1% (DINO), 5% (Mugs) and 12% (iBOT).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(r"vit_([sbl])(\d+)(_\w+)?")
_SHAPES = {"s": (384, 12), "b": (768, 12), "l": (1024, 24)}  # width and depth
_TRAINED = 3  # forward and backward, in units of the forward pass


@dataclass(frozen=True)
class ViTShape:
    """What the operations of a ViT depend on."""

    width: int
    depth: int
    patch: int

    def count_forward(self, size: int) -> float:
        """Return the operations of one image of `size` pixels a side.

        Per block and token: 3 + 1 + 4 + 4 products of a row with a square matrix of `width` (qkv,
        projection and the two layers of the MLP), and two with the keys and values of all tokens.
        """
        patches = (size // self.patch) ** 2
        tokens = patches + 1
        block = 24 * tokens * self.width**2 + 4 * tokens**2 * self.width
        return self.depth * block + 2 * patches * 3 * self.patch**2 * self.width


def find_shape(arch: str) -> ViTShape | None:
    """Return the shape of an architecture that its name tells, such as `vit_s16`; else None."""
    found = _NAME.fullmatch(arch)
    if found is None:
        return None
    width, depth = _SHAPES[found[1]]
    return ViTShape(width, depth, int(found[2]))


def count_pretraining(shape: ViTShape, *, large: int, small: int, num_small: int) -> float:
    """Return the operations of an image in a step: the teacher sees two large crops.

    The student sees two as well, and the small ones, and learns.
    """
    of_large = shape.count_forward(large)
    student = 2 * of_large + num_small * shape.count_forward(small)
    return _TRAINED * student + 2 * of_large


def count_finetuning(shape: ViTShape, size: int) -> float:
    """Return the operations of an image in a step of a fine-tuning."""
    return _TRAINED * shape.count_forward(size)
